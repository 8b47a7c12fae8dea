//! Which pages of guest memory a device process wrote: a bit for each page of 4 KiB, in
//! memory shared with the VMM, which adds it to what KVM knows of the guest's own writes.
//!
//! Each process has a log of its own: a process that lies about what it wrote spoils what
//! it could write anyway, the guest's memory. A bit is set before the page is written and
//! never cleared by the process; a request that was begun is finished before a cut, so that
//! what it wrote is in the cut.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use cellblock_wire::{Access, Mapping, ShmError, sealed_memfd};

/// Bytes of a page, as a power of two.
const PAGE_SHIFT: u64 = 12;
/// Most bytes of guest memory a log is for: 4 TiB.
pub const MAX_MEMORY: u64 = 1 << 42;

/// The log of this process, where it is a device process that has one.
static OWN: OnceLock<WriteLog> = OnceLock::new();

/// The log of this process, if it has one.
pub(crate) fn own() -> Option<&'static WriteLog> {
    OWN.get()
}

/// Gives this process its log, once.
pub(crate) fn set_own(log: WriteLog) {
    let _ = OWN.set(log);
}

/// The log of one device process.
#[derive(Clone, Debug)]
pub struct WriteLog {
    words: Arc<Mapping>,
    pages: u64,
}

impl WriteLog {
    /// A new one for `memory` bytes of guest memory, and what the process maps.
    pub fn new(memory: u64) -> Result<(WriteLog, OwnedFd), ShmError> {
        let fd = sealed_memfd("write-log", bytes(memory) as u64)?;
        let log = WriteLog::map(fd.as_fd(), memory)?;
        Ok((log, fd))
    }

    /// The log that was handed over, for so much guest memory.
    pub fn map(fd: BorrowedFd<'_>, memory: u64) -> Result<WriteLog, ShmError> {
        let words = Mapping::new(fd, bytes(memory), Access::ReadWrite)?;
        Ok(WriteLog { words: Arc::new(words), pages: memory.min(MAX_MEMORY) >> PAGE_SHIFT })
    }

    /// `len` bytes at `offset` of guest memory are going to be written.
    pub fn mark(&self, offset: u64, len: u64) {
        let last = offset.saturating_add(len.saturating_sub(1)) >> PAGE_SHIFT;
        for page in offset >> PAGE_SHIFT..=last.min(self.pages.saturating_sub(1)) {
            let (word, bit) = (self.words.u64((page / 64) as usize * 8), 1 << (page % 64));
            // A bus lock less for the pages that are written over and over.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Adds what is set to `pages`, a bit for each page.
    pub fn add_to(&self, pages: &mut [u64]) {
        let words = (self.pages.div_ceil(64) as usize).min(pages.len());
        for (n, word) in pages[..words].iter_mut().enumerate() {
            *word |= self.words.u64(n * 8).load(Ordering::Relaxed);
        }
    }

    /// Begins anew. Nothing may be written meanwhile.
    pub fn clear(&self) {
        for n in 0..self.pages.div_ceil(64) as usize {
            let word = self.words.u64(n * 8);
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Relaxed);
            }
        }
    }
}

/// Bytes of the bitmap: whole words, at least one.
fn bytes(memory: u64) -> usize {
    (memory.min(MAX_MEMORY) >> PAGE_SHIFT).div_ceil(64).max(1) as usize * 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_pages_and_stay_within_memory() {
        let (log, fd) = WriteLog::new(100 << 12).expect("log");
        let other = WriteLog::map(fd.as_fd(), 100 << 12).expect("map");
        other.mark(0, 1);
        other.mark(4095, 2);
        other.mark(70 << 12, 4096);
        other.mark(99 << 12, u64::MAX);
        other.mark(u64::MAX, 9);
        let mut pages = [0; 2];
        log.add_to(&mut pages);
        assert_eq!(pages, [0b11, 1 << 6 | 1 << 35]);
        log.clear();
        let mut none = [0; 2];
        log.add_to(&mut none);
        assert_eq!(none, [0; 2]);
        // A shorter one than was promised cannot be mapped.
        assert!(WriteLog::map(fd.as_fd(), 1 << 30).is_err());
    }
}
