//! ELF kernels.

use std::io::SeekFrom;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::GuestAddress;

use super::{BootError, HIGH_MEMORY, KernelFile, low_end};
use crate::vm::memory::GuestRam;

const HEADER: usize = 64;
const SEGMENT: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const X86_64: u16 = 62;
const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// A kernel has a handful; more is nonsense, and not worth the reading.
const SEGMENTS_MAX: u16 = 64;
const NOTES_MAX: u64 = 1 << 20;

pub(super) struct Loaded {
    /// 64-bit entry.
    pub entry: u64,
    /// PVH entry, where the notes name one.
    pub pvh: Option<u64>,
    /// First address beyond the kernel.
    pub end: u64,
}

/// Loads the file of `len` bytes at the physical addresses it names.
pub(super) fn load(
    ram: &GuestRam,
    file: &mut (impl KernelFile + Sized),
    len: u64,
) -> Result<Loaded, BootError> {
    let (entry, segments) = check(ram, file, len)?;
    let loaded = Elf::load(ram.memory(), None, file, None)?;
    let inside = |address: u64| segments.iter().any(|s| s.start <= address && address < s.end);
    if !inside(entry) {
        return Err(BootError::Damaged("its entry point is in no segment"));
    }
    let pvh = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(GuestAddress(rip)) if inside(rip) => Some(rip),
        PvhBootCapability::PvhEntryPresent(_) => {
            return Err(BootError::Damaged("its PVH entry point is in no segment"));
        }
        _ => None,
    };
    let end = segments.iter().map(|s| s.end).max().unwrap_or(HIGH_MEMORY);
    Ok(Loaded { entry, pvh, end })
}

struct Segment {
    start: u64,
    end: u64,
}

/// Checks what the loader will believe: kinds, and that every segment is inside
/// the file and inside RAM beyond the first MiB, where our own structures are.
fn check(
    ram: &GuestRam,
    file: &mut (impl KernelFile + Sized),
    len: u64,
) -> Result<(u64, Vec<Segment>), BootError> {
    let header: [u8; HEADER] = read(file, 0, len)?;
    if header[4] != CLASS_64 {
        return Err(BootError::NotAKernel("a 32-bit ELF file"));
    }
    if header[5] != LITTLE_ENDIAN || u16_at(&header, 18) != X86_64 {
        return Err(BootError::NotAKernel("an ELF file for another architecture"));
    }
    let count = u16_at(&header, 56);
    if u16_at(&header, 54) as usize != SEGMENT || count == 0 || count > SEGMENTS_MAX {
        return Err(BootError::Damaged("its program headers make no sense"));
    }
    let mut segments: Vec<Segment> = Vec::new();
    for n in 0..u64::from(count) {
        let at = u64_at(&header, 32).checked_add(n * SEGMENT as u64);
        let at = at.ok_or(BootError::Damaged("its program headers make no sense"))?;
        let segment: [u8; SEGMENT] = read(file, at, len)?;
        let (offset, start) = (u64_at(&segment, 8), u64_at(&segment, 24));
        let (in_file, in_memory) = (u64_at(&segment, 32), u64_at(&segment, 40));
        let kind = u32_at(&segment, 0);
        if !matches!(kind, LOAD | NOTE) {
            continue;
        }
        if offset.checked_add(in_file).is_none_or(|end| end > len) {
            return Err(BootError::Damaged("a segment lies beyond its end; it was cut short"));
        }
        if kind == NOTE {
            if in_file > NOTES_MAX {
                return Err(BootError::Damaged("its notes make no sense"));
            }
            continue;
        }
        if in_memory < in_file {
            return Err(BootError::Damaged("a segment is larger in the file than in memory"));
        }
        if in_memory == 0 {
            continue;
        }
        if start < HIGH_MEMORY {
            return Err(BootError::Damaged("a segment lies in the first MiB"));
        }
        let end = start
            .checked_add(in_memory)
            .ok_or(BootError::Damaged("a segment wraps around the address space"))?;
        if end > low_end(ram) {
            return Err(BootError::TooLarge { needed: end, have: low_end(ram) });
        }
        if segments.iter().any(|other| start < other.end && other.start < end) {
            return Err(BootError::Damaged("two of its segments overlap"));
        }
        segments.push(Segment { start, end });
    }
    if segments.is_empty() {
        return Err(BootError::Damaged("it has nothing to load"));
    }
    Ok((u64_at(&header, 24), segments))
}

fn read<const N: usize>(
    file: &mut (impl KernelFile + Sized),
    at: u64,
    len: u64,
) -> Result<[u8; N], BootError> {
    if at.checked_add(N as u64).is_none_or(|end| end > len) {
        return Err(BootError::Damaged("its headers lie beyond its end; it was cut short"));
    }
    let mut bytes = [0; N];
    file.seek(SeekFrom::Start(at))
        .and_then(|_| file.read_exact(&mut bytes))
        .map_err(|source| BootError::Read { what: "kernel", source })?;
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
