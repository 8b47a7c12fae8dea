//! Whoever is killed at whatever moment of a snapshot: what is on disk is whole or not there,
//! and a VM that lives goes on.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cellblock::snapshot::format::Chain;
use cellblock::snapshot::state::MicrovmState;
use common::{LIMIT, Vm, poll};
use nix::sys::signal::Signal;

/// Moments at which somebody is killed.
const MOMENTS: u64 = 24;

fn begin(vm: &Vm, to: &Path) -> Child {
    begin_with(vm, to, &["--disks", "copy"])
}

fn begin_with(vm: &Vm, to: &Path, options: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .arg("snapshot")
        .arg(vm.path("control"))
        .arg(to)
        .args(options)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Whole, or not there. Says which.
fn is_whole(at: &Path) -> bool {
    if !at.exists() {
        return false;
    }
    let chain = Chain::open(at).unwrap();
    chain.verify_all(|_, _| {}).unwrap();
    MicrovmState::decode(&chain.snapshot().state().unwrap()).unwrap();
    true
}

/// How long an undisturbed snapshot takes: the moments are spread over it.
fn undisturbed(vm: &Vm, at: &Path) -> Duration {
    let begun = std::time::Instant::now();
    assert!(begin(vm, at).wait().unwrap().success());
    let took = begun.elapsed();
    assert!(is_whole(at));
    took
}

#[test]
fn the_writer_killed_at_any_moment_leaves_a_whole_snapshot_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::with("mode=pause every=20").disk(4).start();
    vm.wait_for_line("pause: n=40 ");
    let took = undisturbed(&vm, &dir.path().join("first"));
    let (mut whole, mut none) = (0, 0);
    for moment in 0..MOMENTS {
        let at = dir.path().join(format!("s{moment}"));
        let mut writer = begin(&vm, &at);
        std::thread::sleep(
            took * moment as u32 / MOMENTS as u32 + Duration::from_micros(moment * 7),
        );
        let _ = writer.kill();
        writer.wait().unwrap();
        if is_whole(&at) {
            whole += 1
        } else {
            none += 1
        }
        // One that was held by the writer goes on without it.
        vm.wait_for_line("pause: n=");
    }
    eprintln!("killed {MOMENTS} writers: {whole} whole, {none} not there");
    assert!(none > 0, "nobody was killed in time");
    // What they had begun is taken away by the next, unless that was nothing yet.
    undisturbed(&vm, &dir.path().join("last"));
    let left = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let left: Vec<_> = left.filter(|path| path.join("memory").exists()).collect();
    let hidden =
        |path: &&std::path::PathBuf| path.file_name().unwrap().to_string_lossy().starts_with('.');
    assert_eq!(left.iter().filter(hidden).count(), 0, "{left:?}");
    assert!(is_whole(&dir.path().join("first")), "the old snapshot is what it was");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// The guest counts on from here: what it had printed before does not count.
#[track_caller]
fn counts_on(vm: &mut Vm) {
    let now = vm.console.len();
    if poll(LIMIT, || (vm.console.len() > now + 100).then_some(())).is_none() {
        vm.fail("the guest does not go on");
    }
    vm.wait_for_line("pause: n=");
}

/// A device's process dies: the snapshot is whole or not there, and the guest, whose count and blocks
/// and clock it checks itself, goes on with the process that comes in its place.
fn device_killed_at_any_moment(role: &str, id: &str, disk: &str, options: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::with("mode=pause every=20").disk_with(4 << 20, disk);
    let mut vm = vm.arg("--max-deaths").arg("1000").start();
    vm.wait_for_line("pause: n=40 ");
    let begun = std::time::Instant::now();
    assert!(begin_with(&vm, &dir.path().join("first"), options).wait().unwrap().success());
    let took = begun.elapsed();
    let (mut whole, mut pid) = (0, 0);
    for moment in 0..MOMENTS {
        let at = dir.path().join("s");
        // The one that took the place of the last.
        let there = poll(LIMIT, || {
            let processes = vm.ps();
            let found = processes.iter().find(|p| p.role == role && p.id == id && p.pid != pid);
            found.map(|process| process.pid)
        });
        pid = there.unwrap_or_else(|| vm.fail("nothing takes the place of the process"));
        let mut writer = begin_with(&vm, &at, options);
        std::thread::sleep(
            took * moment as u32 / MOMENTS as u32 + Duration::from_micros(moment * 7),
        );
        common::send(pid, Signal::SIGKILL);
        let ended = poll(LIMIT, || writer.try_wait().unwrap());
        let status = ended.unwrap_or_else(|| vm.fail("the writer does not end"));
        assert_eq!(is_whole(&at), status.success(), "moment {moment}");
        whole += u64::from(status.success());
        counts_on(&mut vm);
        let _ = fs::remove_dir_all(&at);
    }
    eprintln!("{role} killed {MOMENTS} times: {whole} whole");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something is left");
    undisturbed(&vm, &dir.path().join("last"));
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

#[test]
fn a_disks_process_killed_at_any_moment_leaves_a_whole_snapshot_or_none() {
    device_killed_at_any_moment("blk", "disk0", "", &["--disks", "copy"]);
}

#[test]
fn a_cow_disks_process_killed_at_any_moment_of_a_live_snapshot() {
    device_killed_at_any_moment("blk", "disk0", ",cow", &["--live"]);
}

#[test]
fn a_consoles_process_killed_at_any_moment_leaves_a_whole_snapshot_or_none() {
    device_killed_at_any_moment("serial", "com1", "", &["--disks", "copy"]);
}

#[test]
fn the_vm_killed_at_any_moment_leaves_a_whole_snapshot_or_none() {
    let dir = tempfile::tempdir().unwrap();
    for moment in 0..8 {
        let mut vm = Vm::with("mode=pause every=20").disk(4).start();
        vm.wait_for_line("pause: n=20 ");
        let at = dir.path().join(format!("s{moment}"));
        let mut writer = begin(&vm, &at);
        std::thread::sleep(Duration::from_millis(2 * moment));
        vm.signal(Signal::SIGKILL);
        let ended = poll(LIMIT, || writer.try_wait().unwrap());
        let status = ended.unwrap_or_else(|| panic!("the writer waits for a VM that is dead"));
        assert_eq!(is_whole(&at), status.success(), "moment {moment}");
        // What was begun is taken away.
        let left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name.to_string_lossy().starts_with('.'))
            .collect();
        assert!(left.is_empty(), "moment {moment}: {left:?}");
    }
}

/// An interrupted writer takes away what it has begun.
#[test]
fn an_interrupt_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::with("mode=pause every=20").disk(4).start();
    vm.wait_for_line("pause: n=40 ");
    for moment in 0..8 {
        let at = dir.path().join(format!("s{moment}"));
        let mut writer = begin(&vm, &at);
        std::thread::sleep(Duration::from_millis(moment));
        common::send(writer.id() as i32, Signal::SIGINT);
        let status = poll(LIMIT, || writer.try_wait().unwrap()).expect("it ends");
        assert_eq!(is_whole(&at), status.success());
        vm.wait_for_line("pause: n=");
    }
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// It is heard while the VM is still at work on the cut, too.
#[test]
fn an_interrupt_does_not_wait_for_the_vm() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=20").disk(4).start();
    vm.wait_for_line("pause: n=40 ");
    let pid = vm.pid_of("blk", "disk0");
    common::send(pid, Signal::SIGSTOP);
    let mut writer = begin_with(&vm, &at, &["--timeout", "25s"]);
    std::thread::sleep(Duration::from_millis(300));
    common::send(writer.id() as i32, Signal::SIGINT);
    let ended = poll(Duration::from_secs(5), || writer.try_wait().unwrap());
    common::send(pid, Signal::SIGCONT);
    assert_eq!(ended.expect("it waits for the VM").code(), Some(1));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something is left");
    vm.wait_for_line("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}
