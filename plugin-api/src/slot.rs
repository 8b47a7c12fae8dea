//! The shared memory of a plugin and a vCPU thread.
//!
//! Each vCPU has a slot of [`SLOT`] bytes in one memfd that the VMM makes and seals. Either side
//! trusts nothing in it: what the other wrote is copied once, and the copy is checked.
//!
//! ```text
//! VMM → plugin   an event: its facts, its data, registers sent along; then EVENT_SEQ
//!                async writes: an entry of the ring; then ASYNC_TAIL
//!                the answer to an order: its data; then REPLY_SEQ
//!                after each: NEWS rises, and is woken if the plugin says that it sleeps
//! plugin → VMM   registers to be set, the data of a read; then RESUME_SEQ
//!                an order (a vCPU call): its data; then ORDER_SEQ
//!                after each: CALLS rises, and is woken if the VMM says that it sleeps
//! ```
//! A sequence number is written last and read first, so that what it tells of is there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use cellblock_wire::Mapping;
use cellblock_wire::futex::wake_shared;

/// Bytes of one vCPU's slot.
pub const SLOT: usize = 0x13000;
/// Most bytes of an event's data: a page, as KVM has for string instructions.
pub const MAX_DATA: usize = 0x1000;
/// Most bytes of an order or of its answer.
pub const MAX_ORDER: usize = 0x10000;
/// Entries of the ring of async writes.
pub const ASYNC_ENTRIES: u32 = 128;

/// Offsets in a slot. Words that one side writes are in lines of their own.
#[allow(missing_docs)] // the module says what they are for
pub mod at {
    // Written by the VMM.
    pub const NEWS: usize = 0x00;
    pub const VMM_SLEEPS: usize = 0x04;
    pub const EVENT_SEQ: usize = 0x08;
    pub const REPLY_SEQ: usize = 0x0c;
    pub const REPLY_ERRNO: usize = 0x10;
    pub const REPLY_LEN: usize = 0x14;
    pub const ASYNC_TAIL: usize = 0x18;
    pub const CLOSED: usize = 0x1c;
    /// The errno of the last resume's sets, and how many such errors there were.
    pub const SET_ERRNO: usize = 0x20;
    pub const SET_ERRORS: usize = 0x24;
    // The event.
    pub const KIND: usize = 0x40;
    pub const FLAGS: usize = 0x44;
    pub const LEN: usize = 0x48;
    pub const CACHED: usize = 0x4c;
    /// Address, user value, or whatever the kind of event has.
    pub const WORDS: usize = 0x50;
    // Written by the plugin.
    pub const CALLS: usize = 0x80;
    pub const PLUGIN_SLEEPS: usize = 0x84;
    pub const RESUME_SEQ: usize = 0x88;
    pub const ORDER_SEQ: usize = 0x8c;
    pub const ORDER: usize = 0x90;
    pub const ORDER_LEN: usize = 0x94;
    pub const ASYNC_HEAD: usize = 0x98;
    /// Which of the registers below are to be set.
    pub const SETS: usize = 0x9c;
    /// Of a hypercall.
    pub const RESULT: usize = 0xa0;
    pub const REGS: usize = 0x100;
    pub const SREGS: usize = 0x1c0;
    pub const DEBUGREGS: usize = 0x300;
    pub const SET_REGS: usize = 0x400;
    pub const SET_SREGS: usize = 0x4c0;
    pub const SET_DEBUGREGS: usize = 0x600;
    pub const DATA: usize = 0x1000;
    pub const ASYNC: usize = 0x2000;
    pub const ORDER_DATA: usize = 0x3000;
}

/// Bits of `CACHED` and `SETS`.
#[allow(missing_docs)]
pub mod registers {
    pub const REGS: u32 = 1;
    pub const SREGS: u32 = 2;
    pub const DEBUGREGS: u32 = 4;
}

/// Values of `KIND`.
#[allow(missing_docs)]
pub mod kind {
    pub const INIT: u32 = 0;
    pub const ACCESS: u32 = 1;
    pub const PAUSED: u32 = 2;
    pub const HYPERV_CALL: u32 = 3;
    pub const HYPERV_SYNIC: u32 = 4;
    pub const DEBUG: u32 = 5;
    pub const WATCHED: u32 = 6;
}

/// Bits of `FLAGS`.
#[allow(missing_docs)]
pub mod flag {
    pub const WRITE: u32 = 1;
    pub const MMIO: u32 = 2;
}

/// Values of `ORDER`: what is done with a vCPU.
#[allow(missing_docs)]
pub mod order {
    pub const GET_REGS: u32 = 1;
    pub const GET_SREGS: u32 = 2;
    pub const GET_DEBUGREGS: u32 = 3;
    pub const GET_FPU: u32 = 4;
    pub const SET_FPU: u32 = 5;
    pub const GET_XCRS: u32 = 6;
    pub const SET_XCRS: u32 = 7;
    pub const GET_LAPIC: u32 = 8;
    pub const SET_LAPIC: u32 = 9;
    pub const GET_MP_STATE: u32 = 10;
    pub const SET_MP_STATE: u32 = 11;
    pub const GET_EVENTS: u32 = 12;
    pub const SET_EVENTS: u32 = 13;
    pub const GET_MSRS: u32 = 14;
    pub const SET_MSRS: u32 = 15;
    pub const SET_CPUID: u32 = 16;
    pub const GET_HYPERV_CPUID: u32 = 17;
    pub const ENABLE_CAP: u32 = 18;
    pub const SET_GUEST_DEBUG: u32 = 19;
    pub const TRANSLATE: u32 = 20;
}

/// A write to an async range, as the ring has it: 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncWrite {
    /// Address.
    pub address: u64,
    /// Data, the first `len` bytes of it.
    pub data: [u8; 8],
    /// Bytes.
    pub len: u32,
    /// Memory, not a port.
    pub mmio: bool,
}

const ASYNC_ENTRY: usize = 32;

/// All slots of a plugin.
#[derive(Debug)]
pub struct Slots {
    mapping: Mapping,
    count: u32,
}

impl Slots {
    /// Bytes of memory for `vcpus` slots.
    pub const fn bytes(vcpus: u32) -> usize {
        vcpus as usize * SLOT
    }

    /// The slots in memory of [`Slots::bytes`].
    ///
    /// # Panics
    /// If the mapping is too small.
    pub fn new(mapping: Mapping, vcpus: u32) -> Arc<Slots> {
        assert!(mapping.len() >= Slots::bytes(vcpus));
        Arc::new(Slots { mapping, count: vcpus })
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// That of vCPU `id`.
    pub fn slot(self: &Arc<Self>, id: u32) -> Option<Slot> {
        (id < self.count).then(|| Slot { base: id as usize * SLOT, slots: self.clone() })
    }
}

/// One vCPU's slot.
#[derive(Clone, Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    base: usize,
}

impl Slot {
    /// The word at `offset`.
    #[inline]
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset < SLOT);
        self.slots.mapping.u32(self.base + offset)
    }

    /// Copies bytes out. Offset and length are the caller's own, never the other side's.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= SLOT);
        let mut at = self.base + offset;
        let (words, rest) = bytes.as_chunks_mut::<8>();
        for word in words {
            *word = self.slots.mapping.u64(at).load(Ordering::Relaxed).to_le_bytes();
            at += 8;
        }
        for (byte, at) in rest.iter_mut().zip(at..) {
            *byte = self.slots.mapping.u8(at).load(Ordering::Relaxed);
        }
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= SLOT);
        let mut at = self.base + offset;
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.slots.mapping.u64(at).store(u64::from_le_bytes(*word), Ordering::Relaxed);
            at += 8;
        }
        for (byte, at) in rest.iter().zip(at..) {
            self.slots.mapping.u8(at).store(*byte, Ordering::Relaxed);
        }
    }

    /// One 64-bit word.
    pub fn load64(&self, offset: usize) -> u64 {
        self.slots.mapping.u64(self.base + offset).load(Ordering::Relaxed)
    }

    /// Sets one 64-bit word.
    pub fn store64(&self, offset: usize, value: u64) {
        self.slots.mapping.u64(self.base + offset).store(value, Ordering::Relaxed);
    }

    /// Where the data of the event lies in this process, for as long as the slot is kept: the
    /// other side may write there at any time.
    pub fn data_address(&self) -> *mut u8 {
        self.slots.mapping.u8(self.base + at::DATA).as_ptr()
    }

    /// Entry `n` of the ring of async writes. The length is what the slot says.
    pub fn async_write(&self, n: u32) -> AsyncWrite {
        let at = at::ASYNC + (n % ASYNC_ENTRIES) as usize * ASYNC_ENTRY;
        let facts = self.load64(at + 16);
        AsyncWrite {
            address: self.load64(at),
            data: self.load64(at + 8).to_le_bytes(),
            len: (facts as u32).min(8),
            mmio: facts >> 32 != 0,
        }
    }

    /// Fills entry `n` of the ring of async writes.
    pub fn set_async_write(&self, n: u32, write: &AsyncWrite) {
        let at = at::ASYNC + (n % ASYNC_ENTRIES) as usize * ASYNC_ENTRY;
        self.store64(at, write.address);
        self.store64(at + 8, u64::from_le_bytes(write.data));
        self.store64(at + 16, u64::from(write.mmio) << 32 | u64::from(write.len));
    }

    /// Tells the other side that there is something new: `doorbell` rises, and is woken where the
    /// other side says in `sleeps` that it sleeps on it.
    pub fn ring(&self, doorbell: usize, sleeps: usize) {
        let word = self.word(doorbell);
        word.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.word(sleeps).load(Ordering::SeqCst) != 0 {
            wake_shared(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cellblock_wire::{Access, sealed_memfd};

    #[test]
    fn bytes_of_any_length_survive_and_slots_are_apart() {
        let fd = sealed_memfd("slots", Slots::bytes(2) as u64).unwrap();
        let map = Mapping::new(&fd, Slots::bytes(2), Access::ReadWrite).unwrap();
        let slots = Slots::new(map, 2);
        let (one, two) = (slots.slot(0).unwrap(), slots.slot(1).unwrap());
        assert!(slots.slot(2).is_none());
        for len in [0, 1, 7, 8, 9, MAX_DATA] {
            let bytes: Vec<u8> = (1..=len).map(|n| n as u8).collect();
            one.write(at::DATA, &bytes);
            let mut back = vec![0; len];
            one.read(at::DATA, &mut back);
            assert_eq!(back, bytes);
            let mut other = vec![1; len];
            two.read(at::DATA, &mut other);
            assert_eq!(other, vec![0; len]);
        }
        let write = AsyncWrite { address: 5, data: [7; 8], len: 4, mmio: true };
        one.set_async_write(ASYNC_ENTRIES + 3, &write);
        assert_eq!(one.async_write(3), write);
    }
}
