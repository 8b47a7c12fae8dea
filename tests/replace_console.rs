//! A serial process that dies while its guest uses it: what the guest wrote and what the user
//! typed is neither lost nor doubled, over every kind of endpoint.
//!
//! `CELLBLOCK_STORM=... cargo test --release --test replace_console` kills more often.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use cellblock::control::client::ClientError;
use cellblock::control::protocol::{DeviceState, EventKind, Reply, Request};
use common::deaths::{Dice, kill_and_wait, replaced};
use common::output::Output;
use common::{LIMIT, Options, Vm, poll, proc, send};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::signal::Signal;

/// What a guest in mode `print` says.
fn printed(lines: u64) -> String {
    let numbered = (0..lines).map(|n| format!("{n:08} {:.<54}\n", ""));
    format!("cellblock guest\n{}print: ok\n", numbered.collect::<String>())
}

/// Compares long texts; a failure shows the first difference.
#[track_caller]
fn same(found: &str, expected: &str) {
    let pair = found.lines().zip(expected.lines()).enumerate().find(|(_, (a, b))| a != b);
    let sizes = (found.len(), expected.len());
    assert!(found == expected, "bytes {sizes:?}; first other line, found and expected: {pair:?}");
}

fn kills(few: u64) -> u64 {
    if std::env::var_os("CELLBLOCK_STORM").is_some() { 10 * few } else { few }
}

fn storm(kills: u64) -> (Options, u64) {
    let lines = kills * 20;
    let options = Vm::with(&format!("mode=print lines={lines} exit=none"));
    (options.arg("--max-deaths").arg("10000"), lines)
}

/// Kills COM1's process at random moments, spread over what `seen` is to grow to.
fn weather(vm: &mut Vm, kills: u64, all: usize, seen: &dyn Fn(&Vm) -> usize) {
    let mut dice = Dice::new();
    assert!(poll(LIMIT, || vm.path("control").exists().then_some(())).is_some());
    let events = vm.events();
    let mut delays = Vec::new();
    for kill in 0..kills {
        let share = all as u64 * kill / kills + dice.below(all as u64 / kills / 2);
        let there = poll(LIMIT, || (seen(vm) as u64 >= share).then_some(()));
        assert!(there.is_some(), "{} of {all} bytes: {}", seen(vm), vm.stderr.text());
        thread::sleep(Duration::from_micros(dice.below(3000)));
        delays.push(kill_and_wait(vm, &events, "serial", "com1"));
    }
    delays.sort_unstable();
    println!("{kills} kills; delays in us: {delays:?}");
    let serial = vm.stats().serials.remove(0);
    assert_eq!((serial.restarts, serial.dropped), (kills, 0));
}

#[test]
fn standard_output_is_neither_lost_nor_doubled() {
    let kills = kills(50);
    let (options, lines) = storm(kills);
    let mut vm = options.start();
    let all = printed(lines);
    weather(&mut vm, kills, all.len(), &|vm| vm.console.len());
    vm.wait_for("print: ok\n");
    same(&vm.console.text(), &all);
    assert_eq!(vm.stats().serials[0].output, all.len() as u64);
    vm.ask(Request::Stop);
    vm.ends_well();
}

#[test]
fn a_file_is_neither_lost_nor_doubled() {
    let kills = kills(15);
    let (options, lines) = storm(kills);
    let mut vm = options.arg("--serial").arg("file=console").start();
    let all = printed(lines);
    let len = |vm: &Vm| fs::metadata(vm.path("console")).map_or(0, |meta| meta.len() as usize);
    weather(&mut vm, kills, all.len(), &len);
    assert!(poll(LIMIT, || (len(&vm) >= all.len()).then_some(())).is_some());
    vm.ask(Request::Stop);
    assert_eq!(vm.wait_exit().code(), Some(0));
    same(&fs::read_to_string(vm.path("console")).unwrap(), &all);
    vm.ends_well();
}

/// As the shell's `>` does it: the position in the file is the shell's, too.
#[test]
fn a_redirected_standard_output_is_neither_lost_nor_doubled() {
    let kills = kills(10);
    let (options, lines) = storm(kills);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"before\n").unwrap();
    let mut vm = options.output(OwnedFd::from(file)).start();
    let all = format!("before\n{}", printed(lines));
    let len = |_: &Vm| fs::metadata(&path).map_or(0, |meta| meta.len() as usize);
    weather(&mut vm, kills, all.len(), &len);
    assert!(poll(LIMIT, || (len(&vm) >= all.len()).then_some(())).is_some());
    vm.ask(Request::Stop);
    vm.ends_well();
    same(&fs::read_to_string(&path).unwrap(), &all);
}

/// The client that there is stays connected, both ways.
#[test]
fn a_client_of_the_socket_stays_and_loses_nothing() {
    let kills = kills(10);
    let (options, lines) = storm(kills);
    let mut vm = options.arg("--serial").arg("socket=console").start();
    let path = vm.path("console");
    let client = poll(LIMIT, || UnixStream::connect(&path).ok()).unwrap();
    let mut seen = Output::collect(client.try_clone().unwrap());
    let all = printed(lines);
    weather(&mut vm, kills, all.len(), &|_| seen.len());
    seen.wait_for("print: ok\n", LIMIT).unwrap();
    same(&seen.text(), &all);
    drop(client);
    vm.ask(Request::Stop);
    vm.ends_well();
    assert!(seen.is_finished(LIMIT), "the VMM holds the client's connection");
}

#[test]
fn a_pty_is_neither_lost_nor_doubled() {
    let kills = kills(10);
    let (options, lines) = storm(kills);
    let mut vm = options.arg("--serial").arg("pty").start();
    let note = vm.wait_for_error("serial console on /dev/pts/");
    vm.stderr.wait_for("\n", LIMIT);
    let text = vm.stderr.text();
    let line = text.lines().find(|line| line.contains("serial console on")).unwrap_or(&note);
    let slave = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NOCTTY.bits())
        .open(line.rsplit(' ').next().unwrap())
        .unwrap();
    let mut seen = Output::collect(slave.try_clone().unwrap());
    let all = printed(lines);
    weather(&mut vm, kills, all.len(), &|_| seen.len());
    seen.wait_for("print: ok\n", LIMIT).unwrap();
    same(&seen.text(), &all);
    drop(slave);
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// Types numbers a few at a time, while the process is killed; what is echoed is what was
/// typed.
fn input_storm(vm: &mut Vm, mut typist: impl Write + Send + 'static, seen: &mut Output) {
    let kills = kills(10);
    let typed: String = (0..kills * 20).map(|n| format!("{n:07}.")).collect();
    let text = typed.clone();
    let writer = thread::spawn(move || {
        for part in text.as_bytes().chunks(37) {
            typist.write_all(part).unwrap();
            thread::sleep(Duration::from_micros(500));
        }
        typist.write_all(b"quit").unwrap();
        typist
    });
    seen.wait_for("echo: ready\n", LIMIT).unwrap();
    weather(vm, kills, typed.len(), &|_| seen.len());
    seen.wait_for("echo: ok\n", LIMIT).unwrap();
    let bytes = typed.len() + 4;
    let all = format!("cellblock guest\necho: ready\n{typed}quit\necho: bytes={bytes}\necho: ok\n");
    same(&seen.text(), &all);
    drop(writer.join().unwrap());
}

#[test]
fn what_is_typed_is_neither_lost_nor_doubled() {
    let options = Vm::with("mode=echo irq exit=none").arg("--max-deaths").arg("10000");
    let mut vm = options.start();
    let input = vm.take_input();
    let mut seen = vm.console.clone();
    input_storm(&mut vm, input, &mut seen);
    vm.ask(Request::Stop);
    vm.ends_well();
}

#[test]
fn what_a_client_of_the_socket_types_is_neither_lost_nor_doubled() {
    let options = Vm::with("mode=echo irq exit=none").arg("--max-deaths").arg("10000");
    let mut vm = options.arg("--serial").arg("socket=console").start();
    let path = vm.path("console");
    let client = poll(LIMIT, || UnixStream::connect(&path).ok()).unwrap();
    let mut seen = Output::collect(client.try_clone().unwrap());
    input_storm(&mut vm, client, &mut seen);
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// Input that was typed and not taken is there for the successor, which interrupts again.
#[test]
fn input_that_waits_and_its_interrupt_survive() {
    let mut vm = Vm::with("mode=echo irq").arg("--max-deaths").arg("1000").start();
    vm.wait_for("echo: ready");
    let events = vm.events();
    for round in 0..5 {
        // Parked, the guest takes none of it.
        vm.pause();
        vm.say(format!("round {round} of many\n").as_bytes());
        thread::sleep(Duration::from_millis(50));
        kill_and_wait(&mut vm, &events, "serial", "com1");
        vm.resume();
        vm.wait_for(&format!("round {round} of many"));
    }
    vm.say(b"quit\n");
    vm.wait_for("echo: ok");
    vm.ends_well();
}

/// Whoever waits for the guest's heartbeats waits for each of them.
#[test]
fn marker_lines_are_told_once_each() {
    let (kills, line) = (kills(15), "cellblock:heartbeat");
    let lines = kills as usize * 60;
    let mut vm = Vm::with(&format!("mode=print lines={lines} line={line} exit=none"))
        .arg("--max-deaths")
        .arg("10000")
        .start();
    assert!(poll(LIMIT, || vm.path("control").exists().then_some(())).is_some());
    let events = vm.events();
    weather(&mut vm, kills, lines * (line.len() + 1), &|vm| vm.console.len());
    vm.wait_for("print: ok\n");
    vm.ask(Request::Stop);
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::Shutdown { .. }));
    let told = events.all();
    let told = told.iter().filter(|event| matches!(event.kind, EventKind::Marker { .. })).count();
    assert_eq!(told, lines);
    vm.ends_well();
}

/// The reader comes when the VM has ended but for its console, whose process died meanwhile.
#[test]
fn the_last_words_of_a_vm_are_delivered_by_a_successor() {
    let all = printed(200);
    let (mut read, write) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC).map(|(r, w)| (File::from(r), w)).unwrap();
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let mut vm = Vm::with("mode=print lines=200 exit=none").output(write).start();
    poll(LIMIT, || vm.path("control").exists().then_some(())).unwrap();
    let said = poll(LIMIT, || (vm.stats().serials[0].output == all.len() as u64).then_some(()));
    assert!(said.is_some(), "{:?}", vm.stats());
    let pid = vm.pid_of("serial", "com1");
    let control = vm.path("control");
    let stop = thread::spawn(move || {
        Command::new(env!("CARGO_BIN_EXE_cellblock")).arg("stop").arg(control).output().unwrap()
    });
    thread::sleep(Duration::from_millis(500));
    send(pid, Signal::SIGKILL);
    thread::sleep(Duration::from_millis(200));
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    same(&text, &all);
    assert!(stop.join().unwrap().status.success());
    vm.ends_well();
}

#[test]
fn a_console_whose_process_dies_too_often_is_an_empty_bus() {
    let mut vm = Vm::with("mode=pause count=0").disk(1).start();
    vm.wait_for("pause: n=");
    let events = vm.events();
    for _ in 0..4 {
        kill_and_wait(&mut vm, &events, "serial", "com1");
    }
    send(vm.pid_of("serial", "com1"), Signal::SIGKILL);
    let failed = vm.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceFailed { .. }));
    let EventKind::DeviceFailed { role, id, deaths } = failed.kind else { unreachable!() };
    assert_eq!((role.as_str(), id.as_str(), deaths), ("serial", "com1", 5));
    assert_eq!(vm.stats().serials[0].state, DeviceState::Failed);
    let writes = vm.stats().disks[0].writes;
    let more = poll(LIMIT, || (vm.stats().disks[0].writes > writes + 10).then_some(()));
    assert!(more.is_some(), "the guest waits for its console");
    // No snapshot can have its state; the VM goes on.
    let message = refused(&mut vm);
    assert!(message.contains("serial com1"), "{message}");
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// Asks for a snapshot that is not to be; why it is not.
#[track_caller]
fn refused(vm: &mut Vm) -> String {
    let timeout_us = Some(10_000_000);
    let request = Request::Snapshot { hold: false, live: false, timeout_us, trigger: None };
    match vm.try_ask(request) {
        Err(ClientError::Refused { message, .. }) => message,
        other => vm.fail(&format!("a snapshot: {other:?}")),
    }
}

#[track_caller]
fn snapshot(vm: &mut Vm, to: &Path) {
    let control = vm.path("control");
    let words = ["snapshot", control.to_str().unwrap(), to.to_str().unwrap()];
    let ended = Command::new(env!("CARGO_BIN_EXE_cellblock")).args(words).output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
}

/// It hangs, and is killed while the cut waits for it.
#[test]
fn a_death_within_a_snapshot_fails_it_and_the_guest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::with("mode=echo irq").start();
    vm.wait_for_line("echo: ready");
    let events = vm.events();
    let pid = vm.pid_of("serial", "com1");
    // Halted: it may be asking still whether its last byte has gone, and a vCPU that waits for the
    // process does not come to rest.
    let vcpu = poll(LIMIT, || proc::thread(vm.pid(), "vcpu0")).unwrap();
    let halted = || proc::sleeps_in(vm.pid(), vcpu) == Some(libc::SYS_ioctl);
    poll(LIMIT, || halted().then_some(())).unwrap();
    send(pid, Signal::SIGSTOP);
    let killer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(400));
        send(pid, Signal::SIGKILL);
    });
    let begun = Instant::now();
    let message = refused(&mut vm);
    assert!(begun.elapsed() < Duration::from_secs(5), "the death was not noticed");
    killer.join().unwrap();
    assert!(message.contains("serial com1: its process died"), "{message}");
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceReplaced { .. }));
    vm.say(b"still here;");
    vm.wait_for("still here;");

    // The next one is taken from the successor, and what is restored is replaceable too.
    vm.say(b"one;");
    vm.wait_for("one;");
    let to = dir.path().join("snapshot");
    snapshot(&mut vm, &to);
    vm.say(b"quit");
    vm.wait_for(&format!("echo: bytes={}\n", "still here;one;quit".len()));
    vm.ends_well();

    let mut vm = Vm::restore(&to).start();
    vm.say(b"two;");
    vm.wait_for("two;");
    let events = vm.events();
    kill_and_wait(&mut vm, &events, "serial", "com1");
    vm.say(b"three;");
    vm.wait_for("three;");
    let output = vm.stats().serials[0].output;
    assert_eq!(output, "cellblock guest\necho: ready\nstill here;one;two;three;".len() as u64);
    vm.say(b"quit");
    vm.wait_for(&format!("echo: bytes={}\n", "still here;one;two;three;quit".len()));
    vm.ends_well();
}

/// It is killed while a vCPU waits for it: no cut can be made until another is there, and that is
/// not waited for.
#[test]
fn a_death_with_a_vcpu_waiting_fails_the_snapshot_at_once() {
    let mut vm = Vm::with("mode=pause every=1").disk(4).start();
    vm.wait_for("pause: n=20 ");
    let events = vm.events();
    let pid = vm.pid_of("serial", "com1");
    send(pid, Signal::SIGSTOP);
    let vcpu = poll(LIMIT, || proc::thread(vm.pid(), "vcpu0")).unwrap();
    let waits = || proc::sleeps_in(vm.pid(), vcpu) == Some(libc::SYS_futex_waitv);
    poll(LIMIT, || waits().then_some(())).unwrap();
    let killer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(400));
        send(pid, Signal::SIGKILL);
    });
    let begun = Instant::now();
    let message = refused(&mut vm);
    let took = begun.elapsed();
    killer.join().unwrap();
    assert!(took < Duration::from_secs(3), "the death was not noticed: {took:?}");
    assert!(message.contains("serial com1: vcpu 0 waits for the device at port"), "{message}");
    assert!(message.contains("whose process is dead"), "{message}");
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceReplaced { .. }));
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// A cut that is held while the process is replaced: the machine goes on with its console.
#[test]
fn a_death_while_a_cut_is_held_is_a_replacement() {
    let mut vm = Vm::with("mode=echo irq").start();
    vm.wait_for_line("echo: ready");
    let events = vm.events();
    let request = Request::Snapshot { hold: true, live: false, timeout_us: None, trigger: None };
    assert!(matches!(vm.try_ask(request), Ok(Reply::Snapshot(_))));
    kill_and_wait(&mut vm, &events, "serial", "com1");
    vm.say(b"typed while it was held;");
    vm.ask(Request::Resume);
    vm.wait_for("typed while it was held;");
    vm.say(b"quit");
    vm.wait_for("echo: ok");
    vm.ends_well();
}

/// A disk's process that dies meanwhile has its successor when the cut is over, not under
/// whoever copies memory and disks; the machine does not wait for it.
#[test]
fn a_disk_waits_for_the_end_of_a_cut_with_its_replacement() {
    let mut vm = Vm::with("mode=echo irq").disk(8).start();
    vm.wait_for_line("echo: ready");
    let events = vm.events();
    let request = Request::Snapshot { hold: true, live: false, timeout_us: None, trigger: None };
    assert!(matches!(vm.try_ask(request), Ok(Reply::Snapshot(_))));
    send(vm.pid_of("blk", "disk0"), Signal::SIGKILL);
    let mut gone = || vm.ps().iter().all(|process| process.role != "blk");
    assert!(poll(LIMIT, || gone().then_some(())).is_some());
    // A successor takes some 10 ms where nothing is in its way.
    thread::sleep(Duration::from_millis(300));
    assert!(gone(), "a successor under a cut");
    let begun = Instant::now();
    vm.ask(Request::Resume);
    assert!(begun.elapsed() < Duration::from_secs(3), "it was waited for");
    replaced(&mut vm, &events, "disk0", 1);
    vm.say(b"quit");
    vm.wait_for("echo: ok");
    vm.ends_well();
}

/// The successor's jail is that of the first process.
#[test]
fn the_successor_has_the_same_files() {
    let mut vm = Vm::with("mode=echo").arg("--serial").arg("socket=console").start();
    let path = vm.path("console");
    let client = poll(LIMIT, || UnixStream::connect(&path).ok()).unwrap();
    let mut seen = Output::collect(client.try_clone().unwrap());
    seen.wait_for("echo: ready\n", LIMIT).unwrap();
    let events = vm.events();
    let kinds = |pid| {
        let mut kinds: Vec<String> = proc::files(pid)
            .into_values()
            .map(|file| file.split(':').next().unwrap().to_string())
            .collect();
        kinds.sort();
        kinds
    };
    let first = kinds(vm.pid_of("serial", "com1"));
    for _ in 0..2 {
        kill_and_wait(&mut vm, &events, "serial", "com1");
        assert_eq!(kinds(vm.pid_of("serial", "com1")), first);
    }
    vm.ask(Request::Stop);
    vm.ends_well();
}
