//! Block processes at the moment that they ask the kernel for something: one that dies within a
//! request, and what it asks for. For root, who can hold their threads.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use cellblock::control::protocol::Request;
use common::deaths::{kill_and_wait, replaced};
use common::trace::{Call, Traced};
use common::{LIMIT, Options, Vm, is_root, poll};
use nix::libc;

const READS: [i64; 2] = [libc::SYS_pread64, libc::SYS_preadv2];
const WRITES: [i64; 2] = [libc::SYS_pwrite64, libc::SYS_pwritev2];

/// A storm that goes on for as long as a test takes its time, until [`finish`].
fn slow_storm(words: &str, disk: &str) -> Options {
    Vm::with(&format!("mode=storm n=4000 qd=4 mib=1 {words}"))
        .disk_with(1 << 20, &format!(",iops=100,iops-burst=100{disk}"))
        .arg("--max-deaths")
        .arg("1000")
}

/// The storm ends, and every block is what the guest thinks it is.
fn finish(mut vm: Vm) {
    vm.cli("throttle", &["disk0", "iops=0"]);
    vm.wait_for("storm: ok");
    vm.ends_well();
}

/// Kills disk0's process where it is about to make one of these calls, and where it has just
/// made it and told nobody.
fn dies_within(words: &str, disk: &str, calls: &[i64]) {
    if !is_root("holding a thread of a jailed process") {
        return;
    }
    let mut vm = slow_storm(words, disk).start();
    vm.wait_for("storm: begins");
    let events = vm.events();
    for death in 1..=6 {
        // The guest asks for nothing while its thread is taken hold of.
        vm.pause();
        let thread = Traced::hold(vm.pid_of("blk", "disk0"), "blk-q0");
        vm.resume();
        let first = death % 2 == 0;
        thread.run_until(|call| calls.contains(&call.number) && call.entered == first);
        thread.kill();
        replaced(&mut vm, &events, "disk0", death);
    }
    finish(vm);
}

#[test]
fn a_death_within_a_flush_is_a_delay() {
    dies_within("flush=2", "", &[libc::SYS_fdatasync]);
}

#[test]
fn a_death_within_a_discard_is_a_delay() {
    dies_within("clear=2", "", &[libc::SYS_fallocate]);
}

#[test]
fn a_death_within_a_write_is_a_delay() {
    dies_within("", "", &WRITES);
}

#[test]
fn a_death_within_a_read_is_a_delay() {
    dies_within("reads=50", "", &READS);
}

/// Reads, writes, flushes and discards may be in it.
#[test]
fn a_death_within_a_submission_is_a_delay() {
    let words = "reads=30 flush=3 clear=4";
    dies_within(words, ",engine=io_uring", &[libc::SYS_io_uring_enter]);
}

/// A driver that turns the write cache off gets writes that are durable, from a process that
/// comes later too; the one that does not, does not pay for it.
#[test]
fn what_is_written_without_a_cache_is_written_durably() {
    if !is_root("holding a thread of a jailed process") {
        return;
    }
    for (words, durable) in [("", false), ("cache=off", true)] {
        let mut vm = slow_storm(words, "").start();
        vm.wait_for("storm: begins");
        let events = vm.events();
        for _ in 0..2 {
            let thread = Traced::hold(vm.pid_of("blk", "disk0"), "blk-q0");
            for _ in 0..10 {
                let is_write = |call: Call| call.entered && WRITES.contains(&call.number);
                let call = thread.run_until(is_write);
                let flags = match call.number {
                    libc::SYS_pwritev2 => call.args[5] as i32,
                    _ => 0,
                };
                assert_eq!(flags & libc::RWF_DSYNC != 0, durable, "{words} {call:?}");
            }
            thread.release();
            kill_and_wait(&mut vm, &events, "blk", "disk0");
        }
        finish(vm);
    }
}

/// A queue whose thread stands still holds up no other.
#[test]
fn each_queue_is_served_by_itself() {
    if !is_root("holding a thread of a jailed process") {
        return;
    }
    let mut vm = Vm::with("mode=storm n=20000000 qd=32 queues=4 mib=4 reads=50")
        .disk_with(4 << 20, ",queues=4")
        .start();
    vm.wait_for("storm: begins");
    let done = |vm: &mut Vm| -> Vec<u64> {
        let queues = vm.stats().disks.remove(0).queues;
        queues.iter().map(|queue| queue.reads_completed + queue.writes_completed).collect()
    };
    for still in 0..4 {
        let thread = Traced::hold(vm.pid_of("blk", "disk0"), &format!("blk-q{still}"));
        let before = done(&mut vm);
        let others_go_on = || {
            let now = done(&mut vm);
            assert_eq!(now[still], before[still], "queue {still} is served by another thread");
            (0..4).all(|n| n == still || now[n] > before[n] + 100).then_some(())
        };
        assert!(poll(LIMIT, others_go_on).is_some(), "{before:?}, then {:?}", done(&mut vm));
        thread.release();
        let goes_on = || (done(&mut vm)[still] > before[still] + 100).then_some(());
        assert!(poll(LIMIT, goes_on).is_some(), "{before:?}, then {:?}", done(&mut vm));
    }
    vm.ask(Request::Stop);
    vm.ends_well();
}
