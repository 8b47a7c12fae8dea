//! Guest memory as the front end hands it over in SET_MEM_TABLE.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use cellblock_wire::{ShmError, check_sealed};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollectionError,
    GuestRegionMmap, MmapRegion, VolatileSlice,
};

/// Guest memory mapped into this process.
pub(super) type Memory = GuestMemoryMmap<()>;
/// A run of guest memory that is contiguous here.
pub(super) type Slice<'m> = VolatileSlice<'m, ()>;

/// Most regions of a table: what the protocol allows without memory slots.
const MAX_REGIONS: usize = 8;

/// A memory table that was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemTableError {
    /// More regions than a table may have, or not one fd for each.
    #[error("memory table has {regions} regions and {files} file descriptors")]
    Count {
        /// Regions in the message.
        regions: usize,
        /// File descriptors beside it.
        files: usize,
    },
    /// The region's file could be shrunk under us, or is too short.
    #[error("checking memory region {0}")]
    File(usize, #[source] ShmError),
    /// The region could not be mapped.
    #[error("mapping memory region {0}")]
    Map(usize, #[source] MmapRegionError),
    /// The region's addresses wrap around.
    #[error("memory region {0} ends beyond the address space")]
    Wraps(usize),
    /// Two regions overlap, or are not in ascending order of guest address.
    #[error("arranging memory regions")]
    Arrange(#[source] GuestRegionCollectionError),
    /// Two regions overlap in the front end's addresses.
    #[error("memory regions overlap in front-end addresses")]
    UserOverlap,
}

/// One region as the front end sees it.
#[derive(Debug)]
struct Window {
    user: u64,
    guest: u64,
    len: u64,
}

/// Mapped guest memory, and the front end's own addresses for it.
#[derive(Debug)]
pub(super) struct MemTable {
    memory: Arc<Memory>,
    windows: Vec<Window>,
}

impl MemTable {
    /// Checks and maps every region of a SET_MEM_TABLE message.
    pub fn map(
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<MemTable, MemTableError> {
        if regions.len() > MAX_REGIONS || regions.len() != files.len() {
            return Err(MemTableError::Count { regions: regions.len(), files: files.len() });
        }
        let mut windows = Vec::with_capacity(regions.len());
        let mut mapped = Vec::with_capacity(regions.len());
        for (i, (region, file)) in regions.iter().zip(files).enumerate() {
            let wraps = || MemTableError::Wraps(i);
            let (offset, len) = (region.mmap_offset, region.memory_size);
            let end = offset.checked_add(len).ok_or_else(wraps)?;
            check_sealed(file.as_fd(), end).map_err(|e| MemTableError::File(i, e))?;
            let window = Window { user: region.user_addr, guest: region.guest_phys_addr, len };
            window.user.checked_add(len).ok_or_else(wraps)?;
            if windows.iter().any(|w: &Window| w.overlaps(&window)) {
                return Err(MemTableError::UserOverlap);
            }
            let size = usize::try_from(len).map_err(|_| wraps())?;
            let region = MmapRegion::from_file(FileOffset::new(file, offset), size)
                .map_err(|e| MemTableError::Map(i, e))?;
            mapped
                .push(GuestRegionMmap::new(region, GuestAddress(window.guest)).ok_or_else(wraps)?);
            windows.push(window);
        }
        // The front end may list its regions in any order.
        mapped.sort_by_key(GuestMemoryRegion::start_addr);
        let memory = Memory::from_regions(mapped).map_err(MemTableError::Arrange)?;
        Ok(MemTable { memory: Arc::new(memory), windows })
    }

    /// The mapped memory, by guest physical address.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The guest physical address of the front end's address `user`.
    pub fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        let window = self.windows.iter().find(|w| user.wrapping_sub(w.user) < w.len)?;
        Some(GuestAddress(window.guest + (user - window.user)))
    }
}

impl Window {
    fn overlaps(&self, other: &Window) -> bool {
        self.user < other.user + other.len && other.user < self.user + self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    const PAGE: u64 = 4096;

    fn region(guest: u64, len: u64, user: u64, offset: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, len, user, offset)
    }

    fn memfd(bytes: u64) -> File {
        File::from(cellblock_wire::sealed_memfd("ram", bytes).expect("memfd"))
    }

    #[test]
    fn regions_share_memory_and_translate() {
        let ram = memfd(4 * PAGE);
        let files = vec![ram.try_clone().expect("dup"), ram.try_clone().expect("dup")];
        // High region first: order is the front end's.
        let table = MemTable::map(
            &[
                region(1 << 32, 2 * PAGE, 0x9000_0000, 2 * PAGE),
                region(0, 2 * PAGE, 0x1000_0000, 0),
            ],
            files,
        )
        .expect("maps");
        let other = MemTable::map(&[region(0, 4 * PAGE, 0, 0)], vec![ram]).expect("maps");
        table.memory().write_obj(7u32, GuestAddress((1 << 32) + 8)).expect("write");
        let seen: u32 = other.memory().read_obj(GuestAddress(2 * PAGE + 8)).expect("read");
        assert_eq!(seen, 7);
        let at = |user| table.guest_address(user).map(|a| a.0);
        assert_eq!(at(0x9000_0010), Some((1 << 32) + 0x10));
        assert_eq!(at(0x1000_1fff), Some(0x1fff));
        assert_eq!((at(0x1000_2000), at(0xfff_ffff), at(0)), (None, None, None));
    }

    #[test]
    fn hostile_tables_are_refused() {
        let map = |regions: &[VhostUserMemoryRegion], files: Vec<File>| {
            MemTable::map(regions, files).expect_err("refused")
        };
        let two = || vec![memfd(PAGE), memfd(PAGE)];
        assert!(matches!(map(&[region(0, PAGE, 0, 0)], two()), MemTableError::Count { .. }));
        let many: Vec<_> = (0..9).map(|i| region(i * PAGE, PAGE, i * PAGE, 0)).collect();
        let files = many.iter().map(|_| memfd(PAGE)).collect();
        assert!(matches!(map(&many, files), MemTableError::Count { regions: 9, .. }));
        assert!(matches!(
            map(&[region(0, PAGE + 1, 0, 0)], vec![memfd(PAGE)]),
            MemTableError::File(0, ShmError::TooSmall { .. })
        ));
        assert!(matches!(
            map(&[region(0, PAGE, 0, PAGE)], vec![memfd(PAGE)]),
            MemTableError::File(0, ShmError::TooSmall { .. })
        ));
        assert!(matches!(
            map(&[region(0, PAGE, 0, u64::MAX - 5)], vec![memfd(PAGE)]),
            MemTableError::Wraps(0)
        ));
        assert!(matches!(
            map(&[region(0, PAGE, 0, 8)], vec![memfd(2 * PAGE)]),
            MemTableError::Map(0, _)
        ));
        assert!(matches!(
            map(&[region(0, PAGE, u64::MAX - 5, 0)], vec![memfd(PAGE)]),
            MemTableError::Wraps(0)
        ));
        assert!(matches!(
            map(&[region(u64::MAX - 5, PAGE, 0, 0)], vec![memfd(PAGE)]),
            MemTableError::Wraps(0)
        ));
        assert!(matches!(
            map(&[region(0, PAGE, 0, 0), region(0, PAGE, PAGE, 0)], two()),
            MemTableError::Arrange(_)
        ));
        assert!(matches!(
            map(&[region(0, PAGE, 0, 0), region(PAGE, PAGE, 8, 0)], two()),
            MemTableError::UserOverlap
        ));
        let flags = nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING;
        let unsealed =
            File::from(nix::sys::memfd::memfd_create(c"unsealed", flags).expect("memfd"));
        unsealed.set_len(PAGE).expect("size");
        assert!(matches!(
            map(&[region(0, PAGE, 0, 0)], vec![unsealed]),
            MemTableError::File(0, ShmError::Unsealed)
        ));
    }
}
