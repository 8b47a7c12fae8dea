//! `cellblock vhost-user-blk`.

use std::path::PathBuf;
use std::time::Duration;

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use clap::Args;

use super::{Failure, run};
use crate::config;
use crate::spec::{DiskSpec, name_disks};
use crate::vhost_user_blk::{self, Config};

const EXAMPLES: &str = "\
A disk SPEC is PATH[,key=value]..., as for 'cellblock run'.

One front end is served at a time, by a jailed process of its own; the next waits until it
has gone. The other VMM's memory has to be shared. Examples:
  cellblock vhost-user-blk --socket /tmp/disk.sock --disk data.img,id=data
  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=ram,size=1G,share=on \\
      -machine q35,memory-backend=ram -chardev socket,id=data,path=/tmp/disk.sock,reconnect=1 \\
      -device vhost-user-blk-pci,chardev=data,num-queues=1 ...
  cellblock run --disk vhost-user=/tmp/disk.sock ...

Exit status: 0 stopped by SIGINT, SIGTERM or SIGHUP, 1 an error, 2 wrong usage.";

/// Serve a disk to other VMMs, by vhost-user, from a jailed process.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct VhostUserBlk {
    /// Make the Unix socket that front ends connect to here; only this user may
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The disk
    #[arg(long, value_name = "SPEC")]
    disk: DiskSpec,
    /// A device process that gives no sign of life for so long is ended, so that the next front
    /// end is served; 0 for never
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = config::device_timeout)]
    device_timeout: Duration,
    /// Run the device processes without jails: for debugging only
    #[arg(long)]
    disable_sandbox: bool,
    /// On a system call outside a policy: kill (end the process, naming the call) or
    /// log (let it pass and have the kernel log it) [default: kill]
    #[arg(long, value_name = "MODE", value_parser = config::seccomp)]
    seccomp: Option<SeccompMode>,
    /// End when the process that started this one does
    #[arg(long, hide = true)]
    die_with_parent: bool,
}

impl VhostUserBlk {
    pub(super) fn execute(self, log: LogLevel) -> Result<(), Failure> {
        if self.die_with_parent {
            run::die_with_parent()?;
        }
        if self.disk.vhost_user.is_some() {
            return Err(Failure::Usage(
                "a disk that another back end serves cannot be served again; give an image".into(),
            ));
        }
        let mut disk = [self.disk];
        name_disks(&mut disk).map_err(|error| Failure::Usage(error.to_string()))?;
        let [disk] = disk;
        vhost_user_blk::run(&Config {
            socket: self.socket,
            disk,
            device_timeout: self.device_timeout,
            sandbox: !self.disable_sandbox,
            seccomp: self.seccomp.unwrap_or_default(),
            log,
        })
        .map_err(Failure::error)
    }
}
