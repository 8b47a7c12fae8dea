//! Which pages of guest memory a device process wrote: a bit for each page of 4 KiB, in
//! memory shared with the VMM, which adds it to what KVM knows of the guest's own writes.
//!
//! Each device has a log of its own: a process that lies about what it wrote spoils what
//! it could write anyway, the guest's memory. A process sets bits and never clears one; the VMM
//! takes them, at any time.
//!
//! A bit is set **before** the page is written and once more **after**: whoever took it in
//! between, and looked at the page too early, finds it again. What the second mark of a process
//! that died would have said, the VMM knows from the first.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, OnceLock};

use cellblock_wire::{Access, Mapping, ShmError, membarrier, sealed_memfd};

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
    /// Marks come with a barrier of their own: whoever takes them makes none for this process.
    alone: bool,
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
        let pages = memory.min(MAX_MEMORY) >> PAGE_SHIFT;
        Ok(WriteLog { words: Arc::new(words), pages, alone: true })
    }

    /// Leaves the barriers to who takes the marks. To be called before the process is sealed.
    pub fn take_part(&mut self) {
        self.alone = membarrier::take_part().is_err();
    }

    /// `len` bytes at `offset` of guest memory are going to be written, or have been.
    pub fn mark(&self, offset: u64, len: u64) {
        // A bit that is found set may just be taken: what was written is to be seen then.
        if self.alone {
            fence(Ordering::SeqCst);
        }
        let last = offset.saturating_add(len.saturating_sub(1)) >> PAGE_SHIFT;
        for page in offset >> PAGE_SHIFT..=last.min(self.pages.saturating_sub(1)) {
            let (word, bit) = (self.words.u64((page / 64) as usize * 8), 1 << (page % 64));
            // A bus lock less for the pages that are written over and over.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Release);
            }
        }
    }

    /// Takes what is set: `add` is told the number of each word of 64 pages, and its bits. What is
    /// written and finds its bit set is seen by whoever looks after this.
    pub fn take(&self, mut add: impl FnMut(usize, u64)) {
        for n in 0..self.pages.div_ceil(64) as usize {
            let word = self.words.u64(n * 8);
            if word.load(Ordering::Relaxed) != 0 {
                add(n, word.swap(0, Ordering::SeqCst));
            }
        }
        // It fails where no process takes part either.
        let _ = membarrier::everywhere();
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
        let take = || {
            let mut pages = [0; 2];
            log.take(|n, bits| pages[n] |= bits);
            pages
        };
        assert_eq!(take(), [0b11, 1 << 6 | 1 << 35]);
        assert_eq!(take(), [0; 2]);
        other.mark(0, 1);
        assert_eq!(take(), [1, 0], "it is marked anew");
        // A shorter one than was promised cannot be mapped.
        assert!(WriteLog::map(fd.as_fd(), 1 << 30).is_err());
    }
}
