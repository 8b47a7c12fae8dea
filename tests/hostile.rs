//! Device processes that are in somebody else's hands: the test takes a copy of what a
//! jailed process holds, and says what no device of ours says.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cellblock::control::protocol::{EventKind, State};
use cellblock_devices::protocol::{CELL_FD, FromCell, LogLevel, Marker};
use cellblock_wire::Channel;
use common::{LIMIT, Vm, is_root, poll, proc, send};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, sendmsg};

/// The jailed process's own end of its cell channel. Only root can take it.
#[allow(unsafe_code)] // two calls without a wrapper
fn channel_of(pid: i32) -> Channel {
    // SAFETY: numbers only; each result is a new fd that nobody else knows.
    unsafe {
        let process = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid, 0)).unwrap();
        let process = OwnedFd::from_raw_fd(process as i32);
        let call = libc::SYS_pidfd_getfd;
        let fd = Errno::result(libc::syscall(call, process.as_raw_fd(), CELL_FD, 0)).unwrap();
        Channel::from_fd(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Sends without end until dropped.
struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    fn of(channel: Channel, mut message: FromCell) -> Flood {
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let (flag, count) = (stop.clone(), sent.clone());
        let thread = std::thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                match channel.try_send(&message, &[]) {
                    Ok(true) => {
                        // One that has been told already would be nothing.
                        if let FromCell::Marker { number, .. } = &mut message {
                            *number = number.wrapping_add(1);
                        }
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(false) => std::thread::yield_now(),
                    Err(_) => break,
                }
            }
        });
        Flood { stop, sent, thread: Some(thread) }
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_flooding_process_keeps_nobody_from_the_vmm() {
    if !is_root("taking a jailed process's channel") {
        return;
    }
    for message in [
        FromCell::Log { level: LogLevel::Error, message: "x".repeat(300) },
        FromCell::Marker { number: 0, marker: Marker::Heartbeat },
        FromCell::Drained { epoch: 77, dropped: 0, unread: 0 },
    ] {
        let mut vm = Vm::with("mode=spin").disk(1).start();
        vm.wait_for("cellblock guest");
        let floods = [("serial", "com1"), ("blk", "disk0")]
            .map(|(role, id)| Flood::of(channel_of(vm.pid_of(role, id)), message.clone()));
        let sent = || floods.iter().map(Flood::sent).sum::<u64>();
        let start = Instant::now();
        for _ in 0..10 {
            assert_eq!(vm.stats().state, State::Running);
            vm.pause();
            vm.resume();
        }
        assert!(start.elapsed() < Duration::from_secs(15), "{message:?}: {:?}", start.elapsed());
        // However slow the machine is, so many are to be in its way.
        let flood = poll(LIMIT, || {
            assert_eq!(vm.stats().state, State::Running);
            (sent() > 1000).then_some(())
        });
        assert!(flood.is_some(), "{message:?}: only {}, which is no flood", sent());
        vm.signal(Signal::SIGTERM);
        let status = vm.wait_exit();
        floods.into_iter().for_each(Flood::end);
        assert_eq!(status.code(), Some(0), "{message:?}");
        let said = vm.stderr.text().len();
        assert!(said < 200_000, "{message:?}: {said} bytes of log");
    }
}

#[test]
fn a_disk_speaks_for_no_other_device() {
    if !is_root("taking a jailed process's channel") {
        return;
    }
    let mut vm = Vm::with("mode=spin").disk(1).start();
    vm.wait_for("cellblock guest");
    let events = vm.events();
    let disk = channel_of(vm.pid_of("blk", "disk0"));
    disk.send(&FromCell::Marker { number: 0, marker: Marker::Listener }, &[]).unwrap();
    disk.send(&FromCell::Quit, &[]).unwrap();
    // Nor does a console end a VM whose user has no terminal to type at.
    channel_of(vm.pid_of("serial", "com1")).send(&FromCell::Quit, &[]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vm.stats().state, State::Running);
    let seen =
        events.wait_for(Duration::from_millis(10), |kind| matches!(kind, EventKind::Marker { .. }));
    assert!(seen.is_err(), "{seen:?}");
    vm.say(b"q");
    vm.ends_well();
}

#[test]
fn a_process_that_breaks_the_protocol_is_ended_and_named() {
    if !is_root("taking a jailed process's channel") {
        return;
    }
    let garbage: [&[u8]; 3] = [&[0xff; 40], &[], &[0; 70_000]];
    for bytes in garbage {
        let mut vm = Vm::with("mode=spin").disk(1).start();
        vm.wait_for("cellblock guest");
        let events = vm.events();
        let pid = vm.pid_of("blk", "disk0");
        let channel = channel_of(pid);
        let parts = [IoSlice::new(bytes)];
        sendmsg::<()>(channel.as_raw_fd(), &parts, &[], MsgFlags::empty(), None).unwrap();
        vm.wait_for_event(
            &events,
            |kind| matches!(kind, EventKind::DeviceDied { id, .. } if id == "disk0"),
        );
        assert!(proc::Identity::of(pid).is_none_or(|process| !process.is_alive()));
        assert_eq!(vm.stats().state, State::Running);
        vm.say(b"q");
        vm.ends_well();
    }
}

#[test]
fn a_process_that_hangs_delays_once_and_not_the_end() {
    let mut vm = Vm::with("mode=spin").disk(1).start();
    vm.wait_for("cellblock guest");
    for (role, id) in [("serial", "com1"), ("blk", "disk0")] {
        send(vm.pid_of(role, id), Signal::SIGSTOP);
    }
    let start = Instant::now();
    for _ in 0..1000 {
        vm.stats();
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let start = Instant::now();
    vm.signal(Signal::SIGTERM);
    vm.wait_exit();
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}

#[test]
fn events_that_nobody_can_hear_are_not_kept() {
    if !is_root("taking a jailed process's channel") {
        return;
    }
    let mut vm = Vm::with("mode=spin").no_control().start();
    vm.wait_for("cellblock guest");
    let serial =
        poll(common::LIMIT, || vm.processes().into_iter().find(|process| process.name == "serial"));
    let resident = || {
        let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let before = resident();
    let channel = channel_of(serial.unwrap().pid);
    for number in 0..200_000 {
        let marker = Marker::Heartbeat;
        channel.send(&FromCell::Marker { number, marker }, &[]).unwrap();
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 8 << 10, "{grown} KiB");
    vm.say(b"q");
    vm.ends_well();
}
