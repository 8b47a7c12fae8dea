//! Eight threads claim and drop VMs while everything that can fail does.
//!
//! A few seconds; `CELLBLOCK_STORM_SECONDS=600` for the long run.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
mod pool_support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cellblock::pool::engine::ClaimError;
use cellblock::pool::{
    BaseConfig, ClaimOrder, Machine, PoolConfig, PoolError, PooledRestoreVm, Release, RestorePool,
};
use common::proc;
use nix::sys::signal::Signal;
use pool_support::{LIMIT, Snapshot, base};

const THREADS: u64 = 8;

fn duration() -> Duration {
    let seconds = std::env::var("CELLBLOCK_STORM_SECONDS").ok();
    Duration::from_secs(seconds.map_or(8, |text| text.parse().expect("seconds")))
}

/// A small generator, so that a run can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

/// What this process has open and mapped.
struct Own {
    files: BTreeMap<String, usize>,
    resident_kib: u64,
    threads: usize,
}

impl Own {
    fn now() -> Own {
        let pid = std::process::id() as i32;
        let mut files = BTreeMap::new();
        for name in proc::files(pid).into_values() {
            // Numbers of sockets and pipes say nothing.
            let kind = name.split(':').next().unwrap_or_default().to_string();
            *files.entry(kind).or_insert(0) += 1;
        }
        let status = proc::status(pid, pid);
        let resident_kib = status["VmRSS"].split(' ').next().unwrap().parse().unwrap();
        Own { files, resident_kib, threads: proc::threads(pid).len() }
    }
}

/// A program that starts shells, or does not where `broken` is there.
fn flaky_program(dir: &Path) -> PathBuf {
    let path = dir.join("flaky");
    let program = env!("CARGO_BIN_EXE_cellblock");
    let text =
        format!("#!/bin/sh\n[ -e {0}/broken ] && exit 1\nexec {program} \"$@\"\n", dir.display());
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    drop(file);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// How claims ended.
#[derive(Default)]
struct Tally {
    vms: AtomicU64,
    vanished: AtomicU64,
    late: AtomicU64,
    not_made: AtomicU64,
    not_restored: AtomicU64,
}

impl Tally {
    fn count(&self, counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn error(&self, error: &PoolError) {
        let line = cellblock::remedy::one_line(error);
        assert!(!line.contains('\n') && line.len() > 20, "{line:?}");
        match error {
            PoolError::Claim(ClaimError::TimedOut { waited, .. }) => {
                assert!(line.contains("in use") && *waited < LIMIT, "{line}");
                self.count(&self.late);
            }
            PoolError::Claim(ClaimError::Make(_)) => self.count(&self.not_made),
            PoolError::Shell(_) => self.count(&self.not_restored),
            _ => panic!("{line}"),
        }
    }
}

/// Reads what the guest says until it has said `text`; false if it ends first.
fn says(stream: &mut impl Read, seen: &mut String, text: &str) -> bool {
    let mut part = [0; 512];
    while !seen.contains(text) {
        match stream.read(&mut part) {
            Ok(n @ 1..) => seen.push_str(&String::from_utf8_lossy(&part[..n])),
            _ => return false,
        }
    }
    assert!(!seen.contains("FAIL"), "{seen}");
    true
}

/// The guest is who it should be, its console has nothing of another, and what it writes is its
/// own; false if it was killed.
fn use_it(vm: &PooledRestoreVm, data: &str) -> bool {
    let Ok(mut console) = vm.console() else { return false };
    console.set_read_timeout(Some(LIMIT)).unwrap();
    let mut seen = String::new();
    let own = format!("data={data}\n");
    if !says(&mut console, &mut seen, "\n") {
        return false;
    }
    assert!(seen.contains(&own) && seen.contains(&format!("id={}", vm.id())), "{data}: {seen}");
    let (_, rest) = seen.rsplit_once(&own).unwrap();
    seen = rest.to_string();
    if !says(&mut console, &mut seen, "clone: wrote") {
        return false;
    }
    console.write_all(b"c").is_ok() && says(&mut console, &mut seen, "clone: own")
}

#[test]
fn counts_add_up_and_nothing_leaks_whatever_fails() {
    storm(Release::Destroy);
    storm(Release::Reset);
}

fn storm(release: Release) {
    let snapshot = Snapshot::take(",cow");
    let dir = tempfile::tempdir().unwrap();
    let program = Some(flaky_program(dir.path()));
    let config = PoolConfig {
        min_size: 3,
        max_size: 4,
        max_live: 5,
        acquire_timeout: LIMIT,
        memory: None,
        release,
    };
    let machine = Machine::Primed { snapshot: snapshot.path(), disks: Vec::new() };
    let sockets = dir.path().join("sockets");
    fs::create_dir(&sockets).unwrap();
    let directory = Some(sockets.clone());
    let family_before = proc::family(std::process::id() as i32);
    let before = Own::now();
    let pool =
        RestorePool::new(BaseConfig { program, directory, ..base(machine) }, config).unwrap();
    let (tally, stop, killed) = (Tally::default(), AtomicBool::new(false), AtomicU64::new(0));
    let end = Instant::now() + duration() / 2;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (pool, tally, stop) = (&pool, &tally, &stop);
            scope.spawn(move || {
                let mut random = Random(thread);
                let mut n = 0;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    let data = format!("{thread}.{n}");
                    let patience = Some(Duration::from_millis(random.below(400)));
                    let order =
                        ClaimOrder { data: data.clone().into(), patience, ..ClaimOrder::default() };
                    match pool.claim(&order) {
                        Ok(vm) => {
                            tally.count(&tally.vms);
                            if random.below(4) > 0 && !use_it(&vm, &data) {
                                tally.count(&tally.vanished);
                            }
                        }
                        Err(error) => tally.error(&error),
                    }
                    let stats = pool.stats();
                    assert_eq!(stats.violations, 0, "{:?}", stats.last_violation);
                    assert!(stats.in_use <= 5 && stats.idle <= 4, "{stats:?}");
                }
            });
        }
        let mut random = Random(99);
        let (broken, memory) = (dir.path().join("broken"), snapshot.path().join("memory"));
        let (state, away) = (snapshot.path().join("state"), snapshot.path().with_file_name("away"));
        while Instant::now() < end {
            match random.below(8) {
                0 => {
                    fs::write(&broken, "").unwrap();
                    std::thread::sleep(Duration::from_millis(60));
                    fs::remove_file(&broken).unwrap();
                }
                1 => {
                    fs::rename(snapshot.path(), &away).unwrap();
                    std::thread::sleep(Duration::from_millis(60));
                    fs::rename(&away, snapshot.path()).unwrap();
                }
                2 => spoil(if random.below(2) == 0 { &memory } else { &state }),
                _ => {
                    // Any process of any shell or VM, the VMM included.
                    let own = std::process::id() as i32;
                    let all = proc::family(own);
                    let others: Vec<_> =
                        all.iter().filter(|p| !family_before.contains(p)).collect();
                    if !others.is_empty() {
                        let victim = others[random.below(others.len() as u64) as usize];
                        common::send(victim.pid, Signal::SIGKILL);
                        killed.fetch_add(1, Ordering::Relaxed);
                    }
                    std::thread::sleep(Duration::from_millis(random.below(50)));
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let stats = pool.stats();
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    eprintln!(
        "{release:?}: {} VMs of which {} vanished, {} late, {} not made, {} not restored; \
         {} processes killed; {stats:?}",
        get(&tally.vms),
        get(&tally.vanished),
        get(&tally.late),
        get(&tally.not_made),
        get(&tally.not_restored),
        get(&killed)
    );
    assert!(get(&tally.vms) > 3 && stats.make_failures > 0 && get(&killed) > 3);
    assert_eq!(stats.hits + stats.misses, get(&tally.vms) + stats.restore_failures);
    // Everything works again by itself.
    let vm = pool.claim(&ClaimOrder { data: b"after".to_vec(), ..ClaimOrder::default() }).unwrap();
    assert!(use_it(&vm, "after"));
    drop(vm);
    assert!(pool.drain_all(LIMIT), "{:?}", pool.stats());
    let stats = pool.stats();
    assert_eq!((stats.violations, stats.alive, stats.waiting), (0, 0, 0), "{stats:?}");
    drop(pool);
    let left: Vec<_> = fs::read_dir(&sockets).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "sockets are left: {left:?}");
    nothing_is_left(&before, &family_before);
}

/// Flips a bit of a file for a moment.
fn spoil(path: &Path) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let at = 64 << 10 | 77;
    let at = if file.metadata().unwrap().len() > at { at } else { 77 };
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    std::thread::sleep(Duration::from_millis(60));
    file.write_all_at(&byte, at).unwrap();
}

fn nothing_is_left(before: &Own, family_before: &[proc::Identity]) {
    let own = std::process::id() as i32;
    let news = || -> Vec<_> {
        proc::family(own).into_iter().filter(|p| !family_before.contains(p)).collect()
    };
    let gone = common::poll(Duration::from_secs(5), || news().is_empty().then_some(()));
    assert!(gone.is_some(), "processes are left: {:?}", news());
    let quiet = || {
        let now = Own::now();
        let more = |(kind, count): (_, &usize)| *count > before.files.get(kind).map_or(0, |n| *n);
        now.threads <= before.threads && !now.files.iter().any(more)
    };
    let quiet = common::poll(Duration::from_secs(5), || quiet().then_some(()));
    let now = Own::now();
    assert!(
        quiet.is_some(),
        "{:?} {} {:?} {}",
        before.files,
        before.threads,
        now.files,
        now.threads
    );
    let grown = now.resident_kib.saturating_sub(before.resident_kib);
    assert!(grown < 24 << 10, "{grown} KiB more are resident");
}
