//! VMs that are reset and used again: what one tenant did is nothing to the next.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
mod pool_support;

use std::path::Path;

use cellblock::control::client::Client;
use cellblock::control::protocol::{DeviceState, Reply, Request, Stats};
use cellblock::pool::{
    BaseConfig, ClaimOrder, Machine, PoolConfig, PooledRestoreVm, Release, RestorePool,
};
use nix::sys::signal::Signal;
use pool_support::{Console, LIMIT, Snapshot, base};

/// One VM at a time, whose sockets are in `directory`.
fn pool(snapshot: &Snapshot, directory: &Path) -> RestorePool {
    let config = PoolConfig {
        min_size: 0,
        max_size: 1,
        max_live: 1,
        acquire_timeout: LIMIT,
        release: Release::Reset,
        ..PoolConfig::default()
    };
    let machine = Machine::Primed { snapshot: snapshot.path(), disks: Vec::new() };
    let directory = Some(directory.to_path_buf());
    RestorePool::new(BaseConfig { directory, ..base(machine) }, config).unwrap()
}

fn claim(pool: &RestorePool, data: &str) -> PooledRestoreVm {
    pool.claim(&ClaimOrder { data: data.into(), ..ClaimOrder::default() }).unwrap()
}

/// Waits until it is a shell again.
#[track_caller]
fn release(pool: &RestorePool, vm: PooledRestoreVm) {
    drop(vm);
    let idle = common::poll(LIMIT, || (pool.idle_count() == 1).then_some(()));
    idle.unwrap_or_else(|| panic!("it was not reset: {:?}", pool.stats()));
}

fn stats(control: &Path) -> Option<Stats> {
    match Client::connect(control).ok()?.ask(Request::Stats).ok()?.0 {
        Reply::Stats(stats) => Some(*stats),
        other => panic!("{other:?}"),
    }
}

/// The process of its disk, if there is one at the moment.
fn blk(control: &Path) -> Option<i32> {
    pool_support::pid_of(control, "blk")
}

/// Kills the process of its disk again and again, until the disk has failed or the VM has ended.
fn fail_disk(control: &Path) {
    let mut last = 0;
    let done = common::poll(LIMIT, || {
        let failed = stats(control).is_none_or(|s| s.disks[0].state == DeviceState::Failed);
        if let Some(pid) = blk(control).filter(|pid| !failed && *pid != last) {
            last = pid;
            common::send(pid, Signal::SIGKILL);
        }
        failed.then_some(())
    });
    done.expect("its disk does not fail");
}

#[test]
fn a_vm_whose_disk_has_failed_is_given_to_nobody() {
    let (snapshot, dir) = (Snapshot::take(",cow"), tempfile::tempdir().unwrap());
    let pool = pool(&snapshot, dir.path());
    let healthy = |not: Option<u32>| {
        let vm = claim(&pool, "");
        assert_ne!(Some(vm.pid()), not, "it is the one whose disk has failed");
        Console::of(&vm).wait_for("clone: wrote");
        assert_eq!(stats(vm.control_path()).unwrap().disks[0].state, DeviceState::Running);
        vm
    };
    // While it was somebody's.
    let vm = healthy(None);
    let first = vm.pid();
    fail_disk(vm.control_path());
    drop(vm);
    let vm = healthy(Some(first));
    assert_eq!(pool.stats().reset_failures, 1);
    // While it was nobody's.
    let second = vm.pid();
    release(&pool, vm);
    fail_disk(&pool_support::idle(dir.path()));
    common::poll(LIMIT, || (pool.stats().lost == 1).then_some(())).expect("it waits still");
    let vm = healthy(Some(second));
    drop(vm);
    assert!(pool.drain_all(LIMIT));
    assert_eq!((pool.stats().restore_failures, pool.stats().violations), (0, 0));
}

/// What died in one life is not held against the next.
#[test]
fn deaths_are_counted_anew_in_every_life() {
    let (snapshot, dir) = (Snapshot::take(",cow"), tempfile::tempdir().unwrap());
    let pool = pool(&snapshot, dir.path());
    let mut pid = None;
    for _ in 0..2 {
        let vm = claim(&pool, "");
        assert_eq!(*pid.get_or_insert(vm.pid()), vm.pid(), "it was not reset");
        Console::of(&vm).wait_for("clone: wrote");
        for n in 0..3 {
            let stats = || stats(vm.control_path()).unwrap();
            assert_eq!(stats().disks[0].restarts, n);
            common::send(blk(vm.control_path()).unwrap(), Signal::SIGKILL);
            let back = || (stats().disks[0].restarts == n + 1).then_some(());
            common::poll(LIMIT, back).expect("no other has taken over");
        }
        assert_eq!(stats(vm.control_path()).unwrap().disks[0].state, DeviceState::Running);
        release(&pool, vm);
    }
    assert!(pool.drain_all(LIMIT));
}
