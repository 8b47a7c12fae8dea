//! `cellblock run`.

use std::path::PathBuf;
use std::time::Duration;

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use clap::Args;
use nix::sys::prctl;
use nix::sys::signal::Signal;

use super::Failure;
use super::plugin_args::PluginArgs;
use crate::config::{self, ConfigFile, ConfigFileError, VmConfig};
use crate::logging;
use crate::remedy::one_line;
use crate::snapshot::trigger::SnapshotResources;
use crate::spec::{DiskSpec, PluginSocketSpec, SerialSpec, name_disks};

const EXAMPLES: &str = "\
A disk SPEC is PATH[,key=value]...:
  ro             the guest may only read
  cow, cow=DIR   leave the image alone; what the guest writes is kept until the VM ends, in
                 memory or in a file without a name in DIR
  id=NAME        name in this VM, [a-z0-9_-]{1,32} [default: disk0, disk1, ...]
  serial=TEXT    what the guest reads as serial number, up to 20 characters [default: the id]
  queues=N       1 to 32 request queues, each with a thread [default: one per vCPU]
  poll-us=N      poll for up to N microseconds before sleeping: faster, at the cost of CPU
                 time while the guest uses the disk [default: 50]
Without PATH, vhost-user=SOCKET[,id=NAME][,queues=N] is a disk that another program's
vhost-user-blk back end serves: 'cellblock vhost-user-blk', qemu-storage-daemon, SPDK.
A serial SPEC is one of:
  stdout         this terminal (ctrl-a x stops the VM), or standard input and output
  file=F         output only, to a file that is created or emptied
  pty            a new pseudo-terminal, whose name is printed
  socket=PATH    a new Unix stream socket, one client at a time
  null           nothing
A plugin-socket SPEC is PATH[,key=value]...; who runs the VM, and root, may do everything:
  observe=UID    users that may stop vCPUs and look, several with : between
  control=UID    users that may do everything
  memory=MODE    how guest memory is handed out: none, ro or rw [default: ro]
A comma inside a value is written twice. A size takes K, M, G or T.

Examples:
  cellblock run --kernel vmlinux --cmdline 'console=ttyS0 root=/dev/vda ro' --disk root.img,ro
  cellblock run --kernel bzImage --initrd initrd.img -c 4 -m 2G --disk data.img,id=data
  cellblock run --config vm.toml --control /tmp/vm --serial pty

Exit status: 0 the guest shut down or was stopped, 1 an error, 2 wrong usage.";

/// Run a virtual machine until its guest shuts down.
///
/// Each disk and the serial line is served by a process of its own in a jail of its own.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Run {
    /// Kernel: an ELF vmlinux, one with a PVH entry, or a bzImage
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Number of vCPUs, 1 to 32 [default: 1]
    #[arg(short, long, value_name = "N", value_parser = config::cpus, allow_hyphen_values = true)]
    cpus: Option<u8>,
    /// Guest memory, 32M or more; a plain number counts MiB [default: 512M]
    #[arg(short, long, value_name = "SIZE", value_parser = config::memory, allow_hyphen_values = true)]
    memory: Option<u64>,
    /// A disk; give it again for more
    #[arg(long, value_name = "SPEC")]
    disk: Vec<DiskSpec>,
    /// Where the serial console goes [default: stdout]
    #[arg(long, value_name = "SPEC")]
    serial: Option<SerialSpec>,
    /// Make a control socket here, for pause, resume, stop, stats, ps and events
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Run the device processes without jails: for debugging only
    #[arg(long)]
    disable_sandbox: bool,
    /// On a system call outside a policy: kill (end the process, naming the call) or
    /// log (let it pass and have the kernel log it) [default: kill]
    #[arg(long, value_name = "MODE", value_parser = config::seccomp)]
    seccomp: Option<SeccompMode>,
    /// A device fails when its process dies this often within 10 s; up to then another
    /// takes its place [default: 5]
    #[arg(long, value_name = "N", value_parser = config::max_deaths, allow_hyphen_values = true)]
    max_deaths: Option<u16>,
    /// A device process that gives no sign of life for so long is replaced; 0 for never. One
    /// that waits for its disk image is no such process [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = config::device_timeout)]
    device_timeout: Option<Duration>,
    /// Read options from a TOML file: the same names without dashes, disk as a list;
    /// options on the command line win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    snapshot: SnapshotOptions,
    /// Make a socket here for programs that attach to the VM, as 'cellblock gdb' does
    #[arg(long, value_name = "SPEC")]
    plugin_socket: Option<PluginSocketSpec>,
    #[command(flatten)]
    plugin: PluginArgs,
    /// End when the process that started this one does
    #[arg(long, hide = true)]
    die_with_parent: bool,
}

/// When the VM is written down by itself: once, at the first of these that comes.
#[derive(Debug, Args)]
struct SnapshotOptions {
    /// Take a snapshot to DIR, once, when one of the following comes
    #[arg(long, value_name = "DIR")]
    snapshot_out: Option<PathBuf>,
    /// N milliseconds after the start
    #[arg(long, value_name = "N")]
    snapshot_after_ms: Option<u64>,
    /// At the guest's Nth heartbeat
    #[arg(long, value_name = "N")]
    snapshot_at_heartbeat: Option<u64>,
    /// When the guest reports a listener, or is parked without one
    #[arg(long)]
    snapshot_on_listener: bool,
    /// When the guest reports that it is about to run its workload; by port, it waits there
    #[arg(long)]
    snapshot_on_pre_exec: bool,
    /// Let things settle for N milliseconds after a heartbeat or a listener [default: 0]
    #[arg(long, value_name = "N")]
    snapshot_quiesce_ms: Option<u64>,
}

impl SnapshotOptions {
    fn resources(self, file: &ConfigFile) -> Result<SnapshotResources, Failure> {
        let quiesce_ms = self.snapshot_quiesce_ms.or(file.snapshot_quiesce_ms);
        let resources = SnapshotResources {
            after_ms: self.snapshot_after_ms.or(file.snapshot_after_ms),
            at_heartbeat: self.snapshot_at_heartbeat.or(file.snapshot_at_heartbeat),
            on_listener: self.snapshot_on_listener || file.snapshot_on_listener,
            on_pre_exec: self.snapshot_on_pre_exec || file.snapshot_on_pre_exec,
            quiesce_ms: quiesce_ms.unwrap_or(0),
            out_path: self.snapshot_out.or_else(|| file.snapshot_out.clone()),
        };
        resources.check().map_err(|error| Failure::Usage(error.to_string()))?;
        match &resources.out_path {
            Some(path) if path.symlink_metadata().is_ok() => Err(Failure::Error(format!(
                "snapshot {}: it exists; give a path at which nothing is yet",
                path.display()
            ))),
            _ => Ok(resources),
        }
    }
}

impl Run {
    pub(super) fn execute(self, log: Option<LogLevel>) -> Result<(), Failure> {
        if self.die_with_parent {
            die_with_parent()?;
        }
        let config = self.into_config(log)?;
        logging::init(config.log);
        // However the VM ended, it is what somebody asked for: the guest, a control
        // client, a signal or the console.
        crate::vmm::run(config).map(|_end| ()).map_err(Failure::error)
    }

    /// Puts options, configuration file and defaults together.
    fn into_config(self, log: Option<LogLevel>) -> Result<VmConfig, Failure> {
        let mut file = match &self.config {
            Some(path) => ConfigFile::read(path).map_err(|error| match error {
                ConfigFileError::Read { .. } => Failure::Error(one_line(&error)),
                ConfigFileError::Content { .. } => Failure::Usage(one_line(&error)),
            })?,
            None => ConfigFile::default(),
        };
        let snapshot = self.snapshot.resources(&file)?;
        let plugin = self.plugin.into_config(file.plugin())?;
        let kernel = self.kernel.or(file.kernel);
        if kernel.is_none() && plugin.is_none() {
            return Err(Failure::Usage(
                "no kernel given; say --kernel FILE, or kernel in --config FILE".into(),
            ));
        }
        let cpus = self.cpus.or(file.cpus).unwrap_or(1);
        if kernel.is_some() && cpus > config::MAX_CPUS {
            let most = config::MAX_CPUS;
            return Err(Failure::Usage(format!(
                "'{cpus}' CPUs are too many: a VM with a kernel has 1 to {most} CPUs"
            )));
        }
        let (cmdline, initrd) = (self.cmdline.or(file.cmdline), self.initrd.or(file.initrd));
        let memory = self.memory.or(file.memory);
        let serial = self.serial.or(file.serial);
        let mut disks = if self.disk.is_empty() { file.disk } else { self.disk };
        if kernel.is_none() {
            // What a plugin makes itself.
            let without_kernel = [
                (initrd.is_some(), "--initrd"),
                (cmdline.is_some(), "--cmdline"),
                (memory.is_some(), "--memory"),
                (!disks.is_empty(), "--disk"),
                (serial.is_some(), "--serial"),
            ];
            if let Some((_, option)) = without_kernel.iter().find(|(given, _)| *given) {
                return Err(Failure::Usage(format!(
                    "{option} is for a VM with a kernel, and a plugin without one makes memory \
                     and devices itself; leave it out, or say --kernel FILE"
                )));
            }
        }
        let cmdline = cmdline.unwrap_or_default();
        if cmdline.contains('\0') {
            return Err(Failure::Usage("the kernel's command line has a zero byte in it".into()));
        }
        name_disks(&mut disks).map_err(|error| Failure::Usage(error.to_string()))?;
        Ok(VmConfig {
            kernel,
            initrd,
            cmdline,
            cpus,
            memory: memory.unwrap_or(config::DEFAULT_MEMORY),
            disks,
            serial: serial.unwrap_or_default(),
            control: self.control.or(file.control),
            plugin,
            plugin_socket: self
                .plugin_socket
                .or(file.plugin_socket)
                .map(PluginSocketSpec::absolute),
            sandbox: !(self.disable_sandbox || file.disable_sandbox),
            seccomp: self.seccomp.or(file.seccomp).unwrap_or_default(),
            max_deaths: (self.max_deaths)
                .or(file.max_deaths.map(Into::into))
                .unwrap_or(config::DEFAULT_MAX_DEATHS),
            device_timeout: (self.device_timeout)
                .or(file.device_timeout)
                .unwrap_or(config::DEFAULT_DEVICE_TIMEOUT),
            log: logging::choose(log.or(file.log)).map_err(Failure::Usage)?,
            snapshot,
        })
    }
}

/// For programs that start a VM and must not leave it behind, as the demo does.
pub(super) fn die_with_parent() -> Result<(), Failure> {
    prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(|errno| Failure::Error(format!("tying the VM to its parent's life: {errno}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Wrapper {
        #[command(flatten)]
        run: Run,
    }

    fn config(args: &[&str]) -> Result<VmConfig, Failure> {
        let args = std::iter::once("run").chain(args.iter().copied());
        Wrapper::try_parse_from(args).expect("parses").run.into_config(Some(LogLevel::Warn))
    }

    #[test]
    fn defaults() {
        let config = config(&["--kernel", "k"]).unwrap();
        assert_eq!((config.cpus, config.memory), (1, 512 << 20));
        assert_eq!((config.serial, config.sandbox), (SerialSpec::Stdout, true));
        assert_eq!(config.seccomp, SeccompMode::Kill);
        assert!(config.control.is_none() && config.disks.is_empty() && config.cmdline.is_empty());
    }

    #[test]
    fn triggers_come_from_options_and_from_the_file() {
        let given = |args: &[&str]| config(&[&["--kernel", "k"], args].concat()).unwrap().snapshot;
        assert_eq!(given(&[]), SnapshotResources::default());
        let everything = SnapshotResources {
            after_ms: Some(5),
            at_heartbeat: Some(2),
            on_listener: true,
            on_pre_exec: true,
            quiesce_ms: 7,
            out_path: Some("d".into()),
        };
        let options = "--snapshot-out d --snapshot-after-ms 5 --snapshot-at-heartbeat 2 \
                       --snapshot-on-listener --snapshot-on-pre-exec --snapshot-quiesce-ms 7";
        assert_eq!(given(&options.split_whitespace().collect::<Vec<_>>()), everything);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vm.toml");
        let text = "snapshot-out = 'd'\nsnapshot-after-ms = 9\nsnapshot-at-heartbeat = 2\n\
                    snapshot-on-listener = true\nsnapshot-on-pre-exec = true\n\
                    snapshot-quiesce-ms = 7";
        std::fs::write(&file, text).unwrap();
        let both = given(&["--config", file.to_str().unwrap(), "--snapshot-after-ms", "5"]);
        assert_eq!(both, everything);
    }

    #[test]
    fn options_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vm.toml");
        std::fs::write(&file, "kernel = 'a'\ncpus = 2\nmemory = '1G'\ndisk = ['x', 'y']").unwrap();
        let file = file.to_str().unwrap();
        let from_file = config(&["--config", file]).unwrap();
        assert_eq!((from_file.cpus, from_file.memory, from_file.disks.len()), (2, 1 << 30, 2));
        let both = config(&["--config", file, "-c", "4", "--disk", "z,ro"]).unwrap();
        assert_eq!((both.cpus, both.memory, both.disks.len()), (4, 1 << 30, 1));
        assert_eq!(both.disks[0].id(), "disk0");
    }
}
