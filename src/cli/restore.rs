//! `cellblock restore`.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use clap::{Args, ValueEnum};

use super::run::die_with_parent;
use super::{Failure, output};
use crate::cell::overlay::Place;
use crate::config;
use crate::spec::{PluginSocketSpec, SerialSpec};
use crate::vmm::restore::{DiskOverride, MemoryMode, Progress, RestoreConfig};

/// How memory comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Memory {
    /// Lazily where that is possible here
    Auto,
    /// When it is touched, each part checked before it is used
    Lazy,
    /// All of it before the guest runs, and all of it checked
    Eager,
}

/// Go on from a snapshot, as often as you like.
///
/// The VM is the one of the snapshot, in new processes and jails; console and control socket
/// are new. Its clock is set forward to now.
#[derive(Debug, Args)]
pub(super) struct Restore {
    /// What 'cellblock snapshot' made
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Change a disk: id=ID, then path=F for another image (that says that it is the right
    /// one, as it is), cow or cow=DIR to leave the image alone; again for more
    #[arg(long, value_name = "id=ID[,path=F][,cow]", value_parser = disk)]
    disk: Vec<DiskOverride>,
    /// Where the serial console goes, as for 'run' [default: stdout]
    #[arg(long, value_name = "SPEC")]
    serial: Option<SerialSpec>,
    /// Make a control socket here
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Make a socket at which programs attach, as for 'run'
    #[arg(long, value_name = "PATH[,KEY=VALUE]...")]
    plugin_socket: Option<PluginSocketSpec>,
    /// How memory comes back
    #[arg(long, value_enum, default_value = "auto")]
    memory_mode: Memory,
    /// Note what is written from the start, so that 'cellblock snapshot --diff' can build on
    /// this snapshot
    #[arg(long)]
    track: bool,
    /// Run the device processes without jails: for debugging only
    #[arg(long)]
    disable_sandbox: bool,
    /// On a system call outside a policy: kill or log [default: kill]
    #[arg(long, value_name = "MODE", value_parser = config::seccomp)]
    seccomp: Option<SeccompMode>,
    /// End when the process that started this one does
    #[arg(long, hide = true)]
    die_with_parent: bool,
}

impl Restore {
    pub(super) fn execute(self, log: LogLevel) -> Result<(), Failure> {
        if self.die_with_parent {
            die_with_parent()?;
        }
        let config = RestoreConfig {
            snapshot: self.directory,
            disks: self.disk,
            serial: self.serial.unwrap_or_default(),
            control: self.control,
            plugin_socket: self.plugin_socket.map(PluginSocketSpec::absolute),
            memory: match self.memory_mode {
                Memory::Auto => MemoryMode::Auto,
                Memory::Lazy => MemoryMode::Lazy,
                Memory::Eager => MemoryMode::Eager,
            },
            track: self.track,
            sandbox: !self.disable_sandbox,
            seccomp: self.seccomp.unwrap_or_default(),
            log,
        };
        // However the VM ended, it is what somebody asked for.
        let progress = Bar(Mutex::new((output::Progress::new("restoring memory"), 0, 0)));
        crate::vmm::restore::restore(config, &progress).map(|_end| ()).map_err(Failure::error)
    }
}

/// A bar on standard error, if that is a terminal.
struct Bar(Mutex<(output::Progress, usize, usize)>);

impl Bar {
    fn with(&self, act: impl FnOnce(&mut output::Progress, &mut usize, &mut usize)) {
        let mut own = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (progress, done, total) = &mut *own;
        act(progress, done, total);
    }
}

impl Progress for Bar {
    fn begin(&self, chunks: usize) {
        self.with(|_, _, total| *total = chunks);
    }

    fn advance(&self, chunks: usize) {
        self.with(|progress, done, total| {
            *done += chunks;
            progress.show(*done as u64, *total as u64);
        });
    }

    fn end(&self) {
        self.with(|progress, _, _| progress.end());
    }
}

fn disk(text: &str) -> Result<DiskOverride, String> {
    let wrong = || "say which disk and what of it: id=ID,path=F or id=ID,cow".to_string();
    let (mut id, mut path, mut cow) = (None, None, None);
    for part in crate::spec::split(text) {
        let (key, value) = part.split_once('=').unwrap_or((&part, ""));
        match (key, value) {
            ("id", id_of) if !id_of.is_empty() && id.is_none() => id = Some(id_of.to_string()),
            ("path", file) if !file.is_empty() && path.is_none() => path = Some(file.into()),
            ("cow", "" | "true") if cow.is_none() => cow = Some(Place::Memory),
            ("cow", directory) if cow.is_none() => cow = Some(Place::Directory(directory.into())),
            _ => return Err(wrong()),
        }
    }
    match id {
        Some(id) if path.is_some() || cow.is_some() => Ok(DiskOverride { id, path, cow }),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_an_id_and_a_path() {
        let other = |path: Option<&str>, cow| DiskOverride {
            id: "disk0".into(),
            path: path.map(PathBuf::from),
            cow,
        };
        assert_eq!(disk("id=disk0,path=/a,,b"), Ok(other(Some("/a,b"), None)));
        assert_eq!(disk("id=disk0,cow"), Ok(other(None, Some(Place::Memory))));
        let at = Some(Place::Directory("/tmp".into()));
        assert_eq!(disk("cow=/tmp,path=a,id=disk0"), Ok(other(Some("a"), at)));
        for text in ["disk0=/a", "id=,path=/a", "id=a,path=", "id=a", "id=a,id=b,cow", ""] {
            assert!(disk(text).is_err(), "{text}");
        }
    }
}
