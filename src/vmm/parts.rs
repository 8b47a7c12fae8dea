//! What a machine is made of, open, whatever it is to become: one that boots a kernel, one that goes
//! on from a snapshot, or a pool's shell.
//!
//! [`Begun`] comes first, while the process has one thread and nothing to inherit; then everything
//! is opened that has a path; [`Begun::parts`] makes of it what [`super::assemble::build`] takes, to
//! which each kind of machine adds what only it has.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use cellblock_seccomp::plugin::Plan;
use cellblock_seccomp::spawner::{self, SpawnError, Spawner};

use super::VmmError;
use super::hardware::Hardware;
use super::hold::Hold;
use super::phases::Phases;
use super::plugins::Guests;
use super::signals::Signals;
use crate::cell::launch::Common;
use crate::config::{DEFAULT_DEVICE_TIMEOUT, DEFAULT_MAX_DEATHS};
use crate::console::OpenedConsole;
use crate::control::server::ControlServer;
use crate::snapshot::dirty::WriteLogs;
use crate::snapshot::pager::Inviter;
use crate::spec::{Backing, DiskSpec, PluginSocketSpec, SerialSpec};
use crate::vm::memory::GuestRam;

/// How processes are confined, and what they log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Switches {
    /// False only with `--disable-sandbox`.
    pub(super) sandbox: bool,
    pub(super) seccomp: SeccompMode,
    pub(super) log: LogLevel,
}

/// What has to come before everything else.
pub(super) struct Begun {
    phases: Phases,
    spawner: Spawner,
    signals: Signals,
}

/// See the module.
pub(super) struct Parts {
    pub(super) phases: Phases,
    pub(super) spawner: Spawner,
    pub(super) signals: Signals,
    pub(super) common: Common,
    pub(super) specs: Vec<DiskSpec>,
    pub(super) disks: Vec<Backing>,
    pub(super) control: Option<ControlServer>,
    pub(super) console: OpenedConsole,
    pub(super) hardware: Hardware,
    pub(super) ram: GuestRam,
    /// Deaths of its process by which a device fails.
    pub(super) max_deaths: u16,
    /// Of a process that gives no sign of life.
    pub(super) device_timeout: Duration,
    pub(super) hold: Arc<Hold>,
    /// Plugins that take part.
    pub(super) guests: Guests,
    /// Where programs attach.
    pub(super) plugin_socket: Option<PathBuf>,
    /// The main thread is confined by the caller, once nothing is left to be opened; before
    /// that the guest must not run.
    pub(super) confine_later: bool,
}

impl Begun {
    /// Forks the spawner, which has in it what there is by now.
    pub(super) fn new(
        serial: &SerialSpec,
        disks: &[DiskSpec],
        plugin: Option<Plan>,
    ) -> Result<Begun, VmmError> {
        let phases = Phases::begin();
        let spawner = fork_spawner(serial, disks, plugin)?;
        let signals = Signals::install()
            .map_err(|source| VmmError::System { what: "taking signals over", source })?;
        Ok(Begun { phases, spawner, signals })
    }

    /// All is open. Disks are given as they are named and as they are open.
    pub(super) fn parts(
        self,
        switches: Switches,
        (ram, hardware): (GuestRam, Hardware),
        console: OpenedConsole,
        (specs, disks): (Vec<DiskSpec>, Vec<Backing>),
    ) -> Parts {
        let Begun { mut phases, spawner, signals } = self;
        let Switches { sandbox, seccomp, log } = switches;
        let writes = Some(write_logs(ram.len()));
        phases.end("open");
        Parts {
            phases,
            spawner,
            signals,
            common: Common { seccomp, sandbox, log, lazy: None, writes },
            specs,
            disks,
            control: None,
            console,
            hardware,
            ram,
            max_deaths: DEFAULT_MAX_DEATHS,
            device_timeout: DEFAULT_DEVICE_TIMEOUT,
            hold: Arc::new(Hold::new(false)),
            guests: Guests::none(),
            plugin_socket: None,
            confine_later: false,
        }
    }
}

impl Parts {
    pub(super) fn control(self, control: Option<ControlServer>) -> Parts {
        Parts { control, ..self }
    }

    pub(super) fn max_deaths(self, max_deaths: u16) -> Parts {
        Parts { max_deaths, ..self }
    }

    pub(super) fn device_timeout(self, device_timeout: Duration) -> Parts {
        Parts { device_timeout, ..self }
    }

    /// What keeps the guest from going past its marker.
    pub(super) fn hold(self, hold: Arc<Hold>) -> Parts {
        Parts { hold, ..self }
    }

    pub(super) fn guests(self, guests: Guests, socket: Option<PluginSocketSpec>) -> Parts {
        Parts { guests, plugin_socket: socket.map(|spec| spec.path), ..self }
    }

    /// Guest memory comes when it is touched: who invites the processes that map it.
    pub(super) fn lazy(mut self, inviter: Option<Inviter>) -> Parts {
        self.common.lazy = inviter.map(|inviter| &*Box::leak(Box::new(inviter)));
        self
    }

    pub(super) fn confine_later(self) -> Parts {
        Parts { confine_later: true, ..self }
    }
}

/// Where device processes note what they write: one VM's, which is the process's only one.
pub(super) fn write_logs(memory: u64) -> &'static WriteLogs {
    Box::leak(Box::new(WriteLogs::new(memory)))
}

fn fork_spawner(
    serial: &SerialSpec,
    disks: &[DiskSpec],
    plugin: Option<Plan>,
) -> Result<Spawner, SpawnError> {
    let restore_terminal = match serial {
        SerialSpec::Stdout => crate::terminal::stdin_terminal(),
        _ => None,
    };
    // In the order of the machine's back ends.
    let connect = disks.iter().filter_map(|disk| disk.vhost_user.clone()).collect();
    spawner::fork(spawner::Options { restore_terminal, plugin, connect })
}
