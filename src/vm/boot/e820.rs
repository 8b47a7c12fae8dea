//! The map of physical memory a kernel is given (ACPI 6.5, chapter 15).

use crate::vm::layout::{ACPI_START, FIRMWARE_END, HIGH_RAM_START, KVM_IDENTITY_MAP, LOW_RAM_640K};
use crate::vm::memory::RamRegion;

/// Memory the guest may use as it likes.
pub const RAM: u32 = 1;
/// Memory the guest has to leave alone.
pub const RESERVED: u32 = 2;

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Guest-physical start.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// [`RAM`] or [`RESERVED`], the numbers of e820 and of PVH alike.
    pub kind: u32,
}

/// The map of a guest with these regions of RAM, sorted.
pub fn map(regions: &[RamRegion]) -> Vec<Range> {
    let range = |start, end, kind| Range { start, len: end - start, kind };
    let mut map = vec![range(0, LOW_RAM_640K, RAM), range(ACPI_START, FIRMWARE_END, RESERVED)];
    for region in regions {
        let end = region.gpa + region.len;
        if region.gpa == HIGH_RAM_START {
            map.push(range(KVM_IDENTITY_MAP, HIGH_RAM_START, RESERVED));
        }
        // Below 1 MiB is a PC's own business: only the first 640 KiB are RAM.
        map.push(range(region.gpa.max(FIRMWARE_END), end, RAM));
    }
    if regions.len() == 1 {
        map.push(range(KVM_IDENTITY_MAP, HIGH_RAM_START, RESERVED));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(gpa: u64, len: u64) -> RamRegion {
        RamRegion { gpa, len, offset: 0, hva: 0 }
    }

    fn check(map: &[Range], ram: u64) {
        for pair in map.windows(2) {
            assert!(pair[0].start + pair[0].len <= pair[1].start, "{pair:x?}");
        }
        let usable: u64 = map.iter().filter(|r| r.kind == RAM).map(|r| r.len).sum();
        assert_eq!(usable, ram - (FIRMWARE_END - LOW_RAM_640K));
    }

    #[test]
    fn small() {
        let map = map(&[region(0, 64 << 20)]);
        check(&map, 64 << 20);
        assert_eq!(map[2], Range { start: 0x10_0000, len: 63 << 20, kind: RAM });
    }

    #[test]
    fn above_the_hole() {
        let map = map(&[region(0, 3 << 30), region(HIGH_RAM_START, 5 << 30)]);
        check(&map, 8 << 30);
        assert_eq!(map[4], Range { start: HIGH_RAM_START, len: 5 << 30, kind: RAM });
    }
}
