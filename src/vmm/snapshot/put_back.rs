//! Memory of a restored machine made what its snapshot has, in place.

use std::collections::HashMap;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use vm_memory::{Bytes, GuestAddress};

use super::reset::ResetError;
use crate::snapshot::eager::FillError;
use crate::snapshot::format::{CHUNK, Chain, PAGE, table};
use crate::snapshot::pager::Pager;
use crate::vm::memory::GuestRam;

/// Most pages that are kept: 64 MiB of them.
const KEPT: usize = 16 << 10;

/// Pages as the snapshot has them that a reset has put back before. A guest that is reset time
/// and again writes the same pages each time; to have one from the snapshot takes reading and
/// checking all of its chunk.
#[derive(Default)]
pub struct Kept(HashMap<usize, Box<[u8; PAGE]>>);

impl Kept {
    /// Bytes that they come to, at most.
    pub(crate) const MOST: u64 = (KEPT * PAGE) as u64;

    fn keep(&mut self, page: usize, bytes: &[u8]) {
        if self.0.len() < KEPT
            && let Ok(bytes) = <[u8; PAGE]>::try_from(bytes)
        {
            self.0.insert(page, Box::new(bytes));
        }
    }

    fn has_all(&self, chunk: usize, pages: u64) -> bool {
        let first = chunk * (CHUNK / PAGE);
        table::runs(pages)
            .all(|(at, run)| (at..at + run).all(|page| self.0.contains_key(&(first + page))))
    }
}

/// Puts back the pages of `since`, a word for each chunk; how many there are.
pub(super) fn known(
    chain: &Chain,
    ram: &GuestRam,
    since: &[u64],
    kept: &mut Kept,
) -> Result<u64, ResetError> {
    let mut pages = 0;
    let mut was = vec![0; CHUNK];
    for (index, set) in since.iter().enumerate().filter(|(_, set)| **set != 0) {
        let Some(at) = address(ram, (index * CHUNK) as u64) else { continue };
        let zero = chain.is_zero(index);
        let read = !zero && !kept.has_all(index, *set);
        if zero {
            was.fill(0);
        } else if read {
            chain.read_chunk(index, &mut was).map_err(FillError::from)?;
        }
        for page in (0..CHUNK / PAGE).filter(|page| set & 1 << page != 0) {
            let number = index * (CHUNK / PAGE) + page;
            let own = &was[page * PAGE..(page + 1) * PAGE];
            let bytes = match kept.0.get(&number).filter(|_| !zero && !read) {
                Some(bytes) => &bytes[..],
                None => own,
            };
            let at = GuestAddress(at.0 + (page * PAGE) as u64);
            ram.memory().write_slice(bytes, at).map_err(FillError::from)?;
            if read {
                kept.keep(number, own);
            }
            pages += 1;
        }
    }
    Ok(pages)
}

/// Makes memory what the snapshot has, writing only what differs: it is added to `written`, a word
/// for each chunk. Returns how many pages did.
pub(super) fn all(
    chain: &Chain,
    ram: &GuestRam,
    pager: Option<&Pager>,
    written: &mut [u64],
) -> Result<u64, ResetError> {
    if pager.is_some_and(|pager| !pager.settle()) {
        return Err(ResetError::Memory);
    }
    let mut pages = 0;
    let (mut was, mut is) = (vec![0; CHUNK], vec![0; CHUNK]);
    for (index, written) in written.iter_mut().enumerate().take(chain.chunks()) {
        // What has not come yet nobody has written to.
        if pager.is_some_and(|pager| !pager.presence().has(index)) {
            continue;
        }
        let offset = (index * CHUNK) as u64;
        let here = lseek(ram.fd(), offset as i64, Whence::SeekData);
        let populated = match here {
            Ok(data) => (data as u64) < offset + CHUNK as u64,
            Err(Errno::ENXIO) => false,
            Err(error) => return Err(ResetError::Look(error)),
        };
        let zero = chain.is_zero(index);
        if zero && !populated {
            continue;
        }
        if zero {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(ram.fd(), flags, offset as i64, CHUNK as i64).map_err(ResetError::Look)?;
            pages += (CHUNK / PAGE) as u64;
            *written = u64::MAX;
            continue;
        }
        chain.read_chunk(index, &mut was).map_err(FillError::from)?;
        let Some(at) = address(ram, offset) else { continue };
        ram.memory().read_slice(&mut is, at).map_err(FillError::from)?;
        for (page, (was, is)) in was.chunks(PAGE).zip(is.chunks(PAGE)).enumerate() {
            if was != is {
                let at = GuestAddress(at.0 + (page * PAGE) as u64);
                ram.memory().write_slice(was, at).map_err(FillError::from)?;
                *written |= 1 << page;
                pages += 1;
            }
        }
    }
    Ok(pages)
}

/// Where byte `offset` of the memfd is for the guest.
fn address(ram: &GuestRam, offset: u64) -> Option<GuestAddress> {
    let region = ram.regions().iter().find(|r| offset >= r.offset && offset - r.offset < r.len)?;
    Some(GuestAddress(region.gpa + (offset - region.offset)))
}
