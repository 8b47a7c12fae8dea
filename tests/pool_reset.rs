//! VMs that are reset and used again: what one tenant did is nothing to the next.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
mod pool_support;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// Whoever had the VM knows where its sockets were, and may try at any time.
#[test]
fn nothing_of_a_life_leads_to_the_next() {
    let (snapshot, dir) = (Snapshot::take(",cow"), tempfile::tempdir().unwrap());
    let pool = pool(&snapshot, dir.path());
    let serial = |console: &mut Console| {
        console.say(b"s");
        console.wait_for("clone: serial=")
    };
    let first = claim(&pool, "secret of the first");
    let pid = first.pid();
    let mut console = Console::of(&first);
    assert_eq!(console.who().id, first.id().to_string());
    console.wait_for("clone: wrote");
    let (id, old_serial) = (first.id(), serial(&mut console));
    let places = [first.control_path().to_path_buf(), first.console_path().to_path_buf()];
    let stop = AtomicBool::new(false);
    let early = std::thread::scope(|scope| {
        let knocks = scope.spawn(|| {
            let mut early = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                early.extend(UnixStream::connect(&places[1]));
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            early
        });
        drop(console);
        release(&pool, first);
        stop.store(true, Ordering::Relaxed);
        knocks.join().unwrap()
    });
    assert!(places.iter().all(|path| UnixStream::connect(path).is_err()), "one leads to it still");
    // Somebody who looks at the shell is nobody to the VM.
    let mut looks = Client::connect(&pool_support::idle(dir.path())).unwrap();
    looks.ask(Request::Stats).unwrap();
    let second = claim(&pool, "secret of the second");
    assert_eq!(second.pid(), pid, "it was not reset");
    assert!(second.id() != id && second.console_path() != places[1]);
    let mut console = Console::of(&second);
    let who = console.who();
    assert_eq!((who.id, who.data.as_str()), (second.id().to_string(), "secret of the second"));
    console.wait_for("clone: wrote");
    let new_serial = serial(&mut console);
    assert_ne!(new_serial, old_serial);
    assert!(new_serial.ends_with(&second.id().to_string()[..20]), "{new_serial}");
    looks.ask(Request::Stats).expect_err("it is still served");
    for mut stream in early {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut heard = Vec::new();
        let end = stream.read_to_end(&mut heard);
        let heard = String::from_utf8_lossy(&heard);
        assert!(
            !heard.contains("second")
                && !matches!(&end, Err(e) if e.kind() ==
            std::io::ErrorKind::WouldBlock),
            "{end:?} {heard}"
        );
    }
    drop((console, second));
    assert!(pool.drain_all(LIMIT));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "sockets are left");
    assert_eq!((pool.stats().reset_failures, pool.stats().violations), (0, 0));
}
