//! Guest memory for a cut: copied while the guest stands still, or before, in rounds.
//!
//! A live copy begins with all of memory while the guest runs, then what was written
//! meanwhile, and so on while that gets less; the cut has the last round only. What has not
//! come yet from the snapshot that a VM was restored from is taken from there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use cellblock_wire::sealed_memfd;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::super::event_loop::Vm;
use super::capture::{self, CaptureError};
use crate::snapshot::dirty;
use crate::snapshot::format::{CHUNK, PAGE, table};
use crate::snapshot::pager::Pager;

/// Few enough pages for the guest to stand still: 1 MiB.
const ENOUGH: u64 = 256;
/// Most rounds: a guest that writes faster than we copy is not waited for.
const MOST_ROUNDS: u32 = 8;

/// A copy of memory, as of some moment while the guest ran.
#[derive(Debug)]
pub(super) struct Copy {
    memory: OwnedFd,
    pub(super) rounds: u32,
    /// What is not there yet, by chunk, when its copy began.
    absent: Vec<bool>,
}

/// The set of chunks that have not come yet; whatever is in it is as in the snapshot.
pub(super) fn absent(pager: Option<&Pager>, chunks: usize) -> Vec<bool> {
    if let Some(pager) = pager {
        pager.settle();
    }
    let has = |index| pager.is_none_or(|pager| pager.presence().has(index));
    (0..chunks).map(|index| !has(index)).collect()
}

impl Vm {
    /// Copies memory in rounds while the guest runs.
    pub(super) fn copy_live(&mut self, limit: Duration) -> Result<Copy, CaptureError> {
        let end = Instant::now() + limit;
        self.snapshots.tracker.begin(&self.machine)?;
        // From here on every write is in the next round.
        self.snapshots.tracker.round(&self.machine)?;
        let absent = absent(self.pager.as_ref(), self.snapshots.tracker.chunks());
        let memory = capture::copy(&self.ram)?;
        let mut copy = Copy { memory, rounds: 1, absent };
        copy.fill_absent(self.pager.as_ref())?;
        let mut before = u64::MAX;
        while copy.rounds < MOST_ROUNDS && Instant::now() < end {
            let pages = self.snapshots.tracker.round(&self.machine)?;
            copy.pages(self.ram.fd(), &pages, self.has_holes()).map_err(CaptureError::Copy)?;
            copy.rounds += 1;
            let count = dirty::count(&pages);
            if count <= ENOUGH || count >= before / 2 {
                break;
            }
            before = count;
        }
        Ok(copy)
    }

    /// Completes a copy, or makes one, while everybody stands still. Returns memory, how
    /// many pages were copied now, and all that was written since the tracker's base.
    pub(super) fn copy_still(
        &mut self,
        live: Option<Copy>,
        hold: bool,
    ) -> Result<(OwnedFd, u64, Vec<u64>), CaptureError> {
        self.snapshots.tracker.begin(&self.machine)?;
        let (round, since) = self.snapshots.tracker.cut(&self.machine)?;
        let count = dirty::count(&round);
        if let Some(copy) = live {
            let copied = copy.pages(self.ram.fd(), &round, self.has_holes());
            copied.map_err(CaptureError::Copy)?;
            return Ok((copy.memory, count, since));
        }
        if hold {
            return Ok((capture::shared(&self.ram)?, 0, since));
        }
        let absent = absent(self.pager.as_ref(), since.len());
        let mut copy = Copy { memory: capture::copy(&self.ram)?, rounds: 0, absent };
        copy.fill_absent(self.pager.as_ref())?;
        Ok((copy.memory, 0, since))
    }

    fn has_holes(&self) -> bool {
        self.pager.as_ref().is_some_and(|pager| !pager.is_complete())
    }

    /// Waits until all memory is there: who reads it directly must not find holes.
    pub(super) fn await_memory(&self, limit: Duration) -> bool {
        let Some(pager) = &self.pager else { return true };
        pager.prefetch();
        let end = Instant::now() + limit;
        while !pager.is_complete() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        pager.is_complete()
    }
}

impl Copy {
    /// Copies what has not come from where it would come from. Some of it may have come
    /// meanwhile, in part; and if it was written to since, it is in a later round.
    fn fill_absent(&mut self, pager: Option<&Pager>) -> Result<(), CaptureError> {
        let Some(pager) = pager else { return Ok(()) };
        let file = std::fs::File::from(self.memory.try_clone().map_err(CaptureError::Copy)?);
        let mut chunk = vec![0; CHUNK];
        for index in (0..self.absent.len()).filter(|index| self.absent[*index]) {
            pager.chain().read_chunk(index, &mut chunk)?;
            file.write_all_at(&chunk, (index * CHUNK) as u64).map_err(CaptureError::Copy)?;
        }
        Ok(())
    }

    /// Copies single pages. While memory still comes (`holes`), one that is not there was
    /// marked and not written: it is as it was copied before.
    fn pages(&self, ram: BorrowedFd<'_>, pages: &[u64], holes: bool) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        for (index, pages) in pages.iter().enumerate() {
            for (page, run) in table::runs(*pages) {
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
