//! What a kernel finds at its PVH entry: `struct hvm_start_info`.

use linux_loader::loader::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{BootError, Entry, Told, map, place};
use crate::vm::memory::GuestRam;

const MAGIC: u32 = 0x336e_c578;
/// With a memory map.
const VERSION: u32 = 1;

/// Writes the start info.
pub(super) fn tell(ram: &GuestRam, rip: u64, told: &Told) -> Result<Entry, BootError> {
    let ranges = map::ranges(ram);
    for (n, (addr, size, kind)) in ranges.iter().enumerate() {
        let entry =
            hvm_memmap_table_entry { addr: *addr, size: *size, type_: *kind, reserved: 0 };
        let at = place::MEMORY_MAP + (n * size_of::<hvm_memmap_table_entry>()) as u64;
        put(ram, entry, at)?;
    }
    if let Some(initrd) = told.initrd {
        let module = hvm_modlist_entry { paddr: initrd.at, size: initrd.len, ..Default::default() };
        put(ram, module, place::MODULES)?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(told.initrd.is_some()),
        modlist_paddr: place::MODULES,
        cmdline_paddr: place::CMDLINE,
        rsdp_paddr: told.rsdp,
        memmap_paddr: place::MEMORY_MAP,
        memmap_entries: ranges.len() as u32,
        ..Default::default()
    };
    put(ram, info, place::START_INFO)?;
    Ok(Entry::Pvh { rip, start_info: place::START_INFO })
}

fn put<T: ByteValued>(ram: &GuestRam, value: T, at: u64) -> Result<(), BootError> {
    ram.memory().write_obj(value, GuestAddress(at)).map_err(BootError::Write)
}
