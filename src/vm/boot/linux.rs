//! What a kernel finds at its 64-bit entry: `struct boot_params`, the zero page.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Entry, Told, map, place};
use crate::vm::memory::GuestRam;

/// No registered boot loader.
const LOADER: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = 0x5372_6448; // "HdrS"
const ALIGNMENT: u32 = 0x100_0000;

/// Writes the zero page; `header` is the one of a bzImage.
pub(super) fn tell(
    ram: &GuestRam,
    rip: u64,
    header: Option<setup_header>,
    told: &Told,
) -> Result<Entry, BootError> {
    // An ELF kernel brings no header, but reads these fields of it.
    let header = header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        kernel_alignment: ALIGNMENT,
        ..setup_header::default()
    });
    let mut params = boot_params { hdr: header, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER;
    params.hdr.cmd_line_ptr = place::CMDLINE as u32;
    params.hdr.cmdline_size = told.cmdline_len;
    if let Some(initrd) = told.initrd {
        // Low memory ends below 4 GiB.
        params.hdr.ramdisk_image = initrd.at as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
    }
    params.acpi_rsdp_addr = told.rsdp;
    let ranges = map::ranges(ram);
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(&ranges) {
        *entry = boot_e820_entry { addr: *addr, size: *size, r#type: *kind };
    }
    params.e820_entries = ranges.len() as u8;
    ram.memory()
        .write_obj(params, GuestAddress(place::ZERO_PAGE))
        .map_err(BootError::Write)?;
    Ok(Entry::Linux64 { rip, zero_page: place::ZERO_PAGE })
}
