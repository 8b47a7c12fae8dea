//! Claims that do not get what they want: how long that takes, and what it costs.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
mod pool_support;

use std::path::Path;
use std::time::{Duration, Instant};

use cellblock::pool::engine::ClaimError;
use cellblock::pool::{
    BaseConfig, ClaimOrder, Machine, PoolConfig, PoolError, Release, RestorePool,
};
use nix::sys::signal::Signal;
use pool_support::{Console, LIMIT, Snapshot, base, idle, pid_of};

fn pool(snapshot: &Snapshot, directory: &Path, config: PoolConfig) -> RestorePool {
    let machine = Machine::Primed { snapshot: snapshot.path(), disks: Vec::new() };
    let directory = Some(directory.to_path_buf());
    RestorePool::new(BaseConfig { directory, ..base(machine) }, config).unwrap()
}

fn one() -> PoolConfig {
    PoolConfig {
        min_size: 0,
        max_size: 1,
        max_live: 2,
        acquire_timeout: LIMIT,
        ..PoolConfig::default()
    }
}

/// One that is stopped may have got the claim, and run its guest when it goes on.
#[test]
fn a_shell_that_does_not_answer_is_killed_in_good_time() {
    let (snapshot, dir) = (Snapshot::take(",cow"), tempfile::tempdir().unwrap());
    let pool = pool(&snapshot, dir.path(), one());
    let stopped = || {
        assert_eq!(pool.warm(1), 1);
        let pid = pid_of(&idle(dir.path()), "vmm").unwrap();
        common::send(pid, Signal::SIGSTOP);
        common::proc::family(pid)
    };
    let family = stopped();
    let begun = Instant::now();
    let patience = Some(Duration::from_millis(100));
    let error = pool.claim(&ClaimOrder { patience, ..ClaimOrder::default() }).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert!(error.to_string().contains("restoring a VM"), "{error}");
    common::proc::wait_gone(&family, LIMIT).expect("it could go on with the claim");
    // Nor is it waited for by somebody who is gone.
    stopped();
    let begun = Instant::now();
    let wanted = || false;
    let order = ClaimOrder { wanted: Some(&wanted), ..ClaimOrder::default() };
    let error = pool.claim(&order).unwrap_err();
    assert!(matches!(error, PoolError::Claim(ClaimError::Abandoned)), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let vm = pool.claim(&ClaimOrder::default()).unwrap();
    Console::of(&vm).who();
    drop(vm);
    assert!(pool.drain_all(LIMIT));
    let stats = pool.stats();
    assert_eq!((stats.claims, stats.restore_failures, stats.violations), (3, 2, 0));
}

/// A shell that dies under a claim is replaced by another, and it is still one claim.
#[test]
fn another_shell_is_no_other_claim() {
    let (snapshot, dir) = (Snapshot::take(",cow"), tempfile::tempdir().unwrap());
    let pool = pool(&snapshot, dir.path(), one());
    assert_eq!(pool.warm(1), 1);
    let pid = pid_of(&idle(dir.path()), "vmm").unwrap();
    common::send(pid, Signal::SIGSTOP);
    let vm = std::thread::scope(|scope| {
        scope.spawn(|| {
            let claimed = common::poll(LIMIT, || (pool.stats().in_use == 1).then_some(()));
            claimed.expect("a claim");
            common::send(pid, Signal::SIGKILL);
        });
        pool.claim(&ClaimOrder { data: b"touch".to_vec(), ..ClaimOrder::default() }).unwrap()
    });
    assert_ne!(vm.pid(), pid as u32);
    assert_eq!(Console::of(&vm).who().data, "touch");
    drop(vm);
    assert!(pool.drain_all(LIMIT));
    let stats = pool.stats();
    let counts = (stats.claims, stats.retries, stats.restore_failures, stats.violations);
    assert_eq!(counts, (1, 1, 1, 0));
}

/// With a limit on memory all is counted that a guest can make its VM take.
#[test]
fn no_claim_has_memory_that_is_not_counted() {
    let (snapshot, dir) = (Snapshot::take(",cow=/tmp"), tempfile::tempdir().unwrap());
    let config = PoolConfig { memory: Some(1 << 30), ..one() };
    let pool = pool(&snapshot, dir.path(), config);
    let disks = vec!["id=disk0,cow".parse().unwrap()];
    let refused = pool.claim(&ClaimOrder { disks, ..ClaimOrder::default() }).unwrap_err();
    let text = cellblock::remedy::one_line(&refused);
    assert!(text.contains("does not count") && text.contains("cow=DIR"), "{text}");
    assert_eq!(pool.stats().claims, 0);
}

/// What is at the snapshot's path is looked at by every shell that is made.
#[test]
fn another_snapshot_in_the_place_of_the_pools_is_not_used() {
    let (snapshot, dir) = (Snapshot::take(",cow"), tempfile::tempdir().unwrap());
    let other = Snapshot::take(",cow");
    let pool = pool(&snapshot, dir.path(), PoolConfig { release: Release::Reset, ..one() });
    assert_eq!(pool.warm(1), 1);
    let away = snapshot.path().with_file_name("away");
    std::fs::rename(snapshot.path(), &away).unwrap();
    std::fs::rename(other.path(), snapshot.path()).unwrap();
    // The one there is has the right one already.
    let vm = pool.claim(&ClaimOrder::default()).unwrap();
    Console::of(&vm).wait_for("clone: wrote");
    let refused = pool.claim(&ClaimOrder::default()).unwrap_err();
    let text = cellblock::remedy::one_line(&refused);
    assert!(text.contains("the snapshot is") && text.contains("start the pool again"), "{text}");
    std::fs::rename(snapshot.path(), other.path()).unwrap();
    std::fs::rename(&away, snapshot.path()).unwrap();
    drop(pool.claim(&ClaimOrder::default()).unwrap());
    drop(vm);
    assert!(pool.drain_all(LIMIT));
    assert_eq!(pool.stats().violations, 0);
}
