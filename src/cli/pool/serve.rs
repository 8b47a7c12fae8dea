//! `cellblock pool serve`.

use std::path::PathBuf;
use std::time::Duration;

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use clap::{Args, ValueEnum};

use crate::cli::Failure;
use crate::cli::run::die_with_parent;
use crate::config;
use crate::pool::service;
use crate::pool::{BaseConfig, Machine, PoolConfig, Release, Shape};
use crate::spec;
use crate::spec::time;
use crate::vmm::restore::DiskOverride;

/// How far VMs go before they are claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// All the way: the snapshot is loaded, and what its guest needs first is in memory
    Primed,
    /// Processes, memory and vCPUs: any snapshot of such a machine can be claimed
    Shape,
}

/// What becomes of a VM that is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnRelease {
    /// It ends
    Destroy,
    /// It is put back to the snapshot and used again: for one tenant only
    Reset,
}

/// Keep VMs of a snapshot ready, and hand them out.
///
/// Clients claim them with 'cellblock pool claim', or by JSON lines on the socket. The directory
/// PATH.d has the VMs' consoles and control sockets. It ends on a signal, with all VMs, or with the
/// last VM after 'cellblock pool drain'.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// What 'cellblock snapshot' made
    #[arg(long, value_name = "DIR")]
    snapshot: PathBuf,
    /// Idle VMs to keep ready
    #[arg(long, value_name = "N", default_value_t = 1)]
    min: usize,
    /// Most idle VMs
    #[arg(long, value_name = "N", default_value_t = 4)]
    max: usize,
    /// Most VMs in use
    #[arg(long, value_name = "N", default_value_t = 64)]
    live: usize,
    /// Make the pool's socket here
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
    /// How long a claim waits for a VM, unless it says otherwise: 5s, 500ms
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = time)]
    timeout: Duration,
    /// Most guest memory of all VMs together, each counted in full
    /// [default: seven eighths of what the host has available]
    #[arg(long, value_name = "SIZE", value_parser = spec::size)]
    memory_limit: Option<u64>,
    /// How far VMs go before they are claimed
    #[arg(long, value_enum, default_value = "primed")]
    mode: Mode,
    /// What becomes of a VM that is given back
    #[arg(long, value_enum, default_value = "destroy")]
    on_release: OnRelease,
    /// Change a disk of all VMs, as for 'restore'; again for more
    #[arg(long, value_name = "id=ID[,path=F][,cow]")]
    disk: Vec<DiskOverride>,
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

impl Serve {
    pub(super) fn execute(self, log: LogLevel) -> Result<(), Failure> {
        if self.die_with_parent {
            die_with_parent()?;
        }
        if (self.mode, self.on_release) == (Mode::Shape, OnRelease::Reset) {
            let line = "--on-release reset puts a VM back to the snapshot it is primed with; \
                        leave --mode shape out";
            return Err(Failure::Usage(line.into()));
        }
        let machine = match self.mode {
            Mode::Primed => Machine::Primed { snapshot: self.snapshot, disks: self.disk },
            Mode::Shape => {
                let shape = Shape::of(&self.snapshot, &self.disk).map_err(Failure::error)?;
                Machine::Shape(shape)
            }
        };
        let base = BaseConfig {
            sandbox: !self.disable_sandbox,
            seccomp: self.seccomp.unwrap_or_default(),
            log,
            ..BaseConfig::new(machine)
        };
        let config = PoolConfig {
            min_size: self.min,
            max_size: self.max,
            max_live: self.live,
            acquire_timeout: self.timeout,
            memory: self.memory_limit,
            release: match self.on_release {
                OnRelease::Destroy => Release::Destroy,
                OnRelease::Reset => Release::Reset,
            },
        };
        service::serve(&self.control, base, config).map_err(Failure::error)
    }
}
