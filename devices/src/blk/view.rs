//! Guest memory as the data path looks at it: a short list of runs.
//!
//! Every request looks up a dozen addresses. `GuestMemoryMmap` finds each through
//! a search over reference-counted regions; here it is one comparison for a guest
//! whose memory is in few pieces, as all are. It is checked just the same.

use std::iter::FusedIterator;

use libc::iovec;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, Permissions,
};

use super::memory::{Memory, Slice};
use crate::protocol::write_log::{self, WriteLog};

type Result<T> = std::result::Result<T, GuestMemoryError>;

/// Borrowed guest memory.
#[derive(Debug)]
pub(super) struct View<'m> {
    runs: Vec<Run<'m>>,
    /// Where this process notes what it writes.
    log: Option<&'m WriteLog>,
}

#[derive(Debug)]
struct Run<'m> {
    start: u64,
    memory: Slice<'m>,
    /// Where it is in guest memory's file.
    offset: u64,
}

impl<'m> View<'m> {
    /// Lists the regions of `memory`.
    pub fn new(memory: &'m Memory) -> Result<View<'m>> {
        let run = |region: &'m <Memory as GuestMemoryBackend>::R| {
            let start = region.start_addr().raw_value();
            let offset = region.file_offset().map_or(0, FileOffset::start);
            Ok(Run { start, memory: region.as_volatile_slice()?, offset })
        };
        let runs = memory.iter().map(run).collect::<Result<_>>()?;
        Ok(View { runs, log: write_log::own() })
    }

    /// One that notes what is written in `log`.
    #[cfg(test)]
    pub fn logged(memory: &'m Memory, log: &'m WriteLog) -> View<'m> {
        View { log: Some(log), ..View::new(memory).expect("view") }
    }

    /// Notes that `slice`, a part of this memory, is going to be written.
    #[inline]
    pub fn will_write(&self, slice: &Slice<'_>) {
        self.note(slice.ptr_guard().as_ptr() as usize, slice.len());
    }

    /// Notes that it has been.
    #[inline]
    pub fn has_written(&self, slice: &Slice<'_>) {
        self.will_write(slice);
    }

    /// Notes that what an iovec names, a part of this memory, has been written.
    #[inline]
    pub fn has_written_to(&self, iovec: &iovec) {
        self.note(iovec.iov_base as usize, iovec.iov_len);
    }

    #[inline]
    fn note(&self, at: usize, len: usize) {
        let Some(log) = self.log else { return };
        for run in &self.runs {
            let into = at.wrapping_sub(run.memory.ptr_guard().as_ptr() as usize);
            if into < run.memory.len() {
                return log.mark(run.offset + into as u64, len as u64);
            }
        }
    }

    /// The memory at `address`, at most `len` bytes of it. `len` is not zero.
    #[inline]
    fn at(&self, address: u64, len: usize) -> Result<Slice<'m>> {
        for run in &self.runs {
            let offset = address.wrapping_sub(run.start);
            let size = run.memory.len();
            if offset < size as u64 {
                let offset = offset as usize;
                return Ok(run.memory.subslice(offset, len.min(size - offset))?);
            }
        }
        Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(address)))
    }

    /// The runs of memory that make up `len` bytes at `address`. Ends after an error.
    #[inline]
    pub fn slices(&self, address: GuestAddress, len: usize) -> Slices<'_, 'm> {
        Slices { view: self, address: Some(address.raw_value()), left: len }
    }
}

/// See [`View::slices`].
#[derive(Debug)]
pub(super) struct Slices<'v, 'm> {
    view: &'v View<'m>,
    /// None where the range goes beyond the last address.
    address: Option<u64>,
    left: usize,
}

impl<'m> Iterator for Slices<'_, 'm> {
    type Item = Result<Slice<'m>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let found = match self.address {
            Some(address) => self.view.at(address, self.left),
            None => Err(GuestMemoryError::GuestAddressOverflow),
        };
        match &found {
            Ok(slice) => {
                self.left -= slice.len();
                self.address = self.address.and_then(|a| a.checked_add(slice.len() as u64));
            }
            Err(_) => self.left = 0,
        }
        Some(found)
    }
}

impl FusedIterator for Slices<'_, '_> {}

impl<'m> GuestMemorySliceIterator<'m, ()> for Slices<'_, 'm> {}

impl GuestMemory for View<'_> {
    type PhysicalMemory = Memory;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        self.slices(addr, count).all(|slice| slice.is_ok())
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, ()>>> {
        let shorter: &'a View<'a> = self;
        Ok(shorter.slices(addr, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    fn memory() -> Memory {
        let ranges = [(0, 0x2000), (0x2000, 0x1000), (0x8000, 0x1000), (u64::MAX - 0x1000, 0x1000)];
        Memory::from_ranges(&ranges.map(|(at, len)| (GuestAddress(at), len))).expect("memory")
    }

    #[test]
    fn ranges_go_over_neighbours_and_stop_at_holes() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let lens = |at, len| {
            let slices = view.slices(GuestAddress(at), len);
            slices.map(|s| s.map(|s| s.len()).ok()).collect::<Vec<_>>()
        };
        assert_eq!(lens(0x10, 16), [Some(16)]);
        assert_eq!(lens(0x1ff0, 0x20), [Some(0x10), Some(0x10)]);
        assert_eq!(lens(0x2ff0, 0x20), [Some(0x10), None]);
        assert_eq!(lens(0x8fff, 1), [Some(1)]);
        assert_eq!(lens(0x9000, 1), [None]);
        assert_eq!(lens(0x5000, 0), []);
        assert_eq!(lens(u64::MAX - 1, 1), [Some(1)]);
        assert_eq!(lens(u64::MAX - 1, 3), [Some(1), None]);
        assert_eq!(lens(u64::MAX, 2), [None]);
        view.write_obj(7u64, GuestAddress(0x1ffc)).expect("over the seam");
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1ffc)).expect("read"), 7);
    }

    proptest! {
        /// It says what vm-memory's own memory says.
        #[test]
        fn it_agrees_with_the_memory_it_shows(
            at in prop_oneof![0u64..0xa000, u64::MAX - 0x1010..=u64::MAX],
            len in 0usize..0x3000,
        ) {
            let memory = memory();
            let view = View::new(&memory).expect("view");
            let address = |s: &Slice<'_>| (s.ptr_guard().as_ptr() as usize, s.len());
            let ours: Vec<_> = view
                .slices(GuestAddress(at), len)
                .map(|s| s.map(|s| address(&s)).ok())
                .collect();
            let theirs: Vec<_> = GuestMemoryBackend::get_slices(&memory, GuestAddress(at), len)
                .map(|s| s.map(|s| address(&s)).ok())
                .collect();
            prop_assert_eq!(ours, theirs);
        }
    }
}
