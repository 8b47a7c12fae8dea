//! Guest RAM: one sealed memfd, mapped once here and once in every device process.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use cellblock_wire::{ShmError, sealed_memfd};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryMmap};

use super::layout::{HOLE_END, HOLE_START};

/// Name of the memfd, as /proc/PID/maps shows it.
pub const MEMFD_NAME: &str = "cellblock-ram";
const MIB: u64 = 1 << 20;
/// The least a VM can have.
pub const MIN: u64 = 32 * MIB;

/// Memory that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Below [`MIN`] or not whole MiB.
    #[error("guest memory of {0} bytes is not a whole number of MiB from 32 MiB up; use -m 512M")]
    Size(u64),
    /// More than the host has.
    #[error("guest memory of {} MiB is more than the host's {} MiB", .wanted >> 20, .host >> 20)]
    TooLarge {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes the host has.
        host: u64,
    },
    /// The memfd.
    #[error("creating guest memory")]
    Create(#[from] ShmError),
    /// Its mapping.
    #[error("mapping guest memory")]
    Map(#[from] vm_memory::mmap::FromRangesError),
    /// The fd could not be duplicated.
    #[error("duplicating the fd of guest memory")]
    Duplicate(#[source] std::io::Error),
}

/// One contiguous piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Offset in the memfd.
    pub offset: u64,
    /// Address in this process.
    pub hva: u64,
}

/// All of guest RAM.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap<()>,
    regions: Vec<RamRegion>,
    fd: Arc<File>,
}

impl GuestRam {
    /// Makes `bytes` of RAM, all zero, none of it allocated yet.
    pub fn new(bytes: u64) -> Result<GuestRam, MemoryError> {
        if bytes < MIN || !bytes.is_multiple_of(MIB) {
            return Err(MemoryError::Size(bytes));
        }
        let host = host_memory();
        if bytes > host {
            return Err(MemoryError::TooLarge { wanted: bytes, host });
        }
        let fd: OwnedFd = sealed_memfd(MEMFD_NAME, bytes)?;
        let fd = Arc::new(File::from(fd));
        let low = bytes.min(HOLE_START);
        let mut ranges = vec![(GuestAddress(0), low as usize, Some(FileOffset::from_arc(fd.clone(), 0)))];
        if bytes > low {
            let offset = FileOffset::from_arc(fd.clone(), low);
            ranges.push((GuestAddress(HOLE_END), (bytes - low) as usize, Some(offset)));
        }
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges)?;
        let regions = memory
            .iter()
            .map(|region| RamRegion {
                gpa: region.start_addr().0,
                len: region.len(),
                offset: region.file_offset().map_or(0, FileOffset::start),
                hva: region.as_ptr() as u64,
            })
            .collect();
        Ok(GuestRam { memory, regions, fd })
    }

    /// For access from here.
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Its pieces, by address.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn host_memory() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total())
}
