//! A connection to the VMM, and what concerns the VM as a whole.

use std::env;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use cellblock_wire::{Access, Channel, Mapping};
use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_ioapic_state, kvm_pic_state, kvm_pit_state2,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::part::Part;
use super::vcpu::Vcpu;
use crate::error::{Error, refused};
use crate::plain::Plain;
use crate::slot::Slots;
use crate::types::{Hint, IrqRoute, NetConfig, Rights, Space};
use crate::wire::{
    Answer, Handle, Object, Payload, Reply, Request, VERSION, VmState, routes_to_bytes,
};

/// The environment variable that names a plugin's socket.
pub const SOCKET_VARIABLE: &str = "CROSVM_SOCKET";

/// A connection to the VMM.
///
/// All connections that were made from one another are a family: they share vCPUs and all that
/// was made through them.
#[derive(Debug)]
pub struct Vm {
    channel: Mutex<Channel>,
    family: Arc<Family>,
}

#[derive(Debug)]
struct Family {
    vcpus: Vec<Arc<Vcpu>>,
    rights: Rights,
}

/// An eventfd that guest writes signal.
#[derive(Debug)]
pub struct IoEvent {
    handle: Handle,
    fd: OwnedFd,
}

/// An eventfd that raises an interrupt, and one that says when the guest has handled it.
#[derive(Debug)]
pub struct IrqEvent {
    handle: Handle,
    fd: OwnedFd,
    resample: OwnedFd,
}

/// Guest memory that a plugin has made.
#[derive(Debug)]
pub struct Memory {
    handle: Handle,
    length: u64,
}

impl IoEvent {
    /// Readable when the guest has written.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl IrqEvent {
    /// Writing to it raises the interrupt.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Readable when the guest has ended the interrupt.
    pub fn resample_fd(&self) -> BorrowedFd<'_> {
        self.resample.as_fd()
    }
}

impl Memory {
    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of its dirty log: a bit for each page.
    pub fn log_bytes(&self) -> usize {
        self.length.div_ceil(4096).div_ceil(8) as usize
    }
}

impl Vm {
    /// Connects a plugin to the VMM that started it.
    ///
    /// # Errors
    /// [`Error::NotAPlugin`] and [`Error::BadSocket`] where this process was not started as one.
    pub fn connect() -> Result<Vm, Error> {
        let text = env::var_os(SOCKET_VARIABLE).ok_or(Error::NotAPlugin)?;
        let number = text.to_str().and_then(|text| text.parse::<RawFd>().ok());
        let number = number.filter(|fd| *fd >= 0).ok_or(Error::BadSocket)?;
        Vm::from_fd(duplicate(number)?)
    }

    /// Attaches to a running VM by the socket that its `--plugin-socket` made.
    ///
    /// # Errors
    /// [`Error::Attach`] where nobody listens or this user may not connect.
    pub fn attach(path: &Path) -> Result<Vm, Error> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None);
        let socket = socket.map_err(Error::Attach)?;
        let address = UnixAddr::new(path).map_err(Error::Attach)?;
        connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address).map_err(Error::Attach)?;
        Vm::from_fd(socket)
    }

    /// Takes over a connected socket.
    ///
    /// # Errors
    /// When the VMM does not answer as it should.
    pub fn from_fd(socket: OwnedFd) -> Result<Vm, Error> {
        let channel = Channel::from_fd(socket);
        let (answer, fds) = ask(&channel, &Request::Hello { version: VERSION }, &[])?;
        let (vcpus, rights) = match answer.map_err(|errno| refusal("greeting the VMM", errno))? {
            Answer::Hello { vcpus, rights } => (vcpus, rights),
            _ => return Err(STRANGE),
        };
        let [memory, life] = fds.try_into().map_err(|_| STRANGE)?;
        let mapping = Mapping::new(&memory, Slots::bytes(vcpus), Access::ReadWrite);
        let slots = Slots::new(mapping.map_err(Error::Memory)?, vcpus);
        let life = Arc::new(life);
        let vcpus = (0..vcpus)
            .filter_map(|id| Some(Arc::new(Vcpu::new(id, slots.slot(id)?, life.clone()))))
            .collect();
        let family = Arc::new(Family { vcpus, rights });
        Ok(Vm { channel: Mutex::new(channel), family })
    }

    /// A further connection, for another thread.
    ///
    /// # Errors
    /// When the VMM refuses it: EMFILE where there are too many.
    pub fn new_connection(&self) -> Result<Vm, Error> {
        let (_, mut fds) = self.ask("making a connection", &Request::NewConnection, &[])?;
        let channel = Channel::from_fd(fds.pop().ok_or(STRANGE)?);
        Ok(Vm { channel: Mutex::new(channel), family: self.family.clone() })
    }

    /// What this connection may do.
    pub fn rights(&self) -> Rights {
        self.family.rights
    }

    /// How many vCPUs there are, or will be after [`Vm::start`].
    pub fn vcpu_count(&self) -> u32 {
        self.family.vcpus.len() as u32
    }

    /// A vCPU: the same one on every connection of the family.
    ///
    /// # Errors
    /// ENOENT where there is none of that number.
    pub fn vcpu(&self, id: u32) -> Result<Arc<Vcpu>, Error> {
        let vcpu = self.family.vcpus.get(id as usize).cloned();
        vcpu.ok_or(Error::Refused { what: "looking a vCPU up", errno: Errno::ENOENT })
    }

    /// An eventfd that becomes readable when the VM ends: a new descriptor each time. A plugin may
    /// write to it to wake itself.
    ///
    /// # Errors
    /// When the VMM cannot be asked.
    pub fn shutdown_event(&self) -> Result<OwnedFd, Error> {
        self.ask_fd("getting the shutdown event", &Request::ShutdownEvent)
    }

    /// Whether KVM has an extension: whether it answers exactly 1.
    ///
    /// # Errors
    /// When the VMM cannot be asked.
    pub fn check_extension(&self, extension: u32) -> Result<bool, Error> {
        let request = Request::CheckExtension(extension);
        match self.ask("asking for an extension", &request, &[])?.0 {
            Answer::Flag(has) => Ok(has),
            _ => Err(STRANGE),
        }
    }

    /// Enables a capability of the VM: there is none that can be enabled.
    ///
    /// # Errors
    /// EINVAL.
    pub fn enable_capability(&self, cap: u32, _flags: u32, _args: [u64; 4]) -> Result<(), Error> {
        self.done("enabling a capability", &Request::EnableCapability { cap })
    }

    /// What CPUID can say to this guest.
    ///
    /// # Errors
    /// KVM's.
    pub fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        let bytes = self.bytes("listing the supported cpuid", &Request::SupportedCpuid)?;
        Ok(Plain::all_from_bytes(&bytes))
    }

    /// What of CPUID KVM emulates.
    ///
    /// # Errors
    /// KVM's.
    pub fn emulated_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        let bytes = self.bytes("listing the emulated cpuid", &Request::EmulatedCpuid)?;
        Ok(Plain::all_from_bytes(&bytes))
    }

    /// Numbers of the MSRs that are part of a vCPU's state.
    ///
    /// # Errors
    /// KVM's.
    pub fn msr_index_list(&self) -> Result<Vec<u32>, Error> {
        let bytes = self.bytes("listing the msrs", &Request::MsrIndexList)?;
        Ok(Plain::all_from_bytes(&bytes))
    }

    /// The network interface that the VMM was given.
    ///
    /// # Errors
    /// ENODATA where it was given none.
    pub fn net_config(&self) -> Result<NetConfig, Error> {
        let (answer, mut fds) = self.ask("getting the network", &Request::NetConfig, &[])?;
        match (answer, fds.pop()) {
            (Answer::Net { host_ip, netmask, mac }, Some(tap)) => {
                Ok(NetConfig { tap, host_ip: host_ip.into(), netmask: netmask.into(), mac })
            }
            _ => Err(STRANGE),
        }
    }

    /// Takes the `length` addresses from `start` on: accesses that begin there become events.
    /// Length 0 gives back the range that starts exactly there.
    ///
    /// # Errors
    /// EPERM where part of it is taken, EINVAL where it is past the end of the address space,
    /// ENOENT where there is nothing to give back.
    pub fn reserve_range(&self, space: Space, start: u64, length: u64) -> Result<(), Error> {
        let is_async = false;
        self.done("reserving a range", &Request::ReserveRange { space, start, length, is_async })
    }

    /// As [`Vm::reserve_range`], for writes that the vCPU does not wait for. Reads give 0.
    ///
    /// # Errors
    /// As [`Vm::reserve_range`].
    pub fn reserve_async_write_range(
        &self,
        space: Space,
        start: u64,
        length: u64,
    ) -> Result<(), Error> {
        let is_async = true;
        self.done("reserving a range", &Request::ReserveRange { space, start, length, is_async })
    }

    /// Reports accesses that begin in a range before they reach the device it belongs to, or
    /// nobody. Length 0 ends that for the range that starts exactly there.
    ///
    /// # Errors
    /// EINVAL where it is past the end of the address space, ENOENT where there is nothing to end.
    pub fn watch_range(&self, space: Space, start: u64, length: u64) -> Result<(), Error> {
        self.done("watching a range", &Request::WatchRange { space, start, length })
    }

    /// Sets the level of an interrupt line.
    ///
    /// # Errors
    /// KVM's.
    pub fn set_irq(&self, irq: u32, active: bool) -> Result<(), Error> {
        self.done("setting an interrupt line", &Request::SetIrq { irq, active })
    }

    /// Sends a message-signalled interrupt.
    ///
    /// # Errors
    /// KVM's.
    pub fn signal_msi(&self, address: u64, data: u32) -> Result<(), Error> {
        self.done("sending an interrupt message", &Request::SignalMsi { address, data })
    }

    /// Replaces the interrupt routing table.
    ///
    /// # Errors
    /// KVM's.
    pub fn set_irq_routing(&self, routes: &[IrqRoute]) -> Result<(), Error> {
        let (payload, fd) = Payload::new(routes_to_bytes(routes))
            .map_err(|_| refused("routing interrupts")(Errno::ENOMEM))?;
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        self.ask("routing interrupts", &Request::SetIrqRouting(payload), &fds).map(drop)
    }

    /// Has registers sent along with the accesses the hint describes.
    ///
    /// # Errors
    /// EINVAL for address 0 and for too many details.
    pub fn set_hypercall_hint(&self, hint: Option<&Hint>) -> Result<(), Error> {
        self.done("setting a hint", &Request::SetHint(hint.cloned()))
    }

    /// State of an interrupt controller.
    ///
    /// # Errors
    /// KVM's.
    pub fn pic_state(&self, primary: bool) -> Result<kvm_pic_state, Error> {
        self.state("getting the state of a pic", pic(primary))
    }

    /// Sets the state of an interrupt controller.
    ///
    /// # Errors
    /// KVM's.
    pub fn set_pic_state(&self, primary: bool, state: &kvm_pic_state) -> Result<(), Error> {
        self.set_state("setting the state of a pic", pic(primary), state)
    }

    /// State of the IOAPIC.
    ///
    /// # Errors
    /// KVM's.
    pub fn ioapic_state(&self) -> Result<kvm_ioapic_state, Error> {
        self.state("getting the state of the ioapic", VmState::Ioapic)
    }

    /// Sets the state of the IOAPIC.
    ///
    /// # Errors
    /// KVM's.
    pub fn set_ioapic_state(&self, state: &kvm_ioapic_state) -> Result<(), Error> {
        self.set_state("setting the state of the ioapic", VmState::Ioapic, state)
    }

    /// State of the interval timer.
    ///
    /// # Errors
    /// KVM's.
    pub fn pit_state(&self) -> Result<kvm_pit_state2, Error> {
        self.state("getting the state of the timer", VmState::Pit)
    }

    /// Sets the state of the interval timer.
    ///
    /// # Errors
    /// KVM's.
    pub fn set_pit_state(&self, state: &kvm_pit_state2) -> Result<(), Error> {
        self.set_state("setting the state of the timer", VmState::Pit, state)
    }

    /// The guest's clock.
    ///
    /// # Errors
    /// KVM's.
    pub fn clock(&self) -> Result<kvm_clock_data, Error> {
        self.state("getting the clock", VmState::Clock)
    }

    /// Sets the guest's clock.
    ///
    /// # Errors
    /// KVM's.
    pub fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), Error> {
        self.set_state("setting the clock", VmState::Clock, clock)
    }

    /// Places KVM's identity map, before [`Vm::start`].
    ///
    /// # Errors
    /// KVM's.
    pub fn set_identity_map_addr(&self, address: u32) -> Result<(), Error> {
        self.done("placing the identity map", &Request::SetIdentityMapAddr(address))
    }

    /// Asks the first 64 vCPUs of `mask` to stop: each reports [`crate::Event::Paused`] with
    /// `user`. A request that was not reported yet is replaced. Bits without a vCPU are ignored.
    ///
    /// # Errors
    /// When the VMM cannot be asked.
    pub fn pause_vcpus(&self, mask: u64, user: u64) -> Result<(), Error> {
        self.pause_many(&[mask], user)
    }

    /// As [`Vm::pause_vcpus`], for more than 64: bit 0 of the second word is vCPU 64.
    ///
    /// # Errors
    /// When the VMM cannot be asked.
    pub fn pause_many(&self, mask: &[u64], user: u64) -> Result<(), Error> {
        self.done("pausing vCPUs", &Request::PauseVcpus { mask: mask.to_vec(), user })
    }

    /// Makes the vCPUs. Each reports [`crate::Event::Init`].
    ///
    /// # Errors
    /// EINVAL the second time.
    pub fn start(&self) -> Result<(), Error> {
        self.done("starting the vCPUs", &Request::Start)
    }

    /// An eventfd that a guest write of `length` bytes (0: of any length) to `address` signals,
    /// instead of becoming an event. With `datamatch` only the write of that value does.
    ///
    /// # Errors
    /// EINVAL for another length than 0, 1, 2, 4, 8; KVM's.
    pub fn create_io_event(
        &self,
        space: Space,
        address: u64,
        length: u32,
        datamatch: Option<u64>,
    ) -> Result<IoEvent, Error> {
        let request = Request::CreateIoEvent { space, address, length, datamatch };
        match self.ask("creating an io event", &request, &[])? {
            (Answer::Handle(handle), mut fds) => {
                Ok(IoEvent { handle, fd: fds.pop().ok_or(STRANGE)? })
            }
            _ => Err(STRANGE),
        }
    }

    /// Ends an io event.
    ///
    /// # Errors
    /// ENOENT where that has been done.
    pub fn destroy_io_event(&self, event: &IoEvent) -> Result<(), Error> {
        self.done("destroying an io event", &Request::Destroy(Object::IoEvent, event.handle))
    }

    /// Guest memory from `start` on, which is `length` bytes of the memfd `fd` from `offset` on.
    ///
    /// # Errors
    /// In this order: EINVAL for an offset or a length that is no multiple of 4096; EBADF; EINVAL
    /// for what is no memfd; EPERM for one without F_SEAL_SHRINK; EOVERFLOW; EINVAL past the
    /// memfd's end and for length 0; EEXIST where there is memory already.
    #[allow(clippy::too_many_arguments)] // the interface has as many
    pub fn create_memory(
        &self,
        fd: impl AsFd,
        offset: u64,
        length: u64,
        start: u64,
        read_only: bool,
        dirty_log: bool,
    ) -> Result<Memory, Error> {
        let request = Request::CreateMemory { offset, length, start, read_only, dirty_log };
        match self.ask("creating memory", &request, &[fd.as_fd()])?.0 {
            Answer::Handle(handle) => Ok(Memory { handle, length }),
            _ => Err(STRANGE),
        }
    }

    /// Takes memory away from the guest.
    ///
    /// # Errors
    /// ENOENT where that has been done.
    pub fn destroy_memory(&self, memory: &Memory) -> Result<(), Error> {
        self.done("destroying memory", &Request::Destroy(Object::Memory, memory.handle))
    }

    /// A bit for each page that was written since the last time, lowest first.
    ///
    /// # Errors
    /// ENOENT for memory without a dirty log.
    pub fn dirty_log(&self, memory: &Memory) -> Result<Vec<u8>, Error> {
        self.bytes("reading a dirty log", &Request::DirtyLog(memory.handle))
    }

    /// An eventfd that raises interrupt `irq`.
    ///
    /// # Errors
    /// KVM's.
    pub fn create_irq_event(&self, irq: u32) -> Result<IrqEvent, Error> {
        match self.ask("creating an irq event", &Request::CreateIrqEvent { irq }, &[])? {
            (Answer::Handle(handle), fds) => {
                let [fd, resample] = fds.try_into().map_err(|_| STRANGE)?;
                Ok(IrqEvent { handle, fd, resample })
            }
            _ => Err(STRANGE),
        }
    }

    /// Ends an irq event.
    ///
    /// # Errors
    /// ENOENT where that has been done.
    pub fn destroy_irq_event(&self, event: &IrqEvent) -> Result<(), Error> {
        self.done("destroying an irq event", &Request::Destroy(Object::IrqEvent, event.handle))
    }

    /// Takes part in snapshots of the VM from now on. To be called before [`Vm::start`]; where the
    /// VM was restored, [`Part::take_restored`] has the state to go on from. `name` tells programs
    /// that attached apart.
    ///
    /// # Errors
    /// EALREADY the second time, EEXIST for a name that is taken, EINVAL for one that is none.
    pub fn take_part(&self, name: &str) -> Result<Part, Error> {
        let request = Request::TakePart { name: name.into() };
        let (answer, fds) = self.ask("taking part in snapshots", &request, &[])?;
        let Answer::Part(restored) = answer else { return Err(STRANGE) };
        let mut fds = fds.into_iter();
        let channel = fds.next().ok_or(STRANGE)?;
        let memory = fds.next();
        let restored = restored.map(|state| state.take(memory.as_ref().map(|fd| fd.as_fd())));
        Ok(Part::new(channel, restored.transpose().map_err(|_| STRANGE)?))
    }

    fn state<T: Plain>(&self, what: &'static str, state: VmState) -> Result<T, Error> {
        T::from_bytes(&self.bytes(what, &Request::GetState(state))?).ok_or(STRANGE)
    }

    fn set_state<T: Plain>(&self, what: &'static str, of: VmState, to: &T) -> Result<(), Error> {
        self.done(what, &Request::SetState(of, to.bytes().to_vec()))
    }

    pub(super) fn bytes(&self, what: &'static str, request: &Request) -> Result<Vec<u8>, Error> {
        match self.ask(what, request, &[])? {
            (Answer::Bytes(payload), fds) => {
                payload.take(fds.last().map(|fd| fd.as_fd())).map_err(|_| STRANGE)
            }
            _ => Err(STRANGE),
        }
    }

    pub(super) fn done(&self, what: &'static str, request: &Request) -> Result<(), Error> {
        self.ask(what, request, &[]).map(drop)
    }

    fn ask_fd(&self, what: &'static str, request: &Request) -> Result<OwnedFd, Error> {
        self.ask(what, request, &[])?.1.pop().ok_or(STRANGE)
    }

    pub(super) fn ask(
        &self,
        what: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>), Error> {
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let (reply, fds) = ask(&channel, request, fds)?;
        Ok((reply.map_err(|errno| refusal(what, errno))?, fds))
    }
}

pub(super) const STRANGE: Error =
    Error::Protocol("the VMM answered something else than it was asked");

fn ask(
    channel: &Channel,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<(Reply, Vec<OwnedFd>), Error> {
    channel.send(request, fds)?;
    Ok(channel.recv()?)
}

fn refusal(what: &'static str, errno: i32) -> Error {
    Error::Refused { what, errno: Errno::from_raw(errno) }
}

fn pic(primary: bool) -> VmState {
    if primary { VmState::PrimaryPic } else { VmState::SecondaryPic }
}

/// A copy of the socket that the VMM left in this process.
#[allow(unsafe_code)] // a descriptor known by its number only
fn duplicate(number: RawFd) -> Result<OwnedFd, Error> {
    use std::os::fd::FromRawFd;
    // SAFETY: borrowed for the duplication only, which fails where there is no such descriptor.
    let given = unsafe { BorrowedFd::borrow_raw(number) };
    let copy = fcntl(given, FcntlArg::F_DUPFD_CLOEXEC(3)).map_err(|_| Error::BadSocket)?;
    // SAFETY: the kernel gave it to us just now.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
