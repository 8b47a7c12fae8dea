//! The console, over every kind of endpoint: nothing lost, nothing out of order, and nobody
//! at the other end can harm the guest.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cellblock::control::protocol::{EventKind, Reply, Request};
use common::output::Output;
use common::{LIMIT, Vm, poll};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// How long the end of a VM waits for a reader (`DRAIN_LIMIT` of the VMM).
const DRAIN: Duration = Duration::from_secs(5);

/// All that a guest in mode `print` says.
fn printed(lines: usize) -> String {
    let mut text = String::from("cellblock guest\n");
    for n in 0..lines {
        text += &format!("{n:08} {:.<54}\n", "");
    }
    text + "print: ok\n"
}

/// Compares long texts; a failure shows the first difference.
#[track_caller]
fn assert_text(found: &str, expected: &str) {
    if found == expected {
        return;
    }
    let pair = found.lines().zip(expected.lines()).enumerate().find(|(_, (a, b))| a != b);
    panic!(
        "{} bytes, {} expected; first difference (line, found, expected): {pair:?}; ends {:?}",
        found.len(),
        expected.len(),
        found.lines().last()
    );
}

/// A pipe of one page: it is full early.
fn small_pipe() -> (File, OwnedFd) {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    (File::from(read), write)
}

/// What the VM that has ended says was lost of its console's output; 0 where it says nothing.
#[track_caller]
fn lost_bytes(vm: &mut Vm) -> usize {
    let text = vm.stderr.finished(LIMIT);
    let Some((_, line)) = text.split_once("console reader did not keep up; output was dropped")
    else {
        return 0;
    };
    let bytes = line.lines().next().and_then(|line| line.split_once("bytes="));
    match bytes.and_then(|(_, bytes)| bytes.trim().parse().ok()) {
        Some(bytes) => bytes,
        None => vm.fail("no number of bytes lost"),
    }
}

#[test]
fn a_pipe_gets_every_byte_in_order() {
    const LINES: usize = 5000;
    let mut vm = Vm::with(&format!("mode=print lines={LINES}")).no_control().start();
    vm.wait_for_within("print: ok\n", 4 * LIMIT);
    assert_text(&vm.console.finished(LIMIT), &printed(LINES));
    vm.ends_well();
}

/// The guest has long ended when the first byte is read. More than the pipe holds, less
/// than the console's buffer.
#[test]
fn a_reader_that_comes_late_gets_every_byte() {
    const LINES: usize = 400;
    let (mut read, write) = small_pipe();
    let cmdline = format!("mode=print lines={LINES}");
    let mut vm = Vm::with(&cmdline).output(write).no_control().start();
    std::thread::sleep(Duration::from_millis(2500));
    if vm.try_exit().is_some() {
        vm.fail("the VM did not wait for the reader of its console");
    }
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_text(&text, &printed(LINES));
    vm.ends_well();
}

#[test]
fn a_reader_that_is_slow_gets_every_byte() {
    const LINES: usize = 300;
    let (mut read, write) = small_pipe();
    let cmdline = format!("mode=print lines={LINES}");
    let vm = Vm::with(&cmdline).output(write).no_control().start();
    let (mut text, mut part) = (Vec::new(), [0; 300]);
    while let count @ 1.. = read.read(&mut part).unwrap() {
        text.extend_from_slice(&part[..count]);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_text(std::str::from_utf8(&text).unwrap(), &printed(LINES));
    vm.ends_well();
}

/// The guest ends when it is done, the VM when the reader has had its time, and says what
/// is lost, to the byte.
#[test]
fn a_reader_that_never_reads_costs_time_and_output_only() {
    const LINES: usize = 1000;
    let (mut read, write) = small_pipe();
    let cmdline = format!("mode=print lines={LINES} marks=1");
    let mut vm = Vm::with(&cmdline).output(write).start();
    poll(LIMIT, || vm.path("control").exists().then_some(())).unwrap();
    let events = vm.events();
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::Marker { .. }));
    // The guest takes its time to print; then the drain begins.
    let all = printed(LINES).len() as u64;
    let nearly = poll(2 * LIMIT, || match vm.try_ask(Request::Stats) {
        Ok(Reply::Stats(stats)) => (stats.serials[0].output >= all - 200).then_some(()),
        _ => Some(()), // it is over already
    });
    assert!(nearly.is_some(), "the guest waits for the console's reader");
    let begin = Instant::now();
    let status = vm.wait_exit();
    assert_eq!(status.code(), Some(0), "{}", vm.stderr.text());
    let took = begin.elapsed();
    assert!(took < DRAIN + Duration::from_secs(4), "the end took {took:?}");
    let lost = lost_bytes(&mut vm);
    // What the pipe took is there still.
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert!(printed(LINES).starts_with(&text), "the beginning is not the beginning");
    assert_eq!(text.len() + lost, all as usize, "read and lost are not all");
}

#[test]
fn a_reader_that_leaves_does_not_hurt_the_guest() {
    let (mut read, write) = small_pipe();
    let mut vm = Vm::with("mode=echo").output(write).start();
    let mut ready = [0; 28];
    read.read_exact(&mut ready).unwrap();
    assert_eq!(&ready[..], b"cellblock guest\necho: ready\n");
    drop(read);
    let typed = vec![b'x'; 20_000];
    vm.say(&typed);
    let total = 28 + typed.len() as u64;
    let stats = poll(LIMIT, || {
        let serial = vm.stats().serials.remove(0);
        (serial.output == total).then_some(serial)
    });
    let Some(serial) = stats else { vm.fail("the guest does not go on without its reader") };
    assert_eq!(serial.input, typed.len() as u64);
    // Nobody has got any of it.
    let dropped = poll(LIMIT, || {
        let dropped = vm.stats().serials[0].dropped;
        (dropped == typed.len() as u64).then_some(())
    });
    if dropped.is_none() {
        vm.fail("what was dropped is not counted");
    }
    vm.say(b"quit");
    vm.wait_for_error("output was dropped");
    vm.ends_well();
}

#[test]
fn the_end_of_input_is_no_end_of_the_guest() {
    let mut vm = Vm::with("mode=echo").start();
    vm.wait_for("echo: ready");
    vm.say(b"abc");
    vm.wait_for("abc");
    vm.close_input();
    std::thread::sleep(Duration::from_millis(300));
    if vm.try_exit().is_some() {
        vm.fail("the VM ended with its input");
    }
    // It is all there, and does not spin on an input that is always ready.
    let cpu = |pid: i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
        text.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(vm.stats().serials[0].input, 3);
    vm.pause(); // the guest polls its console, which keeps the process busy
    let serial = vm.pid_of("serial", "com1");
    let before = cpu(serial);
    std::thread::sleep(Duration::from_millis(500));
    let used = Duration::from_nanos(cpu(serial) - before);
    assert!(used < Duration::from_millis(50), "the serial process used {used:?} of 500 ms");
    vm.resume();
    vm.cli("stop", &[]);
    vm.ends_well();
}

/// More than the FIFO, the ring and a pipe hold at once, typed as fast as it goes.
#[test]
fn input_is_given_back_in_order() {
    for how in ["", "irq"] {
        let mut vm = Vm::with(&format!("mode=echo {how}")).start();
        vm.wait_for_line("echo: ready");
        let typed: String = (0..600).map(|n| format!("{n:07}.")).collect();
        vm.say(typed.as_bytes());
        vm.say(b"quit");
        vm.wait_for("echo: ok\n");
        let text = vm.console.text();
        let expected = format!(
            "cellblock guest\necho: ready\n{typed}quit\necho: bytes={}\necho: ok\n",
            typed.len() + 4
        );
        assert_text(&text, &expected);
        vm.ends_well();
    }
}

#[test]
fn a_file_gets_every_byte() {
    const LINES: usize = 1500;
    let cmdline = format!("mode=print lines={LINES}");
    let mut vm = Vm::with(&cmdline).arg("--serial").arg("file=log").start();
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert_text(&fs::read_to_string(vm.path("log")).unwrap(), &printed(LINES));
    assert_eq!(vm.console.text(), "", "standard output is not the console");
    vm.ends_well();
}

#[test]
fn null_takes_everything_and_gives_nothing() {
    let mut vm = Vm::with("mode=print lines=300").arg("--serial").arg("null").start();
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert_eq!((vm.console.text(), vm.stderr.text()), (String::new(), String::new()));
    vm.ends_well();

    let mut vm = Vm::with("mode=echo").arg("--serial").arg("null").start();
    poll(LIMIT, || vm.path("control").exists().then_some(())).unwrap();
    let said = poll(LIMIT, || (vm.stats().serials[0].output == 28).then_some(()));
    assert!(said.is_some(), "the guest's words are counted: {:?}", vm.stats());
    vm.say(b"quit");
    std::thread::sleep(Duration::from_millis(200));
    let serial = vm.stats().serials.remove(0);
    assert_eq!((serial.output, serial.input, serial.dropped), (28, 0, 0));
    vm.cli("stop", &[]);
    vm.ends_well();
}

fn open(path: &Path) -> std::io::Result<File> {
    let flags = OFlag::O_NOCTTY.bits();
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}

/// Opens the pseudo-terminal that the VM says its console is.
#[track_caller]
fn open_pty(vm: &mut Vm) -> (PathBuf, File) {
    let note = vm.wait_for_error("serial console on /dev/pts/");
    vm.stderr.wait_for("\n", LIMIT);
    let whole = vm.stderr.text();
    let line = whole.lines().find(|line| line.contains("serial console on")).unwrap_or(&note);
    let path = PathBuf::from(line.rsplit(' ').next().unwrap());
    match open(&path) {
        Ok(file) => (path, file),
        Err(error) => vm.fail(&format!("opening {}: {error}", path.display())),
    }
}

#[test]
fn a_pty_is_read_and_written() {
    let mut vm = Vm::with("mode=echo irq").arg("--serial").arg("pty").start();
    let (path, mut user) = open_pty(&mut vm);
    let mut console = Output::collect(user.try_clone().unwrap());
    // What was said before anybody looked is there.
    let seen = console.wait_for("cellblock guest\necho: ready\n", LIMIT);
    assert!(seen.is_some(), "on the pty: {:?}", console.text());
    user.write_all(b"\x03 \x04 hello\r\n").unwrap();
    let seen = console.wait_for("\x03 \x04 hello\r\n", LIMIT);
    assert!(seen.is_some(), "on the pty: {:?}", console.text());
    // Twice would be a terminal's own echo.
    assert_eq!(console.text().matches("hello").count(), 1);
    user.write_all(b"quit").unwrap();
    assert!(console.wait_for("echo: ok\n", LIMIT).is_some(), "{:?}", console.text());
    drop(user);
    vm.ends_well();
    assert!(console.is_finished(LIMIT), "the pty {} outlives its VM", path.display());
}

#[test]
fn a_pty_that_is_closed_and_opened_again() {
    let mut vm = Vm::with("mode=echo").arg("--serial").arg("pty").start();
    let (path, _) = open_pty(&mut vm);
    for round in 0..3 {
        let mut user = open(&path).unwrap();
        let word = format!("round {round};");
        user.write_all(word.as_bytes()).unwrap();
        let mut seen = Vec::new();
        let end = Instant::now() + LIMIT;
        while !String::from_utf8_lossy(&seen).contains(&word) {
            let mut fds = [nix::poll::PollFd::new(user.as_fd(), nix::poll::PollFlags::POLLIN)];
            let ready = nix::poll::poll(&mut fds, 1000u16).unwrap();
            let mut part = [0; 256];
            if ready > 0 {
                let count = user.read(&mut part).unwrap();
                seen.extend_from_slice(&part[..count]);
            }
            if Instant::now() > end {
                vm.fail(&format!("on the pty: {:?}", String::from_utf8_lossy(&seen)));
            }
        }
    }
    vm.cli("stop", &[]);
    vm.ends_well();
}

#[track_caller]
fn connect(vm: &mut Vm) -> UnixStream {
    let path = vm.path("console");
    match poll(LIMIT, || UnixStream::connect(&path).ok()) {
        Some(stream) => {
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream
        }
        None => vm.fail("connecting to the console's socket"),
    }
}

/// Reads until what came ends with `end`.
#[track_caller]
fn read_until(stream: &mut UnixStream, end: &str) -> String {
    let mut seen = Vec::new();
    while !seen.ends_with(end.as_bytes()) {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1..) => seen.push(byte[0]),
            other => panic!("{other:?} before {end:?}: {:?}", String::from_utf8_lossy(&seen)),
        }
    }
    String::from_utf8(seen).unwrap()
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let mut vm = Vm::with("mode=echo irq").arg("--serial").arg("socket=console").start();
    vm.wait_for_error("serial console on socket console");
    let mut first = connect(&mut vm);
    assert_eq!(read_until(&mut first, "ready\n"), "cellblock guest\necho: ready\n");
    first.write_all(b"one;").unwrap();
    assert_eq!(read_until(&mut first, ";"), "one;");

    // A second client is turned away, and the first does not notice.
    let mut second = connect(&mut vm);
    assert_eq!(second.read(&mut [0; 16]).unwrap(), 0, "a second client is served");
    first.write_all(b"still one;").unwrap();
    assert_eq!(read_until(&mut first, ";"), "still one;");

    // What is said while nobody listens waits for the next one.
    drop(first);
    let mut next = loop {
        // The device may not have seen the first one leave yet, and turn us away.
        let mut next = connect(&mut vm);
        let mut seen = [0; 4];
        let sent = next.write_all(b"two;").is_ok();
        if sent && next.read_exact(&mut seen).is_ok() {
            assert_eq!(&seen, b"two;");
            break next;
        }
    };
    next.write_all(b"quit").unwrap();
    assert_eq!(read_until(&mut next, "ok\n"), "quit\necho: bytes=22\necho: ok\n");
    assert_eq!(next.read(&mut [0; 16]).unwrap(), 0);
    let path = vm.path("console");
    vm.ends_well();
    assert!(!path.exists(), "the console's socket is left behind");
}

#[test]
fn what_is_said_to_nobody_waits_for_a_client() {
    let cmdline = "mode=print lines=200 exit=none";
    let mut vm = Vm::with(cmdline).arg("--serial").arg("socket=console").start();
    let all = printed(200);
    poll(LIMIT, || vm.path("control").exists().then_some(())).unwrap();
    let said = poll(LIMIT, || (vm.stats().serials[0].output == all.len() as u64).then_some(()));
    assert!(said.is_some(), "a guest without a console client hangs: {:?}", vm.stats());
    let mut client = connect(&mut vm);
    assert_text(&read_until(&mut client, "print: ok\n"), &all);
    assert_eq!(vm.stats().serials[0].dropped, 0);
    vm.cli("stop", &[]);
    vm.ends_well();
}

/// A client that connects and never reads holds nobody up.
#[test]
fn a_client_that_never_reads_is_no_danger() {
    let cmdline = "mode=echo";
    let mut vm = Vm::with(cmdline).arg("--serial").arg("socket=console").start();
    let mut client = connect(&mut vm);
    client.set_write_timeout(Some(LIMIT)).unwrap();
    // About what the socket holds on the way back, which depends on how few bytes come at
    // a time: whether something is lost or nothing, it has to add up.
    let typed = vec![b'x'; 16 << 10];
    client.write_all(&typed).unwrap();
    client.write_all(b"quit").unwrap();
    assert_eq!(vm.wait_exit().code(), Some(0));
    let lost = lost_bytes(&mut vm);
    let mut seen = String::new();
    client.read_to_string(&mut seen).unwrap();
    let typed = String::from_utf8(typed).unwrap();
    let all = format!("cellblock guest\necho: ready\n{typed}quit\necho: bytes=16388\necho: ok\n");
    assert!(all.starts_with(&seen), "the beginning is not the beginning");
    assert_eq!(seen.len() + lost, all.len(), "read and lost are not all");
    vm.ends_well();
}

/// `(marker, source)` of the marker events so far.
fn markers(events: &common::output::Events) -> Vec<(String, String)> {
    let all = events.all().into_iter();
    all.filter_map(|event| match event.kind {
        EventKind::Marker { marker, source } => Some((marker, source)),
        _ => None,
    })
    .collect()
}

#[test]
fn markers_become_events() {
    let mut vm = Vm::with("mode=echo marks=1,3,9,2,4,5").start();
    vm.wait_for("echo: ready");
    let events = vm.events();
    vm.say(b"cellblock:heartbeat\nno cellblock:parked\ncellblock:pre-exec\r\ncellblock:listener\n");
    // The last one in the guest's last moment.
    vm.say(b"cellblock:unknown\ncellblock:parked\nquit");
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::Shutdown { .. }));
    let expected = [
        ("heartbeat", "port"),
        ("listener", "port"),
        ("pre-exec", "port"),
        ("listener-gone", "port"),
        ("parked", "port"),
        ("heartbeat", "console"),
        ("pre-exec", "console"),
        ("listener", "console"),
        ("parked", "console"),
    ];
    let found = markers(&events);
    let found: Vec<_> = found.iter().map(|(m, s)| (m.as_str(), s.as_str())).collect();
    assert_eq!(found, expected);
    vm.ends_well();
}

/// A guest that reports and ends at once has reported.
#[test]
fn markers_of_the_last_moment_are_not_lost() {
    for last in ["last=cellblock:parked", "last-mark=5"] {
        for _ in 0..5 {
            let mut vm = Vm::with(&format!("mode=echo {last}")).start();
            vm.wait_for("echo: ready");
            let events = vm.events();
            vm.say(b"quit");
            vm.wait_for_event(&events, |kind| matches!(kind, EventKind::Shutdown { .. }));
            let source = if last.starts_with("last=") { "console" } else { "port" };
            assert_eq!(markers(&events), [("parked".to_string(), source.to_string())]);
            vm.ends_well();
        }
    }
}

/// Several vCPUs use the port at once: reads see the writes before them, and no letter of
/// the other vCPUs is lost.
#[test]
fn register_accesses_keep_their_order() {
    const N: usize = 1500;
    let mut vm = Vm::with(&format!("mode=uart cpus=4 n={N}")).cpus(4).start();
    vm.wait_for_within("uart: ok", 2 * LIMIT);
    let text = vm.console.text();
    let letters = text.split("cellblock guest\n").nth(1).unwrap().split("\nuart:").next().unwrap();
    for letter in ['b', 'c', 'd'] {
        let count = letters.matches(letter).count();
        assert_eq!(count, N, "{letter} of {} bytes", letters.len());
    }
    assert_eq!(letters.len(), 3 * N, "only the letters: {letters:.200}");
    vm.ends_well();
}
