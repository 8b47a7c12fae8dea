//! What runs inside Cellblock's device jails, and the protocol both sides share.
//!
//! A device process is the `cellblock` program started anew with `@cell` as its
//! first argument; [`cell::main`] is all it ever runs. It holds two sockets when
//! it starts: the cell channel (fd 3) and, for virtio devices, the vhost-user
//! socket (fd 4). Everything else arrives as file descriptors in the one
//! [`protocol::Hello`] message; it opens nothing by path.
//!
//! | module | what it holds |
//! |---|---|
//! | [`protocol`] | messages of the cell channel, and the register ring in shared memory |
//! | [`cell`] | the life of a device process: hello, jail, prepare, seal, serve |
//! | [`lazy`] | a process of a VM whose memory is still to come |
//! | [`blk`] | virtio-blk as a vhost-user back end |
//! | [`serial`] | a 16550 UART behind the register ring |

pub mod blk;
pub mod cell;
pub mod lazy;
pub mod protocol;
pub mod serial;
