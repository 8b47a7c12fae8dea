//! Memory beyond the image, handed out once and never taken back.
//!
//! Large buffers are not static: a boot loader zeroes statics, and would touch pages the guest
//! never uses.
#![allow(unsafe_code)] // turns free memory into slices

use crate::boot::Ranges;

/// Where the image certainly has ended (guest.ld asserts it).
const START: u64 = 0x20_0000;

/// The free memory around the image's end.
pub struct Heap {
    next: u64,
    end: u64,
}

impl Heap {
    /// The rest of the range that the image lies in. There may be only one heap.
    pub fn new(memory: &Ranges) -> Self {
        let range =
            memory.as_slice().iter().find(|(base, len)| (*base..base + len).contains(&START));
        match range {
            Some((base, length)) => Self { next: START, end: base + length },
            None => crate::exit::fail(format_args!("the memory map has no memory at {START:#x}")),
        }
    }

    /// Bytes with any contents.
    pub fn bytes(&mut self, length: usize, align: usize) -> &'static mut [u8] {
        let start = self.next.next_multiple_of(align as u64);
        let end = start + length as u64;
        if end > self.end {
            crate::exit::fail(format_args!("out of memory: {length} bytes asked for"));
        }
        self.next = end;
        // SAFETY: memory of the guest's own, identity-mapped, handed out once; bytes need no
        // initialisation beyond what the machine gives memory.
        unsafe { core::slice::from_raw_parts_mut(start as *mut u8, length) }
    }

    /// Words of zeros.
    pub fn words(&mut self, count: usize) -> &'static mut [u64] {
        let bytes = self.bytes(count * 8, 4096);
        bytes.fill(0);
        // SAFETY: aligned to a page, as long, exclusively ours.
        unsafe { core::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), count) }
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'static mut [u8] {
        let start = self.next.next_multiple_of(4096);
        self.bytes((self.end - start) as usize, 4096)
    }
}
