//! One of many that wake up in the same moment: what it is told, and what it writes, is its own.
#![allow(unsafe_code)] // reads the metadata at its address

use crate::arch::cpu::{self, out8};
use crate::boot::Boot;
use crate::console;
use crate::exit;
use crate::heap::Heap;
use crate::virtio::blk::{Disk, Kind, Options};

use super::READINESS_PORT;
use super::blk::transfer;

/// The marker that says: about to run the workload.
const PRE_EXEC: u8 = 2;
const PAGE: usize = 4096;
/// What memory and disk hold before anybody is a clone.
const NOBODY: u64 = 1;

// See src/vm/metadata.rs.
const GENERATION: usize = 0xf_0000;
const METADATA: usize = 0xf_0040;
const LENGTH: usize = 0xf_0048;
const TIME: usize = 0xf_0050;
const ID: usize = 0xf_0060;
const RANDOM: usize = 0xf_0080;
const DATA: usize = 0xf_0100;
const MAGIC: u64 = u64::from_le_bytes(*b"CBMETA\0\x01");

/// Fills `mib=` of memory (1) and `blocks=` of the disk (64), says that it is ready, and writes the
/// marker of a workload that is about to run: a snapshot is to be made there. Whoever goes on from
/// it says who it is, checks that memory and disk are as they were, and makes them its own. Then it
/// takes commands: `c` checks that they still are, `s` tells the disk's serial number, `m` is the
/// first of it all again, `q` ends.
///
/// Data that begins with `end` ends the guest at once, data that begins with `touch` only says who
/// it is and waits for `q`.
pub fn run(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let options = Options { depth: 4, irq: false, ..Options::from_cmdline(boot) };
    let mut disk =
        Disk::find(boot).next().map(|transport| Disk::start(transport, &mut heap, options));
    let blocks = boot.cmdline.number("blocks", 64);
    let memory = heap.bytes((boot.cmdline.number("mib", 1) << 20) as usize, PAGE);
    write(memory, disk.as_mut(), options, blocks, NOBODY);
    // A clone that waits costs nothing.
    console::enable_interrupt();
    say!("clone: ready");
    out8(READINESS_PORT, PRE_EXEC);

    let mut own = tell();
    let data = text(DATA, word(LENGTH) as u32 as usize);
    if data.starts_with("end") {
        return;
    }
    if !data.starts_with("touch") {
        check(memory, disk.as_mut(), options, blocks, NOBODY);
        write(memory, disk.as_mut(), options, blocks, own);
        say!("clone: wrote");
    } else {
        own = NOBODY;
    }
    loop {
        match console::wait() {
            Some(b'q') => break,
            Some(b'c') => {
                check(memory, disk.as_mut(), options, blocks, own);
                say!("clone: own");
            }
            Some(b's') => match &mut disk {
                Some(disk) => say!("clone: serial={}", disk.id()),
                None => say!("clone: no disk"),
            },
            Some(b'm') => {
                tell();
            }
            _ => {}
        }
    }
    cpu::interrupts_on();
}

/// Prints the metadata; returns a random number of it.
fn tell() -> u64 {
    if word(METADATA) != MAGIC {
        exit::fail(format_args!("there is no metadata"));
    }
    let (id, random) = (ID, RANDOM);
    say!(
        "clone: id={:016x}{:016x} random={:016x}{:016x} generation={:016x} ns={} data={}",
        word(id).swap_bytes(),
        word(id + 8).swap_bytes(),
        word(random),
        word(random + 56),
        word(GENERATION),
        word(TIME),
        text(DATA, word(LENGTH) as u32 as usize)
    );
    word(random) | 2
}

fn word(address: usize) -> u64 {
    // SAFETY: in the metadata's page, which is mapped and the monitor's.
    unsafe { (address as *const u64).read_volatile() }
}

fn text(address: usize, length: usize) -> &'static str {
    let length = length.min(0xf00);
    // SAFETY: as above; the monitor writes it only while no vCPU runs.
    let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, length) };
    core::str::from_utf8(bytes).unwrap_or("(not text)")
}

fn write(memory: &mut [u8], disk: Option<&mut Disk>, options: Options, blocks: u64, own: u64) {
    for (n, page) in memory.chunks_exact_mut(PAGE).enumerate() {
        page[..8].copy_from_slice(&(own ^ n as u64).to_le_bytes());
        page[PAGE - 8..].copy_from_slice(&(own ^ !(n as u64)).to_le_bytes());
    }
    if let (Some(disk), 1..) = (disk, blocks) {
        transfer(disk, options, Kind::Write, blocks, own);
    }
}

fn check(memory: &[u8], disk: Option<&mut Disk>, options: Options, blocks: u64, own: u64) {
    for (n, page) in memory.chunks_exact(PAGE).enumerate() {
        let found = |at: usize| page[at..].first_chunk().map_or(0, |w| u64::from_le_bytes(*w));
        let (first, last) = (found(0), found(PAGE - 8));
        if (first, last) != (own ^ n as u64, own ^ !(n as u64)) {
            exit::fail(format_args!("page {n} is {first:#x} {last:#x}, and should be {own:#x}'s"));
        }
    }
    if let (Some(disk), 1..) = (disk, blocks) {
        transfer(disk, options, Kind::Read, blocks, own);
    }
}
