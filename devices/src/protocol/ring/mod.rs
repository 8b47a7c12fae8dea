//! The register ring: how vCPUs reach a register device in another process.
//!
//! One sealed memfd of [`RING_BYTES`]. Every register access of the guest is one
//! 64-bit entry in a single-consumer ring; the vCPU threads of the VMM publish
//! ([`Producer`]), the device process takes out ([`Consumer`]). A write is posted:
//! the vCPU goes on at once. A read is an entry too, so that the order of all
//! accesses is the order in which they were published; its answer comes back in
//! the reply slot of the vCPU that asked.
//!
//! | offset | word | written by |
//! |---|---|---|
//! | 0 | `tail`: entries published so far, modulo 2^32 | VMM |
//! | 64 | `head`: entries finished so far, modulo 2^32; also the futex of those who wait for room | device |
//! | 128 | `sleeping`: 1 while the device waits for its doorbell | both |
//! | 192 | `full`: 1 when somebody waits for room | both |
//! | 4096 + 64 v | reply of vCPU v: ticket in the upper 24 bits, value in the lower 8; a futex | device |
//! | 4096 + 64 v + 32 | 1 while vCPU v sleeps on its reply | VMM |
//! | 8192 + 8 i | entry i: ticket 63..32, vCPU 31..24, kind 23..16, offset 15..8, value 7..0 | VMM |
//!
//! # Who sleeps, who wakes
//!
//! A system call to wake the other side is made only when it sleeps. Three times
//! the same argument makes that safe. The sleeper stores "I sleep", has a
//! sequentially consistent fence, then looks once more for what it waits for; the
//! waker stores what is waited for, has such a fence, then looks whether anybody
//! sleeps. The two fences are ordered one way or the other: either the sleeper's
//! last look sees the news, or the waker sees the sleeper. Futexes then close the
//! gap between that last look and the sleep by comparing the word once more in the
//! kernel; the doorbell, an eventfd, closes it by staying readable.
//!
//! | sleeper | says so in | waits for | waker |
//! |---|---|---|---|
//! | device | `sleeping` | `tail`, by the doorbell | the vCPU that publishes |
//! | vCPU that reads | its reply slot | its reply word | the device |
//! | vCPU that finds the ring full | `full` | `head` | the device, once half of the ring is free |
//!
//! A sleeping vCPU waits with `futex_waitv` on the shared word *and* on a word in
//! private memory of the VMM, so that [`Producer::kick`] reaches it whatever the
//! device does to the shared page, and only for slices of a bounded length.
//!
//! # Trust
//!
//! Neither side believes the page. The VMM takes only `head` and the replies from
//! it: a `head` that went backwards or beyond `tail` is a [`Fault`], after which
//! the device counts as dead; a reply counts only under the ticket of the read
//! that waits. Slots and `tail` are kept by the VMM in private memory. The device
//! checks `tail` and every entry.
//!
//! The device commits an access (moves `head`) after it has carried it out, so a
//! successor of a killed device process goes on with the first access that may not
//! have been carried out.

mod consumer;
mod producer;
#[cfg(test)]
mod tests;

pub use consumer::{Access, Consumer, Corrupt, Reply};
pub use producer::{Counters, Fault, Interrupted, Producer, ReadTicket};

use std::sync::atomic::{AtomicU32, AtomicU64};

use cellblock_wire::Mapping;
use nix::errno::Errno;

/// Size of the ring's memfd in bytes.
pub const RING_BYTES: usize = ENTRIES_AT + SLOTS as usize * 8;
/// The most vCPUs that can read through one ring.
pub const MAX_VCPUS: usize = 64;
/// Entries the ring holds; a power of two.
pub const SLOTS: u32 = 1024;

const REPLIES_AT: usize = 4096;
const REPLY_BYTES: usize = 64;
const ENTRIES_AT: usize = REPLIES_AT + MAX_VCPUS * REPLY_BYTES;

/// Tickets have 24 bits; 0 is never given, so an untouched slot answers nothing.
const TICKETS: u32 = 1 << 24;

/// A ring that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The mapping is too small or cannot be written.
    #[error("register ring needs a writable mapping of {RING_BYTES} bytes")]
    Mapping,
    /// More vCPUs than reply slots.
    #[error("{0} vCPUs are more than the {MAX_VCPUS} a register ring serves")]
    TooManyVcpus(usize),
    /// The kernel cannot wait on two futexes at once.
    #[error("futex_waitv is not available: Linux 5.16 or newer is needed")]
    NoFutexWaitv(#[source] Errno),
    /// The eventfd that reports faults could not be made.
    #[error("creating the fault event of a register ring")]
    FaultEvent(#[source] Errno),
}

/// The words of the page, by name.
struct Page(Mapping);

impl Page {
    fn new(mapping: Mapping) -> Result<Page, RingError> {
        if mapping.len() < RING_BYTES || mapping.access() != cellblock_wire::Access::ReadWrite {
            return Err(RingError::Mapping);
        }
        Ok(Page(mapping))
    }

    fn tail(&self) -> &AtomicU32 {
        self.0.u32(0)
    }

    fn head(&self) -> &AtomicU32 {
        self.0.u32(64)
    }

    fn sleeping(&self) -> &AtomicU32 {
        self.0.u32(128)
    }

    fn full(&self) -> &AtomicU32 {
        self.0.u32(192)
    }

    fn reply(&self, vcpu: usize) -> &AtomicU32 {
        self.0.u32(REPLIES_AT + vcpu * REPLY_BYTES)
    }

    fn reader_sleeps(&self, vcpu: usize) -> &AtomicU32 {
        self.0.u32(REPLIES_AT + vcpu * REPLY_BYTES + 32)
    }

    fn entry(&self, index: u32) -> &AtomicU64 {
        self.0.u64(ENTRIES_AT + (index % SLOTS) as usize * 8)
    }
}

const KIND_WRITE: u8 = 1;
const KIND_READ: u8 = 2;

fn write_entry(vcpu: usize, offset: u8, value: u8) -> u64 {
    u64::from(u32::from_be_bytes([vcpu as u8, KIND_WRITE, offset, value]))
}

fn read_entry(vcpu: usize, offset: u8, ticket: u32) -> u64 {
    u64::from(ticket) << 32 | u64::from(u32::from_be_bytes([vcpu as u8, KIND_READ, offset, 0]))
}

/// What a reply word says: the ticket it answers, and the value.
fn reply_word(ticket: u32, value: u8) -> u32 {
    ticket << 8 | u32::from(value)
}
