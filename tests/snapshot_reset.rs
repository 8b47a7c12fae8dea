//! A restored VM put back to its snapshot, in place.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use cellblock::control::client::{Client, ClientError};
use cellblock::control::protocol::{DeviceState, Reply, Request, State};
use cellblock::snapshot::format::Snapshot;
use cellblock::snapshot::state::MicrovmState;
use common::{LIMIT, Vm, deaths};
use nix::sys::signal::Signal;

const RESETS: u64 = 8;

fn count(line: &str) -> u64 {
    line.split("n=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_reset_vm_lives_the_same_moment_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause cpus=2 every=10").cpus(2).disk_with(4 << 20, ",cow").start();
    vm.wait_for_line("pause: n=100 ");
    match vm.try_ask(Request::Reset) {
        Err(ClientError::Refused { message, .. }) => assert!(message.contains("from a kernel")),
        other => vm.fail(&format!("a VM with no snapshot was reset: {other:?}")),
    }
    let control = vm.path("control");
    let words = ["snapshot", control.to_str().unwrap(), at.to_str().unwrap()];
    let ended = Command::new(env!("CARGO_BIN_EXE_cellblock")).args(words).output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    vm.say(b"q");
    vm.wait_for("pause: ok");

    let mut vm = Vm::restore(&at).start();
    let first = count(&vm.wait_for_line("pause: n="));
    let family = vm.processes();
    let (mut times, mut wrote) = (Vec::new(), Vec::new());
    for _ in 0..RESETS {
        vm.wait_for_line(&format!("pause: n={} ", first + 20));
        let Reply::Reset { took_us, pages, .. } = vm.ask(Request::Reset) else {
            vm.fail("a reset was answered with something else")
        };
        assert!(pages > 0, "nothing was put back");
        times.push(took_us);
        wrote.push(pages);
        // It counts on from where the snapshot is: the count of a moment ago is gone.
        vm.wait_for_line(&format!("pause: n={first} "));
    }
    times.sort_unstable();
    wrote.sort_unstable();
    eprintln!(
        "{RESETS} resets: {} us median, {} pages",
        times[times.len() / 2],
        wrote[wrote.len() / 2]
    );
    assert_eq!(vm.processes(), family, "other processes");
    vm.pause();
    vm.ask(Request::Reset);
    assert_eq!(vm.stats().state, State::Paused);
    vm.resume();
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// What is written after a reset is written since the snapshot that the VM was put back to: a cut
/// of the time before cannot become the base of diffs any more.
#[test]
fn a_cut_from_before_a_reset_cannot_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=10").disk_with(4 << 20, ",cow").start();
    vm.wait_for_line("pause: n=20 ");
    vm.snapshot(&at, &["--stop"]);
    let mut vm = Vm::restore(&at).start();
    vm.wait_for_line("pause: n=");
    let kept =
        |client: &mut Client, digit: &str| client.ask(Request::Kept { id: digit.repeat(32) });
    for known in [false, true] {
        let mut client = Client::connect(&vm.path("control")).unwrap();
        let limit = Duration::from_secs(5);
        client.snapshot(false, false, limit, "test", LIMIT).unwrap();
        vm.ask(Request::Reset);
        let refused = kept(&mut client, "a");
        assert!(matches!(refused, Err(ClientError::Refused { .. })), "{known}: {refused:?}");
        // The cuts that follow can, once each.
        let cut = client.snapshot(false, false, limit, "test", LIMIT).unwrap();
        let base = Snapshot::open(&at).unwrap().manifest().id.to_string();
        assert_eq!(cut.report.base, Some(base));
        if known {
            kept(&mut client, "b").unwrap();
            assert!(kept(&mut client, "c").is_err(), "the same cut became two snapshots");
        }
    }
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// It would go on as in the snapshot, but for a disk of which every request fails.
#[test]
fn a_vm_with_a_disk_that_has_failed_is_not_reset() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=10").disk_with(4 << 20, ",cow").start();
    vm.wait_for_line("pause: n=20 ");
    vm.snapshot(&at, &["--stop"]);
    let mut vm = Vm::restore(&at).start();
    vm.wait_for_line("pause: n=");
    let events = vm.events();
    for _ in 0..4 {
        deaths::kill_and_wait(&mut vm, &events, "blk", "disk0");
    }
    common::send(vm.pid_of("blk", "disk0"), Signal::SIGKILL);
    let failed = |vm: &mut Vm| (vm.stats().disks[0].state == DeviceState::Failed).then_some(());
    common::poll(LIMIT, || failed(&mut vm)).expect("its disk does not fail");
    match vm.try_ask(Request::Reset) {
        Err(ClientError::Refused { message, remedy }) => {
            assert!(message.contains("device 'disk0' has failed"), "{message}");
            assert_eq!(remedy.as_deref(), Some("restore the snapshot anew"));
        }
        other => vm.fail(&format!("it was reset: {other:?}")),
    }
}

/// A reset of a VM whose processes do not come to rest is none: the guest goes on from where it was.
#[test]
fn a_reset_that_cannot_come_to_rest_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=10").disk_with(4 << 20, ",cow").start();
    vm.wait_for_line("pause: n=20 ");
    vm.snapshot(&at, &["--stop"]);
    let mut vm = Vm::restore(&at).start();
    let first = count(&vm.wait_for_line("pause: n="));
    vm.wait_for_line(&format!("pause: n={} ", first + 100));
    let disk = vm.pid_of("blk", "disk0");
    common::send(disk, Signal::SIGSTOP);
    match vm.try_ask(Request::Reset) {
        Err(ClientError::Refused { message, .. }) => {
            assert!(message.contains("no reset") && message.contains("blk disk0"), "{message}");
        }
        other => vm.fail(&format!("a reset without a device: {other:?}")),
    }
    assert_eq!(vm.stats().state, State::Running);
    common::send(disk, Signal::SIGCONT);
    // It counts on, and can be reset now.
    let next = count(&vm.wait_for_line("pause: n="));
    assert!(next > first, "{next} after {first}");
    vm.wait_for_line(&format!("pause: n={} ", next + 50));
    vm.ask(Request::Reset);
    vm.wait_for_line(&format!("pause: n={first} "));
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// What a disk may still do at once is what it was in the snapshot.
#[test]
fn a_reset_gives_a_disk_the_budget_that_it_had() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    // Hardly any comes back in the time of a test.
    let disk = ",cow,iops=1,iops-burst=1000000";
    let mut vm = Vm::with("mode=pause every=10").disk_with(4 << 20, disk).start();
    vm.wait_for_line("pause: n=20 ");
    vm.snapshot(&at, &["--stop"]);
    let saved = budget(&Snapshot::open(&at).unwrap().state().unwrap());
    let mut vm = Vm::restore(&at).start();
    let first = count(&vm.wait_for_line("pause: n="));
    vm.wait_for_line(&format!("pause: n={} ", first + 1000));
    vm.pause();
    let before = budget(&cut(&vm));
    assert!(before < saved - 1000, "nothing was used up: {before} of {saved}");
    vm.ask(Request::Reset);
    let after = budget(&cut(&vm));
    assert!((saved..saved + 60).contains(&after), "{after} in the place of {saved}");
    vm.resume();
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// The state of a cut.
fn cut(vm: &Vm) -> Vec<u8> {
    let mut client = Client::connect(&vm.path("control")).unwrap();
    let limit = Duration::from_secs(5);
    let cut = client.snapshot(false, false, limit, "test", LIMIT).unwrap();
    let mut bytes = vec![0; cut.report.state as usize];
    File::from(cut.state).read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// How many requests the disk of a state may make at once.
fn budget(state: &[u8]) -> i64 {
    let state = MicrovmState::decode(state).unwrap();
    let disk = state.device_states.iter().find_map(|device| device.as_disk().unwrap());
    disk.unwrap().balance[1]
}
