//! How plugins and outside tools control a Cellblock VM.
//!
//! A **plugin** is a process of its own that the VMM starts, or that attaches to a running VM. It
//! answers port and memory accesses, stops and inspects vCPUs, and makes memory and interrupts.
//!
//! ```no_run
//! use cellblock_plugin_api::{Event, Space, Vm};
//!
//! let vm = Vm::connect()?;
//! vm.reserve_range(Space::Port, 0x500, 1)?;
//! let vcpu = vm.vcpu(0)?;
//! vm.start()?;
//! loop {
//!     match vcpu.wait()? {
//!         Event::Access(access) if !access.is_write => vcpu.answer(&[0x2a])?,
//!         Event::Paused { .. } => break,
//!         _ => {}
//!     }
//!     vcpu.resume()?;
//! }
//! # Ok::<(), cellblock_plugin_api::Error>(())
//! ```
//!
//! # Two ways to the VMM
//! | what | how | cost |
//! |---|---|---|
//! | the VM: memory, ranges, interrupts | a message and its answer over a socket ([`wire`]) | two system calls |
//! | a vCPU: events, registers | a page in shared memory ([`slot`]) | none while both sides are awake |
//!
//! # Rules
//! * The first event of each vCPU is [`Event::Init`]; none runs before all were resumed from it.
//! * The state of a vCPU can be read and set between [`Vcpu::wait`] and [`Vcpu::resume`] only.
//! * General, system and debug registers that are set take effect at the resume; what KVM has
//!   against them is the result of the next [`Vcpu::wait`], which leaves the event for the one
//!   after.
//! * [`Vm`] and [`Vcpu`] may be shared by threads. What two threads ask of one of them is done one
//!   after the other.

mod client;
mod error;
mod plain;
pub mod slot;
mod spin;
mod types;
pub mod wire;

pub use cellblock_wire::futex::{wait_either, wake_private, wake_shared};
pub use client::{GuestMemory, IoEvent, IrqEvent, Memory, Moment, Part, SOCKET_VARIABLE, Vcpu, Vm};
pub use error::Error;
pub use plain::Plain;
pub use spin::Spin;
pub use types::{
    Access, Data, Event, GuestDebug, Hint, HintDetail, IrqRoute, MAX_HINT_DETAILS, MemoryAccess,
    NetConfig, RamRegion, Rights, Route, Space,
};
