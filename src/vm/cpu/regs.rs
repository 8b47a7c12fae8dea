//! Registers of the boot vCPU at the kernel's first instruction, and the tables
//! they point to.
//!
//! Linux's 64-bit protocol (Documentation/arch/x86/boot.rst, 1.15) wants long mode,
//! flat segments 0x10 and 0x18 and a one-to-one map; PVH (Xen's
//! docs/misc/pvh.pandoc) wants 32-bit protected mode without paging.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::vm::boot::Entry;
use crate::vm::layout::{BOOT_STACK, GDT, PAGE_TABLES, PAGE_TABLES_MAP};
use crate::vm::memory::{GuestRam, MemoryError};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const CODE: u8 = 0xb; // execute, read, accessed
const DATA: u8 = 0x3; // read, write, accessed
const BUSY_TSS: u8 = 0xb;

/// Writes the boot vCPU's descriptor table and page tables, for either protocol.
pub fn write_boot_tables(ram: &GuestRam, entry: &Entry) -> Result<(), MemoryError> {
    let long = matches!(entry, Entry::Linux64 { .. });
    let gdt = [0, 0, descriptor(&code(long)), descriptor(&data()), descriptor(&task())];
    ram.write(GDT, &bytes(&gdt))?;
    if long {
        ram.write(PAGE_TABLES, &bytes(&page_tables()))?;
    }
    Ok(())
}

/// General registers for `entry`.
pub fn general(entry: &Entry) -> kvm_regs {
    let reset = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match *entry {
        Entry::Linux64 { rip, zero_page } => {
            kvm_regs { rip, rsi: zero_page, rsp: BOOT_STACK, rbp: BOOT_STACK, ..reset }
        }
        Entry::Pvh { rip, start_info } => kvm_regs { rip, rbx: start_info, ..reset },
    }
}

/// Changes the reset state in `sregs` to the mode `entry` starts in.
pub fn system(sregs: &mut kvm_sregs, entry: &Entry) {
    let long = matches!(entry, Entry::Linux64 { .. });
    sregs.cs = code(long);
    sregs.ds = data();
    sregs.es = data();
    sregs.fs = data();
    sregs.gs = data();
    sregs.ss = data();
    sregs.tr = task();
    sregs.gdt = kvm_dtable { base: GDT, limit: 5 * 8 - 1, ..Default::default() };
    sregs.idt = kvm_dtable::default(); // an exception before the kernel has its own: triple fault
    if long {
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    } else {
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
    }
}

fn code(long: bool) -> kvm_segment {
    let (l, db) = if long { (1, 0) } else { (0, 1) };
    kvm_segment { selector: 0x10, type_: CODE, s: 1, l, db, ..flat() }
}

fn data() -> kvm_segment {
    kvm_segment { selector: 0x18, type_: DATA, s: 1, db: 1, ..flat() }
}

fn task() -> kvm_segment {
    kvm_segment { selector: 0x20, type_: BUSY_TSS, limit: 0x67, g: 0, ..flat() }
}

fn flat() -> kvm_segment {
    kvm_segment { limit: 0xffff_ffff, present: 1, g: 1, ..Default::default() }
}

/// The descriptor-table form of a segment (Intel SDM vol. 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    let base = segment.base;
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | flags << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

const TABLE_ENTRIES: usize = 512;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;

/// PML4, PDPT and directories of 2 MiB pages, mapping [`PAGE_TABLES_MAP`] bytes.
fn page_tables() -> Vec<u64> {
    let large_pages = (PAGE_TABLES_MAP / LARGE_PAGE) as usize;
    let directories = large_pages / TABLE_ENTRIES;
    let mut words = vec![0; (2 + directories) * TABLE_ENTRIES];
    let table = |n: usize| PAGE_TABLES + (n * TABLE_ENTRIES * 8) as u64;
    words[0] = table(1) | PRESENT_WRITABLE;
    for n in 0..directories {
        words[TABLE_ENTRIES + n] = table(2 + n) | PRESENT_WRITABLE;
    }
    for (n, word) in words[2 * TABLE_ENTRIES..].iter_mut().enumerate() {
        *word = (n as u64 * LARGE_PAGE) | PRESENT_WRITABLE | LARGE;
    }
    words
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&code(true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&code(false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task()), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn page_tables_map_one_to_one() {
        let words = page_tables();
        let walk = |address: u64| {
            let table = |entry: u64| ((entry & !0xfff) - PAGE_TABLES) as usize / 8;
            let pdpt = table(words[(address >> 39) as usize]);
            let directory = table(words[pdpt + (address >> 30 & 511) as usize]);
            words[directory + (address >> 21 & 511) as usize]
        };
        for address in [0, 0x1234_5678, 0xbfff_ffff, 0xfee0_0000, PAGE_TABLES_MAP - 1] {
            assert_eq!(walk(address), address & !(LARGE_PAGE - 1) | 0x83);
        }
        assert_eq!(PAGE_TABLES + words.len() as u64 * 8, 0xf000);
    }

    #[test]
    fn protocols_pass_their_structure_in_their_register() {
        let linux = general(&Entry::Linux64 { rip: 0x100_0200, zero_page: 0x7000 });
        assert_eq!((linux.rip, linux.rsi, linux.rbx), (0x100_0200, 0x7000, 0));
        let pvh = general(&Entry::Pvh { rip: 0x10_0000, start_info: 0x6000 });
        assert_eq!((pvh.rip, pvh.rsi, pvh.rbx), (0x10_0000, 0, 0x6000));
    }
}
