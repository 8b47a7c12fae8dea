//! A `cow` disk's private overlay, as the VMM holds it: made, copied, put back, dropped.
//!
//! The block process writes both files of it (see [`cellblock_devices::protocol::overlay`]).
//! The VMM keeps them, so that they outlive the process, and looks at them only while the
//! disk stands still. It believes nothing they say: whatever bits are set name blocks of
//! this disk, and what the blocks hold is the guest's affair.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use cellblock_devices::protocol::overlay::{BLOCK, Bitmap, CHUNK, Extent, overlay_bytes};
use cellblock_wire::{Access, ShmError, sealed_memfd};
use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};

use crate::snapshot::format::table;

/// Bytes copied at once.
const COPY: usize = CHUNK as usize;

/// Where the writes to a `cow` disk are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// In memory, as much of it as the guest writes.
    #[default]
    Memory,
    /// In a file without a name in this directory.
    Directory(PathBuf),
}

impl Place {
    /// The same place, whatever directory a process is in.
    pub fn absolute(&self) -> io::Result<Place> {
        Ok(match self {
            Place::Memory => Place::Memory,
            Place::Directory(directory) => Place::Directory(std::path::absolute(directory)?),
        })
    }
}

/// An overlay that cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The file could not be made.
    #[error("making a file for the writes to a cow disk in {}", directory.display())]
    File {
        /// Where.
        directory: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Shared memory.
    #[error("making room for the writes to a cow disk")]
    Memory(#[from] ShmError),
    /// A list of extents that no such disk can have.
    #[error("an extent of {len} bytes at {offset} does not belong to a cow disk of {size} bytes")]
    Extent {
        /// Where it would begin.
        offset: u64,
        /// How long it would be.
        len: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// Reading or writing either file.
    #[error("{what} the writes to a cow disk")]
    Copy {
        /// What was being done.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// The overlay of one disk.
#[derive(Debug)]
pub struct Overlay {
    file: File,
    map: OwnedFd,
    bits: Bitmap,
    size: u64,
}

impl Overlay {
    /// Makes the empty overlay of a disk of `size` bytes.
    pub fn new(size: u64, place: &Place) -> Result<Overlay, OverlayError> {
        let file = match place {
            Place::Memory => File::from(sealed_memfd("cellblock-cow", overlay_bytes(size))?),
            Place::Directory(directory) => tempfile::tempfile_in(directory)
                .and_then(|file| file.set_len(overlay_bytes(size)).map(|()| file))
                .map_err(|source| OverlayError::File { directory: directory.clone(), source })?,
        };
        let map = Bitmap::create(size)?;
        let bits = Bitmap::map(&map, size, Access::ReadWrite)?;
        Ok(Overlay { file, map, bits, size })
    }

    /// One that [`Overlay::new`] made elsewhere, for a disk of `size` bytes.
    pub fn from_parts(file: File, map: OwnedFd, size: u64) -> Result<Overlay, OverlayError> {
        let bits = Bitmap::map(&map, size, Access::ReadWrite)?;
        Ok(Overlay { file, map, bits, size })
    }

    /// What the block process is given: the file, then its map.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.file.as_fd(), self.map.as_fd()]
    }

    /// What the guest has written. To be asked for while the disk stands still.
    pub fn extents(&self) -> Vec<Extent> {
        self.bits.extents().collect()
    }

    /// Copies what the guest has written to the same places of `to`, a new, empty file,
    /// and says which they are. What is zero stays a hole.
    pub fn save(&self, to: &File) -> Result<Vec<Extent>, OverlayError> {
        self.make_room(to)?;
        (0..self.chunks()).try_for_each(|chunk| self.copy_chunk(chunk, to, true).map(drop))?;
        Ok(self.extents())
    }

    /// Gives `to`, a new, empty file, the size of the overlay.
    pub fn make_room(&self, to: &File) -> Result<(), OverlayError> {
        to.set_len(overlay_bytes(self.size)).map_err(copying)
    }

    /// Parts of the disk, for [`Overlay::copy_chunk`].
    pub fn chunks(&self) -> u64 {
        self.bits.chunks()
    }

    /// Copies what the guest has written to a chunk to the same places of `to`; how many bytes. The
    /// guest may go on writing: a chunk is copied as a whole first (`all`, where `to` has nothing of
    /// it), and then, as often as one likes, what was written since. When the disk stands still, and
    /// its process is the same as at first, that makes `to` what the overlay is.
    pub fn copy_chunk(&self, chunk: u64, to: &File, all: bool) -> Result<u64, OverlayError> {
        let written = self.bits.written(chunk);
        // A map is mostly a hole, which a store would fill.
        let since = match written.load(Ordering::SeqCst) {
            0 => 0,
            _ => written.swap(0, Ordering::SeqCst),
        };
        let wanted = self.bits.word(chunk).load(Ordering::Acquire) & if all { !0 } else { since };
        let mut copied = 0;
        for (block, count) in table::runs(wanted) {
            let offset = chunk * CHUNK + block as u64 * BLOCK;
            let len = (count as u64 * BLOCK).min(overlay_bytes(self.size).saturating_sub(offset));
            copy_run(&self.file, to, &Extent { offset, len }, all).map_err(copying)?;
            copied += len;
        }
        Ok(copied)
    }

    /// Replaces what the guest has written by `extents` of `from`, which
    /// [`Overlay::save`] wrote. To be done while the disk stands still. After an error
    /// the overlay is empty, or holds a part of them.
    pub fn load(&self, from: &File, extents: &[Extent]) -> Result<(), OverlayError> {
        self.check(extents)?;
        self.clear()?;
        let put_back = |source| OverlayError::Copy { what: "putting back", source };
        for extent in extents {
            copy_run(from, &self.file, extent, true).map_err(put_back)?;
            for block in extent.offset / BLOCK..(extent.offset + extent.len) / BLOCK {
                self.bits.word(block / 64).fetch_or(1 << (block % 64), Ordering::Release);
            }
        }
        Ok(())
    }

    /// Forgets what the guest has written, and gives its space back. To be done while
    /// the disk stands still.
    pub fn clear(&self) -> Result<(), OverlayError> {
        let extents = self.extents();
        for chunk in 0..self.bits.chunks() {
            let word = self.bits.word(chunk);
            // A map is mostly a hole, which a store would fill.
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Release);
            }
        }
        for extent in extents {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            // Only for the space: what lies under an unset bit is never read.
            let _ = fallocate(&self.file, flags, extent.offset as i64, extent.len as i64);
        }
        Ok(())
    }

    fn check(&self, extents: &[Extent]) -> Result<(), OverlayError> {
        let mut next = 0;
        for &Extent { offset, len } in extents {
            let end = offset.checked_add(len).filter(|end| *end <= overlay_bytes(self.size));
            let aligned = offset.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK);
            match end {
                Some(end) if aligned && len > 0 && offset >= next => next = end,
                _ => return Err(OverlayError::Extent { offset, len, size: self.size }),
            }
        }
        Ok(())
    }
}

fn copying(source: io::Error) -> OverlayError {
    OverlayError::Copy { what: "copying", source }
}

/// Copies a run of blocks. Into a `fresh` file zeros need not be written.
fn copy_run(from: &File, to: &File, extent: &Extent, fresh: bool) -> io::Result<()> {
    let mut buffer = vec![0; extent.len.min(COPY as u64) as usize];
    let end = extent.offset + extent.len;
    let mut at = extent.offset;
    while at < end {
        let len = (end - at).min(COPY as u64) as usize;
        let bytes = &mut buffer[..len];
        from.read_exact_at(bytes, at)?;
        if !fresh || bytes.iter().any(|byte| *byte != 0) {
            to.write_all_at(bytes, at)?;
        }
        at += len as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 3 * CHUNK + 512;

    /// Writes blocks as a block process does.
    fn write(overlay: &Overlay, blocks: std::ops::Range<u64>, value: u8) {
        for block in blocks {
            overlay.file.write_all_at(&[value; BLOCK as usize], block * BLOCK).unwrap();
            overlay.bits.word(block / 64).fetch_or(1 << (block % 64), Ordering::Release);
            overlay.bits.wrote(block * BLOCK, BLOCK);
        }
    }

    fn byte(overlay: &Overlay, block: u64) -> u8 {
        let mut byte = [0];
        overlay.file.read_exact_at(&mut byte, block * BLOCK + 7).unwrap();
        byte[0]
    }

    #[test]
    fn what_was_saved_is_put_back_in_the_place_of_what_came_later() {
        let dir = tempfile::tempdir().unwrap();
        for place in [Place::Memory, Place::Directory(dir.path().into())] {
            let overlay = Overlay::new(SIZE, &place).unwrap();
            assert_eq!(overlay.extents(), []);
            write(&overlay, 3..5, 1);
            write(&overlay, 60..70, 2);
            write(&overlay, 100..180, 0);
            let last = SIZE / BLOCK;
            write(&overlay, last..last + 1, 3);
            let saved = tempfile::tempfile().unwrap();
            let extents = overlay.save(&saved).unwrap();
            assert_eq!(extents.len(), 4);
            assert_eq!(extents, overlay.extents());

            write(&overlay, 4..62, 9);
            write(&overlay, 190..192, 9);
            overlay.load(&saved, &extents).unwrap();
            let other = Overlay::new(SIZE, &Place::Memory).unwrap();
            other.load(&saved, &extents).unwrap();
            for overlay in [&overlay, &other] {
                assert_eq!(overlay.extents(), extents);
                for (block, value) in [(3, 1), (4, 1), (60, 2), (69, 2), (100, 0), (last, 3)] {
                    assert_eq!(byte(overlay, block), value, "block {block}");
                }
            }
            overlay.clear().unwrap();
            assert_eq!(overlay.extents(), []);
            use std::os::unix::fs::MetadataExt;
            assert_eq!(overlay.file.metadata().unwrap().blocks(), 0, "space is kept");
            assert_eq!(overlay.file.metadata().unwrap().len(), overlay_bytes(SIZE));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "it has a name");
    }

    /// A copy that was begun while the guest writes is completed with what it wrote since.
    #[test]
    fn a_copy_is_completed_with_what_was_written_since() {
        let overlay = Overlay::new(SIZE, &Place::Memory).unwrap();
        let copy = tempfile::tempfile().unwrap();
        overlay.make_room(&copy).unwrap();
        let chunk = |n, all| overlay.copy_chunk(n, &copy, all).unwrap();
        let pass = |all| (0..overlay.chunks()).map(|n| chunk(n, all)).sum::<u64>();
        write(&overlay, 3..70, 1);
        assert_eq!(pass(true), 67 * BLOCK);
        assert_eq!(pass(false), 0);
        // New blocks, others once more, and zeros in the place of something.
        write(&overlay, 60..66, 2);
        write(&overlay, 191..193, 3);
        write(&overlay, 10..11, 0);
        assert_eq!(pass(false), 9 * BLOCK);
        assert_eq!(pass(false), 0);
        let all = |file: &File| {
            let mut bytes = vec![0; overlay_bytes(SIZE) as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(all(&copy) == all(&overlay.file));
    }

    #[test]
    fn extents_of_another_disk_are_refused() {
        let overlay = Overlay::new(SIZE, &Place::Memory).unwrap();
        write(&overlay, 1..2, 5);
        let end = overlay_bytes(SIZE);
        let extent = |offset, len| Extent { offset, len };
        for wrong in [
            vec![extent(end, BLOCK)],
            vec![extent(0, end + BLOCK)],
            vec![extent(u64::MAX - BLOCK + 1, BLOCK)],
            vec![extent(0, u64::MAX - BLOCK + 1)],
            vec![extent(512, BLOCK)],
            vec![extent(0, 512)],
            vec![extent(0, 0)],
            vec![extent(BLOCK, BLOCK), extent(0, BLOCK)],
            vec![extent(0, 2 * BLOCK), extent(BLOCK, BLOCK)],
        ] {
            let error = overlay.load(&overlay.file, &wrong).unwrap_err();
            assert!(matches!(error, OverlayError::Extent { .. }), "{error}");
        }
        assert_eq!((overlay.extents().len(), byte(&overlay, 1)), (1, 5), "a refusal changed it");
    }

    #[test]
    fn a_directory_that_is_none_is_named() {
        let place = Place::Directory("/proc/none".into());
        let error = Overlay::new(SIZE, &place).unwrap_err();
        assert!(error.to_string().contains("/proc/none"), "{error}");
    }
}
