//! A private layer over an image: the guest's writes, which nobody else sees.
//!
//! The image is only read. A block that is written goes to the overlay, a file of the
//! disk's size, and its bit in the [`Bitmap`] is set; from then on it is read there. Of a
//! block that is written in part the rest is copied from the image first.
//!
//! What has to be true whoever dies when, and whichever queues write at once:
//!
//! - A bit is set after the block is whole in the overlay, so that a process killed in
//!   between leaves the block as it was, and the request is done again by the next one.
//!   What lies in the overlay under an unset bit is never read, nor relied on to be zero.
//! - While a bit is unset, whoever wants to set it holds the lock of its chunk from the
//!   look at the bit to the setting of it: two queues that write parts of one block would
//!   else both copy it up, and the later copy undo the earlier write.
//! - Once it is set, the overlay is a file like any other, and no lock is taken.
//! - Every write is noted in the map when it is over, for who copies the overlay meanwhile.
//!
//! Nothing here is ever made durable: the overlay ends with the virtual machine.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::clear::{self, Clear, Range};
use super::execute::{Disk, ExecuteError, Executor};
use super::memory::Slice;
use crate::protocol::overlay::{BLOCK, Bitmap, CHUNK};

/// Locks of chunks, shared by those that are so many apart: more than there are queues.
const LOCKS: usize = 64;

/// A block on its way from the image. Aligned, since the image may be open for direct I/O.
#[repr(align(4096))]
#[derive(Debug)]
struct Block([u8; BLOCK as usize]);

/// The overlay of one disk, for all its queues.
#[derive(Debug)]
pub(super) struct Overlay {
    file: File,
    bitmap: Bitmap,
    /// Who holds one may set bits of its chunks, and has a block to copy with.
    locks: Vec<Mutex<Block>>,
    /// Bytes of the disk.
    size: u64,
}

/// A part of the disk within one chunk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: u64,
    end: u64,
}

impl Piece {
    /// Cuts `len` bytes at `offset` where chunks end.
    fn all(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
        let end = offset + len;
        let mut start = offset;
        std::iter::from_fn(move || {
            let piece = Piece { start, end: (start / CHUNK + 1).saturating_mul(CHUNK).min(end) };
            start = piece.end;
            (piece.start < end).then_some(piece)
        })
    }

    fn chunk(self) -> u64 {
        self.start / CHUNK
    }

    fn len(self) -> u64 {
        self.end - self.start
    }

    /// Bits of the blocks it touches.
    fn bits(self) -> u64 {
        if self.len() == 0 {
            return 0;
        }
        let first = self.start % CHUNK / BLOCK;
        let last = (self.end - 1) % CHUNK / BLOCK;
        (u64::MAX << first) & (u64::MAX >> (63 - last))
    }

    /// What of it is whole blocks. The last block of the disk may be short, and is whole
    /// with its last byte.
    fn whole(self, size: u64) -> Piece {
        let end = if self.end == size { self.end } else { self.end / BLOCK * BLOCK };
        let start = self.start.next_multiple_of(BLOCK).min(end.max(self.start));
        Piece { start, end: end.max(start) }
    }

    /// The parts before and behind `whole`, each within a block.
    fn edges(self, whole: Piece) -> impl Iterator<Item = Piece> {
        let parts = if whole.len() == 0 {
            // Within a block, or on both sides of where two meet.
            let middle = self.start.next_multiple_of(BLOCK).clamp(self.start, self.end);
            [Piece { end: middle, ..self }, Piece { start: middle, ..self }]
        } else {
            [Piece { end: whole.start, ..self }, Piece { start: whole.end, ..self }]
        };
        parts.into_iter().filter(|edge| edge.len() > 0)
    }
}

impl Overlay {
    /// `file` has room for [`overlay_bytes`](crate::protocol::overlay::overlay_bytes) of
    /// `size`, and `bitmap` is that of a disk of `size` bytes.
    pub fn new(file: File, bitmap: Bitmap, size: u64) -> Overlay {
        let block = || Mutex::new(Block([0; BLOCK as usize]));
        Overlay { file, bitmap, locks: (0..LOCKS).map(|_| block()).collect(), size }
    }

    /// The file that has every byte of `len` at `offset` and may serve a read of them,
    /// or a write where it is the overlay; `None` where both files have some.
    fn holder<'a>(&'a self, image: &'a File, offset: u64, len: u64) -> Option<(&'a File, bool)> {
        let (end, set) = self.run(offset, offset + len);
        (end == offset + len).then_some((if set { &self.file } else { image }, set))
    }

    /// How far from `start` the blocks are in the same file, at most to `end`, and
    /// whether that is the overlay. What is not there yet may be a moment later.
    fn run(&self, start: u64, end: u64) -> (u64, bool) {
        let word = |at: u64| self.bitmap.word(at / CHUNK).load(Ordering::Acquire);
        let first = word(start);
        let set = first >> (start % CHUNK / BLOCK) & 1 != 0;
        let (mut at, mut bits) = (start, first);
        loop {
            let from = at % CHUNK / BLOCK;
            let others = if set { !bits } else { bits } >> from;
            let same = u64::from(others.trailing_zeros()).min(64 - from);
            at = (at / BLOCK + same) * BLOCK;
            if at >= end || from + same < 64 {
                return (at.min(end), set);
            }
            bits = word(at);
        }
    }

    /// Fills `data` from `offset`; `filled` is as for [`Executor::execute`].
    pub fn read(
        &self,
        executor: &mut Executor,
        image: &File,
        data: &[Slice<'_>],
        offset: u64,
        filled: &mut u64,
    ) -> Result<(), ExecuteError> {
        let len = total(data);
        if let Some((file, _)) = self.holder(image, offset, len) {
            return executor.read(file, data, offset, filled);
        }
        while *filled < len {
            let at = offset + *filled;
            let (end, set) = self.run(at, offset + len);
            let file = if set { &self.file } else { image };
            let mut done = 0;
            let result = executor.read(file, &part(data, *filled, end - at)?, at, &mut done);
            *filled += done;
            result?;
        }
        Ok(())
    }

    /// Writes `data` at `offset`.
    pub fn write(
        &self,
        executor: &mut Executor,
        image: &File,
        data: &[Slice<'_>],
        offset: u64,
    ) -> Result<(), ExecuteError> {
        let result = self.write_all(executor, image, data, offset);
        // Of one that failed a part may be there.
        self.bitmap.wrote(offset, total(data));
        result
    }

    fn write_all(
        &self,
        executor: &mut Executor,
        image: &File,
        data: &[Slice<'_>],
        offset: u64,
    ) -> Result<(), ExecuteError> {
        let len = total(data);
        if let Some((file, true)) = self.holder(image, offset, len) {
            return executor.write(file, data, offset);
        }
        for piece in Piece::all(offset, len) {
            let data = &part(data, piece.start - offset, piece.len())?;
            self.change(image, piece, |_| executor.write(&self.file, data, piece.start))?;
        }
        Ok(())
    }

    /// Discards or zeroes `ranges`.
    pub fn clear(&self, image: &File, clear: Clear, ranges: &[Range]) -> Result<(), ExecuteError> {
        let pieces = ranges.iter().flat_map(|range| Piece::all(range.offset, range.len));
        for piece in pieces {
            let whole = piece.whole(self.size);
            // Of what is discarded in part nothing has to become of the rest.
            let piece = if clear == Clear::Discard { whole } else { piece };
            if piece.len() == 0 {
                continue;
            }
            let result = self.change(image, piece, |piece| {
                if whole.len() > 0 {
                    let range = Range { offset: whole.start, len: whole.len(), unmap: true };
                    clear::zero(&self.file, &range, None)?;
                }
                let zeros = [0; BLOCK as usize];
                for edge in piece.edges(whole) {
                    let zeros = &zeros[..edge.len() as usize];
                    self.file.write_all_at(zeros, edge.start).map_err(ExecuteError::Io)?;
                }
                Ok(())
            });
            self.bitmap.wrote(piece.start, piece.len());
            result?;
        }
        Ok(())
    }

    /// Has `write` write all of `piece`, whose blocks are in the overlay afterwards.
    fn change(
        &self,
        image: &File,
        piece: Piece,
        write: impl FnOnce(Piece) -> Result<(), ExecuteError>,
    ) -> Result<(), ExecuteError> {
        let word = self.bitmap.word(piece.chunk());
        let missing = || piece.bits() & !word.load(Ordering::Acquire);
        if missing() == 0 {
            return write(piece);
        }
        let mut block = self.lock(piece.chunk());
        let missing = missing();
        for edge in piece.edges(piece.whole(self.size)) {
            if edge.bits() & missing != 0 {
                self.copy_up(image, edge.start / BLOCK * BLOCK, &mut block.0)?;
            }
        }
        write(piece)?;
        word.fetch_or(missing, Ordering::Release);
        Ok(())
    }

    fn lock(&self, chunk: u64) -> MutexGuard<'_, Block> {
        let lock = &self.locks[(chunk % LOCKS as u64) as usize];
        // What it guards is overwritten before it is used.
        lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the block at `offset` from the image.
    fn copy_up(
        &self,
        image: &File,
        offset: u64,
        block: &mut [u8; BLOCK as usize],
    ) -> Result<(), ExecuteError> {
        let wanted = BLOCK.min(self.size - offset) as usize;
        let mut have = 0;
        while have < wanted {
            match image.read_at(&mut block[have..], offset + have as u64) {
                Ok(0) => return Err(ExecuteError::EndOfFile(offset + have as u64)),
                Ok(n) => have += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ExecuteError::Io(e)),
            }
        }
        self.file.write_all_at(&block[..wanted], offset).map_err(ExecuteError::Io)
    }
}

/// A disk's file as those see it that look after it.
impl Disk {
    /// What was written is to outlive the virtual machine.
    pub fn is_durable(&self) -> bool {
        !self.read_only && self.overlay.is_none()
    }
}

fn total(data: &[Slice<'_>]) -> u64 {
    data.iter().map(|slice| slice.len() as u64).sum()
}

/// `len` bytes of `data` from `from` on.
fn part<'m>(data: &[Slice<'m>], from: u64, len: u64) -> Result<Vec<Slice<'m>>, ExecuteError> {
    let (mut skip, mut left) = (from as usize, len as usize);
    let mut part = Vec::with_capacity(data.len());
    for slice in data {
        let start = skip.min(slice.len());
        let count = left.min(slice.len() - start);
        if count > 0 {
            part.push(slice.subslice(start, count).map_err(ExecuteError::Memory)?);
        }
        (skip, left) = (skip - start, left - count);
    }
    Ok(part)
}

#[cfg(test)]
#[path = "overlay_tests.rs"]
mod tests;
