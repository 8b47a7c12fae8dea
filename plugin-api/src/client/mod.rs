//! The plugin's side: [`Vm`], a connection, and [`Vcpu`].

mod memory;
mod part;
mod vcpu;
mod vm;

pub use memory::GuestMemory;
pub use part::{Moment, Part};
pub use vcpu::Vcpu;
pub use vm::{IoEvent, IrqEvent, Memory, SOCKET_VARIABLE, Vm};
