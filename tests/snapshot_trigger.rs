//! Snapshots that a VM takes by itself.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cellblock::control::protocol::EventKind;
use cellblock::snapshot::format::Chain;
use cellblock::snapshot::state::MicrovmState;
use common::{LIMIT, Vm, poll};

fn trigger_of(snapshot: &Path) -> String {
    let chain = Chain::open(snapshot).unwrap();
    chain.verify_all(|_, _| {}).unwrap();
    MicrovmState::decode(&chain.snapshot().state().unwrap()).unwrap().metadata.trigger
}

fn taken(vm: &mut Vm, out: &Path) {
    if poll(LIMIT, || out.exists().then_some(())).is_none() {
        vm.fail("no snapshot was taken");
    }
}

#[test]
fn each_trigger_takes_one_snapshot_from_which_the_guest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, &str, &[&str]); 4] = [
        ("heartbeat", "mode=pause every=20 heartbeat", &["--snapshot-at-heartbeat", "3"]),
        ("pre-exec", "mode=pause every=20 marks=2", &["--snapshot-on-pre-exec"]),
        (
            "listener",
            "mode=pause every=20 marks=3",
            &["--snapshot-on-listener", "--snapshot-quiesce-ms", "50"],
        ),
        ("after-ms", "mode=pause every=20", &["--snapshot-after-ms", "300"]),
    ];
    for (name, cmdline, options) in cases {
        let out = dir.path().join(name);
        let mut options: Vec<&str> = options.to_vec();
        options.extend(["--snapshot-out", out.to_str().unwrap()]);
        let mut vm = options.iter().fold(Vm::with(cmdline), |vm, word| vm.arg(*word)).start();
        vm.wait_for("pause: ready");
        let events = vm.events();
        taken(&mut vm, &out);
        vm.wait_for_event(&events, |event| matches!(event, EventKind::Snapshot { .. }));
        assert_eq!(trigger_of(&out), name);
        vm.wait_for_line("pause: n=");
        vm.say(b"q");
        vm.wait_for("pause: ok");
        vm.ends_well();
        let mut restored = Vm::restore(&out).start();
        restored.wait_for_line("pause: n=");
        restored.say(b"q");
        restored.wait_for("pause: ok");
        restored.ends_well();
    }
}

#[test]
fn a_vm_without_a_control_socket_takes_them_too_and_ends_without_one() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let place = ["--snapshot-out", out.to_str().unwrap()];
    let never = ["--snapshot-at-heartbeat", "1000000"];
    let mut vm = [place, never]
        .concat()
        .iter()
        .fold(Vm::with("mode=hello").no_control(), |vm, w| vm.arg(*w))
        .start();
    vm.wait_for("hello: ok");
    vm.ends_well();
    assert!(!out.exists());
    let mut vm = [place, ["--snapshot-after-ms", "100"]]
        .concat()
        .iter()
        .fold(Vm::with("mode=pause every=20").no_control(), |vm, w| vm.arg(*w))
        .start();
    taken(&mut vm, &out);
    vm.wait_for_line("pause: n=");
    std::thread::sleep(Duration::from_millis(1));
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_starts() {
    let run = |words: &[&str]| {
        let ended = Command::new(env!("CARGO_BIN_EXE_cellblock"))
            .args(["run", "--kernel", "/nonexistent"])
            .args(words)
            .output()
            .unwrap();
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    };
    let (status, text) = run(&["--snapshot-after-ms", "5"]);
    assert!(status == Some(2) && text.contains("--snapshot-out DIR"), "{text}");
    let (status, text) = run(&["--snapshot-out", "/tmp/never"]);
    assert!(status == Some(2) && text.contains("not when"), "{text}");
    let (status, text) = run(&["--snapshot-out", "/tmp", "--snapshot-on-listener"]);
    assert!(status == Some(1) && text.contains("it exists"), "{text}");
}
