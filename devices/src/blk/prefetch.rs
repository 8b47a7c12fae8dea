//! Hints to the CPU about guest memory that is going to be read.
//!
//! Descriptors, tables and headers were written by the driver's CPU last, and each line of
//! them has to be fetched from there. One after the other, that is most of what a small
//! request costs beside the file's system call; of several chains at once, it is hidden.
#![allow(unsafe_code)] // a hint takes a raw address

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

use super::memory::Slice;

/// Begins to fetch the first line of `slice`.
#[inline]
pub(super) fn prefetch(slice: &Slice<'_>) {
    let at = slice.ptr_guard();
    // SAFETY: a prefetch reads nothing that the program sees and cannot fault; the address
    // is one of mapped guest memory all the same.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.as_ptr().cast()) }
}
