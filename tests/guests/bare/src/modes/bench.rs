//! Random block requests, measured in cycles.

use crate::arch::cpu::cycles;
use crate::boot::Boot;
use crate::heap::Heap;
use crate::pattern::SECTOR;
use crate::random::Random;
use crate::virtio::blk::{self, Disk, Kind, Options};

/// Requests before the measurement, which fill caches and wake the other side.
const WARM_UP: u64 = 256;

/// Keeps `qd=` requests in flight until `n=` are done and prints one line:
///
/// - `cyc_*`: cycles per request, over windows of `qd` completions (their time divided by `qd`);
/// - `lat_*`: cycles from a request's publication to the sight of its completion.
pub fn run(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let options = Options::from_cmdline(boot);
    let mut disk = Disk::open(boot, &mut heap, options);
    let op = boot.cmdline.get("op").unwrap_or("read");
    let kind = match op {
        "read" => Kind::Read,
        "write" => Kind::Write,
        _ => crate::exit::fail(format_args!("op={op}: must be read or write")),
    };
    let depth = options.depth as u64;
    let windows = boot.cmdline.number("n", 10_000).div_ceil(depth).max(1);
    let n = windows * depth;
    let sectors = (options.buffer / SECTOR) as u64;
    let span = match boot.cmdline.number("mib", 0) {
        0 => disk.capacity,
        mib => disk.capacity.min((mib << 20) / SECTOR as u64),
    };
    if span < sectors {
        crate::exit::fail(format_args!("the disk is smaller than a request"));
    }

    let latencies = heap.words(n as usize);
    let costs = heap.words(windows as usize);
    let mut random = Random::new(boot.cmdline.number("seed", 1));
    let mut sector = || random.below(span / sectors) * sectors;
    let mut started = [0; blk::MAX_DEPTH];

    for (slot, start) in started.iter_mut().enumerate().take(options.depth) {
        disk.prepare(slot, kind, sector(), options.buffer);
        *start = cycles();
    }
    disk.kick();
    // The line is kept full all the way; what is in flight at the end is waited for unmeasured.
    let (mut begin, mut window) = (0, 0);
    let mut done_count = 0;
    while done_count < WARM_UP + n {
        let mut done = disk.wait();
        loop {
            if done.status != blk::OK {
                crate::exit::fail(format_args!("{op}: status {}", done.status));
            }
            let now = cycles();
            if done_count >= WARM_UP && done_count < WARM_UP + n {
                let i = done_count - WARM_UP;
                latencies[i as usize] = now - started[done.slot];
                if (i + 1).is_multiple_of(depth) {
                    costs[(i / depth) as usize] = (now - window) / depth;
                    window = now;
                }
            }
            done_count += 1;
            if done_count == WARM_UP {
                (begin, window) = (now, now);
            }
            disk.prepare(done.slot, kind, sector(), options.buffer);
            started[done.slot] = now;
            match disk.poll() {
                Some(next) => done = next,
                None => break,
            }
        }
        disk.kick();
    }
    let total = window - begin;
    for _ in 0..depth {
        disk.wait();
    }
    costs.sort_unstable();
    latencies.sort_unstable();
    say!(
        "bench: op={op} qd={depth} bytes={} n={n} cyc_min={} cyc_median={} cyc_p99={} \
         cyc_mean={} lat_min={} lat_median={} lat_p99={}",
        options.buffer,
        costs[0],
        quantile(costs, 50),
        quantile(costs, 99),
        total / n,
        latencies[0],
        quantile(latencies, 50),
        quantile(latencies, 99),
    );
}

fn quantile(sorted: &[u64], percent: usize) -> u64 {
    sorted[(sorted.len() - 1) * percent / 100]
}
