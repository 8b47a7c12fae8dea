//! Memory of a machine's processes beyond the guest's own RAM.

use std::fs;

use super::family;

/// Sums the proportional set size of `root` and all its descendants, leaving out
/// the mappings of guest RAM: shared memory files of at least `ram` bytes in all.
/// Proportional: a page that three processes share counts a third in each.
pub fn beyond_guest_ram(root: u32, ram: u64) -> u64 {
    family::of(&[root]).into_iter().map(|pid| beyond(pid, ram)).sum()
}

fn beyond(pid: u32, ram: u64) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let mut is_ram = false;
    let mut bytes = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            let address = |text| u64::from_str_radix(text, 16).unwrap_or(0);
            is_ram = line.contains("/memfd:") && address(to) - address(from) >= ram;
        } else if first == "Pss:" && !is_ram {
            bytes += words.next().and_then(|kib| kib.parse::<u64>().ok()).expect("KiB") << 10;
        }
    }
    bytes
}
