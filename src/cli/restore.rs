//! `cellblock restore`.

use std::path::PathBuf;
use std::sync::Mutex;

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Failure;
use super::run::die_with_parent;
use crate::config;
use crate::snapshot::format::CHUNK;
use crate::spec::SerialSpec;
use crate::vmm::restore::{Progress, RestoreConfig};

/// How memory comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MemoryMode {
    /// The best that is possible here
    Auto,
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
    /// Use another image for a disk: id=ID,path=F; again for more
    #[arg(long, value_name = "id=ID,path=F", value_parser = disk)]
    disk: Vec<(String, PathBuf)>,
    /// Where the serial console goes, as for 'run' [default: stdout]
    #[arg(long, value_name = "SPEC")]
    serial: Option<SerialSpec>,
    /// Make a control socket here
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// How memory comes back
    #[arg(long, value_enum, default_value = "auto")]
    memory_mode: MemoryMode,
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
            sandbox: !self.disable_sandbox,
            seccomp: self.seccomp.unwrap_or_default(),
            log,
        };
        // However the VM ended, it is what somebody asked for.
        let progress = Bar(Mutex::new(None));
        crate::vmm::restore::restore(config, &progress).map(|_end| ()).map_err(Failure::error)
    }
}

/// A bar on standard error, if that is a terminal.
struct Bar(Mutex<Option<ProgressBar>>);

impl Bar {
    fn with(&self, act: impl FnOnce(&mut Option<ProgressBar>)) {
        act(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }
}

impl Progress for Bar {
    fn begin(&self, chunks: usize) {
        use std::io::IsTerminal;
        if std::io::stderr().is_terminal() {
            let target = ProgressDrawTarget::stderr_with_hz(10);
            let bar = ProgressBar::with_draw_target(Some((chunks * CHUNK) as u64), target);
            if let Ok(style) =
                ProgressStyle::with_template("memory {wide_bar} {bytes}/{total_bytes}")
            {
                bar.set_style(style);
            }
            self.with(|own| *own = Some(bar));
        }
    }

    fn advance(&self, chunks: usize) {
        self.with(|own| own.iter().for_each(|bar| bar.inc((chunks * CHUNK) as u64)));
    }

    fn end(&self) {
        self.with(|own| own.take().iter().for_each(ProgressBar::finish_and_clear));
    }
}

fn disk(text: &str) -> Result<(String, PathBuf), String> {
    let wrong = || "say which disk and its image: id=ID,path=F".to_string();
    let rest = text.strip_prefix("id=").ok_or_else(wrong)?;
    let (id, path) = rest.split_once(",path=").ok_or_else(wrong)?;
    if id.is_empty() || path.is_empty() {
        return Err(wrong());
    }
    Ok((id.to_string(), path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_an_id_and_a_path() {
        assert_eq!(disk("id=disk0,path=/a,b"), Ok(("disk0".into(), "/a,b".into())));
        for text in ["disk0=/a", "id=,path=/a", "id=a,path=", "path=/a,id=b", ""] {
            assert!(disk(text).is_err(), "{text}");
        }
    }
}
