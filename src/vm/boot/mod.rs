//! Getting a kernel into memory, and what it is told at its entry.
//!
//! | kernel file | protocol |
//! |---|---|
//! | ELF with a PVH note | PVH: 32-bit entry, `hvm_start_info` |
//! | ELF without | the 64-bit Linux entry, zero page |
//! | bzImage, protocol 2.12 or newer | the same, at its 64-bit entry |
//!
//! Linux's `Documentation/arch/x86/boot.rst` and Xen's `docs/misc/pvh.pandoc` are
//! the specifications. A kernel file is untrusted input: what it says of itself is
//! checked before the loader acts on it.

mod bzimage;
mod elf;
mod linux;
mod map;
mod pvh;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, ReadVolatile};

use super::layout::VirtioSlot;
use super::memory::GuestRam;
use crate::transport::mmio::WINDOW;

/// Where structures for the kernel lie, all below the first 640 KiB.
mod place {
    pub const START_INFO: u64 = 0x6000;
    pub const MEMORY_MAP: u64 = 0x6100;
    pub const MODULES: u64 = 0x6f00;
    pub const ZERO_PAGE: u64 = 0x7000;
    pub const CMDLINE: u64 = 0x2_0000;
    /// Including the final zero: what current kernels accept.
    pub const CMDLINE_MAX: usize = 2048;
}

/// RAM from here on belongs to the kernel and its initrd.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// A kernel, or what goes with it, that cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file could not be read.
    #[error("reading the {what}")]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is no kernel we know.
    #[error("the kernel is {0}; an x86-64 ELF vmlinux or a bzImage is needed")]
    NotAKernel(&'static str),
    /// The file contradicts itself.
    #[error("the kernel file is damaged: {0}")]
    Damaged(&'static str),
    /// It does not fit.
    #[error("the kernel needs memory up to {:#x}, the guest's ends at {:#x}; give it more with -m", .needed, .have)]
    TooLarge {
        /// First address beyond the kernel.
        needed: u64,
        /// First address beyond low memory.
        have: u64,
    },
    /// The loader refused it.
    #[error("loading the kernel")]
    Load(#[from] linux_loader::loader::Error),
    /// The initrd is empty.
    #[error("the initrd is empty")]
    EmptyInitrd,
    /// The initrd does not fit.
    #[error("the initrd of {} MiB does not fit between the kernel and the end of guest memory at {} MiB; give the guest more with -m", .len >> 20, .end >> 20)]
    InitrdTooLarge {
        /// Its bytes.
        len: u64,
        /// First address beyond usable memory.
        end: u64,
    },
    /// The command line does not fit.
    #[error("the kernel command line has {0} bytes, {max} are possible", max = place::CMDLINE_MAX - 1)]
    CmdlineTooLong(usize),
    /// A zero byte would end it early.
    #[error("the kernel command line holds a zero byte")]
    CmdlineZero,
    /// Guest memory.
    #[error("writing boot structures into guest memory")]
    Write(#[source] GuestMemoryError),
}

/// Where and how the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode with the low 4 GiB mapped one to one.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// `struct boot_params`, for RSI.
        zero_page: u64,
    },
    /// In 32-bit protected mode without paging.
    Pvh {
        /// First instruction.
        rip: u64,
        /// `struct hvm_start_info`, for EBX.
        start_info: u64,
    },
}

/// What a kernel is told.
struct Told {
    cmdline_len: u32,
    initrd: Option<Initrd>,
    rsdp: u64,
}

#[derive(Clone, Copy)]
struct Initrd {
    at: u64,
    len: u64,
}

/// `virtio_mmio.device=` words that tell kernels without ACPI where devices are
/// (Linux's `drivers/virtio/virtio_mmio.c`).
pub fn cmdline_words(slots: &[VirtioSlot]) -> String {
    let word = |slot: &VirtioSlot| {
        format!("virtio_mmio.device={}K@{:#x}:{}", WINDOW >> 10, slot.base, slot.gsi)
    };
    slots.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// Loads `kernel` and `initrd` and writes what the kernel is told.
///
/// # Errors
/// Files that are no kernel, are damaged or do not fit: see [`BootError`].
pub fn load(
    ram: &GuestRam,
    kernel: &File,
    initrd: Option<&File>,
    cmdline: &str,
    rsdp: u64,
) -> Result<Entry, BootError> {
    write_cmdline(ram, cmdline)?;
    let told = |initrd| Told { cmdline_len: cmdline.len() as u32, initrd, rsdp };
    let mut start = [0; 4];
    let mut file = kernel;
    let read = |source| BootError::Read { what: "kernel", source };
    let len = file.seek(SeekFrom::End(0)).map_err(read)?;
    file.rewind().map_err(read)?;
    match (len, file.read_exact(&mut start)) {
        (0, _) => return Err(BootError::NotAKernel("an empty file")),
        (1..4, _) => return Err(BootError::NotAKernel("too short a file")),
        (_, result) => result.map_err(read)?,
    }
    let mut kernel = kernel.try_clone().map_err(read)?;
    if start == *b"\x7fELF" {
        let loaded = elf::load(ram, &mut kernel, len)?;
        let initrd = load_initrd(ram, initrd, loaded.end, u64::MAX)?;
        match loaded.pvh {
            Some(rip) => pvh::tell(ram, rip, &told(initrd)),
            None => linux::tell(ram, loaded.entry, None, &told(initrd)),
        }
    } else {
        let loaded = bzimage::load(ram, &mut kernel, len)?;
        let initrd = load_initrd(ram, initrd, loaded.end, loaded.initrd_max)?;
        linux::tell(ram, loaded.entry, Some(loaded.header), &told(initrd))
    }
}

fn write_cmdline(ram: &GuestRam, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= place::CMDLINE_MAX {
        return Err(BootError::CmdlineTooLong(cmdline.len()));
    }
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineZero);
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    ram.memory().write_slice(&bytes, GuestAddress(place::CMDLINE)).map_err(BootError::Write)
}

/// Reads an initrd to the highest place below `max` and the end of low memory.
fn load_initrd(
    ram: &GuestRam,
    initrd: Option<&File>,
    kernel_end: u64,
    max: u64,
) -> Result<Option<Initrd>, BootError> {
    let Some(mut file) = initrd else { return Ok(None) };
    let read = |source| BootError::Read { what: "initrd", source };
    let len = file.seek(SeekFrom::End(0)).map_err(read)?;
    file.rewind().map_err(read)?;
    if len == 0 {
        return Err(BootError::EmptyInitrd);
    }
    let end = low_end(ram).min(max.saturating_add(1));
    let at = end.checked_sub(len).map(|at| at & !0xfff).filter(|at| *at >= kernel_end);
    let at = at.ok_or(BootError::InitrdTooLarge { len, end })?;
    let mut file = file.try_clone().map_err(read)?;
    ram.memory()
        .read_exact_volatile_from(GuestAddress(at), &mut file, len as usize)
        .map_err(BootError::Write)?;
    Ok(Some(Initrd { at, len }))
}

/// First address beyond the low piece of RAM.
fn low_end(ram: &GuestRam) -> u64 {
    ram.regions().first().map_or(0, |region| region.gpa + region.len)
}

/// Kernel files are read straight into guest memory.
trait KernelFile: Read + ReadVolatile + Seek {}
impl KernelFile for File {}

#[cfg(test)]
mod tests;
