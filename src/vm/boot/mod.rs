//! Thin boot.

use std::fs::File;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, bootparam};
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

use super::layout::VirtioSlot;
use super::memory::GuestRam;

/// x
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// x
    #[error("loading the kernel")]
    Load(#[from] linux_loader::loader::Error),
    /// x
    #[error("writing")]
    Write(#[from] vm_memory::GuestMemoryError),
}

/// x
#[derive(Clone, Copy, Debug)]
pub enum Entry {
    /// x
    Linux64 {
        /// x
        rip: u64,
        /// x
        zero_page: u64,
    },
    /// x
    Pvh {
        /// x
        rip: u64,
        /// x
        start_info: u64,
    },
}

/// x
pub fn cmdline_words(slots: &[VirtioSlot]) -> String {
    let words: Vec<_> =
        slots.iter().map(|s| format!("virtio_mmio.device=4K@{:#x}:{}", s.base, s.gsi)).collect();
    words.join(" ")
}

/// x
pub fn load(
    ram: &GuestRam,
    kernel: &File,
    _initrd: Option<&File>,
    cmdline: &str,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let mut kernel = kernel;
    let loaded = Elf::load(ram.memory(), None, &mut kernel.try_clone().unwrap(), Some(GuestAddress(0x10_0000)))?;
    let _ = &mut kernel;
    ram.memory().write_slice(cmdline.as_bytes(), GuestAddress(0x2_0000))?;
    ram.memory().write_obj(0u8, GuestAddress(0x2_0000 + cmdline.len() as u64))?;
    if let PvhBootCapability::PvhEntryPresent(rip) = loaded.pvh_boot_cap {
        let map = [(0u64, 0xa_0000u64), (0x10_0000, ram.regions()[0].len - 0x10_0000)];
        for (n, (addr, size)) in map.into_iter().enumerate() {
            let entry = hvm_memmap_table_entry { addr, size, type_: 1, reserved: 0 };
            ram.memory().write_obj(entry, GuestAddress(0x6100 + n as u64 * 24))?;
        }
        let info = hvm_start_info {
            magic: 0x336e_c578,
            version: 1,
            cmdline_paddr: 0x2_0000,
            rsdp_paddr: rsdp,
            memmap_paddr: 0x6100,
            memmap_entries: 2,
            ..Default::default()
        };
        ram.memory().write_obj(info, GuestAddress(0x6000))?;
        return Ok(Entry::Pvh { rip: rip.0, start_info: 0x6000 });
    }
    let mut params = bootparam::boot_params::default();
    params.hdr.cmd_line_ptr = 0x2_0000;
    params.hdr.cmdline_size = cmdline.len() as u32;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = 0x5372_6448;
    params.acpi_rsdp_addr = rsdp;
    ram.memory().write_obj(params, GuestAddress(0x7000))?;
    Ok(Entry::Linux64 { rip: loaded.kernel_load.0, zero_page: 0x7000 })
}
