//! The assembled machine: brings everything up, runs it, takes it down.
//!
//! | module | what it holds |
//! |---|---|
//! | `assemble` | from a configuration to a machine that is ready to run |
//! | `hardware` | the machine as KVM makes it |
//! | `event_loop` | the main thread while the guest runs |
//! | `requests` | what the control socket can ask for |
//! | `plugin` | the plugin's end, and its grace |
//! | `plugins` | who takes part in a machine that boots a kernel |
//! | `plugin_vm` | the machine of a plugin without a kernel |
//! | `restore` | from a snapshot to a machine that is ready to run |
//! | `shell` | a machine that waits in a pool for its claim |
//! | `shut_down` | how a machine is taken down |
//! | `snapshot` | one cut through all processes |
//! | `triggers` | snapshots that the VM takes by itself |
//! | `reconnect` | back ends of other programs that go away and come back |
//! | `supervise` | device processes that die, and what comes after them |
//! | `watchdog` | device processes that hang |
//! | `ports` | power, reset and marker ports |
//! | `hold` | where a guest waits that says that it is about to run its workload |
//! | `notice`, `signals` | what wakes the main thread |
//! | `phases` | how long each part of a start took |

mod assemble;
mod event_loop;
mod farewell;
mod hardware;
mod hold;
mod notice;
mod parts;
mod phases;
mod plugin;
mod plugin_vm;
mod plugins;
mod ports;
mod reconnect;
mod remedy;
mod requests;
pub mod restore;
pub mod shell;
mod shut_down;
pub(crate) mod signals;
pub(crate) mod snapshot;
mod supervise;
mod triggers;
mod watchdog;

use std::time::Duration;

pub(crate) use assemble::{confine, drop_privileges};

use crate::cell::CellError;
use crate::cell::blk::DiskError;
use crate::config::{OpenError, VmConfig};
use crate::spec::SpecError;
use crate::vm::boot::BootError;
use crate::vm::cpu::CpuError;
use crate::vm::kvm::KvmError;
use crate::vm::memory::MemoryError;

/// How long a slow console reader may hold the end of the VM up.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// Why a VM ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmEnd {
    /// The guest powered itself off.
    Shutdown,
    /// The guest reset itself, which ends a VM too.
    Reset,
    /// `cellblock stop`, or the escape sequence at the console.
    Stopped,
    /// SIGINT, SIGTERM or SIGHUP.
    Signal,
    /// The plugin exited with status 0.
    Plugin,
}

/// A VM that could not be brought up, or did not end well.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum VmmError {
    #[error("starting the spawner")]
    Spawner(#[from] cellblock_seccomp::spawner::SpawnError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Input(#[from] OpenError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    VmGenId(#[from] crate::vm::vmgenid::VmGenIdError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Acpi(#[from] crate::vm::acpi::AcpiError),
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error(transparent)]
    State(#[from] crate::snapshot::state::StateError),
    #[error(transparent)]
    Restore(#[from] restore::RestoreError),
    #[error(transparent)]
    Cell(#[from] CellError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Plugin(#[from] crate::plugin_process::PluginError),
    #[error(transparent)]
    Session(#[from] crate::plugin::SessionError),
    #[error(transparent)]
    Attach(#[from] crate::plugin::AttachError),
    #[error(transparent)]
    Plugins(#[from] crate::plugin::StartError),
    #[error("there is no kernel to boot")]
    NoKernel,
    #[error(transparent)]
    VcpuStart(#[from] crate::vcpu::StartError),
    #[error(transparent)]
    VcpuRun(#[from] crate::vcpu::RunError),
    #[error("creating COM1")]
    Shm(#[from] cellblock_wire::ShmError),
    #[error("creating COM1")]
    Ring(#[from] cellblock_devices::protocol::ring::RingError),
    #[error("confining the VMM")]
    Jail(#[from] cellblock_seccomp::jail::JailError),
    #[error("confining the VMM")]
    Filter(#[from] cellblock_seccomp::filter::FilterError),
    #[error("confining the VMM")]
    Violation(#[from] cellblock_seccomp::violation::InstallError),
    #[error("laying out the devices")]
    Bus(#[from] crate::bus::BusError),
    #[error("{0} disks are more than the {1} a VM can have")]
    TooManyDisks(usize, usize),
    #[error("{what}")]
    System {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("guest memory does not come any more; the VM was stopped")]
    Pager(#[source] crate::snapshot::pager::PagerError),
    #[error("{0}")]
    Guest(String),
    #[error(
        "the spawner died, so no device process can be watched or replaced; the VM was stopped"
    )]
    SpawnerDied,
}

/// Runs a VM from start to end. The caller must still be single-threaded: the
/// spawner is forked before anything else happens.
pub fn run(config: VmConfig) -> Result<VmEnd, VmmError> {
    let mut scribe = triggers::Scribe::start(&config.snapshot).map_err(|source| {
        VmmError::System { what: "starting the process that writes snapshots", source }
    })?;
    let stream = scribe.as_mut().and_then(|scribe| scribe.stream.take());
    let mut vm = match (&config.kernel, config.plugin.clone()) {
        (None, Some(plugin)) => plugin_vm::assemble(config, &plugin)?,
        _ => assemble::assemble(config, stream)?,
    };
    let end = vm.run();
    vm.shut_down(&end);
    if let Some(scribe) = scribe {
        scribe.finish();
    }
    end
}
