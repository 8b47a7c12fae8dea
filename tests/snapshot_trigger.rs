//! Snapshots that a VM takes by itself.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cellblock::control::client::ClientError;
use cellblock::control::protocol::{EventKind, Request};
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

/// The guest waits at its marker: each life that begins there runs all of the workload.
#[test]
fn each_life_runs_the_workload_from_its_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let words = ["--snapshot-on-pre-exec", "--snapshot-out", out.to_str().unwrap()];
    let mut vm = words.iter().fold(Vm::with("mode=hello marks=1,2,5"), |vm, w| vm.arg(*w)).start();
    vm.wait_for("cellblock guest");
    vm.wait_for("hello: protocol=");
    vm.wait_for("hello: ok");
    vm.ends_well();
    assert_eq!(trigger_of(&out), "pre-exec");
    for _ in 0..2 {
        let mut life = Vm::restore(&out).start();
        life.wait_for("hello: protocol=");
        life.wait_for("hello: ok");
        assert!(!life.console.text().contains("cellblock guest"), "it was started anew");
        life.ends_well();
    }
}

/// A place is a place, whatever it is called.
#[test]
fn a_place_that_looks_like_an_option_is_none() {
    let mut vm = Vm::with("mode=pause every=20 marks=2")
        .arg("--snapshot-on-pre-exec")
        .arg("--snapshot-out=-s")
        .start();
    let out = vm.path("-s");
    taken(&mut vm, &out);
    assert_eq!(trigger_of(&out), "pre-exec");
    vm.wait_for_line("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// What the process that writes is told is told to nobody in its place.
#[test]
fn nobody_else_is_told_that_it_is_time() {
    let mut vm = Vm::with("mode=pause every=20 heartbeat");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("s");
    for word in ["--snapshot-at-heartbeat", "5", "--snapshot-out", out.to_str().unwrap()] {
        vm = vm.arg(word);
    }
    let mut vm = vm.start();
    let refused = loop {
        match vm.try_ask(Request::AwaitTrigger) {
            Err(ClientError::Connect { .. }) => std::thread::sleep(Duration::from_millis(1)),
            other => break other.expect_err("it is another's"),
        }
    };
    assert!(refused.to_string().contains("another process's"), "{refused}");
    taken(&mut vm, &out);
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// A guest that stops listening while things settle has not what was waited for.
#[test]
fn a_listener_that_goes_away_is_waited_for_anew() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let words = ["--snapshot-on-listener", "--snapshot-quiesce-ms", "200", "--snapshot-after-ms"];
    let cmdline = "mode=pause every=20 marks=3,4";
    let mut vm = words.iter().fold(Vm::with(cmdline), |vm, w| vm.arg(*w));
    vm = vm.arg("700").arg("--snapshot-out").arg(out.to_str().unwrap());
    let mut vm = vm.start();
    taken(&mut vm, &out);
    assert_eq!(trigger_of(&out), "after-ms");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
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

/// The guest ends in the middle of it: so does the VM, with a whole snapshot or none.
#[test]
fn a_vm_that_ends_while_it_is_written_down_ends() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..6 {
        let out = dir.path().join(format!("s{n}"));
        let mut vm = Vm::with(&format!("mode=pause every=5 marks=2 count={}", 5 * n + 5))
            .arg("--snapshot-on-pre-exec")
            .arg("--snapshot-out")
            .arg(out.to_str().unwrap())
            .start();
        vm.wait_for("pause: ok");
        vm.ends_well();
        assert!(!out.exists() || trigger_of(&out) == "pre-exec");
    }
}
