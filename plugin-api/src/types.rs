//! What a plugin and the VMM speak about.

use std::net::Ipv4Addr;
use std::ops::Deref;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

/// Most details of a [`Hint`].
pub const MAX_HINT_DETAILS: usize = 32;

/// An address space of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Space {
    /// I/O ports.
    Port,
    /// Guest-physical addresses without memory.
    Mmio,
}

/// What a connection may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Rights {
    /// Stop vCPUs and look at everything.
    Observe,
    /// Change it as well.
    Control,
}

/// How guest memory is handed to those that attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryAccess {
    /// Not at all.
    None,
    /// To look at.
    ReadOnly,
    /// To look at and to change.
    ReadWrite,
}

/// A piece of guest memory, as an attached program maps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRegion {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where it starts in the memfd.
    pub offset: u64,
}

/// Where an interrupt goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Route {
    /// To a pin of an interrupt controller: 0 and 1 the PICs, 2 the IOAPIC.
    Irqchip {
        /// The controller.
        irqchip: u32,
        /// Its pin.
        pin: u32,
    },
    /// To a processor, by message.
    Msi {
        /// Message address.
        address: u64,
        /// Message data.
        data: u32,
    },
}

/// One line of the interrupt routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqRoute {
    /// The interrupt (GSI).
    pub irq: u32,
    /// Where it goes.
    pub route: Route,
}

/// On which accesses registers are sent along, without being asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hint {
    /// Address space of the access.
    pub space: Space,
    /// Its address.
    pub address: u64,
    /// Whether it is a write; without it, a read.
    pub on_write: bool,
    /// Tried in order; the first that matches decides. At most [`MAX_HINT_DETAILS`].
    pub details: Vec<HintDetail>,
}

/// Which further registers are sent when registers have certain values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HintDetail {
    /// Value of rax, if it matters.
    pub rax: Option<u64>,
    /// Value of rbx, if it matters.
    pub rbx: Option<u64>,
    /// Value of rcx, if it matters.
    pub rcx: Option<u64>,
    /// Value of rdx, if it matters.
    pub rdx: Option<u64>,
    /// Send the system registers.
    pub send_sregs: bool,
    /// Send the debug registers.
    pub send_debugregs: bool,
}

/// The VM's network interface.
#[derive(Debug)]
pub struct NetConfig {
    /// The TAP device.
    pub tap: OwnedFd,
    /// The host's address on it.
    pub host_ip: Ipv4Addr,
    /// The network's mask.
    pub netmask: Ipv4Addr,
    /// The host's hardware address on it.
    pub mac: [u8; 6],
}

/// Breakpoints and single steps of one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// Stop after every instruction.
    pub single_step: bool,
    /// Hardware breakpoints: linear addresses.
    pub breakpoints: [Option<u64>; 4],
}

/// The bytes of an access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data(Bytes);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Bytes {
    Few([u8; 8], u8),
    Many(Vec<u8>),
}

impl Data {
    /// A copy of `bytes`.
    pub fn new(bytes: &[u8]) -> Data {
        let mut few = [0; 8];
        Data(match few.get_mut(..bytes.len()) {
            Some(place) => {
                place.copy_from_slice(bytes);
                Bytes::Few(few, bytes.len() as u8)
            }
            None => Bytes::Many(bytes.to_vec()),
        })
    }
}

impl Deref for Data {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Few(bytes, len) => &bytes[..usize::from(*len)],
            Bytes::Many(bytes) => bytes,
        }
    }
}

/// An access of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Address space.
    pub space: Space,
    /// Address.
    pub address: u64,
    /// Direction.
    pub is_write: bool,
    /// The vCPU runs on and is not to be resumed: the next call is [`crate::Vcpu::wait`].
    pub no_resume: bool,
    /// What is written; as many zeroes as are read.
    pub data: Data,
}

/// What a vCPU reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is there and has not run yet.
    Init,
    /// An access to a reserved range.
    Access(Access),
    /// It has stopped on request.
    Paused {
        /// What the request gave.
        user: u64,
    },
    /// A Hyper-V hypercall: [`crate::Vcpu::set_hypercall_result`] answers it.
    HypervCall {
        /// The input value.
        input: u64,
        /// The parameters.
        params: [u64; 2],
    },
    /// The guest changed its Hyper-V interrupt controller.
    HypervSynic {
        /// The MSR it wrote.
        msr: u32,
        /// SCONTROL.
        control: u64,
        /// SIEFP.
        evt_page: u64,
        /// SIMP.
        msg_page: u64,
    },
    /// A breakpoint or single step that [`crate::Vcpu::set_guest_debug`] asked for.
    Debug {
        /// Linear address of the next instruction.
        pc: u64,
        /// DR6: what it was.
        dr6: u64,
        /// DR7.
        dr7: u64,
    },
    /// An access to a range that is watched: it reaches its device after the resume.
    Watched(Access),
}
