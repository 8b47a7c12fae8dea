//! The Cellblock virtual machine monitor, as a library.

pub mod bus;
pub mod cell;
pub mod cli;
pub mod control;
pub mod guest;
pub mod transport;
pub mod vcpu;
pub mod vm;
