//! Who takes part in a machine that boots a kernel: its plugin, and those that attach.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use cellblock_devices::protocol::SeccompMode;
use cellblock_seccomp::filter::{self, Policy};
use cellblock_seccomp::spawner::Spawner;
use kvm_ioctls::VcpuFd;

use super::VmmError;
use super::assemble::confine;
use super::notice::{Notice, Notifier};
use super::plugin_vm::network;
use super::restore::RestoreConfig;
use crate::config::VmConfig;
use crate::plugin::{Arrived, AttachSocket, Hub, Machinery, Network, Plugins};
use crate::plugin_process::{self, PluginConfig, PluginProcess};
use crate::snapshot::dirty::WriteLogs;
use crate::spec::PluginSocketSpec;
use crate::vcpu::{self, Vcpus};
use crate::vm::kvm::Machine;
use crate::vm::memory::GuestRam;

/// What of them is there before the machine is.
pub(super) struct Guests {
    attach: Option<AttachSocket>,
    process: Option<(PluginProcess, OwnedFd)>,
    network: Option<Network>,
    /// The plugin's program, and its confinement.
    program: Option<(PathBuf, bool, SeccompMode)>,
    /// There are device processes that map guest memory.
    memory_is_mapped: bool,
    /// What they are to go on from, by name.
    states: Vec<(String, Vec<u8>)>,
}

/// What of them the main thread keeps.
#[derive(Default)]
pub(super) struct Served {
    pub(super) process: Option<PluginProcess>,
    pub(super) plugins: Option<(Arc<Hub>, Plugins)>,
}

impl Guests {
    /// A machine that no plugin takes part in.
    pub(super) fn none() -> Guests {
        let (attach, process, network, program) = (None, None, None, None);
        Guests { attach, process, network, program, memory_is_mapped: false, states: Vec::new() }
    }

    /// A machine that goes on from a snapshot: programs may attach to it. `arrived` says when its
    /// memory is there.
    pub(super) fn restored(
        config: &RestoreConfig,
        ram: &GuestRam,
        arrived: Option<Arrived>,
        states: Vec<(String, Vec<u8>)>,
    ) -> Result<Guests, VmmError> {
        let network = match &config.plugin {
            Some(plugin) => network(plugin)?,
            None => None,
        };
        let program =
            |plugin: &PluginConfig| (plugin.program.clone(), config.sandbox, config.seccomp);
        Ok(Guests {
            attach: attach(config.plugin_socket.as_ref(), ram, arrived)?,
            process: None,
            network,
            program: config.plugin.as_ref().map(program),
            memory_is_mapped: false,
            states,
        })
    }

    /// Opens what has a path, before privileges go.
    pub(super) fn open(config: &VmConfig, ram: &GuestRam) -> Result<Guests, VmmError> {
        let attach = attach(config.plugin_socket.as_ref(), ram, None)?;
        let network = match &config.plugin {
            Some(plugin) => network(plugin)?,
            None => None,
        };
        let program =
            |plugin: &PluginConfig| (plugin.program.clone(), config.sandbox, config.seccomp);
        let program = config.plugin.as_ref().map(program);
        let (process, states, memory_is_mapped) = (None, Vec::new(), false);
        Ok(Guests { attach, process, network, program, memory_is_mapped, states })
    }

    /// Starts the plugin's process, when all device processes serve.
    pub(super) fn launch(&mut self, spawner: &mut Spawner) -> Result<(), VmmError> {
        if let Some((program, sandbox, seccomp)) = &self.program {
            let process = plugin_process::start(spawner, program, *sandbox, *seccomp)?;
            self.process = Some(process);
        }
        Ok(())
    }

    /// Device processes have guest memory mapped.
    pub(super) fn beside_devices(&mut self) {
        self.memory_is_mapped = true;
    }

    /// Whether a plugin says when the guest runs for the first time.
    pub(super) fn has_owner(&self) -> bool {
        self.process.is_some()
    }

    /// Whether the guest runs later than all is ready: when its plugin starts it, or when those
    /// have attached that the machine of its snapshot had.
    pub(super) fn start_later(&self) -> bool {
        self.has_owner() || !self.states.is_empty()
    }

    /// Starts the vCPUs' threads and the server. With an owner the vCPUs come to their threads when
    /// that starts them; without anybody there is no server.
    pub(super) fn start_vcpus(
        self,
        fds: Vec<VcpuFd>,
        machine: &Arc<Machine>,
        config: vcpu::Config,
        notifier: &Arc<Notifier>,
        logs: &'static WriteLogs,
        seccomp: Option<filter::Mode>,
    ) -> Result<(Vcpus, Served), VmmError> {
        let owned = self.has_owner();
        let wanted = owned || self.attach.is_some();
        let hub = wanted.then(|| {
            let vcpu::Config { kicks, pio, mmio, .. } = config.clone();
            Hub::new(kicks, pio, mmio, owned)
        });
        let hub = hub.transpose()?;
        if let Some(hub) = &hub {
            hub.restore(self.states);
        }
        let config = match &hub {
            Some(hub) => config.with_plugins(hub),
            None => config,
        };
        let (vcpus, supply) = Vcpus::start_later(config)?;
        let (supply, made) = if owned {
            (Some(supply), fds)
        } else {
            supply.give(fds)?;
            (None, Vec::new())
        };
        let Some(hub) = hub else { return Ok((vcpus, Served::default())) };
        let (process, connection) = self.process.unzip();
        let started = notifier.clone();
        let machinery = Machinery {
            machine: machine.clone(),
            supply,
            vcpus: made,
            on_start: Box::new(move || started.send(Notice::Made)),
            logs,
            memory_is_mapped: self.memory_is_mapped,
            network: self.network,
        };
        let confine =
            move || confine(Policy::VmmPlugin, seccomp).map_err(|e| crate::remedy::chain(&e));
        let plugins = Plugins::start(hub.clone(), machinery, connection, self.attach, confine)?;
        Ok((vcpus, Served { process, plugins: Some((hub, plugins)) }))
    }
}

/// Makes the socket that was asked for.
fn attach(
    socket: Option<&PluginSocketSpec>,
    ram: &GuestRam,
    arrived: Option<Arrived>,
) -> Result<Option<AttachSocket>, VmmError> {
    let Some(spec) = socket else { return Ok(None) };
    let mut socket = AttachSocket::bind(spec)?;
    socket.hand_out(ram, arrived)?;
    Ok(Some(socket))
}
