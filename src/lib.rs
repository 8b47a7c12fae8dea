//! The Cellblock virtual machine monitor, as a library.

pub mod bus;
pub mod cell;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod demo;
pub mod event;
pub mod gdb;
pub mod guest;
pub mod logging;
pub mod open_files;
pub mod plugin;
pub mod plugin_process;
pub mod pool;
pub mod remedy;
mod slice;
pub mod snapshot;
pub mod spec;
pub mod terminal;
mod throttle;
pub mod transport;
pub mod vcpu;
pub mod vhost_user_blk;
pub mod vm;
pub mod vmm;
