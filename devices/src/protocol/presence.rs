//! Which chunks of guest memory are there, while a restored VM's memory still comes.
//!
//! One bit for each chunk of 256 KiB, in a page that the VMM writes and device processes
//! may only read. A bit is set after the whole chunk is there, and never cleared. A process
//! registers with its userfaultfd what is not there when it maps guest memory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cellblock_wire::{Access, Mapping, ShmError, Uffd};

use super::FaultWindow;

/// Bytes of a chunk.
pub const CHUNK: u64 = 256 << 10;
/// Most ranges that are registered: each divides a mapping, and a process may have only so
/// many.
const MAX_RANGES: usize = 128;

/// The VMM's end: it alone writes.
#[derive(Debug)]
pub struct PresenceOwner {
    fd: OwnedFd,
    presence: Presence,
}

/// What is there.
#[derive(Clone, Debug)]
pub struct Presence {
    page: Arc<Mapping>,
    chunks: usize,
}

impl PresenceOwner {
    /// None of `chunks` is there yet.
    pub fn new(chunks: usize) -> Result<PresenceOwner, ShmError> {
        let (fd, page) = cellblock_wire::published_memfd("presence", bytes(chunks))?;
        Ok(PresenceOwner { fd, presence: Presence { page: Arc::new(page), chunks } })
    }

    /// For [`Presence::map`] in another process.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The same, to look at.
    pub fn presence(&self) -> &Presence {
        &self.presence
    }

    /// All of chunk `index` is there.
    pub fn set(&self, index: usize) {
        self.presence.page.u64(index / 64 * 8).fetch_or(1 << (index % 64), Ordering::Release);
    }
}

impl Presence {
    /// The page that the VMM handed over, for guest memory of so many chunks.
    pub fn map(fd: &OwnedFd, chunks: usize) -> Result<Presence, ShmError> {
        let page = Mapping::new(fd, bytes(chunks), Access::ReadOnly)?;
        Ok(Presence { page: Arc::new(page), chunks })
    }

    /// Number of chunks.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// Whether all of chunk `index` is there; nothing beyond the last is.
    pub fn has(&self, index: usize) -> bool {
        index < self.chunks
            && self.page.u64(index / 64 * 8).load(Ordering::Acquire) & 1 << (index % 64) != 0
    }

    /// Whether everything is there.
    pub fn is_complete(&self) -> bool {
        (0..self.chunks).all(|index| self.has(index))
    }

    /// Ranges of bytes from `start` to `end`, offsets in guest memory, that hold all chunks
    /// that are not there. They are few: what lies between two may be there.
    pub fn absent(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for index in (start / CHUNK) as usize..end.div_ceil(CHUNK) as usize {
            if self.has(index) {
                continue;
            }
            let from = (index as u64 * CHUNK).max(start);
            let to = ((index + 1) as u64 * CHUNK).min(end);
            match runs.last_mut() {
                Some(last) if last.1 == from => last.1 = to,
                _ => runs.push((from, to)),
            }
        }
        let mut gap = CHUNK;
        while runs.len() > MAX_RANGES {
            runs.dedup_by(|next, last| {
                let close = next.0 - last.1 <= gap;
                if close {
                    last.1 = next.1;
                }
                close
            });
            gap *= 2;
        }
        runs
    }
}

/// Registers what is not there of `windows`, mappings of guest memory in this process.
pub fn register(uffd: &Uffd, windows: &[FaultWindow], presence: &Presence) -> io::Result<()> {
    for window in windows {
        for (from, to) in presence.absent(window.offset, window.offset + window.len) {
            uffd.register(window.start + (from - window.offset), to - from)?;
        }
    }
    Ok(())
}

/// Bytes of the bitmap: whole words, at least one.
fn bytes(chunks: usize) -> usize {
    chunks.div_ceil(64).max(1) * 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_chunks_are_in_few_ranges() {
        let owner = PresenceOwner::new(1000).expect("presence");
        let absent = |start, end| owner.presence().absent(start * CHUNK, end * CHUNK);
        assert_eq!(absent(0, 1000), [(0, 1000 * CHUNK)]);
        (10..20).chain(500..1000).for_each(|index| owner.set(index));
        assert_eq!(absent(0, 1000), [(0, 10 * CHUNK), (20 * CHUNK, 500 * CHUNK)]);
        assert_eq!(absent(5, 25), [(5 * CHUNK, 10 * CHUNK), (20 * CHUNK, 25 * CHUNK)]);
        assert_eq!(absent(600, 700), []);
        (0..1000).filter(|index| index % 2 == 0).for_each(|index| owner.set(index));
        let ranges = absent(0, 500);
        assert!(ranges.len() <= MAX_RANGES);
        let within = |index: u64| {
            ranges.iter().any(|(from, to)| *from <= index * CHUNK && (index + 1) * CHUNK <= *to)
        };
        assert!((0..500).all(|index| owner.presence().has(index) || within(index as u64)));
    }

    #[test]
    fn nobody_else_can_write_it() {
        let owner = PresenceOwner::new(100).expect("presence");
        let fd = owner.fd().try_clone_to_owned().expect("dup");
        let seen = Presence::map(&fd, 100).expect("map");
        owner.set(99);
        assert!(seen.has(99) && !seen.has(98) && !seen.has(100) && !seen.has(usize::MAX));
        assert!(Mapping::new(&fd, 16, Access::ReadWrite).is_err(), "it can be mapped to write");
    }
}
