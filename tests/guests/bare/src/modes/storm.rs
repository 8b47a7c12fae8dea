//! Random requests whose every block says what it is, for a device whose process dies.

use crate::boot::Boot;
use crate::console;
use crate::heap::Heap;
use crate::pattern::{self, SECTOR};
use crate::random::Random;
use crate::virtio::blk::{self, Disk, Done, Kind, Options};

/// What a slot is doing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Busy {
    No,
    Read(u64),
    Write(u64),
    Flush,
    Clear(u64),
}

/// Where the configuration has the cache mode.
const WRITEBACK: u64 = 32;

/// Resets the disk and sets it up `resets=` times (with `idle` without a request in between), then keeps `qd=` requests in flight until `n=` are done, `reads=` percent of them reads, every
/// `flush=`th a flush and every `clear=`th by turns a discard and a zeroing, then reads every block of the first `mib=` back. A block has at most one
/// request in flight. Every answer must be to a request in flight, which one that appears twice is
/// not, and must be OK; with `errors` an I/O error will do, and the blocks are not read back. With
/// `quit` no more requests are begun when it reads `q`.
pub fn run(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let options = Options::from_cmdline(boot);
    if boot.cmdline.number("resets", 0) > 0 {
        say!("storm: resets");
    }
    for _ in 0..boot.cmdline.number("resets", 0) {
        let mut disk = Disk::open(boot, &mut heap, options);
        if !boot.cmdline.flag("idle") {
            disk.request(Kind::Read, 0, options.buffer);
        }
    }
    let mut disk = Disk::open(boot, &mut heap, options);
    let number = |key, default| boot.cmdline.number(key, default);
    let mut n = number("n", 10_000);
    let quits = boot.cmdline.flag("quit");
    let per_block = (options.buffer / SECTOR) as u64;
    let blocks = disk.capacity.min((number("mib", 16) << 20) / SECTOR as u64) / per_block;
    if blocks <= options.depth as u64 {
        crate::exit::fail(format_args!("the disk has {blocks} blocks only"));
    }
    let mut storm = Storm {
        reads: number("reads", 0),
        flush: number("flush", 0),
        clear: number("clear", 0),
        errors: boot.cmdline.flag("errors"),
        random: Random::new(number("seed", 1)),
        generations: heap.words(blocks as usize),
        taken: heap.words(blocks as usize),
        cleared: heap.words(blocks as usize),
        slots: [Busy::No; blk::MAX_DEPTH],
        failed: 0,
        begun: 0,
    };
    if boot.cmdline.get("cache") == Some("off") {
        let transport = disk.transport();
        transport.set_config8(WRITEBACK, 0);
        if transport.config8(WRITEBACK) != 0 {
            crate::exit::fail(format_args!("the cache is still on"));
        }
    }
    say!("storm: begins");
    for slot in 0..options.depth {
        storm.begin(&mut disk, slot, options.buffer);
    }
    disk.kick();
    let (mut done, mut look) = (0, 0);
    while done < n {
        // Not each time: every look is a round trip to the console's process.
        if quits && done >= look {
            look = done + 256;
            if console::poll() == Some(b'q') {
                n = n.min(done + options.depth as u64);
            }
        }
        let mut next = Some(disk.wait());
        while let Some(answer) = next {
            storm.end(&mut disk, &answer);
            done += 1;
            if done + options.depth as u64 <= n {
                storm.begin(&mut disk, answer.slot, options.buffer);
            }
            next = disk.poll();
        }
        disk.kick();
    }
    if storm.slots.iter().any(|slot| *slot != Busy::No) {
        crate::exit::fail(format_args!("a request was not answered"));
    }
    if !storm.errors {
        for block in 0..blocks {
            disk.request(Kind::Read, block * per_block, options.buffer);
            storm.check(disk.data(0), block);
        }
    }
    let sum: u64 = storm.generations.iter().sum();
    say!("storm: n={n} blocks={blocks} generations={sum} failed={}", storm.failed);
}

struct Storm {
    reads: u64,
    flush: u64,
    clear: u64,
    errors: bool,
    random: Random,
    /// How often each block was written; zero is one that never was.
    generations: &'static mut [u64],
    taken: &'static mut [u64],
    /// Not 0 where a block was given up since it was written.
    cleared: &'static mut [u64],
    slots: [Busy; blk::MAX_DEPTH],
    failed: u64,
    begun: u64,
}

impl Storm {
    fn begin(&mut self, disk: &mut Disk, slot: usize, bytes: usize) {
        self.begun += 1;
        if self.flush != 0 && self.begun.is_multiple_of(self.flush) {
            self.slots[slot] = Busy::Flush;
            return disk.prepare(slot, Kind::Flush, 0, 0);
        }
        let block = loop {
            let block = self.random.below(self.taken.len() as u64);
            if self.taken[block as usize] == 0 {
                break block;
            }
        };
        self.taken[block as usize] = 1;
        let first = block * (bytes / SECTOR) as u64;
        if self.clear != 0 && self.begun.is_multiple_of(self.clear) {
            self.slots[slot] = Busy::Clear(block);
            let range = &mut disk.data(slot)[..16];
            range[..8].copy_from_slice(&first.to_le_bytes());
            range[8..12].copy_from_slice(&((bytes / SECTOR) as u32).to_le_bytes());
            range[12..].fill(0);
            let turn = (self.begun / self.clear).is_multiple_of(2);
            let kind = if turn { Kind::Discard } else { Kind::WriteZeroes };
            return disk.prepare(slot, kind, 0, 16);
        }
        if self.random.below(100) < self.reads {
            self.slots[slot] = Busy::Read(block);
            disk.data(slot)[..bytes].fill(0xa5);
            disk.prepare(slot, Kind::Read, first, bytes);
        } else {
            self.slots[slot] = Busy::Write(block);
            let generation = self.generations[block as usize] + 1;
            pattern::fill(disk.data(slot), first, generation);
            disk.prepare(slot, Kind::Write, first, bytes);
        }
    }

    fn end(&mut self, disk: &mut Disk, answer: &Done) {
        let was = core::mem::replace(&mut self.slots[answer.slot], Busy::No);
        let good = answer.status == blk::OK;
        if !(good || self.errors && answer.status == blk::IO_ERROR) {
            crate::exit::fail(format_args!("slot {}: status {}", answer.slot, answer.status));
        }
        self.failed += u64::from(!good);
        match was {
            Busy::No => crate::exit::fail(format_args!("slot {} answered twice", answer.slot)),
            Busy::Flush => {}
            Busy::Write(block) => {
                self.taken[block as usize] = 0;
                self.generations[block as usize] += u64::from(good);
                self.cleared[block as usize] = 0;
            }
            Busy::Clear(block) => {
                self.taken[block as usize] = 0;
                self.cleared[block as usize] = u64::from(good);
            }
            Busy::Read(block) => {
                self.taken[block as usize] = 0;
                if good && !self.errors {
                    self.check(disk.data(answer.slot), block);
                }
            }
        }
    }

    fn check(&self, data: &[u8], block: u64) {
        let cleared = self.cleared[block as usize] != 0;
        match self.generations[block as usize] {
            _ if cleared && data.iter().all(|byte| *byte == 0) => {}
            _ if cleared => crate::exit::fail(format_args!("block {block} was cleared")),
            0 if data.iter().all(|byte| *byte == 0) => {}
            0 => crate::exit::fail(format_args!("block {block} was never written")),
            generation => {
                pattern::check(data, block * (data.len() / SECTOR) as u64, generation);
            }
        }
    }
}
