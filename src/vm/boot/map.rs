//! The memory map a kernel is given (e820).

use super::super::acpi;
use super::super::memory::GuestRam;
use super::HIGH_MEMORY;

/// Usable RAM.
pub const RAM: u32 = 1;
/// Not to be touched.
pub const RESERVED: u32 = 2;

/// Where conventional memory ends: the last KiB is the EBDA's by tradition.
const CONVENTIONAL_END: u64 = 0x9_fc00;

/// Address, length and kind of each range, in rising order.
pub fn ranges(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut ranges =
        vec![(0, CONVENTIONAL_END, RAM), (acpi::START, acpi::END - acpi::START, RESERVED)];
    for region in ram.regions() {
        let start = region.gpa.max(HIGH_MEMORY);
        ranges.push((start, region.gpa + region.len - start, RAM));
    }
    ranges
}
