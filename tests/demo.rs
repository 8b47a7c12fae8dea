//! `cellblock demo`: holds, and fails when a step does.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn demo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    command.arg("demo").env_remove("CELLBLOCK_LOG");
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

#[test]
fn every_step_holds_within_a_minute() {
    let places = tempfile::tempdir().expect("folder");
    let start = Instant::now();
    let Output { status, stdout, stderr } =
        demo().env("TMPDIR", places.path()).output().expect("the program runs");
    assert!(start.elapsed() < Duration::from_secs(60));
    let (out, err) = (text(&stdout), text(&stderr));
    assert_eq!(status.code(), Some(0), "{out}{err}");
    assert_eq!(err, "");
    for line in [
        "serial   com1",
        "blk      disk0",
        "the image on the host holds what it wrote",
        "resumed, it answers",
        "no process is left behind",
        "start to first guest output",
        "memory of all processes beyond guest RAM",
        "pause, request to all vCPUs parked",
        "all steps held",
    ] {
        assert!(out.contains(line), "no {line:?} in:\n{out}");
    }
    let left: Vec<_> = std::fs::read_dir(places.path()).expect("folder").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_machine_that_does_not_let_it_is_named() {
    let output = demo().env("TMPDIR", "/nonexistent").output().expect("the program runs");
    assert_eq!(output.status.code(), Some(1));
    let err = text(&output.stderr);
    assert!(err.starts_with("cellblock: error: making a temporary directory"), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
}

/// The VM's process whose `ps` line in the demo's output begins with `role`, killed as
/// soon as it is shown.
fn killed(role: &str) -> (Option<i32>, String) {
    let mut child =
        demo().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let pid = loop {
        let line = lines.next().expect("the process is listed").expect("UTF-8");
        let mut words = line.split_whitespace();
        if words.next() == Some(role) {
            let pid = words.find_map(|word| word.parse::<i32>().ok()).expect("a pid");
            break nix::unistd::Pid::from_raw(pid);
        }
    };
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kill");
    lines.for_each(drop);
    let mut err = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut err).expect("UTF-8");
    (child.wait().expect("ends").code(), err)
}

#[test]
fn a_vm_that_breaks_on_the_way_fails_it() {
    // At once: the demo may wait for an answer until its patience ends.
    let roles = ["vmm", "spawner"];
    for (role, run) in roles.map(|role| (role, std::thread::spawn(move || killed(role)))) {
        let (status, err) = run.join().expect("no panic");
        assert_eq!(status, Some(1), "{role} killed: {err}");
        let last = err.lines().last().unwrap_or_default();
        assert!(last.starts_with("cellblock: error: "), "{role} killed: {err}");
    }
}

#[test]
fn a_device_process_that_dies_on_the_way_is_replaced() {
    let roles = ["blk", "serial"];
    for (role, run) in roles.map(|role| (role, std::thread::spawn(move || killed(role)))) {
        let (status, err) = run.join().expect("no panic");
        assert_eq!(status, Some(0), "{role} killed: {err}");
        assert!(err.contains("another process has taken over"), "{role} killed: {err}");
    }
}
