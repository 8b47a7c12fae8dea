//! Who takes part in a machine that boots a kernel: its plugin, and those that attach.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use cellblock_seccomp::filter::{self, Policy};
use cellblock_seccomp::spawner::Spawner;
use kvm_ioctls::VcpuFd;

use super::VmmError;
use super::assemble::confine;
use super::notice::{Notice, Notifier};
use super::plugin_vm::network;
use crate::bus::Bus;
use crate::config::VmConfig;
use crate::plugin::{AttachSocket, Hub, Machinery, Network, Plugins};
use crate::plugin_process::{self, PluginProcess};
use crate::vcpu::{self, Kicks, Vcpus};
use crate::vm::kvm::Machine;
use crate::vm::memory::GuestRam;

/// What of them is there before the machine is.
pub(super) struct Guests {
    attach: Option<AttachSocket>,
    process: Option<(PluginProcess, OwnedFd)>,
    network: Option<Network>,
}

/// What of them the main thread keeps.
#[derive(Default)]
pub(super) struct Served {
    pub(super) process: Option<PluginProcess>,
    pub(super) plugins: Option<(Arc<Hub>, Plugins)>,
}

impl Guests {
    /// Opens what has a path and starts the plugin's process, before privileges go.
    pub(super) fn open(
        config: &VmConfig,
        spawner: &mut Spawner,
        ram: &GuestRam,
    ) -> Result<Guests, VmmError> {
        let mut attach = config.plugin_socket.as_ref().map(AttachSocket::bind).transpose()?;
        if let Some(attach) = &mut attach {
            attach.hand_out(ram)?;
        }
        let network = match &config.plugin {
            Some(plugin) => network(plugin)?,
            None => None,
        };
        let start = |plugin: &plugin_process::PluginConfig| {
            plugin_process::start(spawner, &plugin.program, config.sandbox)
        };
        let process = config.plugin.as_ref().map(start).transpose()?;
        Ok(Guests { attach, process, network })
    }

    /// Whether a plugin says when the guest runs for the first time.
    pub(super) fn has_owner(&self) -> bool {
        self.process.is_some()
    }

    /// Starts the vCPUs' threads and the server. With an owner the vCPUs come to their threads when
    /// that starts them; without anybody there is no server.
    pub(super) fn start_vcpus(
        self,
        fds: Vec<VcpuFd>,
        machine: &Arc<Machine>,
        kicks: Arc<Kicks>,
        (pio, mmio): (Bus, Bus),
        exit: vcpu::ExitNotifier,
        notifier: &Arc<Notifier>,
        seccomp: Option<filter::Mode>,
    ) -> Result<(Vcpus, Served), VmmError> {
        let (pio, mmio) = (Arc::new(pio), Arc::new(mmio));
        let owned = self.has_owner();
        let wanted = owned || self.attach.is_some();
        let hub = wanted.then(|| Hub::new(kicks.clone(), pio.clone(), mmio.clone(), owned));
        let hub = hub.transpose()?;
        let mut config = vcpu::Config {
            on_thread_start: seccomp.map(super::assemble::vcpu_filter),
            ..vcpu::Config::new(kicks, pio, mmio, exit)
        };
        if let Some(hub) = &hub {
            config = config.with_plugins(hub);
        }
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
            network: self.network,
        };
        let confine =
            move || confine(Policy::VmmPlugin, seccomp).map_err(|e| crate::remedy::chain(&e));
        let plugins = Plugins::start(hub.clone(), machinery, connection, self.attach, confine)?;
        Ok((vcpus, Served { process, plugins: Some((hub, plugins)) }))
    }
}
