//! What the boot loader left in memory.
#![allow(unsafe_code)] // reads structures at addresses the boot protocols give

use crate::arch::entry::{BOOTED_BY_LINUX64, BOOTED_BY_PVH};
use crate::cmdline::Cmdline;

/// Longest command line kept.
const CMDLINE_MAX: usize = 2048;
const PVH_MAGIC: u32 = 0x336e_c578;
const E820_RAM: u32 = 1;

/// The boot loader's facts.
pub struct Boot {
    /// The command line.
    pub cmdline: Cmdline,
    /// `linux64` or `pvh`.
    pub protocol: &'static str,
    /// Memory ranges, as (start, length).
    pub memory: Ranges,
}

/// A few memory ranges.
pub struct Ranges {
    ranges: [(u64, u64); 16],
    count: usize,
}

impl Ranges {
    /// All ranges.
    pub fn as_slice(&self) -> &[(u64, u64)] {
        &self.ranges[..self.count]
    }

    /// Bytes in all ranges.
    pub fn total(&self) -> u64 {
        self.as_slice().iter().map(|range| range.1).sum()
    }

    fn push(&mut self, start: u64, length: u64) {
        if self.count < self.ranges.len() {
            self.ranges[self.count] = (start, length);
            self.count += 1;
        }
    }
}

/// Copies everything that is needed out of the loader's structures, whose pages are reused.
pub fn read(info: u64, protocol: u32) -> Boot {
    let mut memory = Ranges { ranges: [(0, 0); 16], count: 0 };
    let (text, protocol) = match protocol {
        BOOTED_BY_LINUX64 => {
            // struct boot_params: Documentation/arch/x86/zero-page.rst of the Linux kernel.
            let entries = u64::from(peek::<u8>(info + 0x1e8)).min(128);
            for entry in (0..entries).map(|i| info + 0x2d0 + 20 * i) {
                if peek::<u32>(entry + 16) == E820_RAM {
                    memory.push(peek(entry), peek(entry + 8));
                }
            }
            (u64::from(peek::<u32>(info + 0x228)), "linux64")
        }
        BOOTED_BY_PVH => {
            // struct hvm_start_info: xen/include/public/arch-x86/hvm/start_info.h.
            if peek::<u32>(info) != PVH_MAGIC {
                crate::exit::fail(format_args!("no PVH start information at {info:#x}"));
            }
            if peek::<u32>(info + 4) >= 1 {
                let table = peek::<u64>(info + 40);
                let entries = u64::from(peek::<u32>(info + 48));
                for entry in (0..entries).map(|i| table + 24 * i) {
                    if peek::<u32>(entry + 16) == E820_RAM {
                        memory.push(peek(entry), peek(entry + 8));
                    }
                }
            }
            (peek::<u64>(info + 24), "pvh")
        }
        other => crate::exit::fail(format_args!("unknown boot protocol {other}")),
    };
    let mut cmdline = [0; CMDLINE_MAX];
    let mut length = 0;
    while text != 0 && length < CMDLINE_MAX {
        match peek::<u8>(text + length as u64) {
            0 => break,
            byte => cmdline[length] = byte,
        }
        length += 1;
    }
    Boot { cmdline: Cmdline::new(cmdline, length), protocol, memory }
}

fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: an address inside a structure of the boot protocol, which lies in mapped memory; the
    // types read are integers.
    unsafe { (address as *const T).read_unaligned() }
}
