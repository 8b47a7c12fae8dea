//! A guest to be snapshotted and measured: it prints dots without end, and does as it is told.

use crate::arch::cpu::cycles;
use crate::boot::Boot;
use crate::console;
use crate::heap::Heap;

const PAGE: usize = 4096;
/// What is left alone at the beginning of memory: tables of the touched memory may be there.
const SPARED: usize = 1 << 20;
/// Pages that are written over and over.
const WORKING_SET: usize = 256;
/// What `t` touches.
const TOUCHED: usize = 64 << 20;
/// What `w` writes: 1 MiB in pages of which each is in another 64 KiB.
const WRITTEN: usize = 256;
const APART: usize = 16;
/// Cycles between two dots.
const REST: u64 = 250_000;

/// Has `touch=` MiB of memory in use. Then it prints dots, and writes to one page of a set for each;
/// `t` has it write to every page of 64 MiB, `w` to 256 pages here and there, each followed by a
/// line; `q` ends it.
pub fn run(boot: &Boot) {
    super::touch::pages(boot, boot.cmdline.number("touch", 16) << 20);
    let mut heap = Heap::new(&boot.memory);
    let memory = &mut heap.rest()[SPARED..];
    say!("snap: ready");
    for round in 1.. {
        write(memory, round % WORKING_SET, round);
        // A line, which the console hands over at once.
        console::write(b".\n");
        // Not each time: every look is a round trip to the console's process.
        let typed = if round % 8 == 0 { console::poll() } else { None };
        match typed {
            Some(b't') => {
                (0..TOUCHED / PAGE).for_each(|page| write(memory, page, round));
                say!("touched");
            }
            Some(b'w') => {
                (0..WRITTEN).for_each(|n| write(memory, WORKING_SET + n * APART, round));
                say!("wrote");
            }
            Some(b'q') => break,
            _ => {}
        }
        let until = cycles() + REST;
        while cycles() < until {}
    }
}

/// Writes to a page, if there is so much memory.
fn write(memory: &mut [u8], page: usize, value: usize) {
    if let Some(byte) = memory.get_mut(page * PAGE) {
        *byte = value as u8;
    }
}
