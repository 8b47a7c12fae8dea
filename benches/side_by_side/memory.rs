//! Memory of a machine's processes beyond the guest's own RAM.

use std::fs;

/// Sums the proportional set size of `root` and all its descendants, leaving out
/// the mappings of guest RAM: shared memory files of at least `ram` bytes in all.
/// Proportional: a page that three processes share counts a third in each.
pub fn beyond_guest_ram(root: u32, ram: u64) -> u64 {
    family(root).into_iter().map(|pid| beyond(pid, ram)).sum()
}

fn family(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| Some((pid, parent(pid)?)))
        .collect();
    let mut family = vec![root];
    let mut next = 0;
    while let Some(&pid) = family.get(next) {
        family.extend(parents.iter().filter(|(_, parent)| *parent == pid).map(|(child, _)| child));
        next += 1;
    }
    family
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
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
