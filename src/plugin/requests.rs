//! What a plugin asks of the VM as a whole, carried out.
#![allow(unsafe_code)] // one ioctl whose wrapper does not take every length; unions of the kernel's

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use cellblock_plugin_api::wire::{
    Answer, Handle, Object, Payload, Request, VERSION, VmState, routes_from_bytes,
};
use cellblock_plugin_api::{
    Hint, IrqRoute, MAX_HINT_DETAILS, MemoryAccess, Plain, RamRegion, Rights, Route, Space,
};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVMIO, KvmIrqRouting, kvm_clock_data,
    kvm_ioapic_state, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_irq_routing_entry, kvm_irqchip,
    kvm_msi, kvm_pic_state, kvm_pit_state2,
};
use nix::errno::Errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::memory::{Slab, Wanted, kvm_errno};
use super::orders::errno;
use super::server::Server;
use super::session::{IoEvent, Session};
use crate::event;

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// The most things one plugin has made at a time.
const MADE: usize = 4096;

/// Bytes of the largest table of interrupt routes that KVM takes, of 4096 lines.
const MAX_ROUTES: u64 = 4096 * 24;

/// An answer with the descriptors that go with it.
pub(super) struct Out {
    pub(super) answer: Answer,
    pub(super) fds: Vec<OwnedFd>,
}

impl From<Answer> for Out {
    fn from(answer: Answer) -> Out {
        Out { answer, fds: Vec::new() }
    }
}

const DONE: Answer = Answer::Done;

/// Whether a request leaves everything as it is.
fn only_looks(request: &Request) -> bool {
    matches!(
        request,
        Request::Hello { .. }
            | Request::NewConnection
            | Request::ShutdownEvent
            | Request::CheckExtension(_)
            | Request::SupportedCpuid
            | Request::EmulatedCpuid
            | Request::MsrIndexList
            | Request::WatchRange { .. }
            | Request::GetState(_)
            | Request::SetHint(_)
            | Request::PauseVcpus { .. }
            | Request::Memory { .. }
    )
}

/// Whether a request is for the plugin that the VM belongs to.
fn for_owner(request: &Request) -> bool {
    matches!(
        request,
        Request::NetConfig
            | Request::SetIrqRouting(_)
            | Request::SetIdentityMapAddr(_)
            | Request::Start
    )
}

impl Server {
    /// Carries out a request of `session`.
    pub(super) fn carry_out(
        &mut self,
        session: &Arc<Session>,
        request: Request,
        fds: &[OwnedFd],
    ) -> Result<Out, Errno> {
        if session.rights() != Rights::Control && !only_looks(&request) {
            return Err(Errno::EPERM);
        }
        if !session.is_owner() && for_owner(&request) {
            return Err(Errno::EPERM);
        }
        let vm = self.machine.vm();
        match request {
            Request::Hello { version: VERSION } => {
                let fds = session.greeting().map(|fd| fd.try_clone_to_owned());
                let fds = fds.into_iter().collect::<Result<_, _>>().map_err(io_errno)?;
                let vcpus = self.hub.vcpus() as u32;
                Ok(Out { answer: Answer::Hello { vcpus, rights: session.rights() }, fds })
            }
            Request::Hello { .. } => Err(Errno::EPROTONOSUPPORT),
            Request::NewConnection => {
                let theirs = self.connect(session)?;
                Ok(Out { answer: DONE, fds: vec![theirs] })
            }
            Request::ShutdownEvent => {
                let fd = session.shutdown_event().try_clone_to_owned().map_err(io_errno)?;
                Ok(Out { answer: DONE, fds: vec![fd] })
            }
            Request::CheckExtension(number) => {
                Ok(Answer::Flag(vm.check_extension_raw(number.into()) == 1).into())
            }
            Request::EnableCapability { .. } => Err(Errno::EINVAL),
            Request::SupportedCpuid => {
                let table = self.machine.kvm().get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
                bytes(Plain::all_bytes(table.map_err(errno)?.as_slice()))
            }
            Request::EmulatedCpuid => {
                let table = self.machine.kvm().get_emulated_cpuid(KVM_MAX_CPUID_ENTRIES);
                bytes(Plain::all_bytes(table.map_err(errno)?.as_slice()))
            }
            Request::MsrIndexList => {
                let list = self.machine.kvm().get_msr_index_list().map_err(errno)?;
                bytes(Plain::all_bytes(list.as_slice()))
            }
            Request::NetConfig => {
                let net = self.network.as_ref().ok_or(Errno::ENODATA)?;
                let tap = net.tap.try_clone().map_err(io_errno)?;
                let (host_ip, netmask) = (net.host_ip.octets(), net.netmask.octets());
                Ok(Out { answer: Answer::Net { host_ip, netmask, mac: net.mac }, fds: vec![tap] })
            }
            Request::ReserveRange { space, start, length, is_async } => {
                self.hub.reserve(session, space, start, length, is_async)?;
                Ok(DONE.into())
            }
            Request::WatchRange { space, start, length } => {
                self.hub.watch(session, space, start, length)?;
                Ok(DONE.into())
            }
            Request::SetIrq { irq, active } => {
                let mut made = session.made();
                if active && !made.raised.contains(&irq) {
                    room(made.len())?;
                }
                vm.set_irq_line(irq, active).map_err(errno)?;
                match active {
                    true => made.raised.insert(irq),
                    false => made.raised.remove(&irq),
                };
                Ok(DONE.into())
            }
            Request::SignalMsi { address, data } => {
                let msi = kvm_msi {
                    address_lo: address as u32,
                    address_hi: (address >> 32) as u32,
                    data,
                    ..Default::default()
                };
                vm.signal_msi(msi).map_err(errno)?;
                Ok(DONE.into())
            }
            Request::SetIrqRouting(payload) => {
                if payload.bytes() > MAX_ROUTES {
                    return Err(Errno::EINVAL);
                }
                let table = payload.take(fds.last().map(|fd| fd.as_fd()));
                let table = table.map_err(|_| Errno::EINVAL)?;
                let routes = routes_from_bytes(&table).ok_or(Errno::EINVAL)?;
                let entries: Vec<_> = routes.iter().map(entry).collect();
                let table = KvmIrqRouting::from_entries(&entries).map_err(|_| Errno::EINVAL)?;
                vm.set_gsi_routing(&table).map_err(errno)?;
                Ok(DONE.into())
            }
            Request::SetHint(hint) => {
                check_hint(hint.as_ref())?;
                session.set_hint(hint);
                Ok(DONE.into())
            }
            Request::GetState(state) => bytes(self.state(state)?),
            Request::SetState(state, value) => {
                self.set_state(state, &value)?;
                Ok(DONE.into())
            }
            Request::SetIdentityMapAddr(address) => {
                vm.set_identity_map_address(address.into()).map_err(errno)?;
                Ok(DONE.into())
            }
            Request::PauseVcpus { mask, user } => {
                for vcpu in 0..self.hub.vcpus() {
                    let word = mask.get(vcpu / 64).copied().unwrap_or(0);
                    if word >> (vcpu % 64) & 1 != 0 {
                        self.hub.pause(session, vcpu, user);
                    }
                }
                Ok(DONE.into())
            }
            Request::Start => {
                self.start_vcpus()?;
                Ok(DONE.into())
            }
            Request::CreateIoEvent { space, address, length, datamatch } => {
                self.create_io_event(session, space, address, length, datamatch)
            }
            Request::CreateMemory { offset, length, start, read_only, dirty_log } => {
                let wanted = Wanted { offset, length, start, read_only, dirty_log };
                let fd = fds.first().ok_or(Errno::EBADF)?.as_fd();
                if self.memory_is_mapped {
                    tracing::warn!(
                        "a plugin's memory at {start:#x} was refused: the processes of the VM's \
                         disks could not reach it; use a VM without disks, or the VM's own memory"
                    );
                    return Err(Errno::EOPNOTSUPP);
                }
                let mut made = session.made();
                room(made.len())?;
                let slab = Slab::create(&self.machine, &mut self.slots, fd, &wanted)?;
                let handle = made.handle();
                made.memory.insert(handle, slab);
                self.hub.memory_made();
                Ok(Answer::Handle(handle).into())
            }
            Request::DirtyLog(handle) => {
                let made = session.made();
                bytes(made.memory.get(&handle).ok_or(Errno::ENOENT)?.dirty_log(&self.machine)?)
            }
            Request::CreateIrqEvent { irq } => self.create_irq_event(session, irq),
            Request::Destroy(object, handle) => {
                self.destroy(session, object, handle)?;
                Ok(DONE.into())
            }
            Request::Writing { offset, length } => {
                let mut made = session.made();
                room(made.len())?;
                let end = offset.checked_add(length).ok_or(Errno::EOVERFLOW)?;
                if end > self.machine.ram().len() {
                    return Err(Errno::EINVAL);
                }
                // While everybody stands still for a cut it is to be asked again.
                let writing = self.logs.writing(offset, length).ok_or(Errno::EAGAIN)?;
                let handle = made.handle();
                made.writing.insert(handle, writing);
                Ok(Answer::Handle(handle).into())
            }
            Request::LogMemory(on) => {
                self.log_memory(session, on)?;
                Ok(DONE.into())
            }
            Request::TakePart { name } => {
                self.fds.room(&self.hub, session.rights(), 1)?;
                let (channel, restored, memory) = self.hub.take_part(session, &name)?;
                let fds = [channel].into_iter().chain(memory).collect();
                // The VM of a snapshot runs when everybody is there that it had.
                let last = restored.is_some() && self.hub.restored().is_empty();
                if last && self.hub.owner().is_none() {
                    (self.on_start)();
                }
                Ok(Out { answer: Answer::Part(restored), fds })
            }
            Request::MemoryLog => {
                let reader = session.made().log.ok_or(Errno::ENOENT)?;
                let pages = self.logs.read(&self.machine, reader).map_err(kvm_errno)?;
                bytes(pages.iter().flat_map(|word| word.to_le_bytes()).collect())
            }
            Request::Memory { tells } => {
                let (fd, access) = self.hand_out(session)?;
                if access == MemoryAccess::ReadWrite && !tells {
                    self.logs.lose_track();
                }
                let regions = self.machine.ram().regions().iter();
                let regions = regions
                    .map(|r| RamRegion { gpa: r.gpa, len: r.len, offset: r.offset })
                    .collect();
                Ok(Out { answer: Answer::Memory { access, regions }, fds: vec![fd] })
            }
        }
    }

    /// Guest memory for a plugin: for those that attach as the socket says, for the one that the VM
    /// was started with, which answers for devices, to read and to write.
    fn hand_out(&self, session: &Session) -> Result<(OwnedFd, MemoryAccess), Errno> {
        let ram = self.machine.ram();
        if session.is_owner() {
            if ram.is_empty() {
                return Err(Errno::EPERM);
            }
            let fd = ram.fd().try_clone_to_owned().map_err(io_errno)?;
            return Ok((fd, MemoryAccess::ReadWrite));
        }
        let attach = self.attach.as_ref().ok_or(Errno::EPERM)?;
        let fd = attach.ram().ok_or(Errno::EPERM)?;
        if !attach.has_arrived() {
            return Err(Errno::EAGAIN);
        }
        // Who may only look gets no memory to write to.
        if session.memory() == MemoryAccess::ReadWrite && session.rights() != Rights::Control {
            let fd = attach.read_only_ram().ok_or(Errno::EPERM)?;
            return Ok((fd, MemoryAccess::ReadOnly));
        }
        Ok((fd.try_clone_to_owned().map_err(io_errno)?, session.memory()))
    }

    fn create_io_event(
        &self,
        session: &Session,
        space: Space,
        address: u64,
        length: u32,
        datamatch: Option<u64>,
    ) -> Result<Out, Errno> {
        if !matches!(length, 0 | 1 | 2 | 4 | 8) {
            return Err(Errno::EINVAL);
        }
        // It would take the guest's writes away from the device.
        self.hub.leave_devices_alone(space, address, length.max(1).into())?;
        self.fds.room(&self.hub, session.rights(), 1)?;
        let mut made = session.made();
        room(made.len())?;
        let event = event::event().map_err(io_errno)?;
        let mut raw = kvm_ioeventfd {
            addr: address,
            len: length,
            fd: event.as_raw_fd(),
            ..Default::default()
        };
        if space == Space::Port {
            raw.flags |= 1 << kvm_ioeventfd_flag_nr_pio;
        }
        // Of a write of any length no byte is compared.
        if let Some(value) = datamatch.filter(|_| length > 0) {
            raw.flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
            raw.datamatch = value & u64::MAX >> (64 - 8 * length);
        }
        self.ioeventfd(&raw)?;
        let fd = copy(&event)?;
        let handle = made.handle();
        made.io_events.insert(handle, IoEvent { fd: event, raw });
        Ok(Out { answer: Answer::Handle(handle), fds: vec![fd] })
    }

    fn ioeventfd(&self, raw: &kvm_ioeventfd) -> Result<(), Errno> {
        // SAFETY: the kernel reads the structure, whose descriptor is open.
        let result = unsafe { ioctl_with_ref(self.machine.vm(), KVM_IOEVENTFD(), raw) };
        Errno::result(result).map(drop)
    }

    fn create_irq_event(&self, session: &Session, irq: u32) -> Result<Out, Errno> {
        self.fds.room(&self.hub, session.rights(), 1)?;
        let mut made = session.made();
        room(made.len())?;
        let event = event::event().map_err(io_errno)?;
        let resample = event::event().map_err(io_errno)?;
        let vm = self.machine.vm();
        vm.register_irqfd_with_resample(&event, &resample, irq).map_err(errno)?;
        let fds = vec![copy(&event)?, copy(&resample)?];
        let handle = made.handle();
        made.irq_events.insert(handle, (event, irq));
        Ok(Out { answer: Answer::Handle(handle), fds })
    }

    fn destroy(&mut self, session: &Session, object: Object, handle: Handle) -> Result<(), Errno> {
        let mut made = session.made();
        let vm = self.machine.vm();
        match object {
            Object::IoEvent => {
                let event = made.io_events.remove(&handle).ok_or(Errno::ENOENT)?;
                self.remove_io_event(&event)
            }
            Object::IrqEvent => {
                let (event, irq) = made.irq_events.remove(&handle).ok_or(Errno::ENOENT)?;
                vm.unregister_irqfd(&event, irq).map_err(errno)
            }
            Object::Memory => {
                let slab = made.memory.remove(&handle).ok_or(Errno::ENOENT)?;
                self.hub.memory_gone();
                slab.remove(&self.machine, &mut self.slots)
            }
            Object::Writing => {
                self.logs.written(made.writing.remove(&handle).ok_or(Errno::ENOENT)?);
                Ok(())
            }
        }
    }

    /// Has the VM's own memory watched for a plugin; asked twice, from the second time on.
    fn log_memory(&self, session: &Session, on: bool) -> Result<(), Errno> {
        if self.machine.ram().is_empty() {
            return Err(Errno::ENODATA);
        }
        let mut made = session.made();
        if let Some(reader) = made.log.take() {
            self.logs.leave(&self.machine, reader).map_err(kvm_errno)?;
        }
        if on {
            made.log = Some(self.logs.join(&self.machine).map_err(kvm_errno)?);
        }
        Ok(())
    }

    fn remove_io_event(&self, event: &IoEvent) -> Result<(), Errno> {
        let mut raw = event.raw;
        raw.flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
        raw.fd = event.fd.as_raw_fd();
        self.ioeventfd(&raw)
    }

    /// Undoes all that a plugin made that has gone.
    pub(super) fn undo(&mut self, session: &Session) {
        let mut made = session.made();
        let vm = self.machine.vm();
        let report = |result: Result<(), Errno>| {
            if let Err(errno) = result {
                tracing::error!(%errno, "releasing what a plugin had made");
            }
        };
        for event in std::mem::take(&mut made.io_events).into_values() {
            report(self.remove_io_event(&event));
        }
        for (event, irq) in std::mem::take(&mut made.irq_events).into_values() {
            report(vm.unregister_irqfd(&event, irq).map_err(errno));
        }
        for irq in std::mem::take(&mut made.raised) {
            // Lines are shared: others may hold it up as well.
            let held = |other: &Arc<Session>| other.made().raised.contains(&irq);
            if !self.hub.sessions().iter().any(held) {
                report(vm.set_irq_line(irq, false).map_err(errno));
            }
        }
        for slab in std::mem::take(&mut made.memory).into_values() {
            self.hub.memory_gone();
            report(slab.remove(&self.machine, &mut self.slots));
        }
        for writing in std::mem::take(&mut made.writing).into_values() {
            self.logs.written(writing);
        }
        if let Some(reader) = made.log.take() {
            report(self.logs.leave(&self.machine, reader).map_err(kvm_errno));
        }
    }

    fn state(&self, state: VmState) -> Result<Vec<u8>, Errno> {
        let vm = self.machine.vm();
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map(|()| chip).map_err(errno)
        };
        Ok(match state {
            VmState::PrimaryPic | VmState::SecondaryPic => {
                // SAFETY: the chip that was asked for is a PIC.
                unsafe { chip(pic(state))?.chip.pic }.bytes().to_vec()
            }
            // SAFETY: the chip that was asked for is the IOAPIC.
            VmState::Ioapic => unsafe { chip(KVM_IRQCHIP_IOAPIC)?.chip.ioapic }.bytes().to_vec(),
            VmState::Pit => vm.get_pit2().map_err(errno)?.bytes().to_vec(),
            VmState::Clock => vm.get_clock().map_err(errno)?.bytes().to_vec(),
        })
    }

    fn set_state(&self, state: VmState, bytes: &[u8]) -> Result<(), Errno> {
        let vm = self.machine.vm();
        match state {
            VmState::PrimaryPic | VmState::SecondaryPic => {
                let mut chip = kvm_irqchip { chip_id: pic(state), ..Default::default() };
                chip.chip.pic = value::<kvm_pic_state>(bytes)?;
                vm.set_irqchip(&chip)
            }
            VmState::Ioapic => {
                let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
                chip.chip.ioapic = value::<kvm_ioapic_state>(bytes)?;
                vm.set_irqchip(&chip)
            }
            VmState::Pit => vm.set_pit2(&value::<kvm_pit_state2>(bytes)?),
            VmState::Clock => vm.set_clock(&value::<kvm_clock_data>(bytes)?),
        }
        .map_err(errno)
    }
}

fn value<T: Plain>(bytes: &[u8]) -> Result<T, Errno> {
    T::from_bytes(bytes).ok_or(Errno::EINVAL)
}

fn pic(state: VmState) -> u32 {
    if state == VmState::PrimaryPic { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE }
}

fn room(made: usize) -> Result<(), Errno> {
    if made < MADE { Ok(()) } else { Err(Errno::ENOSPC) }
}

fn copy(event: &EventFd) -> Result<OwnedFd, Errno> {
    event::fd(event).try_clone_to_owned().map_err(io_errno)
}

fn bytes(bytes: Vec<u8>) -> Result<Out, Errno> {
    let (payload, fd) = Payload::new(bytes).map_err(|_| Errno::ENOMEM)?;
    Ok(Out { answer: Answer::Bytes(payload), fds: fd.into_iter().collect() })
}

pub(super) fn io_errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn check_hint(hint: Option<&Hint>) -> Result<(), Errno> {
    match hint {
        Some(hint) if hint.address == 0 || hint.details.len() > MAX_HINT_DETAILS => {
            Err(Errno::EINVAL)
        }
        _ => Ok(()),
    }
}

fn entry(route: &IrqRoute) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: route.irq, ..Default::default() };
    match route.route {
        Route::Irqchip { irqchip, pin } => {
            entry.type_ = KVM_IRQ_ROUTING_IRQCHIP;
            entry.u.irqchip.irqchip = irqchip;
            entry.u.irqchip.pin = pin;
        }
        Route::Msi { address, data } => {
            entry.type_ = KVM_IRQ_ROUTING_MSI;
            entry.u.msi.address_lo = address as u32;
            entry.u.msi.address_hi = (address >> 32) as u32;
            entry.u.msi.data = data;
        }
    }
    entry
}
