//! From a configuration to a machine that is ready to run.
//!
//! The order is chosen for a short start: the spawner first, while there is
//! nothing to inherit; then every cell is asked for; KVM, memory, kernel and
//! vCPUs are set up while the jails are being built; last the two halves meet.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use cellblock_devices::protocol::ring::{self, Producer};
use cellblock_devices::protocol::{OUTPUT_MAX, SeccompMode, SerialStart};
use cellblock_seccomp::filter::Policy;
use cellblock_seccomp::spawner::{SpawnError, Spawner};
use cellblock_seccomp::{filter, jail, spawner, violation};
use cellblock_wire::{Access, Mapping, sealed_memfd};
use kvm_ioctls::VcpuFd;
use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};
use vmm_sys_util::eventfd::EventFd;

use super::VmmError;
use super::event_loop::{BackEnd, DiskFacts, Vm};
use super::notice::Notifier;
use super::ports::{KeyboardController, MarkerPort, SleepControl};
use super::signals::Signals;
use super::supervise::{Kind, Supervisor};
use crate::bus::{Bus, BusError};
use crate::cell::launch::{Common, wait_ready};
use crate::cell::serial::{PORTS, SerialPort};
use crate::cell::{blk, com1};
use crate::config::{Opened, VmConfig};
use crate::console::OpenedConsole;
use crate::event;
use crate::logging;
use crate::spec::{self, Backing};
use crate::transport::mmio::{VirtioMmio, WINDOW};
use crate::vcpu::{self, Kicks, Vcpus};
use crate::vm::boot::Entry;
use crate::vm::cpu::CpuModel;
use crate::vm::kvm::{self, Machine};
use crate::vm::layout::VirtioSlot;
use crate::vm::memory::GuestRam;
use crate::vm::vmgenid::VmGenId;
use crate::vm::{acpi, boot, layout};

pub(super) fn assemble(mut config: VmConfig) -> Result<Vm, VmmError> {
    let started = Instant::now();
    let seccomp = config.sandbox.then_some(match config.seccomp {
        SeccompMode::Kill => filter::Mode::Kill,
        SeccompMode::Log => filter::Mode::Log,
    });
    let mut spawner = fork_spawner(&config)?;
    let signals = Signals::install()
        .map_err(|source| VmmError::System { what: "taking signals over", source })?;

    // Everything that has a path is opened here, before privileges go.
    spec::name_disks(&mut config.disks)?;
    if config.disks.len() > layout::VIRTIO_GSI.len() {
        return Err(VmmError::TooManyDisks(config.disks.len(), layout::VIRTIO_GSI.len()));
    }
    let Opened { kernel, initrd, disks, control, mut console } = config.open()?;
    let kvm = kvm::open()?;
    let ram = GuestRam::new(config.memory)?;

    // Every cell is asked for, and its jail is built beside what follows.
    let common = Common {
        seccomp: config.seccomp,
        sandbox: config.sandbox,
        log: config.log,
        lazy: None,
        writes: None,
    };
    let com1 = SerialEnds::new()?;
    let console_recipe = console_recipe(&com1, &mut console)?;
    let mut serial = console_recipe.launch(&mut spawner, common)?;
    let mut starting = Vec::new();
    let mut back_ends = Vec::new();
    for (spec, disk) in config.disks.iter().zip(&disks) {
        starting.push(match disk {
            Backing::Image(image) => blk::start(&mut spawner, common, spec, image, config.cpus)?,
            Backing::BackEnd(socket) => {
                let copy = |source| VmmError::System { what: "copying a connection", source };
                let own = socket.try_clone().map_err(copy)?;
                back_ends.push(BackEnd { id: spec.id().to_string(), socket: own, gone: false });
                blk::back_end(spec, socket.try_clone().map_err(copy)?)
            }
        });
    }
    let OpenedConsole { terminal, note, keep, .. } = console;
    if let Some(note) = note {
        logging::tell(&note);
    }

    // From here on there are threads, each of which confines itself.
    if seccomp.is_some() {
        drop_privileges()?;
    }
    for disk in &mut starting {
        disk.negotiate(&ram, move || confine(Policy::VmmDevice, seccomp))?;
    }

    let machine = Machine::with_kvm(kvm, &ram)?;
    let slots: Vec<_> = (0..disks.len()).filter_map(layout::virtio_slot).collect();
    let rsdp = acpi::write(&ram, config.cpus, &slots)?;
    let cmdline = [config.cmdline.as_str(), &layout::cmdline_words(&slots)].join(" ");
    let entry = boot::load(&ram, &kernel, initrd.as_ref(), cmdline.trim(), rsdp)?;
    let vcpu_fds = create_vcpus(&machine, config.cpus, &entry)?;
    machine.irqfd(&com1.irq, layout::SERIAL_GSI)?;
    let vmgenid = VmGenId::new(&machine)?;
    vmgenid.set(&ram, vmgenid.fresh()?)?;

    // The two halves meet.
    let mut waiting = vec![&mut serial];
    waiting.extend(starting.iter_mut().filter_map(|disk| disk.cell.as_mut()));
    wait_ready(&mut waiting, &mut spawner)?;
    let kicks = Kicks::new(usize::from(config.cpus));
    let ring = Arc::new(com1.producer(kicks.len())?);
    let mut cells = vec![serial];
    let mut devices = Vec::new();
    let mut recipes = Vec::new();
    for (mut starting, slot) in starting.into_iter().zip(&slots) {
        recipes.push(starting.recipe.take());
        let (cell, device) = starting.connect(&machine, &ram, *slot, kicks.clone())?;
        devices.push((device.id().to_string(), Arc::new(device)));
        cells.extend(cell);
    }
    let mut supervisor = Supervisor::new(common, config.max_deaths.into())
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
    let facts = facts(&config.disks, &disks, &devices);
    drop(disks);
    let notifier = Notifier::new()
        .map_err(|e| VmmError::System { what: "creating an event", source: e.into() })?;
    let pio = ports(SerialPort::new(ring.clone(), kicks.clone()), notifier.clone())?;
    let mmio = windows(&devices, &slots)?;
    wake_on_kick(&kicks, &ring, &devices);
    let (exit, ended) = vcpu::exit_notice()
        .map_err(|source| VmmError::System { what: "creating an event", source })?;
    let vcpus = Vcpus::start(
        vcpu_fds,
        vcpu::Config {
            on_thread_start: seccomp.map(vcpu_filter),
            ..vcpu::Config::new(kicks, Arc::new(pio), Arc::new(mmio), exit)
        },
    )?;

    // Last, because threads inherit the filter of the thread that starts them.
    confine(Policy::VmmMain, seccomp)?;
    let vm = Vm {
        started,
        _vmgenid: vmgenid,
        _machine: machine,
        ram,
        vcpus,
        ended,
        ring,
        cells,
        devices,
        disks: facts,
        back_ends,
        spawner,
        supervisor,
        control,
        notifier,
        signals,
        terminal,
        _console: keep,
        events: Vec::new(),
        defers_events: false,
        asked_to_stop: false,
        asked_for_processes: Vec::new(),
    };
    vm.watch_links();
    Ok(vm)
}

/// Has to come first: what the spawner forks from, it has in it.
fn fork_spawner(config: &VmConfig) -> Result<Spawner, SpawnError> {
    let restore_terminal = match config.serial {
        spec::SerialSpec::Stdout => crate::terminal::stdin_terminal(),
        _ => None,
    };
    // In the order of the machine's back ends.
    let connect = config.disks.iter().filter_map(|disk| disk.vhost_user.clone()).collect();
    spawner::fork(spawner::Options { restore_terminal, plugin: None, connect })
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

fn ports(serial: SerialPort, notifier: Arc<Notifier>) -> Result<Bus, BusError> {
    Ok(Bus::builder()
        .add(layout::SERIAL_PORT.into(), PORTS, Arc::new(serial))?
        .add(layout::I8042_DATA_PORT.into(), 5, Arc::new(KeyboardController))?
        .add(layout::SLEEP_CONTROL_PORT.into(), 2, Arc::new(SleepControl))?
        .add(layout::MARKER_PORT.into(), 1, Arc::new(MarkerPort(notifier)))?
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

    fn producer(self, vcpus: usize) -> Result<Producer, VmmError> {
        let mapping = Mapping::new(&self.memfd, ring::RING_BYTES, Access::ReadWrite)?;
        Ok(Producer::new(mapping, self.doorbell, vcpus)?)
    }
}

fn create_vcpus(machine: &Machine, cpus: u8, entry: &Entry) -> Result<Vec<VcpuFd>, VmmError> {
    let model = CpuModel::new(machine.kvm(), cpus)?;
    (0..cpus)
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
    disks: &[Backing],
    devices: &[(String, Arc<VirtioMmio>)],
) -> Vec<DiskFacts> {
    let of = |((spec, disk), (id, device)): (
        (&spec::DiskSpec, &Backing),
        &(String, Arc<VirtioMmio>),
    )| {
        let (size, read_only) = match disk {
            Backing::Image(image) => (image.size, image.read_only),
            Backing::BackEnd(_) => blk::facts(device.info()),
        };
        DiskFacts { id: id.clone(), size, read_only, throttle: spec.throttle }
    };
    specs.iter().zip(disks).zip(devices).map(of).collect()
}

fn vcpu_filter(mode: filter::Mode) -> vcpu::ThreadHook {
    Arc::new(move |_| filter::apply(Policy::VmmVcpu, mode).map_err(|e| crate::remedy::chain(&e)))
}

/// Puts the calling thread under `policy`, unless jails are off.
pub(crate) fn confine(
    policy: Policy,
    mode: Option<filter::Mode>,
) -> Result<(), filter::FilterError> {
    mode.map_or(Ok(()), |mode| filter::apply(policy, mode))
}
