//! A tour for a human reader.

use crate::arch::cpu::cycles;
use crate::arch::{apic, cpu};
use crate::boot::Boot;
use crate::console;
use crate::heap::Heap;
use crate::virtio::blk::{Disk, Kind, Options};

use super::blk::transfer;

/// Works through a part of the disk, then waits for commands on the console: `w` works through it
/// once more, `t` tells the time in ticks, `q` quits.
pub fn run(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let options = Options { depth: 16, irq: true, ..Options::from_cmdline(boot) };
    say!("guest: 64-bit, booted by {}, {} MiB of memory", boot.protocol, boot.memory.total() >> 20);
    let mut disk = Disk::open(boot, &mut heap, options);
    let mib = disk.capacity >> 11;
    say!("guest: a disk of {mib} MiB, called {}", disk.id());
    let blocks = (boot.cmdline.number("mib", 8).min(mib) << 20) / options.buffer as u64;
    let mut generation = boot.cmdline.number("seed", 1);
    work(&mut disk, options, blocks, generation);

    console::enable_interrupt();
    say!("guest: ready, ticks={}", apic::ticks());
    loop {
        match console::wait() {
            Some(b'q') => break,
            Some(b't') => say!("guest: ticks={} cycles={}", apic::ticks(), cycles()),
            Some(b'w') => {
                generation += 1;
                work(&mut disk, options, blocks, generation);
            }
            _ => {}
        }
    }
    apic::stop_timer();
    cpu::interrupts_on();
    say!("guest: goodbye");
}

fn work(disk: &mut Disk, options: Options, blocks: u64, generation: u64) {
    let mib = (blocks * options.buffer as u64) >> 20;
    let begin = cycles();
    transfer(disk, options, Kind::Write, blocks, generation);
    let written = cycles();
    if disk.flush {
        disk.request(Kind::Flush, 0, 0);
    }
    say!("guest: wrote {mib} MiB, {} cycles a block", (written - begin) / blocks);
    let begin = cycles();
    transfer(disk, options, Kind::Read, blocks, generation);
    say!("guest: read and checked {mib} MiB, {} cycles a block", (cycles() - begin) / blocks);
}
