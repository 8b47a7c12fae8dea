//! The record of a private overlay: which blocks of a disk the guest has written.
//!
//! A disk with an overlay has two files: the image, which is only read, and the overlay,
//! which has the same size and holds the blocks that were written. The bitmap says which
//! of the two has a block. It is a memfd that the VMM makes and keeps, so that it outlives
//! the process, and the VMM can copy the overlay into a snapshot or drop it.
//!
//! A bit is set, with [`Ordering::Release`], after the whole block is in the overlay, and
//! never cleared while a device serves. What a process wrote into the map is only ever
//! taken as bits: any pattern names blocks of this disk and nothing else.
//!
//! Behind them the map has a second bit for each block, which is set after every write to it
//! and cleared by whoever copies the overlay while it is written to: before the block is
//! copied, so that a write that the copy has not is noted behind the clearing. What a process
//! was writing when it died is not noted.

use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use cellblock_wire::{Access, Mapping, ShmError, sealed_memfd};

/// Bytes of a block: what is copied when part of it is written.
pub const BLOCK: u64 = 4096;
/// Bytes of the disk whose blocks share a word of the map.
pub const CHUNK: u64 = BLOCK * 64;

/// Bytes of an overlay for a disk of `size` bytes: whole blocks.
pub const fn overlay_bytes(size: u64) -> u64 {
    size.next_multiple_of(BLOCK)
}

/// A run of neighbouring blocks that are in the overlay. The last one may reach beyond
/// the end of the disk, though not of the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub len: u64,
}

/// Which blocks are in the overlay.
#[derive(Debug)]
pub struct Bitmap {
    words: Mapping,
    size: u64,
}

impl Bitmap {
    /// Makes the empty map of a disk of `size` bytes. It costs memory where bits are set.
    pub fn create(size: u64) -> Result<OwnedFd, ShmError> {
        sealed_memfd("cellblock-cow-map", Self::bytes(size) as u64)
    }

    /// Maps one made by [`Bitmap::create`] for a disk of the same size.
    pub fn map(fd: impl AsFd, size: u64, access: Access) -> Result<Bitmap, ShmError> {
        Ok(Bitmap { words: Mapping::new(fd, Self::bytes(size), access)?, size })
    }

    fn bytes(size: u64) -> usize {
        // A disk too large for the address space fails to map, which is an error.
        usize::try_from(size.div_ceil(CHUNK).saturating_mul(16)).unwrap_or(usize::MAX)
    }

    /// Words of the map.
    pub fn chunks(&self) -> u64 {
        self.size.div_ceil(CHUNK)
    }

    /// The bits of the blocks of a chunk, lowest first.
    ///
    /// # Panics
    /// If there is no such chunk: the caller has checked its range.
    pub fn word(&self, chunk: u64) -> &AtomicU64 {
        self.words.u64(usize::try_from(chunk).unwrap_or(usize::MAX).saturating_mul(8))
    }

    /// The bits of the blocks of a chunk that were written since they were cleared.
    ///
    /// # Panics
    /// As [`Bitmap::word`].
    pub fn written(&self, chunk: u64) -> &AtomicU64 {
        assert!(chunk < self.chunks());
        self.word(self.chunks() + chunk)
    }

    /// Notes that `len` bytes at `offset` of the disk were written.
    pub fn wrote(&self, offset: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|more| offset.checked_add(more)) else {
            return;
        };
        let (first, last) = (offset / BLOCK, last / BLOCK);
        for chunk in first / 64..=(last / 64).min(self.chunks().saturating_sub(1)) {
            let from = first.max(chunk * 64) % 64;
            let to = last.min(chunk * 64 + 63) % 64;
            let bits = (u64::MAX << from) & (u64::MAX >> (63 - to));
            // Each time, though it may be set: what was seen set may be cleared by now.
            self.written(chunk).fetch_or(bits, Ordering::SeqCst);
        }
    }

    /// The blocks in the overlay, in order, as the map says at this moment.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = self.find(next, true)?;
            let end = self.find(first, false).unwrap_or(self.blocks());
            next = end;
            Some(Extent { offset: first * BLOCK, len: (end - first) * BLOCK })
        })
    }

    fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK)
    }

    /// The first block from `from` on whose bit is `set`.
    fn find(&self, from: u64, set: bool) -> Option<u64> {
        let mut block = from;
        while block < self.blocks() {
            let word = self.word(block / 64).load(Ordering::Acquire);
            let wanted = if set { word } else { !word } >> (block % 64);
            if wanted != 0 {
                return Some(block + u64::from(wanted.trailing_zeros()))
                    .filter(|block| *block < self.blocks());
            }
            block = (block / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(size: u64) -> Bitmap {
        let fd = Bitmap::create(size).expect("memfd");
        Bitmap::map(fd, size, Access::ReadWrite).expect("map")
    }

    #[test]
    fn bits_beyond_the_disk_name_nothing() {
        let map = map(CHUNK + 5 * BLOCK + 512);
        assert_eq!(map.chunks(), 2);
        for chunk in 0..2 {
            map.word(chunk).store(u64::MAX, Ordering::Relaxed);
        }
        let all = Extent { offset: 0, len: CHUNK + 6 * BLOCK };
        assert_eq!(map.extents().collect::<Vec<_>>(), [all]);
        assert_eq!(all.len, overlay_bytes(CHUNK + 5 * BLOCK + 512));
        map.word(0).store(0, Ordering::Relaxed);
        map.word(1).store(1 << 6, Ordering::Relaxed);
        assert_eq!(map.extents().next(), None);
    }

    #[test]
    fn a_map_of_another_disk_is_refused() {
        let fd = Bitmap::create(CHUNK).expect("memfd");
        let error = Bitmap::map(&fd, CHUNK + 512, Access::ReadOnly).expect_err("too small");
        assert!(matches!(error, ShmError::TooSmall { found: 16, needed: 32 }), "{error}");
        let error =
            Bitmap::create(u64::MAX).and_then(|fd| Bitmap::map(fd, 1 << 62, Access::ReadOnly));
        assert!(error.is_err());
    }

    #[test]
    fn what_was_written_is_noted_by_blocks() {
        let map = map(3 * CHUNK);
        let noted = || [0, 1, 2].map(|chunk| map.written(chunk).swap(0, Ordering::SeqCst));
        map.wrote(5 * BLOCK - 1, 2);
        assert_eq!(noted(), [0b11 << 4, 0, 0]);
        map.wrote(63 * BLOCK, 66 * BLOCK);
        assert_eq!(noted(), [1 << 63, u64::MAX, 1]);
        map.wrote(3 * CHUNK - 1, u64::MAX);
        map.wrote(7, 0);
        assert_eq!(noted(), [0, 0, 0]);
        map.wrote(3 * CHUNK - 1, CHUNK);
        assert_eq!(noted(), [0, 0, 1 << 63]);
        assert_eq!(map.extents().next(), None);
    }

    proptest! {
        #[test]
        fn extents_are_the_set_bits(blocks in prop::collection::btree_set(0u64..300, 0..80)) {
            let map = map(300 * BLOCK);
            for block in &blocks {
                map.word(block / 64).fetch_or(1 << (block % 64), Ordering::Relaxed);
            }
            let mut found = Vec::new();
            let mut end = None;
            for extent in map.extents() {
                prop_assert!(end.is_none_or(|end| extent.offset > end), "neighbours are one run");
                end = Some(extent.offset + extent.len);
                found.extend(extent.offset / BLOCK..(extent.offset + extent.len) / BLOCK);
            }
            prop_assert_eq!(found, blocks.into_iter().collect::<Vec<_>>());
        }
    }
}
