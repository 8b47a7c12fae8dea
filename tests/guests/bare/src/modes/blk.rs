//! A disk written, read back and checked, with any depth and ring format.

use crate::boot::Boot;
use crate::heap::Heap;
use crate::pattern::{self, SECTOR};
use crate::random::Random;
use crate::virtio::blk::{self, Disk, Kind, Options};

/// Writes the first `mib=` of the disk in a scattered order, flushes, reads them back in another,
/// `rounds=` times. `keep` only reads: for what an earlier run with the same `seed=` wrote.
pub fn run(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let options = Options::from_cmdline(boot);
    let mut disk = Disk::open(boot, &mut heap, options);
    let (capacity, read_only, flush) = (disk.capacity, disk.read_only, disk.flush);
    say!("blk: capacity={capacity} ro={} flush={} id={}", read_only as u8, flush as u8, disk.id());

    let sectors = (options.buffer / SECTOR) as u64;
    let requests = ((boot.cmdline.number("mib", 4) << 20) / options.buffer as u64).max(1);
    let requests = requests.min(capacity / sectors);
    if requests == 0 {
        crate::exit::fail(format_args!("the disk is smaller than a request"));
    }
    let seed = boot.cmdline.number("seed", 1);
    for round in 0..boot.cmdline.number("rounds", 1) {
        let generation = seed + round;
        if !read_only && !boot.cmdline.flag("keep") {
            transfer(&mut disk, options, Kind::Write, requests, generation);
            if flush {
                disk.request(Kind::Flush, 0, 0);
            }
            say!("blk: wrote={} bytes generation={generation}", requests * options.buffer as u64);
        }
        transfer(&mut disk, options, Kind::Read, requests, generation);
        say!("blk: verified={} bytes generation={generation}", requests * options.buffer as u64);
    }
    if !read_only && !boot.cmdline.flag("keep") {
        // The very end, where a device's arithmetic is most easily wrong.
        let last = capacity - 1;
        pattern::fill(&mut disk.data(0)[..SECTOR], last, seed);
        disk.request(Kind::Write, last, SECTOR);
        disk.data(0).fill(0xa5);
        disk.request(Kind::Read, last, SECTOR);
        pattern::check(&disk.data(0)[..SECTOR], last, seed);
        say!("blk: last-sector={last}");
    }
}

/// Moves every block of `requests` once, `depth` at a time.
pub fn transfer(disk: &mut Disk, options: Options, kind: Kind, requests: u64, generation: u64) {
    let sectors = (options.buffer / SECTOR) as u64;
    let order = Order::new(requests, generation ^ (kind as u64) << 32);
    let mut block_of = [0; blk::MAX_DEPTH];
    let mut next = 0;
    let start = |disk: &mut Disk, slot: usize, block: u64| {
        if kind == Kind::Write {
            pattern::fill(disk.data(slot), block * sectors, generation);
        } else {
            // What is not overwritten must not look right.
            disk.data(slot).fill(0xa5);
        }
        disk.prepare(slot, kind, block * sectors, options.buffer);
    };
    for (slot, block) in block_of.iter_mut().enumerate().take(options.depth) {
        if next < requests {
            *block = order.block(next);
            start(disk, slot, *block);
            next += 1;
        }
    }
    disk.kick();
    for _ in 0..requests {
        let done = disk.wait();
        let block = block_of[done.slot];
        if done.status != blk::OK {
            crate::exit::fail(format_args!(
                "request type {} at sector {}: status {}",
                kind as u32,
                block * sectors,
                done.status
            ));
        }
        let written = 1 + if kind == Kind::Read { options.buffer as u32 } else { 0 };
        if done.written != written {
            crate::exit::fail(format_args!("the device wrote {}, not {written}", done.written));
        }
        if kind == Kind::Read {
            pattern::check(disk.data(done.slot), block * sectors, generation);
        }
        if next < requests {
            block_of[done.slot] = order.block(next);
            start(disk, done.slot, block_of[done.slot]);
            disk.kick();
            next += 1;
        }
    }
}

/// A permutation: steps of a length that has no divisor in common with the count.
struct Order {
    count: u64,
    step: u64,
    offset: u64,
}

impl Order {
    fn new(count: u64, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let offset = random.below(count);
        let mut step = random.below(count) | 1;
        while common_divisor(step, count) != 1 {
            step += 1;
        }
        Self { count, step, offset }
    }

    fn block(&self, n: u64) -> u64 {
        ((u128::from(n) * u128::from(self.step) + u128::from(self.offset)) % u128::from(self.count))
            as u64
    }
}

fn common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}
