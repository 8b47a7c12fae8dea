//! The ground every Cellblock process stands on: bounded messages with file
//! descriptors over `SOCK_SEQPACKET` sockets, and shared memory that cannot be
//! resized behind a reader's back.
//!
//! Nothing here knows what a message means. The spawner's requests, the cell
//! protocol and the plugin protocol are serde types of other crates; this crate
//! bounds them, encodes them and moves them.

mod channel;
pub mod closer;
mod codec;
pub mod futex;
pub mod membarrier;
mod shm;
mod uffd;

pub use channel::{Channel, ChannelError, MAX_FDS, MAX_MESSAGE};
pub use codec::{CodecError, decode, decode_within, encode, encode_within};
pub use shm::{Access, Mapping, ShmError, check_sealed, published_memfd, sealed_memfd};
pub use uffd::Uffd;
