//! What a VM is made of, as plain data, and opening all of it.
//!
//! [`VmConfig`] is what the command line and a configuration file come to. Its
//! [`VmConfig::open`] turns the paths in it into file descriptors, in one place and
//! before the first vCPU exists, so that nothing is opened by path later on.

mod file;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use nix::fcntl::OFlag;

pub use self::file::{ConfigFile, ConfigFileError, PluginKeys};
use crate::console::{self, ConsoleError, OpenedConsole};
use crate::control::server::{ControlServer, ServerError};
use crate::plugin_process::PluginConfig;
use crate::remedy::Remedy;
use crate::snapshot::trigger::SnapshotResources;
use crate::spec::{Backing, DiskError, DiskSpec, PluginSocketSpec, SerialSpec};

/// Most vCPUs of a VM.
pub const MAX_CPUS: u8 = 32;
/// Most vCPUs of a VM that has a plugin in the place of a kernel.
pub const MAX_PLUGIN_CPUS: u8 = 64;
/// Least guest memory, in bytes.
pub const MIN_MEMORY: u64 = 32 << 20;
/// Guest memory where none is asked for, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Deaths of its process within 10 s by which a device fails, unless told otherwise.
pub const DEFAULT_MAX_DEATHS: u16 = 5;
/// How long a device process may give no sign of life, unless told otherwise.
pub const DEFAULT_DEVICE_TIMEOUT: Duration = Duration::from_secs(30);
/// Guest memory is a whole number of these.
const MIB: u64 = 1 << 20;

/// A virtual machine, described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// The kernel image. None where a plugin makes all of the machine.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, as the user gave it.
    pub cmdline: String,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// Guest memory in bytes: whole MiB, at least [`MIN_MEMORY`].
    pub memory: u64,
    /// The disks, each with its id.
    pub disks: Vec<DiskSpec>,
    /// Endpoint of the serial line.
    pub serial: SerialSpec,
    /// Where to make the control socket.
    pub control: Option<PathBuf>,
    /// The plugin that is started with the VM.
    pub plugin: Option<PluginConfig>,
    /// Where programs attach to it.
    pub plugin_socket: Option<PluginSocketSpec>,
    /// False only with `--disable-sandbox`.
    pub sandbox: bool,
    /// What happens on a system call outside a policy.
    pub seccomp: SeccompMode,
    /// Deaths of a device's process within 10 s by which the device fails.
    pub max_deaths: u16,
    /// A device process that gives no sign of life for so long is replaced; zero for never.
    pub device_timeout: Duration,
    /// What is logged, here and by the device processes.
    pub log: LogLevel,
    /// When the VM is to be written down by itself.
    pub snapshot: SnapshotResources,
}

/// Reads a number of vCPUs: up to [`MAX_CPUS`], or [`MAX_PLUGIN_CPUS`] where a plugin makes
/// all of the machine, which the caller knows.
pub fn cpus(text: &str) -> Result<u8, String> {
    let count = text.parse::<u8>().ok().filter(|n| (1..=MAX_PLUGIN_CPUS).contains(n));
    count.ok_or_else(|| {
        format!("a VM has 1 to {MAX_CPUS} CPUs, with nothing but a plugin up to {MAX_PLUGIN_CPUS}")
    })
}

/// Reads an amount of guest memory, in bytes. A plain number counts MiB.
pub fn memory(text: &str) -> Result<u64, String> {
    let bytes = crate::spec::memory_size(text)?;
    if bytes < MIN_MEMORY {
        Err(format!("a VM needs at least {}M", MIN_MEMORY >> 20))
    } else if !bytes.is_multiple_of(MIB) {
        Err("memory is a whole number of MiB".into())
    } else {
        Ok(bytes)
    }
}

/// Reads a number of deaths.
pub fn max_deaths(text: &str) -> Result<u16, String> {
    let count = text.parse::<u16>().ok().filter(|n| *n > 0);
    count.ok_or_else(|| format!("it is a number from 1 to {}", u16::MAX))
}

/// Reads how long a device process may give no sign of life.
pub fn device_timeout(text: &str) -> Result<Duration, String> {
    match text {
        "0" => Ok(Duration::ZERO),
        _ => crate::spec::time(text).map_err(|why| format!("{why}, or 0 for never")),
    }
}

/// Reads what happens on a system call outside a policy.
pub fn seccomp(text: &str) -> Result<SeccompMode, String> {
    match text {
        "kill" => Ok(SeccompMode::Kill),
        "log" => Ok(SeccompMode::Log),
        _ => Err("it is kill or log".into()),
    }
}

/// Everything a VM needs from the file system, open.
#[derive(Debug)]
pub struct Opened {
    /// The kernel image.
    pub kernel: Option<File>,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The disks, in the order of [`VmConfig::disks`].
    pub disks: Vec<Backing>,
    /// The control socket, listening.
    pub control: Option<ControlServer>,
    /// The console; the user's terminal is raw from here on.
    pub console: OpenedConsole,
}

/// Something of a VM that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel or the initial RAM disk.
    #[error("opening the {what} {}", path.display())]
    Image {
        /// Which.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel or the initial RAM disk, when it is no file.
    #[error("the {what} {} is {kind}, not a file", path.display())]
    NoFile {
        /// Which.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What it is, with its article.
        kind: &'static str,
    },
    /// More memory than there is.
    #[error("the VM's memory of {} MiB is more than this host's {} MiB", wanted >> 20, present >> 20)]
    Memory {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes of memory and swap of the host.
        present: u64,
    },
    /// A disk.
    #[error(transparent)]
    Disk(DiskError),
    /// The control socket.
    #[error(transparent)]
    Control(ServerError),
    /// The console.
    #[error(transparent)]
    Console(ConsoleError),
}

impl Remedy for OpenError {
    fn remedy(&self) -> Option<String> {
        match self {
            OpenError::Image { what, source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Some(format!("check the path given with --{what}")),
                io::ErrorKind::PermissionDenied => Some("make it readable for this user".into()),
                _ => None,
            },
            OpenError::NoFile { what, .. } => Some(format!("give the file itself with --{what}")),
            OpenError::Memory { .. } => Some("ask for less with --memory".into()),
            OpenError::Disk(error) => error.remedy(),
            OpenError::Control(error) => error.remedy(),
            OpenError::Console(error) => error.remedy(),
        }
    }
}

impl VmConfig {
    /// Opens, checks and locks everything the VM needs from the file system.
    ///
    /// To be called after the spawner is forked, which must not inherit any of it.
    /// The console comes last, because it changes the user's terminal; the disks come
    /// before it, so that a serial file that names one of them is found out.
    pub fn open(&self) -> Result<Opened, OpenError> {
        let kernel = self.kernel.as_deref().map(|path| image("kernel", path)).transpose()?;
        let initrd = self.initrd.as_deref().map(|path| image("initrd", path)).transpose()?;
        if let Some(present) = host_memory()
            && self.memory > present
        {
            return Err(OpenError::Memory { wanted: self.memory, present });
        }
        let disks = self.disks.iter().map(DiskSpec::open_backing).collect::<Result<_, _>>();
        let disks = disks.map_err(OpenError::Disk)?;
        let control = self.control.as_deref().map(ControlServer::bind).transpose();
        let control = control.map_err(OpenError::Control)?;
        let console = console::open(&self.serial).map_err(OpenError::Console)?;
        Ok(Opened { kernel, initrd, disks, control, console })
    }
}

fn image(what: &'static str, path: &Path) -> Result<File, OpenError> {
    let fail = |source| OpenError::Image { what, path: path.to_owned(), source };
    // A FIFO without a peer must not hang the start.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(fail)?;
    let found = file.metadata().map_err(fail)?.file_type();
    let kind = match found {
        kind if kind.is_file() => return Ok(file),
        kind if kind.is_dir() => "a directory",
        kind if kind.is_fifo() => "a pipe",
        _ => "a device",
    };
    Err(OpenError::NoFile { what, path: path.to_owned(), kind })
}

/// Bytes of memory and swap of the host; nothing where it does not say.
fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    (kib("MemTotal:")? + kib("SwapTotal:").unwrap_or(0)).checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remedy::one_line;

    #[test]
    fn numbers_have_their_limits() {
        assert_eq!(cpus("1"), Ok(1));
        assert_eq!(cpus("64"), Ok(64));
        for text in ["0", "65", "256", "1000", "-1", "", "two"] {
            assert!(cpus(text).unwrap_err().starts_with("a VM has 1 to 32 CPUs"), "{text}");
        }
        assert_eq!(memory("32M"), Ok(32 << 20));
        assert_eq!(memory("6G"), Ok(6 << 30));
        for text in ["0", "1", "1M", "31M", "40000001K", "33555K"] {
            assert!(memory(text).is_err(), "{text}");
        }
    }

    fn config(dir: &Path) -> VmConfig {
        let kernel = dir.join("kernel");
        std::fs::write(&kernel, "k").unwrap();
        VmConfig {
            kernel: Some(kernel),
            initrd: None,
            cmdline: String::new(),
            cpus: 1,
            memory: DEFAULT_MEMORY,
            disks: Vec::new(),
            serial: SerialSpec::Null,
            control: Some(dir.join("control")),
            plugin: None,
            plugin_socket: None,
            sandbox: true,
            seccomp: SeccompMode::Kill,
            max_deaths: DEFAULT_MAX_DEATHS,
            device_timeout: DEFAULT_DEVICE_TIMEOUT,
            log: LogLevel::Warn,
            snapshot: SnapshotResources::default(),
        }
    }

    #[test]
    fn everything_opens_once() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let opened = config.open().unwrap();
        assert!(opened.control.is_some());
        let line = one_line(&config.open().unwrap_err());
        assert!(line.contains("making the control socket: the socket path"), "{line}");
        drop(opened);
        config.open().unwrap();
    }

    #[test]
    fn what_does_not_open_is_named_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let good = config(dir.path());
        let at = |name: &str| dir.path().join(name);
        for (config, part) in [
            (VmConfig { kernel: Some(at("none")), ..good.clone() }, "given with --kernel"),
            (
                VmConfig { kernel: Some(at(".")), ..good.clone() },
                "is a directory, not a file; give",
            ),
            (VmConfig { initrd: Some(at("none")), ..good.clone() }, "given with --initrd"),
            (VmConfig { memory: 1 << 60, ..good.clone() }, "MiB; ask for less with --memory"),
        ] {
            let line = one_line(&config.open().unwrap_err());
            assert!(line.contains(part), "{line}");
        }
    }
}
