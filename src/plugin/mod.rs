//! Plugins: processes that take part in the run of the vCPUs, and make what the VM has.
//!
//! ```text
//!  plugin process          the VMM
//!   Vm   ── requests ────▶  server thread ─── Hub: who has which range, who wants which vCPU
//!   Vcpu ◀─ slot (shared ─▶ vCPU threads ──┘
//!            memory)
//! ```
//! * [`Hub`]: what vCPU threads and the server share.
//! * [`Session`]: one plugin, with all of its connections and all that it made.
//! * `tap`: a plugin's place in a vCPU's thread ([`crate::vcpu`]'s attendant).
//! * `seat`: the VMM's side of a slot; `orders`: what is done with a vCPU on a plugin's behalf.
//! * `part`: plugins in snapshots.
//! * `server`, `requests`: the thread that serves connections.
//!
//! # What a plugin cannot do
//! Hang the VMM: a vCPU that waits for it is in a pause's reach; neither the main loop nor the
//! server waits for it, and what it sends in is closed by threads that serve nobody
//! ([`cellblock_wire::closer`]). Use the VMM up: things, ranges, watches and fds have limits, for
//! one and for all. Be believed: what it writes into a slot is copied once and the copy checked; a message that
//! does not decode, or brings fds that nobody asked for, ends its sender's connections. Outlive its welcome: what an attached one held is released
//! when its last connection ends, and the vCPUs it stopped run on.

mod fds;
mod hub;
mod listen;
mod memory;
mod orders;
mod part;
mod ranges;
mod requests;
mod seat;
mod server;
mod session;
mod tap;
mod watches;

pub use hub::Hub;
pub use listen::{Arrived, AttachError, AttachSocket};
pub use part::{Answer as PartAnswer, Holder, OWNER};
pub use server::{Machinery, Network, Plugins, StartError};
pub use session::{Session, SessionError};
