//! The plugin's side: [`Vm`], a connection, and [`Vcpu`].

mod vcpu;
mod vm;

pub use vcpu::Vcpu;
pub use vm::{IoEvent, IrqEvent, Memory, SOCKET_VARIABLE, Vm};
