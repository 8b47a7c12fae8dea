//! The measurements.
#![allow(clippy::unwrap_used)] // a failure here ends the benchmark

use std::fmt::Write as _;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cellblock::pool::stats::Percentiles;
use cellblock::pool::{BaseConfig, ClaimOrder, Machine, PoolConfig, RestorePool, Shape};
use serde::Serialize;

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(30);
const DISK: u64 = 64 << 20;
/// What is reached on the way to the first output.
const PHASES: [&str; 4] =
    ["  a shell is found", "  it has heard of it", "  the guest runs", "  the claim is answered"];
/// How long a pool at rest is left alone.
const REST: Duration = Duration::from_millis(20);

/// How much of it.
pub struct Plan {
    /// Memory of the machines, in MiB.
    pub sizes: &'static [u64],
    /// Claims of each kind.
    pub claims: usize,
    /// Shells of a pool that is at rest when one of them is claimed.
    pub ready: usize,
    /// Starts of `cellblock restore`.
    pub cold: usize,
    /// Shells that are ready before a batch of claims.
    pub batch: usize,
    /// How long claims are sustained.
    pub sustained: Duration,
}

pub const SMOKE: Plan = Plan {
    sizes: &[64],
    claims: 4,
    ready: 2,
    cold: 2,
    batch: 2,
    sustained: Duration::from_millis(500),
};

/// Everything that was measured.
#[derive(Default, Serialize)]
pub struct Report {
    /// From the claim to the first byte of output.
    pub latencies: Vec<Latency>,
    pub sustained: Vec<Sustained>,
    pub memory: Vec<Memory>,
}

#[derive(Serialize)]
pub struct Latency {
    pub kind: &'static str,
    pub memory_mib: u64,
    /// Microseconds.
    #[serde(flatten)]
    pub us: Percentiles,
}

#[derive(Serialize)]
pub struct Sustained {
    pub kind: &'static str,
    pub memory_mib: u64,
    pub threads: usize,
    pub claims_per_second: f64,
    pub hits: u64,
    pub misses: u64,
    /// Microseconds.
    #[serde(flatten)]
    pub us: Percentiles,
}

/// Proportional set sizes, in KiB.
#[derive(Serialize)]
pub struct Memory {
    pub kind: &'static str,
    pub memory_mib: u64,
    /// Of all processes of one.
    pub pss_kib: u64,
    /// Of that, guest memory.
    pub guest_kib: u64,
}

pub fn run(plan: &Plan) -> Report {
    let mut report = Report::default();
    // In memory where that is possible, so that no write-back is measured.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    for mib in plan.sizes {
        let snapshot = take(dir.path(), *mib);
        let primed = || Machine::Primed { snapshot: snapshot.clone(), disks: Vec::new() };
        let shape = || Machine::Shape(Shape::of(&snapshot, &[]).unwrap());
        // One VM notes what memory the guest needs first.
        let first = Pool::new(primed(), 0, 1, true);
        drop(first.claim());
        drop(first);

        for (kind, machine) in [("primed shell", primed()), ("empty shell", shape())] {
            let pool =
                Pool { snapshot: snapshot.clone(), ..Pool::new(machine, 0, plan.batch, true) };
            let mut times = Vec::new();
            while times.len() < plan.claims {
                assert_eq!(pool.pool.warm(plan.batch), plan.batch);
                if times.is_empty() {
                    let count = plan.batch as u64;
                    report.memory.push(memory(kind, *mib, count));
                }
                let held: Vec<_> = (0..plan.batch).map(|_| pool.claim()).collect();
                if times.is_empty() {
                    let kind = if kind == "primed shell" {
                        "clone of it, primed"
                    } else {
                        "clone of it, empty"
                    };
                    report.memory.push(memory(kind, *mib, plan.batch as u64));
                }
                times.extend(held.iter().map(|(_, took)| *took));
                drop(held);
                while pool.pool.stats().in_use > 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            report.latencies.push(latency(kind, *mib, times));
        }
        for (kind, machine) in [("primed, at rest", primed()), ("empty, at rest", shape())] {
            let pool = Pool::new(machine, plan.ready, plan.ready, true);
            let pool = Pool { snapshot: snapshot.clone(), ..pool };
            let (mut times, mut steps) = (Vec::new(), PHASES.map(|_| Vec::new()));
            while times.len() < plan.claims {
                pool.await_rest(plan.ready as u64);
                let (vm, took) = pool.claim();
                times.push(took);
                let at = vm.times();
                let reached = [at.granted, at.heard, at.runs, at.answered];
                for (all, reached) in steps.iter_mut().zip(reached) {
                    all.push(reached.as_micros() as u64);
                }
                drop(vm);
            }
            report.latencies.push(latency(kind, *mib, times));
            for (phase, times) in PHASES.into_iter().zip(steps) {
                report.latencies.push(latency(phase, *mib, times));
            }
        }
        let times = (0..plan.cold).map(|_| cold(&snapshot)).collect();
        report.latencies.push(latency("cellblock restore", *mib, times));

        let kinds = [("primed, jailed", true), ("primed, without jails", false)];
        for (kind, sandbox) in kinds {
            let pool = Pool::new(primed(), 4, 8, sandbox);
            report.sustained.push(sustained(&pool, kind, *mib, plan.sustained));
        }
        fs::remove_dir_all(&snapshot).unwrap();
    }
    report
}

struct Pool {
    pool: RestorePool,
    /// For pools that are not primed.
    snapshot: PathBuf,
    primed: bool,
}

impl Pool {
    fn new(machine: Machine, min_size: usize, max_size: usize, sandbox: bool) -> Pool {
        let primed = matches!(machine, Machine::Primed { .. });
        let program = Some(env!("CARGO_BIN_EXE_cellblock").into());
        let base = BaseConfig { program, sandbox, ..BaseConfig::new(machine) };
        let config = PoolConfig {
            min_size,
            max_size,
            max_live: 64,
            acquire_timeout: LIMIT,
            memory: Some(u64::MAX),
            ..PoolConfig::default()
        };
        Pool { pool: RestorePool::new(base, config).unwrap(), snapshot: PathBuf::new(), primed }
    }

    /// Waits until nothing is made or destroyed any more, and a little longer: the kernel ends
    /// namespaces after their processes.
    fn await_rest(&self, ready: u64) {
        let end = Instant::now() + LIMIT;
        loop {
            let stats = self.pool.stats();
            if (stats.idle, stats.alive, stats.making) == (ready, ready, 0) {
                break;
            }
            assert!(Instant::now() < end, "the pool does not come to rest: {stats:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(REST);
    }

    /// A VM, and the microseconds from the claim to its first output.
    fn claim(&self) -> (cellblock::pool::PooledRestoreVm, u64) {
        let order = ClaimOrder { data: b"touch".to_vec(), ..ClaimOrder::default() };
        let begun = Instant::now();
        let vm = match self.primed {
            true => self.pool.claim(&order),
            false => self.pool.restore_snapshot_with(&self.snapshot, &order),
        };
        let vm = vm.unwrap_or_else(|error| panic!("{}", cellblock::remedy::one_line(&error)));
        let mut console = vm.console().unwrap();
        console.set_read_timeout(Some(LIMIT)).unwrap();
        console.read_exact(&mut [0]).unwrap();
        let took = begun.elapsed().as_micros() as u64;
        (vm, took)
    }
}

/// From the start of the process to the guest's first byte.
fn cold(snapshot: &Path) -> u64 {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    command.args(["restore", "--die-with-parent"]).arg(snapshot);
    let begun = Instant::now();
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let took = begun.elapsed().as_micros() as u64;
    child.kill().unwrap();
    child.wait().unwrap();
    took
}

fn sustained(pool: &Pool, kind: &'static str, memory_mib: u64, time: Duration) -> Sustained {
    const THREADS: usize = 2;
    pool.pool.warm(4);
    let begun = Instant::now();
    let work = || {
        let mut times = Vec::new();
        while begun.elapsed() < time {
            times.push(pool.claim().1);
        }
        times
    };
    let mut times: Vec<u64> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        all.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let took = begun.elapsed().as_secs_f64();
    let stats = pool.pool.stats();
    assert_eq!(stats.violations, 0);
    times.sort_unstable();
    Sustained {
        kind,
        memory_mib,
        threads: THREADS,
        claims_per_second: times.len() as f64 / took,
        hits: stats.hits,
        misses: stats.misses,
        us: Percentiles::of(&times),
    }
}

fn latency(kind: &'static str, memory_mib: u64, mut times: Vec<u64>) -> Latency {
    times.sort_unstable();
    Latency { kind, memory_mib, us: Percentiles::of(&times) }
}

/// What each of `count` that there are costs.
fn memory(kind: &'static str, memory_mib: u64, count: u64) -> Memory {
    let (mut pss_kib, mut guest_kib) = (0, 0);
    for pid in descendants(std::process::id()) {
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/smaps")) else { continue };
        let mut is_guest = false;
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("Pss:"), Some(kib)) => {
                    let kib: u64 = kib.parse().unwrap();
                    pss_kib += kib;
                    guest_kib += if is_guest { kib } else { 0 };
                }
                (Some(range), _) if range.contains('-') => {
                    is_guest = line.contains("memfd:guest-ram");
                }
                _ => {}
            }
        }
    }
    Memory { kind, memory_mib, pss_kib: pss_kib / count, guest_kib: guest_kib / count }
}

fn descendants(of: u32) -> Vec<u32> {
    let parent = |pid: u32| -> Option<u32> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parents: Vec<(u32, u32)> = pids.filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let (mut found, mut next) = (Vec::new(), vec![of]);
    while let Some(pid) = next.pop() {
        let children = parents.iter().filter(|(_, of)| *of == pid).map(|(child, _)| *child);
        let children: Vec<u32> = children.collect();
        found.extend(&children);
        next.extend(children);
    }
    found
}

/// A snapshot of a guest that is about to run its workload, with half of its memory in use.
fn take(dir: &Path, mib: u64) -> PathBuf {
    let (kernel, disk, at) = (dir.join("guest"), dir.join("disk"), dir.join(format!("s{mib}")));
    fs::write(&kernel, cellblock::guest::BARE_GUEST).unwrap();
    fs::File::create(&disk).unwrap().set_len(DISK).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .args(["run", "--die-with-parent", "--memory", &format!("{mib}M"), "--kernel"])
        .arg(&kernel)
        .args(["--cmdline", &format!("mode=clone mib={}", mib / 2), "--disk"])
        .arg(format!("{},cow", disk.display()))
        .args(["--serial", "null", "--snapshot-on-pre-exec", "--snapshot-out"])
        .arg(&at)
        .spawn()
        .unwrap();
    let end = Instant::now() + LIMIT * 2;
    while !at.join("manifest").exists() {
        assert!(Instant::now() < end && child.try_wait().unwrap().is_none(), "no snapshot");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    at
}

impl Report {
    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap()
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        let ms = |us: u64| us as f64 / 1e3;
        let row = |us: &Percentiles| {
            let (p50, p95, p99, max) = (ms(us.p50), ms(us.p95), ms(us.p99), ms(us.max));
            format!("{p50:8.3} {p95:8.3} {p99:8.3} {max:8.3}  of {}", us.count)
        };
        let _ = writeln!(
            text,
            "claim to first output, ms                  50%      95%      99%     most"
        );
        for one in &self.latencies {
            let _ =
                writeln!(text, "  {:<22} {:5} MiB   {}", one.kind, one.memory_mib, row(&one.us));
        }
        let _ = writeln!(text, "claims a second, 2 threads, with refill");
        for one in &self.sustained {
            let rate = one.claims_per_second;
            let (size, hits, misses) = (one.memory_mib, one.hits, one.misses);
            let _ = writeln!(
                text,
                "  {:<22} {size:5} MiB   {rate:8.1}  found {hits}, waited {misses}",
                one.kind
            );
            let _ = writeln!(text, "    claim to first output, ms            {}", row(&one.us));
        }
        let _ = writeln!(text, "proportional set size of each, KiB         all    guest   beyond");
        for one in &self.memory {
            let beyond = one.pss_kib - one.guest_kib;
            let (all, guest) = (one.pss_kib, one.guest_kib);
            let _ = writeln!(
                text,
                "  {:<22} {:5} MiB   {all:8} {guest:8} {beyond:8}",
                one.kind, one.memory_mib
            );
        }
        text
    }
}
