//! Guest RAM: one sealed memfd, mapped in two regions with a hole below 4 GiB.
//!
//! Every process that needs guest memory maps the same memfd; being sealed, none
//! of them can resize it under another. Pages come into being when they are first
//! touched, so a large guest costs what it uses.
#![allow(unsafe_code)] // host memory size, no RAM in core dumps, file to memfd copies

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use cellblock_wire::{ShmError, sealed_memfd};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryError, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use super::layout::{HIGH_RAM_START, LOW_RAM_END};

/// Name of the memfd, as `/proc/PID/maps` shows it.
pub const MEMFD_NAME: &str = "guest-ram";
/// Least guest RAM, in bytes (32 MiB).
pub const MIN_RAM: u64 = 32 << 20;
/// Guest RAM is a multiple of this many bytes (1 MiB).
pub const RAM_STEP: u64 = 1 << 20;

/// Guest RAM that could not be made, or be reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Less than [`MIN_RAM`].
    #[error("guest memory of {0} bytes is too small: give at least 32M")]
    TooSmall(u64),
    /// Not a multiple of [`RAM_STEP`].
    #[error("guest memory of {0} bytes is not a whole number of MiB: give for example 512M")]
    Uneven(u64),
    /// More than the host has.
    #[error("guest memory of {asked} MiB is more than this host's {host} MiB: give a smaller size")]
    TooLarge {
        /// What was asked for, in MiB.
        asked: u64,
        /// What the host has in all, in MiB.
        host: u64,
    },
    /// The memfd could not be made.
    #[error("making guest memory")]
    Create(#[source] ShmError),
    /// Mapping the memfd failed.
    #[error("mapping guest memory")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    /// A range that is not RAM, or not in one region.
    #[error("{len:#x} bytes at guest-physical {gpa:#x} are not all RAM")]
    NotRam {
        /// Guest-physical start.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A file could not be copied to guest memory.
    #[error("copying a file to guest memory")]
    Copy(#[source] io::Error),
    /// A file ended early.
    #[error("the file became shorter while it was read: try again when nobody writes it")]
    Shrunk,
    /// Data could not be written to guest memory.
    #[error("placing data in guest memory")]
    Access(#[source] GuestMemoryError),
}

/// One contiguous piece of guest RAM, as KVM and device processes need to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where it starts in the memfd, in bytes.
    pub offset: u64,
    /// Where it is mapped in this process.
    pub hva: u64,
}

/// All of a guest's RAM. Cheap to clone: clones are the same memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    file: Arc<File>,
    memory: GuestMemoryMmap<()>,
    regions: Vec<RamRegion>,
    len: u64,
}

impl GuestRam {
    /// Makes `bytes` of zeroed guest RAM, at most what the host has.
    pub fn new(bytes: u64) -> Result<GuestRam, MemoryError> {
        check_size(bytes, host_memory())?;
        let fd = sealed_memfd(MEMFD_NAME, bytes).map_err(MemoryError::Create)?;
        let file = Arc::new(File::from(fd));
        let mut mapped = Vec::with_capacity(2);
        let mut regions = Vec::with_capacity(2);
        for (gpa, len, offset) in split(bytes) {
            let at = FileOffset::from_arc(Arc::clone(&file), offset);
            let region =
                MmapRegion::from_file(at, len as usize).map_err(|e| MemoryError::Map(e.into()))?;
            // SAFETY: the range is a mapping just made; MADV_DONTDUMP changes no
            // contents. Failure only makes a core dump larger.
            unsafe { libc::madvise(region.as_ptr().cast(), len as usize, libc::MADV_DONTDUMP) };
            regions.push(RamRegion { gpa, len, offset, hva: region.as_ptr() as u64 });
            let region = GuestRegionMmap::new(region, GuestAddress(gpa))
                .ok_or(MemoryError::Map(vm_memory::mmap::FromRangesError::InvalidGuestRegion))?;
            mapped.push(region);
        }
        let memory =
            GuestMemoryMmap::from_regions(mapped).map_err(|e| MemoryError::Map(e.into()))?;
        Ok(GuestRam { file, memory, regions, len: bytes })
    }

    /// No RAM: the machine's memory is what a plugin makes.
    pub fn none() -> Result<GuestRam, MemoryError> {
        let fd = sealed_memfd(MEMFD_NAME, 0).map_err(MemoryError::Create)?;
        let file = Arc::new(File::from(fd));
        Ok(GuestRam { file, memory: GuestMemoryMmap::new(), regions: Vec::new(), len: 0 })
    }

    /// The memory, for access by guest-physical address.
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// The sealed memfd behind all regions.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The regions, by rising address: one, or two when there is high RAM.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Only in a machine that has a plugin's memory.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// End of the RAM below the MMIO hole: the address behind its last byte.
    pub fn low_end(&self) -> u64 {
        self.len.min(LOW_RAM_END)
    }

    /// Copies `len` bytes of `file` from byte `offset` on to guest-physical `gpa`.
    ///
    /// From page cache to page cache: half the time of reading to the mapping, and
    /// this process's page tables stay empty.
    pub fn fill_from(
        &self,
        gpa: u64,
        file: &File,
        offset: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        let region = self
            .regions
            .iter()
            .find(|r| gpa >= r.gpa && gpa.checked_add(len).is_some_and(|end| end <= r.gpa + r.len));
        let region = region.ok_or(MemoryError::NotRam { gpa, len })?;
        let target = region.offset + (gpa - region.gpa);
        (&*self.file).seek(SeekFrom::Start(target)).map_err(MemoryError::Copy)?;
        let mut from = i64::try_from(offset)
            .map_err(|_| MemoryError::Copy(io::ErrorKind::InvalidInput.into()))?;
        let mut left = len;
        while left > 0 {
            let (to, source) = (self.file.as_raw_fd(), file.as_raw_fd());
            // SAFETY: both fds are open; `from` outlives the call. The bytes go to the
            // memfd, which is guest memory and may change at any time anyway.
            let n = unsafe { libc::sendfile(to, source, &mut from, left as usize) };
            match n {
                0 => return Err(MemoryError::Shrunk),
                1.. => left -= n as u64,
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(MemoryError::Copy(e)),
                },
            }
        }
        Ok(())
    }

    /// Writes `data` to guest-physical `gpa`.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.memory.write_slice(data, GuestAddress(gpa)).map_err(MemoryError::Access)
    }
}

/// The regions of `bytes` of RAM: (guest address, length, offset in the memfd).
fn split(bytes: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let low = bytes.min(LOW_RAM_END);
    let high = bytes - low;
    [(0, low, 0), (HIGH_RAM_START, high, low)].into_iter().filter(|(_, len, _)| *len > 0)
}

fn check_size(bytes: u64, host: u64) -> Result<(), MemoryError> {
    if bytes < MIN_RAM {
        return Err(MemoryError::TooSmall(bytes));
    }
    if !bytes.is_multiple_of(RAM_STEP) {
        return Err(MemoryError::Uneven(bytes));
    }
    if bytes > host {
        return Err(MemoryError::TooLarge { asked: bytes >> 20, host: host >> 20 });
    }
    Ok(())
}

/// The host's memory in bytes. Where the kernel will not say, no limit: the
/// mapping itself is then the check.
fn host_memory() -> u64 {
    // SAFETY: sysconf takes no pointers.
    let (pages, size) =
        unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    match (u64::try_from(pages), u64::try_from(size)) {
        (Ok(pages), Ok(size)) => pages.saturating_mul(size),
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryBackend;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn a_small_guest_has_one_region() {
        assert_eq!(split(32 * MIB).collect::<Vec<_>>(), [(0, 32 * MIB, 0)]);
        assert_eq!(split(3 * GIB).collect::<Vec<_>>(), [(0, 3 * GIB, 0)]);
    }

    #[test]
    fn a_large_guest_continues_above_the_hole() {
        assert_eq!(
            split(6 * GIB).collect::<Vec<_>>(),
            [(0, 3 * GIB, 0), (4 * GIB, 3 * GIB, 3 * GIB)]
        );
    }

    #[test]
    fn sizes_out_of_range_are_refused_with_the_remedy() {
        let refused = |bytes| check_size(bytes, 8 * GIB).unwrap_err().to_string();
        assert!(refused(0).contains("at least 32M"));
        assert!(refused(MIB).contains("at least 32M"));
        assert!(refused(33 * MIB + 4096).contains("whole number of MiB"));
        assert!(refused(9 * GIB).contains("more than this host's 8192 MiB"));
        assert!(refused(u64::MAX - u64::MAX % MIB).contains("give a smaller size"));
        check_size(8 * GIB, 8 * GIB).unwrap();
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        let huge = (host_memory() / MIB + 1) * MIB;
        assert!(matches!(GuestRam::new(huge), Err(MemoryError::TooLarge { .. })));
    }

    #[test]
    fn regions_map_the_memfd_at_their_offsets() {
        // Larger than 4 GiB and sparse: only what is touched exists.
        let ram = GuestRam::new((5 * GIB).min(host_memory() / MIB * MIB)).unwrap();
        for region in ram.regions() {
            let mark = region.gpa ^ 0x5a5a;
            ram.memory().write_obj(mark, GuestAddress(region.gpa + 8)).unwrap();
            let mut seen = [0; 8];
            nix::sys::uio::pread(ram.fd(), &mut seen, (region.offset + 8) as i64).unwrap();
            assert_eq!(u64::from_le_bytes(seen), mark);
        }
        let stat = nix::sys::stat::fstat(ram.fd()).unwrap();
        assert_eq!(stat.st_size as u64, ram.len());
        assert!(stat.st_blocks * 512 < 64 * 1024, "not sparse: {} blocks", stat.st_blocks);
    }

    #[test]
    fn the_hole_is_not_memory() {
        let ram = GuestRam::new(64 * MIB).unwrap();
        assert!(matches!(ram.write(64 * MIB - 1, &[1, 2]), Err(MemoryError::Access(_))));
        ram.write(64 * MIB - 1, &[1]).unwrap();
        assert_eq!(ram.low_end(), 64 * MIB);
    }

    #[test]
    fn a_file_is_copied_to_its_place() {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"0123456789").unwrap();
        let ram = GuestRam::new((4 * GIB).min(host_memory() / MIB * MIB)).unwrap();
        let last = *ram.regions().last().unwrap();
        let end = last.gpa + last.len;
        ram.fill_from(end - 4, &file, 3, 4).unwrap();
        let seen: [u8; 6] = ram.memory().read_obj(GuestAddress(end - 6)).unwrap();
        assert_eq!(&seen, b"\0\x003456");
        let fill = |gpa, offset, len| ram.fill_from(gpa, &file, offset, len);
        assert!(matches!(fill(end - 3, 3, 4), Err(MemoryError::NotRam { .. })));
        assert!(matches!(fill(u64::MAX, 3, 4), Err(MemoryError::NotRam { .. })));
        assert!(matches!(fill(ram.low_end(), 0, 1), Err(MemoryError::NotRam { .. })));
        assert!(matches!(fill(0, 8, 4), Err(MemoryError::Shrunk)));
        assert!(matches!(fill(0, u64::MAX, 4), Err(MemoryError::Copy(_))));
    }

    #[test]
    fn regions_carry_what_vhost_user_needs() {
        let ram = GuestRam::new(64 * MIB).unwrap();
        let region = ram.memory().iter().next().unwrap();
        let info = vhost::VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        assert_eq!(info.userspace_addr, ram.regions()[0].hva);
        assert_eq!(info.memory_size, 64 * MIB);
    }
}
