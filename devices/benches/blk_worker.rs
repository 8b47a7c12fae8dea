//! What a queue's thread costs a request, in a process of its own with a driver that polls:
//! no guest, no jail. A look at the worker alone; `cargo bench --bench blk` has the whole.
//!
//! ```text
//! cargo bench -p cellblock-devices --bench blk_worker
//! ```

#[allow(dead_code)] // shared with the tests; each uses a part
#[path = "../tests/blk_driver/mod.rs"]
mod blk_driver;

use blk_driver::*;

const IMAGE: u64 = 64 << 20;
const BLOCK: u32 = 4096;
const DATA: u64 = 0x20_0000;
const FEATURES: u64 = F_VERSION_1 | F_FLUSH | F_INDIRECT | F_EVENT_IDX;

fn cycles() -> u64 {
    #[allow(unsafe_code)] // the intrinsic is an unsafe function
    // SAFETY: reads the time stamp counter, which every x86_64 has.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
}

/// Cycles per request at a queue depth, of `requests` at random places.
fn measure(kind: u32, depth: u64, requests: u64, poll_us: u32) -> u64 {
    let options = Options { bytes: IMAGE, poll_us, ..Options::default() };
    let mut device = Device::start(&options, FEATURES);
    let mut queue = Queue::set_up(&mut device, 0, 256, FEATURES);
    let memory = device.memory.clone();
    // The used index is watched, so no interrupt is wanted.
    queue.set_used_event(&memory, u16::MAX / 2);
    let mut random = 1u64;
    let mut submit = |queue: &mut Queue, slot: u64| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let sector = (random >> 33) % (IMAGE / u64::from(BLOCK)) * u64::from(BLOCK / 512);
        let [header, status] = queue.header(&memory, slot, kind, sector);
        let at = DATA + slot * u64::from(BLOCK);
        let data = if kind == T_IN { into(at, BLOCK) } else { out(at, BLOCK) };
        let from = queue.avail;
        queue.add(&memory, &[header, data, status]);
        if queue.avail.is_multiple_of(1 << 14) {
            queue.set_used_event(&memory, queue.avail.wrapping_add(u16::MAX / 2));
        }
        queue.kick(&memory, from);
    };
    for slot in 0..depth {
        submit(&mut queue, slot);
    }
    let start = cycles();
    for n in 0..requests {
        queue.next_used(&memory).expect("an answer");
        submit(&mut queue, n % depth);
    }
    (cycles() - start) / requests
}

/// Nanoseconds that thread `blk-q0` of this process has been on a CPU.
fn worker_time() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("tasks");
    let worker = tasks
        .map(|task| task.expect("task").path())
        .find(|task| {
            std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "blk-q0\n")
        })
        .expect("worker");
    let stat = std::fs::read_to_string(worker.join("schedstat")).expect("schedstat");
    stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds")
}

/// CPU nanoseconds of the worker per request, in batches with one kick each.
fn worker_cost(kind: u32, batch: u64, batches: u64) -> u64 {
    let options = Options { bytes: IMAGE, ..Options::default() };
    let mut device = Device::start(&options, FEATURES);
    let mut queue = Queue::set_up(&mut device, 0, 256, FEATURES);
    let memory = device.memory.clone();
    let mut random = 1u64;
    let mut before = 0;
    for round in 0..=batches {
        if round == 1 {
            before = worker_time();
        }
        let from = queue.avail;
        queue.set_used_event(&memory, from.wrapping_sub(2));
        for slot in 0..batch {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let sector = (random >> 33) % (IMAGE / u64::from(BLOCK)) * u64::from(BLOCK / 512);
            let [header, status] = queue.header(&memory, slot, kind, sector);
            let at = DATA + slot * u64::from(BLOCK);
            let data = if kind == T_IN { into(at, BLOCK) } else { out(at, BLOCK) };
            queue.add(&memory, &[header, data, status]);
        }
        queue.kick(&memory, from);
        while queue.used_index(&memory) != queue.avail {
            std::thread::yield_now();
        }
        queue.used = queue.avail;
    }
    (worker_time() - before) / (batch * batches)
}

/// CPU nanoseconds of one pread or pwrite of the same size, for comparison.
fn floor(kind: u32, requests: u64) -> u64 {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile().expect("file");
    file.set_len(IMAGE).expect("size");
    let mut block = vec![0u8; BLOCK as usize];
    for at in 0..IMAGE / u64::from(BLOCK) {
        file.write_all_at(&block, at * u64::from(BLOCK)).expect("fill");
    }
    let cpu = || {
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
            .map(|t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
            .expect("clock")
    };
    let (mut random, start) = (1u64, cpu());
    for _ in 0..requests {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let at = (random >> 33) % (IMAGE / u64::from(BLOCK)) * u64::from(BLOCK);
        if kind == T_IN {
            file.read_exact_at(&mut block, at).expect("read");
        } else {
            file.write_all_at(&block, at).expect("write");
        }
    }
    (cpu() - start) / requests
}

fn median(mut runs: Vec<u64>) -> String {
    runs.sort_unstable();
    format!("{:6} ({} to {})", runs[runs.len() / 2], runs[0], runs[runs.len() - 1])
}

const ROUNDS: usize = 7;
const KINDS: [(&str, u32); 2] = [("read", T_IN), ("write", T_OUT)];

fn main() {
    println!("4 KiB at random in a page-cached image: CPU ns a request (least to most)");
    for (name, kind) in KINDS {
        // In turn, so that what else the host does hits all alike.
        let (mut calls, mut worker) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            calls.push(floor(kind, 50_000));
            worker.push(worker_cost(kind, 128, 400));
        }
        println!("  {name:5} by one system call      {}", median(calls));
        println!("  {name:5} worker, batches of 128  {}", median(worker));
    }
    println!("the same: cycles seen by a polling driver, which needs a CPU beside the worker's");
    for (name, kind) in KINDS {
        for (depth, poll_us, requests) in [(1, 0, 2_000), (1, 50, 10_000), (32, 50, 50_000)] {
            let runs = (0..ROUNDS).map(|_| measure(kind, depth, requests, poll_us)).collect();
            println!("  {name:5} depth {depth:2}, poll {poll_us:2} us  {}", median(runs));
        }
    }
}
