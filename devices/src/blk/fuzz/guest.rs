//! The driver's half of a program: steps that write into guest memory.

use std::fs::File;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{Bytes, GuestAddress};

use super::Input;
use crate::blk::memory::{MemTable, Memory};

/// Bytes of guest memory, in three regions, of which the last is behind a hole.
pub const BYTES: u64 = 0x10000;
const REGIONS: [(u64, u64); 3] = [(0, 0x8000), (0x8000, 0x4000), (HIGH, 0x4000)];
const HIGH: u64 = 0x20000;
/// What the front end calls guest address 0.
pub const USER: u64 = 0x7000_0000_0000;

/// Where a ring's parts are unless the program says otherwise.
pub const DESCRIPTORS: u64 = 0;
pub const AVAIL: u64 = 0x1000;
pub const USED: u64 = 0x2000;
/// Headers, 32 bytes apart, each with its status byte behind it.
const HEADERS: u64 = 0x3000;
/// Indirect tables, one 256 bytes behind the other.
const TABLES: u64 = 0x4000;

/// How many first bytes mean a step of the driver.
pub const STEPS: u8 = 7;

/// Guest memory with a driver's view of one ring in it.
pub struct Guest {
    table: MemTable,
    /// Entries of the ring.
    pub size: u16,
    /// Where its available ring is.
    pub avail: u64,
    index: u16,
}

/// The memory table of the whole of `ram`.
pub fn regions() -> Vec<VhostUserMemoryRegion> {
    let mut offset = 0;
    let region = |(at, len)| {
        offset += len;
        VhostUserMemoryRegion::new(at, len, USER + at, offset - len)
    };
    REGIONS.into_iter().map(region).collect()
}

impl Guest {
    pub fn new(ram: &File) -> Guest {
        let files = REGIONS.map(|_| ram.try_clone().expect("dup")).into();
        let table = MemTable::map(&regions(), files).expect("the table is good");
        Guest { table, size: 16, avail: AVAIL, index: 0 }
    }

    pub fn memory(&self) -> &Memory {
        self.table.memory()
    }

    /// All zeros again, and a ring whose next entry is `index`.
    pub fn restart(&mut self, size: u16, avail: u64, index: u16) {
        for (at, len) in REGIONS {
            self.write(at, &ZEROS[..len as usize]);
        }
        (self.size, self.avail, self.index) = (size, avail, index);
        self.write(avail.wrapping_add(2), &index.to_le_bytes());
    }

    /// True while something is available that is not used.
    pub fn is_waiting(&self) -> bool {
        self.memory()
            .load(GuestAddress(USED + 2), Ordering::Acquire)
            .is_ok_and(|i: u16| i != self.index)
    }

    /// Writes where there is memory.
    fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.memory().write(bytes, GuestAddress(at));
    }

    /// Does step number `step`, below [`STEPS`].
    pub fn step(&mut self, step: u8, input: &mut Input<'_>) -> Option<()> {
        match step {
            0 => {
                let number = u64::from(input.u8()?);
                self.descriptor(DESCRIPTORS + 16 * number, input)?;
            }
            1 => {
                let (table, number) = (u64::from(input.u8()? % 16), u64::from(input.u8()?));
                self.descriptor(TABLES + 256 * table + 16 * number, input)?;
            }
            2 => {
                let at = HEADERS + 32 * u64::from(input.u8()? % 64);
                self.write(at, &kind(input.u8()?).to_le_bytes());
                self.write(at.wrapping_add(8), &wide(input.u16()?).to_le_bytes());
                self.write(at.wrapping_add(16), &[0xff]);
            }
            3 => {
                let entry = self.avail + 4 + 2 * u64::from(self.index % self.size);
                self.write(entry, &u16::from(input.u8()?).to_le_bytes());
                self.index = self.index.wrapping_add(1);
                self.write(self.avail.wrapping_add(2), &self.index.to_le_bytes());
            }
            4 => {
                self.index = self.index.wrapping_add(input.u8()?.cast_signed() as u16);
                self.write(self.avail.wrapping_add(2), &self.index.to_le_bytes());
            }
            5 => {
                let at = address(input.u16()?);
                let len = input.u8()? % 32;
                self.write(at, input.take(len.into())?);
            }
            _ => {
                // A segment of a discard or write-zeroes.
                let at = address(input.u16()?);
                self.write(at, &wide(input.u16()?).to_le_bytes());
                self.write(at.wrapping_add(8), &u32::from(input.u16()?).to_le_bytes());
                self.write(at.wrapping_add(12), &u32::from(input.u8()?).to_le_bytes());
            }
        }
        Some(())
    }

    fn descriptor(&self, at: u64, input: &mut Input<'_>) -> Option<()> {
        self.write(at, &address(input.u16()?).to_le_bytes());
        self.write(at.wrapping_add(8), &length(input.u16()?).to_le_bytes());
        // Only the three flags there are, and rarely one that is none.
        let flags = input.u8()?;
        self.write(
            at.wrapping_add(12),
            &u16::from(if flags < 0xf0 { flags & 7 } else { flags }).to_le_bytes(),
        );
        self.write(at.wrapping_add(14), &u16::from(input.u8()?).to_le_bytes());
        Some(())
    }
}

static ZEROS: [u8; 0x8000] = [0; 0x8000];

/// Everywhere in memory, around its edges, and at the end of all addresses.
pub fn address(code: u16) -> u64 {
    match code {
        0..0xc800 => code.into(),
        0xc800..0xff00 => HIGH - 0x400 + u64::from(code - 0xc800),
        _ => u64::MAX - u64::from(0xffff - code),
    }
}

fn length(code: u16) -> u32 {
    if code < 0xc000 { code.into() } else { u32::from(code - 0xc000) << 18 }
}

/// Sectors of the disk, and others.
fn wide(code: u16) -> u64 {
    if code < 0xff00 { code.into() } else { u64::MAX - u64::from(0xffff - code) }
}

fn kind(code: u8) -> u32 {
    if code < 0xf0 { (code % 16).into() } else { u32::MAX - u32::from(code) }
}
