//! Images opened with O_DIRECT: what does not fit their blocks goes over a bounce buffer.
//!
//! The kernel moves whole blocks, to and from memory aligned as the file demands. A guest
//! may ask for any sectors, with buffers anywhere. What fits goes straight; for the rest
//! whole blocks are read, or read, changed and written back. Such a change must not meet
//! another write of the same block, of whichever queue, or one of the two would be lost:
//! every write of a disk whose blocks are larger than a sector holds a [`Turns`], shared
//! while it writes whole blocks, alone while it changes parts of some.
#![allow(unsafe_code)] // statx and an ioctl, which have no wrapper here

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::config::SECTOR;
use super::execute::ExecuteError;
use super::memory::Slice;
use super::turns::Turns;

/// Most bytes of a bounce buffer beside the blocks at its ends.
const CHUNK: u64 = 1 << 20;
/// Largest block of a file or device, so that a bounce buffer stays one.
const MAX_BLOCK: u32 = 1 << 20;

/// How an image wants to be read and written.
#[derive(Debug)]
pub(super) struct Direct {
    /// Alignment of memory.
    pub memory: usize,
    /// Alignment of offsets and lengths: a power of two, at least a sector.
    pub block: u64,
    /// Who may write; none where a sector is a block.
    pub turns: Option<Turns>,
}

impl Direct {
    /// The rules of a file, if it was opened with O_DIRECT.
    pub fn of(file: &File) -> io::Result<Option<Direct>> {
        let flags = fcntl(file, FcntlArg::F_GETFL).map_err(io::Error::from)?;
        if !OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT) {
            return Ok(None);
        }
        let (memory, block) = match alignment(file) {
            // The file is one that the kernel reads through its cache after all.
            Some((0, _) | (_, 0)) => return Err(io::ErrorKind::Unsupported.into()),
            Some(known) => known,
            None => (block_size(file)?, block_size(file)?),
        };
        Ok(Some(Direct::new(memory, block)?))
    }

    /// Rules of a file whose memory and blocks have these alignments.
    pub fn new(memory: u32, block: u32) -> io::Result<Direct> {
        let known = |n: u32| n.is_power_of_two() && n <= MAX_BLOCK;
        if !known(memory) || !known(block) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let block = u64::from(block).max(SECTOR);
        let turns = (block > SECTOR).then(Turns::default);
        Ok(Direct { memory: memory as usize, block, turns })
    }

    /// Whether a transfer can go straight between the file and the guest's buffers.
    pub fn fits(&self, offset: u64, data: &[Slice<'_>]) -> bool {
        let fits = |slice: &Slice<'_>| {
            let address = slice.ptr_guard().as_ptr().addr();
            address.is_multiple_of(self.memory) && self.whole(slice.len() as u64)
        };
        self.whole(offset) && data.iter().all(fits)
    }

    /// Whether a write of `bytes` at `offset` changes part of a block.
    pub fn is_partial(&self, offset: u64, bytes: u64) -> bool {
        !(self.whole(offset) && self.whole(bytes))
    }

    fn whole(&self, n: u64) -> bool {
        n & (self.block - 1) == 0
    }
}

/// Alignment of memory and of offsets, as the kernel (6.1 or newer) and the file system
/// know it.
fn alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: plain data, for which zeros are a value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a string, `stat` has room for what is written.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    (result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// Where the kernel does not say: a device's logical block, a file system's block.
fn block_size(file: &File) -> io::Result<u32> {
    let metadata = file.metadata()?;
    if !metadata.file_type().is_block_device() {
        return u32::try_from(metadata.blksize()).map_err(|_| io::ErrorKind::Unsupported.into());
    }
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET as _, &raw mut size) };
    match u32::try_from(size) {
        Ok(size) if result == 0 => Ok(size),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Memory that every file's alignment is content with, made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Bounce {
    memory: Vec<u8>,
}

impl Bounce {
    fn buffer(&mut self, len: usize, align: usize) -> &mut [u8] {
        if self.memory.len() < len + align {
            self.memory = vec![0; len + align];
        }
        let start = self.memory.as_ptr().align_offset(align);
        &mut self.memory[start..start + len]
    }

    /// Reads into `data`, which is `bytes` long; `done` counts what is there.
    pub fn read(
        &mut self,
        (file, direct): (&File, &Direct),
        offset: u64,
        data: &[Slice<'_>],
        bytes: u64,
        done: &mut u64,
    ) -> Result<(), ExecuteError> {
        let mut to = Cursor::new(data);
        while *done < bytes {
            let span = Span::of(offset + *done, (bytes - *done).min(CHUNK), direct.block);
            let buffer = self.buffer(span.len(), direct.memory);
            let got = read_blocks(file, buffer, span.start, direct.block)?;
            let wanted = span.skip + span.bytes;
            let got = got.min(wanted);
            let chunk = buffer.get(span.skip..got).unwrap_or_default();
            to.fill(chunk)?;
            *done += chunk.len() as u64;
            if got < wanted {
                return Err(ExecuteError::EndOfFile(offset + *done));
            }
        }
        Ok(())
    }

    /// Writes `bytes` bytes, that `source` puts into one piece of memory after the other.
    /// The caller has the turn that it takes.
    pub fn write(
        &mut self,
        (file, direct): (&File, &Direct),
        offset: u64,
        bytes: u64,
        dsync: bool,
        mut source: impl FnMut(&mut [u8]) -> Result<(), ExecuteError>,
    ) -> Result<(), ExecuteError> {
        let (mut done, block) = (0, direct.block as usize);
        while done < bytes {
            let span = Span::of(offset + done, (bytes - done).min(CHUNK), direct.block);
            let buffer = self.buffer(span.len(), direct.memory);
            let last = span.len() - block;
            let end = span.skip + span.bytes;
            // Blocks that keep some of what they have.
            if span.skip > 0 {
                read_all(file, &mut buffer[..block], span.start, direct.block)?;
            }
            if end < span.len() && (span.skip == 0 || last > 0) {
                let at = span.start + last as u64;
                read_all(file, &mut buffer[last..], at, direct.block)?;
            }
            source(&mut buffer[span.skip..end])?;
            write_blocks(file, buffer, span.start, dsync)?;
            done += span.bytes as u64;
        }
        Ok(())
    }
}

/// The whole blocks around a part of a file.
struct Span {
    start: u64,
    /// Bytes of the first block in front of the part.
    skip: usize,
    /// Bytes of the part.
    bytes: usize,
    block: u64,
}

impl Span {
    /// Around `bytes`, at most a [`CHUNK`], at `offset`.
    fn of(offset: u64, bytes: u64, block: u64) -> Span {
        let skip = offset & (block - 1);
        Span { start: offset - skip, skip: skip as usize, bytes: bytes as usize, block }
    }

    fn len(&self) -> usize {
        (self.skip + self.bytes).next_multiple_of(self.block as usize)
    }
}

/// Fills `buffer`, whole blocks, as far as the file goes.
fn read_blocks(
    file: &File,
    buffer: &mut [u8],
    offset: u64,
    block: u64,
) -> Result<usize, ExecuteError> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => {
                done += n;
                // Only the end of the file cuts a block short.
                if !(n as u64).is_multiple_of(block) {
                    break;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ExecuteError::Io(e)),
        }
    }
    Ok(done)
}

fn read_all(file: &File, buffer: &mut [u8], offset: u64, block: u64) -> Result<(), ExecuteError> {
    match read_blocks(file, buffer, offset, block)? {
        n if n == buffer.len() => Ok(()),
        n => Err(ExecuteError::EndOfFile(offset + n as u64)),
    }
}

fn write_blocks(file: &File, buffer: &[u8], offset: u64, dsync: bool) -> Result<(), ExecuteError> {
    file.write_all_at(buffer, offset).map_err(ExecuteError::Io)?;
    if dsync { file.sync_data().map_err(ExecuteError::Io) } else { Ok(()) }
}

/// A place in the guest's buffers.
pub(super) struct Cursor<'d, 'm> {
    data: &'d [Slice<'m>],
    /// Bytes of the first buffer that are behind it.
    at: usize,
}

impl<'d, 'm> Cursor<'d, 'm> {
    pub fn new(data: &'d [Slice<'m>]) -> Cursor<'d, 'm> {
        Cursor { data, at: 0 }
    }

    /// Calls `copy` with the guest's memory for one part of `len` bytes after the other.
    fn each(
        &mut self,
        len: usize,
        mut copy: impl FnMut(&Slice<'m>, std::ops::Range<usize>),
    ) -> Result<(), ExecuteError> {
        let mut done = 0;
        while done < len {
            let Some((first, rest)) = self.data.split_first() else { break };
            let n = (first.len() - self.at).min(len - done);
            let part = first.subslice(self.at, n).map_err(ExecuteError::Memory)?;
            copy(&part, done..done + n);
            (done, self.at) = (done + n, self.at + n);
            if self.at == first.len() {
                (self.data, self.at) = (rest, 0);
            }
        }
        Ok(())
    }

    /// Copies `bytes` to the guest.
    fn fill(&mut self, bytes: &[u8]) -> Result<(), ExecuteError> {
        self.each(bytes.len(), |part, at| part.copy_from(&bytes[at]))
    }

    /// Copies from the guest.
    pub fn drain(&mut self, bytes: &mut [u8]) -> Result<(), ExecuteError> {
        self.each(bytes.len(), |part, at| {
            part.copy_to(&mut bytes[at]);
        })
    }
}

#[cfg(test)]
#[path = "direct_tests.rs"]
mod tests;
