//! Real VMs whose memory comes when it is touched, is copied while they run, or is written
//! down as a difference.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod attach_support;
mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output as Ended};
use std::time::{Duration, Instant};

use cellblock::control::client::{Client, ClientError};
use cellblock::control::protocol::{EventKind, Request, Shutdown};
use cellblock::snapshot::format::{CHUNK, Chain, Snapshot};
use cellblock::snapshot::pager::LAST_RESORT;
use common::trace::Traced;
use common::{LIMIT, Vm};
use nix::sys::signal::Signal;

fn cellblock(args: &[&str]) -> Ended {
    Command::new(env!("CARGO_BIN_EXE_cellblock")).args(args).output().unwrap()
}

fn try_snapshot(vm: &mut Vm, to: &Path, options: &[&str]) -> Ended {
    let control = vm.path("control");
    let words = ["snapshot", control.to_str().unwrap(), to.to_str().unwrap(), "--json"];
    cellblock(&[&words, options].concat())
}

#[track_caller]
fn snapshot(vm: &mut Vm, to: &Path, options: &[&str]) -> serde_json::Value {
    let ended = try_snapshot(vm, to, options);
    if !ended.status.success() {
        vm.fail(&format!("snapshot: {ended:?}"));
    }
    serde_json::from_slice(&ended.stdout).unwrap()
}

/// The guest counts, writes blocks that say where they belong, reads them back, and checks
/// its clock and all that it wrote to memory.
fn busy() -> Vm {
    let mut vm = Vm::with("mode=pause cpus=2 every=20").cpus(2).disk_with(4 << 20, ",cow").start();
    vm.wait_for_line("pause: n=40 ");
    vm
}

#[track_caller]
fn goes_on_and_ends(mut vm: Vm) -> Vm {
    vm.wait_for_line("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    let said = vm.console.text();
    assert!(!said.contains("FAIL"), "{said}");
    // Its directory has the disk's image.
    vm
}

fn restored(from: &Path, mode: &str) -> Vm {
    reachable(Vm::restore(from).arg("--memory-mode").arg(mode).start())
}

/// It can be asked for things as soon as its socket is there, and no sooner.
#[track_caller]
fn reachable(mut vm: Vm) -> Vm {
    let end = Instant::now() + LIMIT;
    while !vm.path("control").exists() {
        if Instant::now() > end {
            vm.fail("no control socket");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    vm
}

#[test]
fn a_vm_runs_while_its_memory_comes() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = busy();
    snapshot(&mut vm, &at, &[]);
    for mode in ["lazy", "auto", "eager"] {
        goes_on_and_ends(restored(&at, mode));
    }
    // What was touched first is known by now, and of no consequence but for speed.
    assert!(at.join("touch").exists());
    goes_on_and_ends(restored(&at, "lazy"));
    assert!(cellblock(&["verify", at.to_str().unwrap()]).status.success());
    goes_on_and_ends(vm);
}

/// At once after its start, most of its memory has not come: the snapshot has it all the same.
#[test]
fn a_vm_whose_memory_still_comes_can_be_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut vm = busy();
    snapshot(&mut vm, &at("one"), &[]);
    for (name, options) in [("two", &[][..]), ("live", &["--live"]), ("held", &["--stop"])] {
        let mut lazy = restored(&at("one"), "lazy");
        snapshot(&mut lazy, &at(name), options);
        goes_on_and_ends(restored(&at(name), "eager"));
    }
    goes_on_and_ends(vm);
}

/// Who has to wait for memory that still comes lets others have their answers.
#[test]
fn a_hold_that_waits_for_memory_keeps_nobody_else_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=20 touch=200").memory("384M").start();
    vm.wait_for_line("pause: n=20 ");
    snapshot(&mut vm, &at, &["--stop"]);
    let mut vm = restored(&at, "lazy");
    vm.stats();
    // No memory comes from here on.
    let pager = Traced::hold(vm.pid(), "pager");
    let control = vm.path("control");
    let (asked, answered) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let held = scope.spawn(move || {
            let mut client = Client::connect(&control).unwrap();
            let limit = Duration::from_secs(5);
            asked.send(()).unwrap();
            let cut = client.snapshot(true, false, limit, "test", LIMIT);
            cut.map(|_| client.ask(Request::Resume).unwrap())
        });
        answered.recv().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        for _ in 0..20 {
            vm.stats();
        }
        match vm.try_ask(Request::Reset) {
            Err(ClientError::Refused { message, .. }) => {
                assert!(message.contains("a snapshot of the VM is being taken"), "{message}");
            }
            other => panic!("a reset in the middle of a snapshot: {other:?}"),
        }
        assert!(!held.is_finished(), "there is a cut without its memory");
        pager.release();
        held.join().unwrap().unwrap();
    });
    goes_on_and_ends(vm);
}

#[test]
fn a_live_snapshot_is_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = busy();
    let mut ended = Vec::new();
    for n in 0..4 {
        let at = dir.path().join(format!("g{n}"));
        let report = snapshot(&mut vm, &at, &["--live"]);
        let number = |key: &str| report[key].as_u64().unwrap();
        assert!(number("rounds") >= 2 && number("rounds_us") > 0, "{report}");
        assert!(number("last_pages") > 0, "{report}");
        assert!(Snapshot::open(&at).unwrap().manifest().live);
        assert!(cellblock(&["verify", at.to_str().unwrap()]).status.success());
        let next = restored(&at, "auto");
        ended.push(goes_on_and_ends(std::mem::replace(&mut vm, next)));
        vm.wait_for_line("pause: n=");
    }
    goes_on_and_ends(vm);
}

#[test]
fn a_chain_of_diffs_goes_on_and_can_be_flattened() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let path = |name: &str| -> String { at(name).to_str().unwrap().into() };
    let mut vm = busy();
    // Of what was written before the first snapshot nothing is known.
    snapshot(&mut vm, &at("zero"), &["--stop"]);
    let mut vm = restored(&at("zero"), "lazy");
    vm.wait_for_line("pause: n=");
    let refused = try_snapshot(&mut vm, &at("none"), &["--diff", &path("zero")]);
    let line = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && line.contains("take a full one first"), "{line}");
    assert!(!at("none").exists());

    snapshot(&mut vm, &at("full"), &[]);
    vm.wait_for_line("pause: n=");
    snapshot(&mut vm, &at("one"), &["--diff", &path("full")]);
    vm.wait_for_line("pause: n=");
    // One that is not kept, because PARENT is not the last: nothing is lost by it.
    let refused = try_snapshot(&mut vm, &at("none"), &["--diff", &path("full")]);
    let line = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && line.contains("and PARENT is"), "{line}");
    vm.wait_for_line("pause: n=");
    snapshot(&mut vm, &at("two"), &["--diff", &path("one"), "--live"]);
    goes_on_and_ends(vm);

    let chain = Chain::open(&at("two")).unwrap();
    assert_eq!(chain.links().len(), 3);
    let own: u32 = chain.snapshot().entries().iter().map(|entry| entry.own.count_ones()).sum();
    assert!(own > 0 && u64::from(own) < chain.manifest().memory / 4096 / 2, "{own} pages");
    let merged = cellblock(&["snapshot", "merge", &path("two"), &path("flat")]);
    assert!(merged.status.success(), "{merged:?}");
    for (name, mode) in [("two", "lazy"), ("two", "eager"), ("one", "lazy"), ("flat", "lazy")] {
        goes_on_and_ends(restored(&at(name), mode));
    }
}

#[test]
fn a_diff_to_the_snapshot_a_vm_came_from() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut vm = busy();
    snapshot(&mut vm, &at("full"), &["--stop"]);
    let mut vm = Vm::restore(&at("full")).arg("--track").start();
    vm.wait_for_line("pause: n=");
    let parent = at("full");
    snapshot(&mut vm, &at("diff"), &["--diff", parent.to_str().unwrap()]);
    goes_on_and_ends(vm);
    goes_on_and_ends(restored(&at("diff"), "lazy"));
}

/// Who watches the VM hears why it ended.
#[test]
fn a_bad_chunk_ends_the_vm_with_an_event() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=20 touch=200").memory("384M").start();
    vm.wait_for_line("pause: n=20 ");
    snapshot(&mut vm, &at, &["--stop"]);
    // The last that has anything, which comes late.
    let whole = Snapshot::open(&at).unwrap();
    let last = whole.entries().iter().enumerate().rfind(|(_, entry)| entry.data != 0);
    let (index, entry) = last.unwrap();
    let file = File::options().read(true).write(true).open(at.join("memory")).unwrap();
    let offset = (index * CHUNK) as u64 + u64::from(entry.data.trailing_zeros()) * 4096;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    let mut vm = restored(&at, "lazy");
    vm.stats();
    let pager = Traced::hold(vm.pid(), "pager");
    let events = vm.events();
    pager.release();
    let end = vm.wait_for_event(&events, |kind| matches!(kind, EventKind::Shutdown { .. }));
    let EventKind::Shutdown { reason, message } = end.kind else { unreachable!("asked for") };
    assert_eq!(reason, Shutdown::Error);
    let message = message.unwrap_or_default();
    assert!(message.contains(&format!("memory chunk {index} is damaged")), "{message}");
    assert_eq!(vm.wait_exit().code(), Some(1));
}

/// Damages the first page of every chunk from `from` on that has one; says how many.
fn damage(at: &Path, from: usize) -> usize {
    let whole = Snapshot::open(at).unwrap();
    let file = File::options().read(true).write(true).open(at.join("memory")).unwrap();
    let all = whole.entries().iter().enumerate().skip(from / CHUNK);
    let damaged = all.filter(|(_, entry)| entry.data != 0).map(|(index, entry)| {
        let offset = (index * CHUNK) as u64 + u64::from(entry.data.trailing_zeros()) * 4096;
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    });
    damaged.count()
}

/// A vCPU in the middle of an instruction that KVM emulates cannot be interrupted.
#[test]
fn memory_that_a_vcpu_waits_for_keeps_no_vm_from_its_end() {
    const FROM: usize = 8 << 20;
    // No interrupts from the PIC; `sti`; from 8 to 24 MiB: counts in every page, over and over.
    const CODE: &[u8] = &[
        0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1, 0xfb, 0x48, 0xc7, 0xc7, 0, 0, 0x80, 0, 0x48, 0xff, 7,
        0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0x48, 0x81, 0xff, 0, 0, 0x80, 1, 0x72, 0xed, 0xeb, 0xe4,
    ];
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let vm = Vm::with("").kernel(&attach_support::kernel(dir.path(), CODE)).start();
    let mut vm = reachable(vm);
    std::thread::sleep(Duration::from_millis(300));
    snapshot(&mut vm, &at, &["--stop"]);
    assert_eq!(damage(&at, FROM), (16 << 20) / CHUNK, "the guest did not get round");
    let begun = Instant::now();
    let mut vm = restored(&at, "lazy");
    assert_eq!(vm.wait_exit().code(), Some(1));
    vm.wait_for_error("is damaged");
    assert!(begun.elapsed() < LAST_RESORT, "it ended by the last resort");
}

/// For a vCPU that could be interrupted KVM has memory brought beside it, and KVM's end waits for
/// that: such a process could not even be killed.
#[test]
fn memory_that_kvm_waits_for_beside_a_vcpu_keeps_no_vm_from_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=snap touch=100").memory("128M").start();
    vm.wait_for_line("snap: ready");
    snapshot(&mut vm, &at, &["--stop"]);
    assert!(damage(&at, 16 << 20) > 300);
    let waiting = || {
        let mut vm = restored(&at, "lazy");
        vm.wait_for(".\n");
        let pager = Traced::hold(vm.pid(), "pager");
        // It writes to 64 MiB now.
        vm.say(b"t");
        std::thread::sleep(Duration::from_millis(500));
        (vm, pager)
    };
    let (mut vm, pager) = waiting();
    let begun = Instant::now();
    pager.release();
    assert_eq!(vm.wait_exit().code(), Some(1));
    vm.wait_for_error("is damaged");
    assert!(begun.elapsed() < LAST_RESORT, "it ended by the last resort");

    let (mut vm, pager) = waiting();
    pager.kill();
    assert_eq!(vm.wait_exit().signal(), Some(Signal::SIGKILL as i32));
}

/// Every chunk that has anything is damaged: whichever the VM needs first ends it.
#[test]
fn a_bad_chunk_ends_the_vm_with_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let at: PathBuf = dir.path().join("s");
    let mut vm = busy();
    snapshot(&mut vm, &at, &["--stop"]);
    assert!(damage(&at, 0) > 0);
    for mode in ["lazy", "eager"] {
        let args = ["restore", at.to_str().unwrap(), "--serial", "null", "--memory-mode", mode];
        let begun = std::time::Instant::now();
        let ended = cellblock(&args);
        let line = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(1), "{mode}: {line}");
        assert!(line.contains("is damaged") || line.contains("does not come"), "{mode}: {line}");
        assert!(begun.elapsed() < LIMIT, "{mode}: took {:?}", begun.elapsed());
    }
    fs::remove_dir_all(&at).unwrap();
}
