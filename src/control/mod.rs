//! The control socket: how a running VM is paused, stopped and asked from outside.
//!
//! | module | what it holds |
//! |---|---|
//! | [`protocol`] | the messages, one JSON object a line, and their stable shape |
//! | [`socket`] | making a Unix socket at a path, and taking only our own away again |
//! | [`server`] | the VM's side, driven by the main loop without a thread |
//! | [`client`] | the command line's side, blocking with deadlines |

pub mod client;
mod fds;
pub mod protocol;
pub mod server;
pub mod socket;
