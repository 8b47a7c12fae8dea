//! The record of the memory that a guest needs first: what VMs of a pool make of it.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
mod pool_support;

use std::time::Duration;

use cellblock::pool::{ClaimOrder, Machine, PoolConfig, PooledRestoreVm, RestorePool};
use pool_support::{Console, LIMIT, Snapshot, base};

/// Chunks of 256 KiB in the guest's memory.
const CHUNKS: u64 = 256;

/// With so many idle VMs, and none made in the place of one that goes.
fn pool(snapshot: &Snapshot, idle: usize) -> RestorePool {
    let config = PoolConfig {
        min_size: 0,
        max_size: idle,
        max_live: idle,
        acquire_timeout: LIMIT,
        ..PoolConfig::default()
    };
    let machine = Machine::Primed { snapshot: snapshot.path(), disks: Vec::new() };
    let pool = RestorePool::new(base(machine), config).unwrap();
    assert_eq!(pool.warm(idle), idle);
    pool
}

fn claim(pool: &RestorePool, data: &str) -> (PooledRestoreVm, Console) {
    let vm = pool.claim(&ClaimOrder { data: data.into(), ..ClaimOrder::default() }).unwrap();
    let mut console = Console::of(&vm);
    console.who();
    (vm, console)
}

/// Chunks that the record names; none while there is no record.
fn recorded(snapshot: &Snapshot) -> Option<u64> {
    let bytes = std::fs::read(snapshot.path().join("touch")).ok()?;
    Some(u64::from_le_bytes(*bytes.get(24..)?.first_chunk()?))
}

fn record_of(snapshot: &Snapshot) -> u64 {
    common::poll(LIMIT, || recorded(snapshot)).expect("there is no record")
}

#[test]
fn the_record_is_that_of_the_first_vm_that_runs_and_of_its_first_moment() {
    // What the guest has of its own is half of its memory.
    let snapshot = Snapshot::with("mode=clone mib=32", ",cow", 64);
    let pool = pool(&snapshot, 3);
    assert_eq!(recorded(&snapshot), None, "nobody has run");
    let (vm, mut console) = claim(&pool, "touch");
    let few = record_of(&snapshot);
    assert!((1..16).contains(&few), "{few} chunks");
    // It goes on to touch all it has.
    console.say(b"c");
    console.wait_for("clone: own");
    drop((vm, console));
    assert_eq!(recorded(&snapshot), Some(few), "what it did later was added");
    // One that has waited since before there was a record, and one that never runs.
    let (vm, mut console) = claim(&pool, "");
    console.wait_for("clone: wrote");
    std::thread::sleep(Duration::from_millis(200));
    drop((vm, console));
    assert!(pool.drain_all(LIMIT));
    assert_eq!(recorded(&snapshot), Some(few), "another VM has made it anew");
}

/// What a guest that touches everything at once makes all others bring is bounded.
#[test]
fn no_guest_has_much_recorded() {
    let snapshot = Snapshot::with("mode=clone mib=48", ",cow", 64);
    let hostile = pool(&snapshot, 1);
    let (vm, mut console) = claim(&hostile, "");
    console.wait_for("clone: wrote");
    let most = record_of(&snapshot);
    assert!((1..=CHUNKS / 8).contains(&most), "{most} chunks");
    drop((vm, console));
    assert!(hostile.drain_all(LIMIT));
    let next = pool(&snapshot, 1);
    let (vm, mut console) = claim(&next, "touch");
    console.say(b"c");
    console.wait_for("clone: own");
    drop((vm, console));
    assert!(next.drain_all(LIMIT));
    assert_eq!(recorded(&snapshot), Some(most));
}
