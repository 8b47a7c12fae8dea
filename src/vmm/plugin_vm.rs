//! A machine that is a plugin's: no kernel, no memory, no devices of ours; vCPUs once the
//! plugin starts them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use cellblock_devices::protocol::SeccompMode;
use cellblock_seccomp::filter::{self, Policy};
use cellblock_seccomp::spawner;

use super::VmmError;
use super::assemble::{confine, drop_privileges, vcpu_filter};
use super::event_loop::Vm;
use super::notice::{Notice, Notifier};
use super::parts::write_logs;
use super::phases::Phases;
use super::signals::Signals;
use super::snapshot::Snapshots;
use super::supervise::Supervisor;
use super::watchdog::Watchdog;
use crate::bus::Bus;
use crate::cell::launch::Common;
use crate::config::VmConfig;
use crate::control::server::ControlServer;
use crate::plugin::{AttachSocket, Hub, Machinery, Network, Plugins};
use crate::plugin_process::{self, PluginConfig, PluginError, Tap};
use crate::snapshot::dirty::Tracker;
use crate::snapshot::state::Host;
use crate::vcpu::{self, Kicks, Vcpus};
use crate::vm::cpu::CpuModel;
use crate::vm::kvm::{self, Machine};
use crate::vm::memory::GuestRam;

/// Assembles the machine of `plugin`, which runs when this returns.
pub(super) fn assemble(config: VmConfig, plugin: &PluginConfig) -> Result<Vm, VmmError> {
    let phases = Phases::begin();
    let seccomp = config.sandbox.then_some(match config.seccomp {
        SeccompMode::Kill => filter::Mode::Kill,
        SeccompMode::Log => filter::Mode::Log,
    });
    let system = |what| move |source| VmmError::System { what, source };
    let plan = plugin_process::plan(plugin, config.sandbox)?;
    let options = spawner::Options { plugin: Some(plan), ..spawner::Options::default() };
    let mut spawner = spawner::fork(options)?;
    let signals = Signals::install().map_err(system("taking signals over"))?;

    // Everything that has a path is opened here, before privileges go.
    let network = network(plugin)?;
    let control = config.control.as_deref().map(ControlServer::bind).transpose();
    let control = control.map_err(crate::config::OpenError::Control)?;
    let attach = config.plugin_socket.as_ref().map(AttachSocket::bind).transpose()?;
    let kvm = kvm::open()?;
    let model = CpuModel::new(&kvm, 1)?;
    let host = Host::new(&kvm, &model)?;
    let (process, connection) =
        plugin_process::start(&mut spawner, &plugin.program, config.sandbox, config.seccomp)?;

    // From here on there are threads, each of which confines itself.
    if seccomp.is_some() {
        drop_privileges()?;
    }
    let ram = GuestRam::none()?;
    let machine = Arc::new(Machine::with_kvm(kvm, &ram)?);
    let notifier = Notifier::new().map_err(|e| system("creating an event")(e.into()))?;
    let kicks = Kicks::new(usize::from(config.cpus));
    // What nobody has reserved reads as 0.
    let bus = || Arc::new(Bus::builder().nobody(0).build());
    let (pio, mmio) = (bus(), bus());
    let hub = Hub::new(kicks.clone(), pio.clone(), mmio.clone(), true)?;
    let (exit, ended) = vcpu::exit_notice().map_err(system("creating an event"))?;
    let (vcpus, supply) = Vcpus::start_later(
        vcpu::Config {
            on_thread_start: seccomp.map(vcpu_filter),
            ..vcpu::Config::new(kicks, pio, mmio, exit)
        }
        .with_plugins(&hub),
    )?;
    let made = notifier.clone();
    let logs = write_logs(ram.len());
    let machinery = Machinery {
        machine: machine.clone(),
        supply: Some(supply),
        vcpus: Vec::new(),
        on_start: Box::new(move || made.send(Notice::Made)),
        logs,
        memory_is_mapped: false,
        network,
    };
    // There are no device processes that could be watched.
    let common = Common {
        seccomp: config.seccomp,
        sandbox: config.sandbox,
        log: config.log,
        lazy: None,
        writes: None,
    };
    let supervisor = Supervisor::new(common, config.max_deaths.into())
        .map_err(|e| system("creating an event")(e.into()))?;
    let plugins = serve(hub.clone(), machinery, connection, attach, seccomp)?;

    // Last, because threads inherit the filter of the thread that starts them.
    confine(Policy::VmmMain, seccomp)?;
    Ok(Vm {
        phases,
        machine,
        vmgenid: None,
        vcpus,
        ended,
        ring: None,
        com1_irq: None,
        snapshots: Snapshots::new(host, String::new(), Tracker::new(logs)),
        ram,
        triggers: None,
        pager: None,
        origin: None,
        to_load: None,
        shell: None,
        cells: Vec::new(),
        devices: Vec::new(),
        disks: Vec::new(),
        back_ends: Vec::new(),
        spawner,
        supervisor,
        watchdog: Watchdog::new(config.device_timeout),
        plugin: Some(process),
        plugins: Some((hub, plugins)),
        plugin_socket: config.plugin_socket.map(|spec| spec.path),
        starts_later: true,
        control,
        notifier,
        signals,
        terminal: None,
        _console: crate::console::Keep::default(),
        events: Vec::new(),
        defers_events: false,
        asked_to_stop: false,
        asked_for_processes: Vec::new(),
    })
}

/// Opens every TAP device that was asked for; the plugin can ask for the first.
pub(super) fn network(plugin: &PluginConfig) -> Result<Option<Network>, VmmError> {
    let taps = plugin.taps.iter().map(Tap::open).collect::<Result<Vec<_>, _>>();
    let first = taps.map_err(PluginError::from)?.into_iter().next();
    Ok(first.map(|Tap { fd, host_ip, netmask, mac }| Network { tap: fd, host_ip, netmask, mac }))
}

fn serve(
    hub: Arc<Hub>,
    machinery: Machinery,
    connection: OwnedFd,
    attach: Option<AttachSocket>,
    seccomp: Option<filter::Mode>,
) -> Result<Plugins, VmmError> {
    let confine = move || confine(Policy::VmmPlugin, seccomp).map_err(|e| crate::remedy::chain(&e));
    Ok(Plugins::start(hub, machinery, Some(connection), attach, confine)?)
}
