//! Device processes that hang are replaced, and those that are only slow are not.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::time::Duration;

use cellblock::control::protocol::{EventKind, Request};
use common::deaths::replaced;
use common::output::Events;
use common::trace::Traced;
use common::{LIMIT, Options, Vm, is_root, poll, send};
use nix::libc;
use nix::sys::signal::Signal;

fn with(cmdline: &str, limit: &str) -> Options {
    Vm::with(cmdline).arg("--device-timeout").arg(limit)
}

#[track_caller]
fn hung(vm: &mut Vm, events: &Events, role: &str, id: &str, pid: i32) {
    let (role, id) = (role.to_string(), id.to_string());
    let expected = EventKind::DeviceHung { role, id, pid };
    vm.wait_for_event(events, |kind| *kind == expected);
}

/// Whether anybody was found to hang so far.
fn any_hung(events: &Events) -> bool {
    events.all().iter().any(|event| matches!(event.kind, EventKind::DeviceHung { .. }))
}

fn done(vm: &mut Vm) -> u64 {
    let disk = vm.stats().disks.remove(0);
    disk.reads + disk.writes
}

#[test]
fn a_disk_whose_process_is_stopped_goes_on() {
    let mut vm = with("mode=storm n=20000000 qd=32 queues=4 mib=4 reads=50 irq", "1s")
        .disk_with(4 << 20, ",queues=4")
        .start();
    vm.wait_for("storm: begins");
    let events = vm.events();
    for times in 1..=2 {
        let pid = vm.pid_of("blk", "disk0");
        send(pid, Signal::SIGSTOP);
        hung(&mut vm, &events, "blk", "disk0", pid);
        replaced(&mut vm, &events, "disk0", times);
        let before = done(&mut vm);
        let more = poll(LIMIT, || (done(&mut vm) > before + 1000).then_some(()));
        assert!(more.is_some(), "{:?}", vm.stats());
    }
    vm.wait_for_error("no sign of life in 1s");
    vm.ask(Request::Stop);
    vm.ends_well();
}

#[test]
fn a_console_whose_process_is_stopped_goes_on() {
    let mut vm = with("mode=echo irq", "1s").start();
    vm.wait_for_line("echo: ready");
    let events = vm.events();
    let pid = vm.pid_of("serial", "com1");
    send(pid, Signal::SIGSTOP);
    vm.say(b"typed while it hangs;");
    hung(&mut vm, &events, "serial", "com1", pid);
    replaced(&mut vm, &events, "com1", 1);
    vm.wait_for("typed while it hangs;");
    vm.say(b"quit");
    vm.wait_for("echo: ok");
    vm.ends_well();
}

/// Idle disks, with rings and without, and a VM that was stopped as a whole.
#[test]
fn nobody_hangs_who_has_nothing_to_do() {
    let mut vm = with("mode=echo irq open queues=4 qd=4", "2s")
        .disk_with(4 << 20, ",queues=4")
        .disk_with(4 << 20, ",queues=2")
        .start();
    vm.wait_for_line("echo: ready");
    let events = vm.events();
    std::thread::sleep(Duration::from_secs(5));
    assert!(!any_hung(&events), "{:?}", events.all());
    let all = [vm.pid(), vm.pid_of("blk", "disk0"), vm.pid_of("serial", "com1")];
    all.iter().for_each(|pid| send(*pid, Signal::SIGSTOP));
    std::thread::sleep(Duration::from_secs(4));
    all.iter().rev().for_each(|pid| send(*pid, Signal::SIGCONT));
    std::thread::sleep(Duration::from_secs(3));
    assert!(!any_hung(&events), "{:?}", events.all());
    vm.say(b"quit");
    vm.wait_for("echo: ok");
    vm.ends_well();
}

/// One that is stopped is left alone while the VM is, and for ever where the user says so.
#[test]
fn nobody_is_looked_at_while_the_vm_is_paused() {
    let mut vm = with("mode=echo irq", "500ms").disk(1).start();
    let mut other = with("mode=echo irq", "0").disk(1).start();
    vm.wait_for_line("echo: ready");
    other.wait_for_line("echo: ready");
    let (events, of_other) = (vm.events(), other.events());
    let (pid, another) = (vm.pid_of("blk", "disk0"), other.pid_of("blk", "disk0"));
    vm.pause();
    send(pid, Signal::SIGSTOP);
    send(another, Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(2));
    assert!(!any_hung(&events) && !any_hung(&of_other));
    vm.resume();
    hung(&mut vm, &events, "blk", "disk0", pid);
    replaced(&mut vm, &events, "disk0", 1);
    send(another, Signal::SIGCONT);
    for mut vm in [vm, other] {
        vm.say(b"quit");
        vm.wait_for("echo: ok");
        vm.ends_well();
    }
}

/// A thread that waits for the image is waited for; one that stands still anywhere else hangs,
/// though the process answers.
#[test]
fn a_slow_image_is_not_a_thread_that_hangs() {
    if !is_root("holding a thread of a jailed process") {
        return;
    }
    let mut vm = with("mode=storm n=20000000 qd=4 queues=2 mib=4 reads=100", "1s")
        .disk_with(4 << 20, ",queues=2,engine=sync,iops=1000")
        .start();
    vm.wait_for("storm: begins");
    let events = vm.events();
    let pid = vm.pid_of("blk", "disk0");
    let thread = Traced::hold(pid, "blk-q0");
    thread.run_until(|call| call.entered && call.number == libc::SYS_pread64);
    std::thread::sleep(Duration::from_secs(4));
    assert!(!any_hung(&events), "{:?}", events.all());
    let other = |call: &i64| [libc::SYS_epoll_wait, libc::SYS_timerfd_settime].contains(call);
    thread.run_until(|call| call.entered && other(&call.number));
    hung(&mut vm, &events, "blk", "disk0", pid);
    thread.bury();
    replaced(&mut vm, &events, "disk0", 1);
    let before = done(&mut vm);
    assert!(poll(LIMIT, || (done(&mut vm) > before + 100).then_some(())).is_some());
    vm.ask(Request::Stop);
    vm.ends_well();
}
