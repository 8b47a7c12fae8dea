//! The driver's side of a split virtqueue.
//!
//! Every request has a slot: a fixed run of descriptors, or with indirect descriptors a table of
//! its own and one descriptor in the ring. So nothing is allocated on the way, and a used entry
//! names its slot.
#![allow(unsafe_code)] // rings shared with a device

use core::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use crate::heap::Heap;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// One descriptor, as the device reads it.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// A piece of a request.
#[derive(Clone, Copy)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// Whether the device writes it.
    pub device_writes: bool,
}

/// What a queue is made for.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Requests that may be in flight.
    pub slots: u16,
    /// Most segments of one request.
    pub segments: u16,
    /// Indirect descriptors were negotiated and shall be used.
    pub indirect: bool,
    /// Event indices were negotiated.
    pub event_idx: bool,
    /// The driver wants interrupts.
    pub interrupts: bool,
}

/// A completed request.
pub struct Used {
    /// Its slot.
    pub slot: u16,
    /// Bytes the device says it wrote.
    pub written: u32,
}

/// A split virtqueue.
pub struct Queue {
    size: u16,
    shape: Shape,
    descriptors: *mut Descriptor,
    tables: *mut Descriptor,
    available: *mut u16,
    used: *mut u16,
    /// The available index, as far as it is filled in, and as far as it is published.
    filled: u16,
    published: u16,
    seen: u16,
}

impl Queue {
    /// A queue of at most `size_max` entries; fails the guest when the shape does not fit.
    pub fn new(heap: &mut Heap, size_max: u16, shape: Shape) -> Self {
        let wanted = shape.slots * if shape.indirect { 1 } else { shape.segments };
        let size = size_max.min(256);
        if size == 0 || !size.is_power_of_two() || wanted > size {
            crate::exit::fail(format_args!(
                "{wanted} descriptors do not fit a queue of {size_max}"
            ));
        }
        let entries = usize::from(size);
        let tables = usize::from(shape.slots * shape.segments);
        let queue = Self {
            size,
            shape,
            descriptors: heap.words(entries * 2).as_mut_ptr().cast(),
            tables: heap.words(tables * 2).as_mut_ptr().cast(),
            available: heap.words(entries / 4 + 1).as_mut_ptr().cast(),
            used: heap.words(entries + 1).as_mut_ptr().cast(),
            filled: 0,
            published: 0,
            seen: 0,
        };
        if !shape.interrupts {
            // The flag counts without event indices, the index with them: one that was just passed.
            queue.available(0).store(flag(NO_INTERRUPT, !shape.event_idx), Ordering::Relaxed);
            queue.used_event().store(u16::MAX, Ordering::Relaxed);
        }
        queue
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest-physical addresses of the descriptor table, the available and the used ring.
    pub fn addresses(&self) -> (u64, u64, u64) {
        (self.descriptors as u64, self.available as u64, self.used as u64)
    }

    /// Writes a request into its slot and the available ring. [`Self::publish`] shows it.
    pub fn push(&mut self, slot: u16, segments: &[Segment]) {
        assert!(slot < self.shape.slots && segments.len() <= usize::from(self.shape.segments));
        let count = segments.len() as u16;
        let first = slot * self.shape.segments;
        // In a chain in the ring, descriptors name each other by their place in the ring; in an
        // indirect table, by their place in the table.
        let (table, base) = if self.shape.indirect {
            // SAFETY: the slot's own part of the tables.
            (unsafe { self.tables.add(usize::from(first)) }, 0)
        } else {
            // SAFETY: `new` checked that every slot's run fits.
            (unsafe { self.descriptors.add(usize::from(first)) }, first)
        };
        for (i, segment) in (0..).zip(segments) {
            let more = i + 1 < count;
            let descriptor = Descriptor {
                address: segment.address,
                length: segment.length,
                flags: flag(NEXT, more) | flag(WRITE, segment.device_writes),
                next: if more { base + i + 1 } else { 0 },
            };
            // SAFETY: inside the slot's run; the device does not look before `publish`.
            unsafe { table.add(usize::from(i)).write_volatile(descriptor) };
        }
        let mut head = first;
        if self.shape.indirect {
            head = slot;
            let length = u32::from(count) * size_of::<Descriptor>() as u32;
            let descriptor = Descriptor { address: table as u64, length, flags: INDIRECT, next: 0 };
            // SAFETY: one descriptor for each slot.
            unsafe { self.descriptors.add(usize::from(slot)).write_volatile(descriptor) };
        }
        self.available(2 + self.filled % self.size).store(head, Ordering::Relaxed);
        self.filled = self.filled.wrapping_add(1);
    }

    /// Whether something was pushed that the device was not shown.
    pub fn has_unpublished(&self) -> bool {
        self.filled != self.published
    }

    /// Shows the device what was pushed; whether it wants to be notified.
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        self.published = self.filled;
        self.available(1).store(self.filled, Ordering::Release);
        // The index must be visible before the device's wish is read, or both sides could sleep.
        fence(Ordering::SeqCst);
        if self.shape.event_idx {
            let event = self.used_at(2 + 4 * self.size).load(Ordering::Relaxed);
            passes(event, old, self.filled)
        } else {
            self.used_at(0).load(Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    /// Moves the available index without a request behind it, as no driver may.
    pub fn publish_nonsense(&mut self, ahead: u16) {
        self.available(1).store(self.filled.wrapping_add(ahead), Ordering::Release);
    }

    /// Whether the device has completed something that was not taken yet.
    pub fn has_used(&self) -> bool {
        self.used_at(1).load(Ordering::Acquire) != self.seen
    }

    /// Takes the next completed request.
    pub fn pop(&mut self) -> Option<Used> {
        if !self.has_used() {
            return None;
        }
        let entry = 2 + 4 * (self.seen % self.size);
        let id = self.used_word(entry).load(Ordering::Relaxed);
        let written = self.used_word(entry + 2).load(Ordering::Relaxed);
        let stride = if self.shape.indirect { 1 } else { u32::from(self.shape.segments) };
        let slot = id / stride;
        if !id.is_multiple_of(stride) || slot >= u32::from(self.shape.slots) {
            crate::exit::fail(format_args!("used entry {} names descriptor {id}", self.seen));
        }
        self.seen = self.seen.wrapping_add(1);
        Some(Used { slot: slot as u16, written })
    }

    /// Asks for an interrupt at the next completion. Completions that came before may not cause
    /// one: look again afterwards.
    pub fn request_interrupt(&mut self) {
        self.used_event().store(self.seen, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The available ring as 16-bit words: flags, index, entries, used event.
    fn available(&self, word: u16) -> &AtomicU16 {
        // SAFETY: inside the ring, for the queue's size; all accesses are atomic.
        unsafe { AtomicU16::from_ptr(self.available.add(usize::from(word))) }
    }

    fn used_event(&self) -> &AtomicU16 {
        self.available(2 + self.size)
    }

    /// The used ring as 16-bit words: flags, index, entries of four, available event.
    fn used_at(&self, word: u16) -> &AtomicU16 {
        // SAFETY: as for `available`.
        unsafe { AtomicU16::from_ptr(self.used.add(usize::from(word))) }
    }

    fn used_word(&self, word: u16) -> &AtomicU32 {
        // SAFETY: as above; entries are 4-byte aligned.
        unsafe { AtomicU32::from_ptr(self.used.add(usize::from(word)).cast()) }
    }
}

fn flag(bit: u16, set: bool) -> u16 {
    if set { bit } else { 0 }
}

/// Whether an index that went from `old` to `new` passed `event` (specification 2.7.10).
fn passes(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
