//! The messages between a plugin and the VMM: one [`Request`], then one [`Reply`].
//!
//! A message is a datagram of at most 64 KiB with file descriptors. What can be larger is a
//! [`Payload`], which then comes as a sealed memfd.

pub mod part;
mod payload;

use serde::{Deserialize, Serialize};

pub use self::payload::{MAX_PAYLOAD, Payload, PayloadError};
use crate::types::{Hint, IrqRoute, MemoryAccess, RamRegion, Rights, Space};

/// Rises with every change of the messages or of the slot.
pub const VERSION: u32 = 2;

/// Names what a plugin has made.
pub type Handle = u64;

/// What a plugin asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// First on a connection. Answered by [`Answer::Hello`].
    Hello {
        /// [`VERSION`] of the sender.
        version: u32,
    },
    /// A further connection for the same plugin: its socket comes with the answer.
    NewConnection,
    /// The eventfd that says the VM is ending, with the answer.
    ShutdownEvent,
    /// Answered by a flag.
    CheckExtension(u32),
    /// Of the VM; there is none that can be enabled.
    EnableCapability {
        /// The capability's number.
        cap: u32,
    },
    /// `kvm_cpuid_entry2`s that KVM can give a guest.
    SupportedCpuid,
    /// Those of them that KVM emulates.
    EmulatedCpuid,
    /// Numbers of the MSRs that make up a guest's state.
    MsrIndexList,
    /// The TAP device comes with the answer.
    NetConfig,
    /// Takes a range, or gives it back where `length` is 0.
    ReserveRange {
        /// Address space.
        space: Space,
        /// First address.
        start: u64,
        /// Bytes.
        length: u64,
        /// Writes are reported without the vCPU waiting.
        is_async: bool,
    },
    /// Reports accesses on their way to the device that has the range; length 0 ends that.
    WatchRange {
        /// Address space.
        space: Space,
        /// First address.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// Level of an interrupt line.
    SetIrq {
        /// The interrupt.
        irq: u32,
        /// Its level.
        active: bool,
    },
    /// A message-signalled interrupt.
    SignalMsi {
        /// Message address.
        address: u64,
        /// Message data.
        data: u32,
    },
    /// The whole routing table: [`routes_to_bytes`].
    SetIrqRouting(Payload),
    /// Registers to be sent along.
    SetHint(Option<Hint>),
    /// State of an interrupt controller or clock of the VM.
    GetState(VmState),
    /// Sets it, by the kernel's structure.
    SetState(VmState, Vec<u8>),
    /// Before the vCPUs exist.
    SetIdentityMapAddr(u32),
    /// Asks vCPUs to stop.
    PauseVcpus {
        /// Bit n is vCPU n: as many words as it takes.
        mask: Vec<u64>,
        /// Comes back in the event.
        user: u64,
    },
    /// Makes the vCPUs.
    Start,
    /// An eventfd that guest writes signal; it comes with the answer.
    CreateIoEvent {
        /// Address space.
        space: Space,
        /// Address.
        address: u64,
        /// Bytes of the write; 0 for any.
        length: u32,
        /// What has to be written.
        datamatch: Option<u64>,
    },
    /// Makes memory of the memfd that comes along.
    CreateMemory {
        /// Start in the memfd.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Guest-physical address.
        start: u64,
        /// Guest writes become accesses.
        read_only: bool,
        /// Written pages are recorded.
        dirty_log: bool,
    },
    /// Pages written since the last time.
    DirtyLog(Handle),
    /// An eventfd that raises an interrupt and one that tells of its end; both with the answer.
    CreateIrqEvent {
        /// The interrupt.
        irq: u32,
    },
    /// Undoes a creation.
    Destroy(Object, Handle),
    /// Guest memory of a VM that is attached to; its memfd comes with the answer.
    Memory {
        /// Every write to it will be told of by [`Request::Writing`].
        tells: bool,
    },
    /// That memory is going to be written to; [`Request::Destroy`] says that it has been.
    Writing {
        /// Where in the memfd.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Has pages of that memory noted that are written from now on, or no more.
    LogMemory(bool),
    /// Those pages, since the last time: a bit each.
    MemoryLog,
    /// Takes part in snapshots ([`part`]): the channel comes with the answer.
    TakePart {
        /// Tells programs that attached apart.
        name: String,
    },
}

/// What can be destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Object {
    /// Of [`Request::CreateIoEvent`].
    IoEvent,
    /// Of [`Request::CreateMemory`].
    Memory,
    /// Of [`Request::CreateIrqEvent`].
    IrqEvent,
    /// Of [`Request::Writing`].
    Writing,
}

/// State of the VM that is no vCPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// `kvm_pic_state` of the first.
    PrimaryPic,
    /// `kvm_pic_state` of the second.
    SecondaryPic,
    /// `kvm_ioapic_state`.
    Ioapic,
    /// `kvm_pit_state2`.
    Pit,
    /// `kvm_clock_data`.
    Clock,
}

/// What comes back: an error number where the request was refused.
pub type Reply = Result<Answer, i32>;

/// What a request was answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done,
    /// With the memfd of all slots, and a pipe that hangs up when the VMM has let go.
    Hello {
        /// How many vCPUs there are or will be.
        vcpus: u32,
        /// What this connection may do.
        rights: Rights,
    },
    /// Yes or no.
    Flag(bool),
    /// A structure, or several.
    Bytes(Payload),
    /// Something was made.
    Handle(Handle),
    /// Of the TAP device.
    Net {
        /// Address of the host.
        host_ip: [u8; 4],
        /// Mask of the network.
        netmask: [u8; 4],
        /// Hardware address of the host.
        mac: [u8; 6],
    },
    /// Guest memory.
    Memory {
        /// How the memfd may be used.
        access: MemoryAccess,
        /// What lies where.
        regions: Vec<RamRegion>,
    },
    /// With the channel, and what the plugin goes on from in a VM that was restored.
    Part(Option<Payload>),
}

const ROUTE: usize = 24;

/// A routing table as the bytes of a [`Payload`]: 24 for each line.
pub fn routes_to_bytes(routes: &[IrqRoute]) -> Vec<u8> {
    use crate::types::Route;
    let mut bytes = Vec::with_capacity(routes.len() * ROUTE);
    for IrqRoute { irq, route } in routes {
        let (kind, first, second) = match *route {
            Route::Irqchip { irqchip, pin } => (0u32, u64::from(irqchip), pin),
            Route::Msi { address, data } => (1, address, data),
        };
        bytes.extend(irq.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(first.to_le_bytes());
        bytes.extend(second.to_le_bytes());
        bytes.extend([0; 4]);
    }
    bytes
}

/// The table that [`routes_to_bytes`] made; `None` where the bytes are none.
pub fn routes_from_bytes(bytes: &[u8]) -> Option<Vec<IrqRoute>> {
    use crate::types::Route;
    let (lines, rest) = bytes.as_chunks::<ROUTE>();
    let word = |line: &[u8; ROUTE], at: usize| {
        u32::from_le_bytes([line[at], line[at + 1], line[at + 2], line[at + 3]])
    };
    let lines = lines.iter().map(|line| {
        let (low, high, second) = (word(line, 8), word(line, 12), word(line, 16));
        let route = match word(line, 4) {
            0 => Route::Irqchip { irqchip: low, pin: second },
            1 => Route::Msi { address: u64::from(high) << 32 | u64::from(low), data: second },
            _ => return None,
        };
        Some(IrqRoute { irq: word(line, 0), route })
    });
    rest.is_empty().then(|| lines.collect()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Route;

    #[test]
    fn a_routing_table_survives() {
        let routes = [
            IrqRoute { irq: 5, route: Route::Irqchip { irqchip: 2, pin: 5 } },
            IrqRoute { irq: 30, route: Route::Msi { address: 0xfee0_1000_0000_0001, data: 0x41 } },
        ];
        let mut bytes = routes_to_bytes(&routes);
        assert_eq!(routes_from_bytes(&bytes).unwrap(), routes);
        bytes[4] = 2;
        assert_eq!(routes_from_bytes(&bytes), None);
        assert_eq!(routes_from_bytes(&bytes[1..]), None);
    }
}
