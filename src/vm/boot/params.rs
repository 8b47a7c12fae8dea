//! The structures a kernel finds its environment by: Linux's zero page, and PVH's
//! start info with module list and memory map.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams, Error};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::GuestAddress;

use super::e820::Range;
use super::initrd::Initrd;
use crate::vm::layout::{CMDLINE, PVH_START_INFO, ZERO_PAGE};
use crate::vm::memory::GuestRam;

/// "Undefined" loader, the type for those without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page around `header`, the kernel's own setup header.
pub fn write_linux(
    ram: &GuestRam,
    mut header: setup_header,
    cmdline: u64,
    initrd: Option<Initrd>,
    map: &[Range],
    rsdp: u64,
) -> Result<(), Error> {
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = cmdline as u32;
    if let Some(initrd) = initrd {
        header.ramdisk_image = initrd.start as u32; // below 3 GiB, as its size
        header.ramdisk_size = initrd.len as u32;
    }
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: range.start, size: range.len, r#type: range.kind };
    }
    params.e820_table = table;
    params.e820_entries = map.len() as u8;
    let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
    write::<LinuxBootConfigurator>(ram, &params)
}

/// Writes PVH's start info, its module (the initrd) and its memory map.
pub fn write_pvh(
    ram: &GuestRam,
    initrd: Option<Initrd>,
    map: &[Range],
    rsdp: u64,
) -> Result<(), Error> {
    const MODULES: u64 = PVH_START_INFO + 0x40;
    const MAP: u64 = PVH_START_INFO + 0x80;
    let modules: Vec<_> = initrd
        .iter()
        .map(|i| hvm_modlist_entry { paddr: i.start, size: i.len, ..Default::default() })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let map: Vec<_> = map
        .iter()
        .map(|r| hvm_memmap_table_entry {
            addr: r.start,
            size: r.len,
            type_: r.kind,
            ..Default::default()
        })
        .collect();
    let mut params = BootParams::new(&info, GuestAddress(PVH_START_INFO));
    params.set_sections(&map, GuestAddress(MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(MODULES));
    }
    write::<PvhBootConfigurator>(ram, &params)
}

fn write<C: BootConfigurator>(ram: &GuestRam, params: &BootParams) -> Result<(), Error> {
    C::write_bootparams(params, ram.memory())
}
