//! Guest memory for a cut: copied while the guest stands still, or before, in rounds ([`super::rounds`]).
//!
//! A live copy begins with all of memory while the guest runs, then what was written
//! meanwhile, and so on while that gets less; the cut has the last round only. What has not
//! come yet from the snapshot that a VM was restored from is taken from there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use cellblock_wire::sealed_memfd;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::super::event_loop::Vm;
use super::capture::{self, CaptureError, Until};
use super::layers::Layer;
use crate::snapshot::dirty;
use crate::snapshot::format::{CHUNK, PAGE, table};
use crate::snapshot::pager::Pager;

/// A copy of memory, as of some moment while the guest ran.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) memory: OwnedFd,
    pub(super) rounds: u32,
    /// What is not there yet, by chunk, when its copy began.
    pub(super) absent: Vec<bool>,
    /// The same of what is written to `cow` disks.
    pub(super) layers: Vec<Layer>,
}

/// The set of chunks that have not come yet; whatever is in it is as in the snapshot.
pub(super) fn absent(pager: Option<&Pager>, chunks: usize) -> Result<Vec<bool>, CaptureError> {
    if pager.is_some_and(|pager| !pager.settle()) {
        return Err(CaptureError::Broken);
    }
    let has = |index| pager.is_none_or(|pager| pager.presence().has(index));
    Ok((0..chunks).map(|index| !has(index)).collect())
}

impl Vm {
    /// Completes a copy, or makes one, while everybody stands still. Returns memory, how
    /// many pages were copied now, and all that was written since the tracker's base.
    pub(super) fn copy_still(
        &mut self,
        live: Option<Copy>,
        hold: bool,
        until: Until,
    ) -> Result<(OwnedFd, u64, Vec<u64>), CaptureError> {
        self.snapshots.tracker.begin(&self.machine)?;
        let (round, since) = self.snapshots.tracker.cut(&self.machine)?;
        // First of all: the logs are empty now, and whatever fails below has kept nothing.
        self.snapshots.unkept = Some(since.clone());
        let count = dirty::count(&round);
        if let Some(copy) = live {
            copy.pages(self.ram.fd(), &round, self.has_holes(), until)?;
            return Ok((copy.memory, count, since));
        }
        if hold {
            return Ok((capture::shared(&self.ram)?, 0, since));
        }
        let absent = absent(self.pager.as_ref(), since.len())?;
        let memory = capture::copy(&self.ram, until)?;
        let copy = Copy { memory, rounds: 0, absent, layers: Vec::new() };
        let mut next = 0;
        while let Some(index) = copy.next_absent(next) {
            until.check()?;
            copy.fill_absent(index, self.pager.as_ref())?;
            next = index + 1;
        }
        Ok((copy.memory, 0, since))
    }

    pub(super) fn has_holes(&self) -> bool {
        self.pager.as_ref().is_some_and(|pager| !pager.is_complete())
    }
}

impl Copy {
    /// The first chunk from `from` on that has not come.
    pub(super) fn next_absent(&self, from: usize) -> Option<usize> {
        (from..self.absent.len()).find(|index| self.absent[*index])
    }

    /// Copies a chunk that has not come from where it would come from. Some of it may have come
    /// meanwhile, in part; and if it was written to since, it is in a later round.
    pub(super) fn fill_absent(
        &self,
        index: usize,
        pager: Option<&Pager>,
    ) -> Result<(), CaptureError> {
        let Some(pager) = pager else { return Ok(()) };
        let mut chunk = vec![0; CHUNK];
        pager.chain().read_chunk(index, &mut chunk)?;
        let written = nix::sys::uio::pwrite(self.memory.as_fd(), &chunk, (index * CHUNK) as i64);
        match written.map_err(|errno| CaptureError::Copy(errno.into()))? {
            CHUNK => Ok(()),
            _ => Err(CaptureError::Copy(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Copies single pages, a word of them for each chunk.
    fn pages(
        &self,
        ram: BorrowedFd<'_>,
        pages: &[u64],
        holes: bool,
        until: Until,
    ) -> Result<(), CaptureError> {
        for (index, pages) in pages.iter().enumerate().filter(|(_, pages)| **pages != 0) {
            self.chunk(ram, index, *pages, holes).map_err(CaptureError::Copy)?;
            until.check()?;
        }
        Ok(())
    }

    /// Copies single pages of a chunk. While memory still comes (`holes`), one that is not there
    /// was marked and not written: it is as it was copied before.
    pub(super) fn chunk(
        &self,
        ram: BorrowedFd<'_>,
        index: usize,
        pages: u64,
        holes: bool,
    ) -> io::Result<()> {
        let mut buffer = vec![0; PAGE * pages.count_ones() as usize];
        for (page, run) in table::runs(pages) {
            let at = (index * CHUNK + page * PAGE) as i64;
            if holes {
                for at in (0..run).map(|page| at + (page * PAGE) as i64) {
                    if is_there(ram, at)? {
                        self.copy(ram, at, &mut buffer[..PAGE])?;
                    }
                }
            } else {
                self.copy(ram, at, &mut buffer[..run * PAGE])?;
            }
        }
        Ok(())
    }

    fn copy(&self, ram: BorrowedFd<'_>, at: i64, bytes: &mut [u8]) -> io::Result<()> {
        let n = nix::sys::uio::pread(ram, bytes, at)?;
        let written = nix::sys::uio::pwrite(self.memory.as_fd(), &bytes[..n], at)?;
        match n == bytes.len() && written == n {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Whether memory has a page at `at`. (Where it ends is not asked: that is a long way.)
fn is_there(ram: BorrowedFd<'_>, at: i64) -> io::Result<bool> {
    match lseek(ram, at, Whence::SeekData) {
        Ok(from) => Ok(from == at),
        Err(Errno::ENXIO) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// A set of pages as a file, for who writes the cut down.
pub(super) fn pages_file(pages: &[u64]) -> Result<OwnedFd, CaptureError> {
    let fd = sealed_memfd("snapshot-pages", pages.len() as u64 * 8)?;
    let bytes: Vec<u8> = pages.iter().flat_map(|word| word.to_le_bytes()).collect();
    let file = std::fs::File::from(fd.try_clone().map_err(CaptureError::Copy)?);
    file.write_all_at(&bytes, 0).map_err(CaptureError::Copy)?;
    Ok(fd)
}
