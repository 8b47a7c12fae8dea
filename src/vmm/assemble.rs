//! From a configuration to a machine that is ready to run.
//!
//! The order is chosen for a short start: the spawner first, while there is
//! nothing to inherit; then every cell is asked for; KVM, memory, kernel and
//! vCPUs are set up while the jails are being built; last the two halves meet.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use cellblock_devices::protocol::ring::{self, Producer};
use cellblock_devices::protocol::{OUTPUT_MAX, SeccompMode, SerialStart};
use cellblock_seccomp::filter::Policy;
use cellblock_seccomp::{filter, jail, violation};
use cellblock_wire::{Access, Mapping, sealed_memfd};
use kvm_ioctls::VcpuFd;
use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};
use vmm_sys_util::eventfd::EventFd;

use super::VmmError;
use super::event_loop::{BackEnd, DiskFacts, ImageFacts, Vm};
use super::hardware::{Hardware, Made};
use super::hold::Hold;
use super::notice::Notifier;
use super::parts::{Begun, Parts, Switches, write_logs};
use super::plugins::Guests;
use super::ports::{KeyboardController, MarkerPort, SleepControl};
use super::snapshot::Snapshots;
use super::supervise::{Kind, Supervisor};
use super::triggers::Triggers;
use super::watchdog::Watchdog;
use crate::bus::{Bus, BusError};
use crate::cell::launch::{Common, wait_ready};
use crate::cell::serial::{PORTS, SerialPort};
use crate::cell::{blk, com1};
use crate::config::{OpenError, Opened, VmConfig};
use crate::console::OpenedConsole;
use crate::control::server::ControlServer;
use crate::event;
use crate::logging;
use crate::plugin_process;
use crate::snapshot::dirty::Tracker;
use crate::snapshot::state::Host;
use crate::spec::{self, Backing};
use crate::transport::mmio::{VirtioMmio, WINDOW};
use crate::vcpu::{self, Kicks};
use crate::vm::boot::Entry;
use crate::vm::cpu::CpuModel;
use crate::vm::kvm::{self, Machine};
use crate::vm::layout::VirtioSlot;
use crate::vm::memory::GuestRam;
use crate::vm::vmgenid::VmGenId;
use crate::vm::{acpi, boot, layout};

/// A machine that boots a kernel.
///
/// `scribe` is the connection of the process that writes its snapshots, if it is to take some.
pub(super) fn assemble(mut config: VmConfig, scribe: Option<UnixStream>) -> Result<Vm, VmmError> {
    let plan = |plugin| plugin_process::plan(plugin, config.sandbox);
    let plan = config.plugin.as_ref().map(plan).transpose()?;
    let begun = Begun::new(&config.serial, &config.disks, plan)?;

    // Everything that has a path is opened here, before privileges go.
    spec::name_disks(&mut config.disks)?;
    if config.disks.len() > layout::VIRTIO_GSI.len() {
        return Err(VmmError::TooManyDisks(config.disks.len(), layout::VIRTIO_GSI.len()));
    }
    let Opened { kernel, initrd, disks, mut control, console } = config.open()?;
    let kvm = kvm::open()?;
    let ram = GuestRam::new(config.memory)?;
    let hardware = Hardware::begin(kvm, config.cpus.into(), &ram)?;
    let mut triggers = None;
    let hold = Arc::new(Hold::new(scribe.is_some() && config.snapshot.on_pre_exec));
    if let Some(stream) = scribe {
        let made = |source| VmmError::System { what: "watching for a snapshot's time", source };
        let server = match control.take() {
            Some(server) => server,
            None => ControlServer::without_socket().map_err(OpenError::Control)?,
        };
        let writer = control.insert(server).adopt(stream);
        let resources = std::mem::take(&mut config.snapshot);
        let new = Triggers::new(resources, writer, hold.clone());
        triggers = Some(new.map_err(|e| made(e.into()))?);
    }
    let guests = Guests::open(&config, &ram)?;
    let VmConfig { sandbox, seccomp, log, .. } = config;
    let disks = (std::mem::take(&mut config.disks), disks);
    let switches = Switches { sandbox, seccomp, log };
    let parts = begun
        .parts(switches, (ram, hardware), console, disks)
        .control(control)
        .max_deaths(config.max_deaths)
        .device_timeout(config.device_timeout)
        .hold(hold)
        .guests(guests, config.plugin_socket.take());
    let kernel = kernel.ok_or(VmmError::NoKernel)?;
    let mut vm = build(parts, |machine, model, _, slots| {
        let ram = machine.ram();
        let rsdp = acpi::write(ram, model.cpus(), slots)?;
        let cmdline = [config.cmdline.as_str(), &layout::cmdline_words(slots)].join(" ");
        let entry = boot::load(ram, &kernel, initrd.as_ref(), cmdline.trim(), rsdp)?;
        create_vcpus(machine, model, &entry)
    })?;
    vm.triggers = triggers;
    Ok(vm)
}

/// Brings a machine up as far as it goes without running: processes in their jails, KVM,
/// threads. What its vCPUs and its memory are, `guest` sets up meanwhile.
pub(super) fn build(
    parts: Parts,
    guest: impl FnOnce(&Machine, &CpuModel, &Host, &[VirtioSlot]) -> Result<Vec<VcpuFd>, VmmError>,
) -> Result<Vm, VmmError> {
    let Parts {
        mut phases,
        mut spawner,
        signals,
        common,
        specs,
        disks,
        control,
        mut console,
        hardware,
        ram,
        max_deaths,
        device_timeout,
        hold,
        mut guests,
        plugin_socket,
        confine_later,
    } = parts;
    let seccomp = filter_mode(common);
    let logs = common.writes.unwrap_or_else(|| write_logs(ram.len()));
    let boot_id = boot_id();

    // Every cell is asked for, and its jail is built beside what follows.
    let cpus = hardware.cpus;
    let com1 = SerialEnds::new()?;
    let console_recipe = console_recipe(&com1, &mut console)?;
    let mut serial = console_recipe.launch(&mut spawner, common, None)?;
    let mut starting = Vec::new();
    let mut back_ends = Vec::new();
    for (spec, disk) in specs.iter().zip(&disks) {
        starting.push(match disk {
            Backing::Image(image) => blk::start(&mut spawner, common, spec, image, cpus)?,
            Backing::BackEnd(socket) => {
                let copy = |source| VmmError::System { what: "copying a connection", source };
                let own = socket.try_clone().map_err(copy)?;
                let path = spec.vhost_user.clone().unwrap_or_default();
                let path = std::path::absolute(path)
                    .map_err(|source| VmmError::System { what: "naming a socket", source })?;
                let id = spec.id().to_string();
                back_ends.push(BackEnd { id, path, socket: own, gone: false });
                blk::back_end(spec, socket.try_clone().map_err(copy)?, cpus)
            }
        });
    }
    if !back_ends.is_empty() {
        // What another program writes to guest memory is in no log.
        logs.lose_track();
    }
    let OpenedConsole { terminal, note, keep, .. } = console;
    if let Some(note) = note {
        logging::tell(&note);
    }

    phases.end("ask");
    let Made { machine, model, host } = hardware.finish()?;
    let machine = Arc::new(machine);
    phases.end("machine");

    // From here on there are threads, each of which confines itself.
    if seccomp.is_some() {
        drop_privileges()?;
    }
    for disk in &mut starting {
        disk.negotiate(&ram, move || confine(Policy::VmmDevice, seccomp))?;
    }

    let slots: Vec<_> = (0..disks.len()).filter_map(layout::virtio_slot).collect();
    let vcpu_fds = guest(&machine, &model, &host, &slots)?;
    let snapshots = Snapshots::new(host, boot_id, Tracker::new(logs));
    machine.irqfd(&com1.irq, layout::SERIAL_GSI)?;
    let vmgenid = VmGenId::new(&machine)?;
    vmgenid.new_life(&ram, None, Vec::new())?;

    phases.end("guest");
    // The two halves meet.
    let mut waiting = vec![&mut serial];
    waiting.extend(starting.iter_mut().filter_map(|disk| disk.cell.as_mut()));
    wait_ready(&mut waiting, &mut spawner)?;
    phases.end("jails");
    guests.launch(&mut spawner)?;
    let starts_later = guests.start_later();
    if !specs.is_empty() {
        guests.beside_devices();
    }
    let kicks = Kicks::new(usize::from(cpus));
    let (ring, com1_irq) = com1.producer(kicks.len())?;
    let ring = Arc::new(ring);
    let mut cells = vec![serial];
    let mut devices = Vec::new();
    let mut recipes = Vec::new();
    for (mut starting, slot) in starting.into_iter().zip(&slots) {
        recipes.push(starting.recipe.take());
        let (cell, device) = starting.connect(&machine, &ram, *slot, kicks.clone())?;
        devices.push((device.id().to_string(), Arc::new(device)));
        cells.extend(cell);
    }
    let mut supervisor = Supervisor::new(common, max_deaths.into())
        .map_err(|e| VmmError::System { what: "creating an event", source: e.into() })?;
    supervisor.add(com1::ID, Kind::Serial { recipe: console_recipe });
    for (device, recipe) in recipes.into_iter().enumerate() {
        let kind = match recipe {
            Some(recipe) => Kind::Blk { device, recipe: Box::new(recipe) },
            None => {
                let place = back_ends.iter().position(|end| end.id == devices[device].0);
                let Some(place) = place else { continue };
                Kind::BackEnd { device, place }
            }
        };
        supervisor.add(&devices[device].0, kind);
    }
    let facts = facts(&specs, cpus, disks, &devices)?;
    let notifier = Notifier::new()
        .map_err(|e| VmmError::System { what: "creating an event", source: e.into() })?;
    let markers = MarkerPort::new(notifier.clone(), hold.clone(), kicks.clone());
    kicks.on_kick(move |_| hold.wake());
    let pio = ports(SerialPort::new(ring.clone(), kicks.clone()), markers)?;
    let mmio = windows(&devices, &slots)?;
    wake_on_kick(&kicks, &ring, &devices);
    let (exit, ended) = vcpu::exit_notice()
        .map_err(|source| VmmError::System { what: "creating an event", source })?;
    let vcpu_config = vcpu::Config {
        on_thread_start: seccomp.map(vcpu_filter),
        ..vcpu::Config::new(kicks, Arc::new(pio), Arc::new(mmio), exit)
    };
    let (vcpus, served) =
        guests.start_vcpus(vcpu_fds, &machine, vcpu_config, &notifier, logs, seccomp)?;

    // Last, because threads inherit the filter of the thread that starts them.
    if !confine_later {
        confine(Policy::VmmMain, seccomp)?;
    }
    phases.end("threads");
    let vm = Vm {
        phases,
        machine,
        vmgenid: Some(vmgenid),
        ram,
        vcpus,
        ended,
        ring: Some(ring),
        com1_irq: Some(com1_irq),
        cells,
        devices,
        disks: facts,
        back_ends,
        spawner,
        plugin: served.process,
        plugins: served.plugins,
        plugin_socket,
        starts_later,
        supervisor,
        watchdog: Watchdog::new(device_timeout),
        control,
        notifier,
        signals,
        terminal,
        _console: keep,
        events: Vec::new(),
        defers_events: false,
        asked_to_stop: false,
        asked_for_processes: Vec::new(),
        snapshots,
        pager: None,
        triggers: None,
        origin: None,
        to_load: None,
        shell: None,
    };
    vm.watch_links();
    Ok(vm)
}

/// What a refused system call does, where there are filters.
pub(super) fn filter_mode(common: Common) -> Option<filter::Mode> {
    common.sandbox.then_some(match common.seccomp {
        SeccompMode::Kill => filter::Mode::Kill,
        SeccompMode::Log => filter::Mode::Log,
    })
}

fn console_recipe(
    com1: &SerialEnds,
    console: &mut OpenedConsole,
) -> Result<com1::Recipe, VmmError> {
    let start = SerialStart {
        endpoint: console.endpoint,
        escape: console.terminal.is_some(),
        buffer: OUTPUT_MAX,
    };
    let ring = [com1.memfd.as_fd(), com1.doorbell.as_fd(), event::fd(&com1.irq)];
    Ok(com1::Recipe::new(start, ring, std::mem::take(&mut console.fds))?)
}

/// Gives up capabilities, and has refused system calls reported by name.
pub(crate) fn drop_privileges() -> Result<(), VmmError> {
    jail::drop_vmm_privileges()?;
    let page = violation::new_page()?;
    let page = Mapping::new(&page, violation::PAGE, Access::ReadWrite)?;
    Ok(violation::install(page, "vmm")?)
}

fn ports(serial: SerialPort, markers: MarkerPort) -> Result<Bus, BusError> {
    Ok(Bus::builder()
        .add(layout::SERIAL_PORT.into(), PORTS, Arc::new(serial))?
        .add(layout::I8042_DATA_PORT.into(), 5, Arc::new(KeyboardController))?
        .add(layout::SLEEP_CONTROL_PORT.into(), 2, Arc::new(SleepControl))?
        .add(layout::MARKER_PORT.into(), 1, Arc::new(markers))?
        .build())
}

fn windows(devices: &[(String, Arc<VirtioMmio>)], slots: &[VirtioSlot]) -> Result<Bus, BusError> {
    let mut bus = Bus::builder();
    for ((_, device), slot) in devices.iter().zip(slots) {
        bus = bus.add(slot.base, WINDOW, device.clone())?;
    }
    Ok(bus.build())
}

/// A vCPU that waits for a device process is woken to look at its request.
fn wake_on_kick(kicks: &Kicks, ring: &Arc<Producer>, devices: &[(String, Arc<VirtioMmio>)]) {
    let ring = ring.clone();
    kicks.on_kick(move |vcpu| ring.kick(vcpu));
    for (_, device) in devices {
        let device = device.clone();
        kicks.on_kick(move |vcpu| device.kick(vcpu));
    }
}

/// The two ends of COM1 before they meet.
struct SerialEnds {
    memfd: OwnedFd,
    doorbell: OwnedFd,
    irq: EventFd,
}

impl SerialEnds {
    fn new() -> Result<SerialEnds, VmmError> {
        let system = |source| VmmError::System { what: "creating an event", source };
        let memfd = sealed_memfd("cellblock-com1", ring::RING_BYTES as u64)?;
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let doorbell = NixEventFd::from_flags(flags).map_err(|e| system(e.into()))?;
        Ok(SerialEnds { memfd, doorbell: doorbell.into(), irq: event::event().map_err(system)? })
    }

    /// The VMM's end of the ring, and the interrupt.
    fn producer(self, vcpus: usize) -> Result<(Producer, EventFd), VmmError> {
        let mapping = Mapping::new(&self.memfd, ring::RING_BYTES, Access::ReadWrite)?;
        Ok((Producer::new(mapping, self.doorbell, vcpus)?, self.irq))
    }
}

/// Names this run of the host's kernel; empty where it does not say.
fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_string()
}

fn create_vcpus(
    machine: &Machine,
    model: &CpuModel,
    entry: &Entry,
) -> Result<Vec<VcpuFd>, VmmError> {
    (0..model.cpus())
        .map(|id| {
            let vcpu = machine.create_vcpu(id)?;
            model.configure(&vcpu, id, (id == 0).then_some(entry))?;
            Ok(vcpu)
        })
        .collect()
}

/// What does not change about the disks. A back end of somebody else's says it itself.
fn facts(
    specs: &[spec::DiskSpec],
    cpus: u8,
    disks: Vec<Backing>,
    devices: &[(String, Arc<VirtioMmio>)],
) -> Result<Vec<DiskFacts>, VmmError> {
    // A snapshot is restored in another directory than this process is in.
    let naming = |source| VmmError::System { what: "naming a disk", source };
    let mut facts = Vec::with_capacity(disks.len());
    for ((spec, disk), (id, device)) in specs.iter().zip(disks).zip(devices) {
        let (size, read_only) = match &disk {
            Backing::Image(image) => (image.size, image.read_only),
            Backing::BackEnd(_) => blk::facts(device.info()),
        };
        let image = match disk {
            Backing::BackEnd(_) => None,
            Backing::Image(image) => Some(ImageFacts {
                path: std::path::absolute(&spec.path).map_err(naming)?,
                fd: image.fd,
                overlay: match (image.overlay, &spec.cow) {
                    (Some(overlay), Some(place)) => {
                        Some((overlay, place.absolute().map_err(naming)?))
                    }
                    _ => None,
                },
                serial: image.serial,
                poll_us: spec.poll_us,
                queues: spec.queues(cpus),
                direct: spec.direct,
                engine: spec.engine,
            }),
        };
        facts.push(DiskFacts { id: id.clone(), size, read_only, throttle: spec.throttle, image });
    }
    Ok(facts)
}

pub(super) fn vcpu_filter(mode: filter::Mode) -> vcpu::ThreadHook {
    Arc::new(move |_| filter::apply(Policy::VmmVcpu, mode).map_err(|e| crate::remedy::chain(&e)))
}

/// Puts the calling thread under `policy`, unless jails are off.
pub(crate) fn confine(
    policy: Policy,
    mode: Option<filter::Mode>,
) -> Result<(), filter::FilterError> {
    mode.map_or(Ok(()), |mode| filter::apply(policy, mode))
}
