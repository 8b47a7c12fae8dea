//! From a configuration to a machine that is ready to run.
//!
//! The order is chosen for a short start: the spawner first, while there is
//! nothing to inherit; then every cell is asked for; KVM, memory, kernel and
//! vCPUs are set up while the jails are being built; last the two halves meet.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use cellblock_devices::protocol::ring::{self, Producer};
use cellblock_devices::protocol::{SerialStart, Start};
use cellblock_seccomp::{filter, jail, spawner};
use cellblock_wire::{Access, Mapping, sealed_memfd};
use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::VmmError;
use super::event_loop::Vm;
use super::notice::Notifier;
use super::ports::{KeyboardController, MarkerPort, SleepControl};
use super::signals::Signals;
use crate::bus::Bus;
use crate::cell::launch::{Common, launch, wait_ready};
use crate::cell::serial::{PORTS, SerialPort};
use crate::cell::{Cell, CellError, blk};
use crate::config::VmConfig;
use crate::console::{self, OpenedConsole};
use crate::control::server::ControlServer;
use crate::transport::mmio::{VirtioMmio, WINDOW};
use crate::vcpu::Vcpus;
use crate::vm::kvm::Machine;
use crate::vm::memory::GuestRam;
use crate::vm::{acpi, boot, cpu, layout};

/// Guest output kept for a slow console reader, in bytes.
const CONSOLE_BUFFER: u32 = 1 << 20;

pub(super) fn assemble(config: VmConfig) -> Result<Vm, VmmError> {
    let started = Instant::now();
    let terminal = config.serial.uses_terminal().then_some(0);
    let mut spawner = spawner::fork(spawner::Options { restore_terminal: terminal })?;
    let signals = Signals::install()
        .map_err(|source| VmmError::System { what: "taking signals over", source })?;

    let kernel = open("kernel", &config.kernel)?;
    let initrd = config.initrd.as_deref().map(|path| open("initrd", path)).transpose()?;
    let disks = config.disks.iter().map(|spec| spec.open()).collect::<Result<Vec<_>, _>>()?;
    if disks.len() > layout::VIRTIO_SLOTS {
        return Err(VmmError::TooManyDisks(disks.len(), layout::VIRTIO_SLOTS));
    }
    let control = config.control.as_deref().map(ControlServer::bind).transpose()?;
    let OpenedConsole { endpoint, fds: console_fds, terminal, note } =
        console::open(&config.serial)?;

    // The cells are asked for first and waited for last.
    let common =
        Common { seccomp: config.seccomp, sandbox: config.sandbox, log: config.log };
    let com1 = SerialEnds::new()?;
    let start = Start::Serial(SerialStart {
        endpoint,
        escape: terminal.is_some(),
        buffer: CONSOLE_BUFFER,
    });
    let mut fds: Vec<BorrowedFd<'_>> =
        vec![com1.memfd.as_fd(), com1.doorbell.as_fd(), com1.irq.as_fd()];
    fds.extend(console_fds.iter().map(|fd| fd.as_fd()));
    let mut serial = launch(&mut spawner, common, "com1", start, &fds, None)?;
    drop(console_fds);
    let mut starting = disks
        .iter()
        .map(|disk| blk::start(&mut spawner, common, disk))
        .collect::<Result<Vec<_>, _>>()?;

    let ram = Arc::new(GuestRam::new(config.memory)?);
    let machine = Machine::new(&ram, config.cpus)?;
    let slots: Vec<_> = (0..disks.len()).map(layout::virtio_slot).collect();
    let rsdp = acpi::write(&ram, config.cpus, &slots)?;
    let cmdline = [config.cmdline.as_str(), &boot::cmdline_words(&slots)].join(" ");
    let entry = boot::load(&ram, &kernel, initrd.as_ref(), cmdline.trim(), rsdp)?;
    let fds = cpu::create_all(&machine, config.cpus, &entry)?;
    machine.irqfd(&com1.irq, layout::SERIAL_GSI)?;

    let mut waiting: Vec<&mut Cell> = vec![&mut serial];
    waiting.extend(starting.iter_mut().map(|disk| &mut disk.cell));
    wait_ready(&mut waiting, &mut spawner)?;

    let seccomp = config.sandbox.then(|| match config.seccomp {
        cellblock_devices::protocol::SeccompMode::Kill => filter::Mode::Kill,
        cellblock_devices::protocol::SeccompMode::Log => filter::Mode::Log,
    });
    let ring = Arc::new(com1.producer(config.cpus)?);
    let notifier = Notifier::new()
        .map_err(|e| VmmError::System { what: "creating an event", source: e.into() })?;

    let mut mmio = Bus::builder();
    let mut cells = vec![serial];
    let mut devices = Vec::new();
    for (starting, slot) in starting.into_iter().zip(&slots) {
        let (cell, device) = blk::connect(&machine, &ram, *slot, starting, confine(seccomp))?;
        let device = Arc::new(device);
        mmio = mmio.add(slot.base, WINDOW, device.clone())?;
        devices.push((cell.id().to_string(), device));
        cells.push(cell);
    }
    let pio = Bus::builder()
        .add(layout::SERIAL_PORT, PORTS, Arc::new(SerialPort::new(ring.clone(), config.cpus as usize)))?
        .add(layout::I8042_PORT, 5, Arc::new(KeyboardController))?
        .add(layout::SLEEP_PORT, 2, Arc::new(SleepControl))?
        .add(layout::MARKER_PORT, 1, Arc::new(MarkerPort(notifier.clone())))?
        .build();

    let hooks = kick_hooks(&ring, &devices);
    let vcpus = Vcpus::start(fds, Arc::new(pio), Arc::new(mmio.build()), hooks, on_thread(seccomp))?;

    if let Some(mode) = seccomp {
        jail::drop_vmm_privileges()?;
        filter::apply(filter::Policy::VmmMain, mode)?;
    }
    Ok(Vm {
        started,
        machine,
        ram,
        vcpus,
        ring,
        cells,
        devices,
        spawner,
        control,
        notifier,
        signals,
        terminal,
        note,
    })
}
