//! Memory, page by page.

use crate::arch::cpu::cycles;
use crate::arch::tables;
use crate::boot::Boot;
use crate::heap::Heap;

const PAGE: usize = 4096;
const GIB: u64 = 1 << 30;

/// Writes one word in every page and reads all of them back, in the memory beyond the image and
/// then in the memory map's other ranges. `high`: only in those above 4 GiB.
pub fn run(boot: &Boot) {
    pages(boot, boot.cmdline.number("mib", 16) << 20);
}

/// As [`run`], for so many bytes.
pub fn pages(boot: &Boot, mut left: u64) {
    let mut heap = Heap::new(&boot.memory);
    // Tables first: they come from the same memory.
    for &(start, length) in boot.memory.as_slice() {
        for index in start / GIB..(start + length).div_ceil(GIB) {
            if !tables::is_mapped(index as usize) {
                let directory = heap.words(512).first_chunk_mut();
                tables::map_gigabyte(index as usize, directory.expect("as long as asked for"));
            }
        }
    }
    let near = heap.rest();
    let near_range = near.as_ptr_range();
    let (near_start, near_end) = (near_range.start as u64, near_range.end as u64);
    let lowest = if boot.cmdline.flag("high") { 4 * GIB } else { 1 << 20 };
    if near_start >= lowest {
        touch(near_start, left.min(near_end - near_start));
        left = left.saturating_sub(near_end - near_start);
    }
    for &(start, length) in boot.memory.as_slice() {
        // Below 1 MiB lie the loader's tables, and the image's own range is done.
        if start >= lowest && !(start..start + length).contains(&near_start) && left > 0 {
            touch(start, left.min(length));
            left = left.saturating_sub(length);
        }
    }
    if left > 0 {
        crate::exit::fail(format_args!("{left} bytes more than there is memory"));
    }
}

#[allow(unsafe_code)] // memory by its address
fn touch(start: u64, length: u64) {
    let pages = length / PAGE as u64;
    let addresses = || (0..pages).map(|page| start + page * PAGE as u64);
    let begin = cycles();
    for address in addresses() {
        // SAFETY: memory by the boot loader's map, beyond the image, in nobody's use, mapped.
        unsafe { (address as *mut u64).write_volatile(address ^ 0x5a5a) };
    }
    let spent = cycles() - begin;
    for address in addresses() {
        // SAFETY: as above.
        let found = unsafe { (address as *const u64).read_volatile() };
        if found != address ^ 0x5a5a {
            crate::exit::fail(format_args!("memory at {address:#x} is {found:#x}"));
        }
    }
    say!("touch: start={start:#x} pages={pages} cyc_page={}", spent / pages.max(1));
}
