//! A list of measurements on one disk, each for a fixed time.

use crate::arch::cpu::cycles;
use crate::boot::Boot;
use crate::cmdline::parse;
use crate::heap::Heap;
use crate::pattern::SECTOR;
use crate::random::Random;
use crate::virtio::blk::{self, Disk, Kind, Options};

/// Part of a measurement's time that goes by first, unmeasured.
const WARM_UP: u64 = 4;
/// Latencies kept; of more requests, the first ones.
const SAMPLES: usize = 1 << 18;

/// One of the `plan=` words: `OP:SECTORS:DEPTH`, OP being `read`, `write`, `seqread` or
/// `seqwrite`.
#[derive(Clone, Copy)]
struct Item<'a> {
    op: &'a str,
    kind: Kind,
    sequential: bool,
    sectors: usize,
    depth: usize,
}

impl<'a> Item<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.split(':');
        let op = parts.next()?;
        let (kind, sequential) = match op {
            "read" => (Kind::Read, false),
            "write" => (Kind::Write, false),
            "seqread" => (Kind::Read, true),
            "seqwrite" => (Kind::Write, true),
            _ => return None,
        };
        let mut number = || parts.next().and_then(parse).map(|n| n as usize);
        let (sectors, depth) = (number()?, number()?);
        Some(Self { op, kind, sequential, sectors, depth })
    }
}

/// Carries out `plan=`, each for `cycles=`, printing `plan: begin` before and one line behind
/// each: the cycles a request and its latency (from publication to the sight of its completion)
/// at the median and the 99th percentile.
pub fn run(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let options = Options::from_cmdline(boot);
    let time = boot.cmdline.number("cycles", 200_000_000);
    let plan = boot.cmdline.get("plan").unwrap_or("read:8:1");
    let mut disk = Disk::open(boot, &mut heap, options);
    let latencies = heap.words(SAMPLES);
    let mut random = Random::new(boot.cmdline.number("seed", 1));
    for text in plan.split(',') {
        let item = Item::parse(text).filter(|item| {
            let bytes = item.sectors * SECTOR;
            (1..=options.depth).contains(&item.depth) && (1..=options.buffer).contains(&bytes)
        });
        match item {
            Some(item) => measure(item, time, &mut disk, &mut random, latencies),
            None => crate::exit::fail(format_args!("plan: {text} is none, or too large")),
        }
    }
}

fn measure(item: Item<'_>, time: u64, disk: &mut Disk, random: &mut Random, latencies: &mut [u64]) {
    let sectors = item.sectors as u64;
    let places = disk.capacity / sectors;
    if places == 0 {
        crate::exit::fail(format_args!("the disk is smaller than a request"));
    }
    let mut turn = 0;
    let mut place = || {
        turn += 1;
        (if item.sequential { turn % places } else { random.below(places) }) * sectors
    };
    let bytes = item.sectors * SECTOR;
    let mut started = [0; blk::MAX_DEPTH];
    say!("plan: begin op={} bytes={bytes} qd={}", item.op, item.depth);
    let mut begin = cycles();
    for (slot, start) in started.iter_mut().enumerate().take(item.depth) {
        disk.prepare(slot, item.kind, place(), bytes);
        *start = cycles();
    }
    disk.kick();
    let (mut done_count, mut warm, mut end) = (0u64, false, begin + time / WARM_UP);
    let mut now = begin;
    // The line is kept full all the way; what is in flight at the end is waited for unmeasured.
    loop {
        let mut next = Some(disk.wait());
        while let Some(done) = next {
            if done.status != blk::OK {
                crate::exit::fail(format_args!("{}: status {}", item.op, done.status));
            }
            now = cycles();
            if let Some(latency) = latencies.get_mut(done_count as usize) {
                *latency = now - started[done.slot];
            }
            done_count += 1;
            disk.prepare(done.slot, item.kind, place(), bytes);
            started[done.slot] = now;
            next = disk.poll();
        }
        disk.kick();
        if now >= end {
            if warm {
                break;
            }
            say!("plan: warm");
            (warm, done_count, begin) = (true, 0, cycles());
            end = begin + time;
            started.fill(begin); // what is in flight did not wait for the console
        }
    }
    let total = now - begin;
    say!("plan: measured");
    for _ in 0..item.depth {
        disk.wait();
    }
    let kept = &mut latencies[..(done_count as usize).min(SAMPLES)];
    kept.sort_unstable();
    say!(
        "plan: end op={} bytes={bytes} qd={} n={done_count} cycles={total} lat_median={} lat_p99={}",
        item.op,
        item.depth,
        kept[(kept.len() - 1) / 2],
        kept[(kept.len() - 1) * 99 / 100],
    );
}
