//! `cellblock restore`.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use clap::{Args, ValueEnum};

use super::plugin_args::PluginArgs;
use super::run::die_with_parent;
use super::{Failure, output};
use crate::config::{self, PluginKeys};
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
    #[arg(long, value_name = "id=ID[,path=F][,cow]")]
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
    #[command(flatten)]
    plugin: PluginArgs,
    /// How memory comes back
    #[arg(long, value_enum, default_value = "auto")]
    memory_mode: Memory,
    /// Note what is written from the start, so that 'cellblock snapshot --diff' can build on
    /// this snapshot
    #[arg(long)]
    track: bool,
    /// A device fails when its process dies so often within 10 s, as for 'run' [default: 5]
    #[arg(long, value_name = "N", value_parser = config::max_deaths, allow_hyphen_values = true)]
    max_deaths: Option<u16>,
    /// A device process that gives no sign of life for so long is replaced, as for 'run'; 0 for
    /// never
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = config::device_timeout)]
    device_timeout: Duration,
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
            plugin: self.plugin.into_config(PluginKeys::default())?,
            plugin_socket: self.plugin_socket.map(PluginSocketSpec::absolute),
            memory: match self.memory_mode {
                Memory::Auto => MemoryMode::Auto,
                Memory::Lazy => MemoryMode::Lazy,
                Memory::Eager => MemoryMode::Eager,
            },
            track: self.track,
            shell: None,
            max_deaths: self.max_deaths.unwrap_or(config::DEFAULT_MAX_DEATHS),
            device_timeout: self.device_timeout,
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
