//! Clones of one snapshot: none sees anything of another, and the snapshot stays what it is.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
mod pool_support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cellblock::pool::{ClaimOrder, Machine, PoolConfig, RestorePool};
use common::proc;
use pool_support::{Console, LIMIT, Snapshot, base};

const CLONES: usize = 50;

/// Every file below `path`, but what says which memory is needed first: that is advice.
fn contents(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    let files = files.filter(|entry| entry.file_name() != "touch");
    let read = |path: &Path| std::fs::read(path).unwrap();
    files.map(|f| (f.file_name().into_string().unwrap(), read(&f.path()))).collect()
}

/// Inodes of what the processes of a VM map of guest memory, and whether any maps a file of the
/// snapshot.
fn guest_memory(pid: u32, snapshot: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for process in proc::family(pid as i32) {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.pid)).unwrap();
        for line in maps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert!(!line.contains(snapshot.to_str().unwrap()), "{line}");
            if line.contains("memfd:guest-ram") {
                found.insert(words[4].to_string());
            }
        }
    }
    found
}

#[test]
fn fifty_clones_have_nothing_in_common_and_change_nothing() {
    let snapshot = Snapshot::take(",cow");
    let disk = std::fs::read(snapshot.disk()).unwrap();
    let before = contents(&snapshot.path());
    let config = PoolConfig {
        min_size: 4,
        max_size: 8,
        max_live: CLONES,
        acquire_timeout: LIMIT,
        memory: Some(u64::MAX),
        ..PoolConfig::default()
    };
    let machine = Machine::Primed { snapshot: snapshot.path(), disks: Vec::new() };
    let pool = RestorePool::new(base(machine), config).unwrap();
    let mut clones = Vec::new();
    for n in 0..CLONES {
        let data = format!("clone {n}").into_bytes();
        let vm = pool.claim(&ClaimOrder { data, ..ClaimOrder::default() }).unwrap();
        clones.push((Console::of(&vm), vm));
    }
    let (mut ids, mut randoms, mut generations) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let (mut serials, mut memories) = (BTreeSet::new(), BTreeSet::new());
    for (n, (console, vm)) in clones.iter_mut().enumerate() {
        let who = console.who();
        assert_eq!((who.data, &who.id), (format!("clone {n}"), &vm.id().to_string()));
        ids.insert(who.id);
        randoms.insert(who.random);
        generations.insert(who.generation);
        // It has found memory and disk as the snapshot has them, whatever the others did.
        console.wait_for("clone: wrote");
        let own = guest_memory(vm.pid(), &snapshot.path());
        assert_eq!(own.len(), 1, "{own:?}");
        memories.extend(own);
    }
    for (console, _) in &mut clones {
        console.say(b"cs");
    }
    for (console, _) in &mut clones {
        console.wait_for("clone: own");
        serials.insert(console.wait_for("clone: serial="));
    }
    for set in [&ids, &randoms, &generations, &serials, &memories] {
        assert_eq!(set.len(), CLONES, "{set:?}");
    }
    assert_eq!(pool.stats().in_use, CLONES as u64);
    drop(clones);
    assert!(pool.drain_all(LIMIT));
    assert_eq!((pool.stats().violations, pool.stats().alive), (0, 0));
    assert!(contents(&snapshot.path()) == before, "the snapshot has changed");
    assert!(std::fs::read(snapshot.disk()).unwrap() == disk, "the disk has changed");
}
