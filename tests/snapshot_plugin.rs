//! Plugins in snapshots: a guest that relies on its plugin's state goes on with it, or not at all.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
#[allow(dead_code)] // its own VMs
#[path = "plugin_c/run.rs"]
mod run;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cellblock::control::protocol::Request;
use cellblock_plugin_api::{Event, SOCKET_VARIABLE, Space};
use common::snapshot::{cellblock, refused_restore};
use common::{LIMIT, Options, Vm, poll, send};
use nix::sys::signal::Signal;

/// A plugin of the old kind, in its process; nothing in the test's own.
#[test]
fn plugin_that_knows_no_snapshots() {
    if std::env::var_os(SOCKET_VARIABLE).is_none() {
        return;
    }
    let vm = cellblock_plugin_api::Vm::connect().unwrap();
    vm.reserve_range(Space::Port, 0x500, 1).unwrap();
    let vcpu = vm.vcpu(0).unwrap();
    vm.start().unwrap();
    let mut last = 0;
    while let Ok(event) = vcpu.wait() {
        if let Event::Access(access) = event {
            match access.is_write {
                true => last = access.data[0],
                false => vcpu.answer(&[last]).unwrap(),
            }
        }
        if vcpu.resume().is_err() {
            return;
        }
    }
}

/// The guest counts, writes blocks, and checks each round that its port gives back what it wrote.
fn guest() -> Options {
    Vm::with("mode=pause every=20 port=0x500").disk_with(4 << 20, ",cow")
}

fn with_plugin(options: Options, program: &Path, arguments: &[&str]) -> Options {
    let options = options.arg("--plugin").arg(program.to_str().unwrap()).arg("-pplugin");
    arguments.iter().fold(options, |options, word| options.arg(format!("-p{word}")))
}

fn c_plugin() -> PathBuf {
    run::compiled("tests/plugins", "part")
}

#[track_caller]
fn ends(mut vm: Vm) {
    vm.wait_for_line("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    let said = vm.console.text();
    assert!(!said.contains("FAIL"), "{said}");
}

#[test]
fn a_plugin_goes_on_with_its_vm() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let program = c_plugin();
    for (kind, arguments) in [("small", &[][..]), ("big", &["big"])] {
        let mut vm = with_plugin(guest(), &program, arguments).start();
        vm.wait_for_error("began");
        vm.wait_for_line("pause: n=40 ");
        for n in 0..5 {
            let options: &[&str] = if n % 2 == 0 { &[] } else { &["--live"] };
            vm.snapshot(&at(&format!("{kind}-{n}")), options);
        }
        let last = at(&format!("{kind}-last"));
        vm.snapshot(&last, &["--stop"]);
        let line = refused_restore(&last, &[]);
        assert!(line.contains("'plugin0'") && line.contains("'--plugin PATH'"), "{line}");
        let mut restored = with_plugin(Vm::restore(&last), &program, arguments).start();
        restored.wait_for_error("went on from");
        restored.wait_for_line("pause: n=");
        for _ in 0..3 {
            restored.ask(Request::Reset);
            restored.wait_for_error("went back to");
            restored.wait_for_line("pause: n=");
        }
        // A second generation, lazily and eagerly.
        let next = at(&format!("{kind}-next"));
        restored.snapshot(&next, &[]);
        for mode in ["lazy", "eager"] {
            let again = with_plugin(Vm::restore(&next), &program, arguments);
            let mut again = again.arg("--memory-mode").arg(mode).start();
            again.wait_for_error("went on from");
            ends(again);
        }
        ends(restored);
    }
}

#[test]
fn a_snapshot_with_a_plugin_of_the_old_kind_is_for_inspection() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let own = std::env::current_exe().unwrap();
    let arguments = ["--exact", "plugin_that_knows_no_snapshots", "--nocapture"];
    let mut vm = with_plugin(guest(), &own, &arguments).start();
    vm.wait_for_line("pause: n=40 ");
    vm.snapshot(&at, &[]);
    assert!(cellblock(&["verify", at.to_str().unwrap()]).status.success());
    let line = refused_restore(&at, &["--plugin", own.to_str().unwrap()]);
    assert!(line.contains("for inspection") && line.contains("plugin0"), "{line}");
    ends(vm);
    // One without a plugin has no use for one.
    let mut vm = Vm::with("mode=pause every=20").start();
    vm.wait_for_line("pause: n=20 ");
    let plain = dir.path().join("plain");
    vm.snapshot(&plain, &["--stop"]);
    let line = refused_restore(&plain, &["--plugin", own.to_str().unwrap()]);
    assert!(line.contains("without a plugin"), "{line}");
}

/// The VM's plugin dies, and the VM ends: the snapshot is whole or not there, and its writer ends too.
#[test]
fn a_plugin_killed_at_any_moment_leaves_a_whole_snapshot_or_none() {
    const MOMENTS: u64 = 12;
    let dir = tempfile::tempdir().unwrap();
    let program = c_plugin();
    for moment in 0..MOMENTS {
        let at = dir.path().join(format!("s{moment}"));
        let mut vm = with_plugin(guest(), &program, &[]).start();
        vm.wait_for_line("pause: n=20 ");
        let plugin = vm.pid_of("plugin", "plugin0");
        let mut writer = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        writer.arg("snapshot").arg(vm.path("control")).arg(&at).args(["--disks", "copy"]);
        let mut writer = writer.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(moment * 2500));
        send(plugin, Signal::SIGKILL);
        let ended = poll(LIMIT, || writer.try_wait().unwrap());
        let status = ended.unwrap_or_else(|| vm.fail("the writer does not end"));
        assert_eq!(at.exists(), status.success(), "moment {moment}");
        if at.exists() {
            let verified = cellblock(&["verify", at.to_str().unwrap()]);
            assert!(verified.status.success(), "moment {moment}: {verified:?}");
            std::fs::remove_dir_all(&at).unwrap();
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "moment {moment}");
        vm.wait_exit();
    }
}

#[test]
fn a_plugin_that_does_not_answer_fails_the_snapshot_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut vm = with_plugin(guest(), &c_plugin(), &[]).start();
    vm.wait_for_line("pause: n=40 ");
    let pid = vm.pid_of("plugin", "plugin0");
    common::send(pid, Signal::SIGSTOP);
    let ended = vm.try_snapshot(&at("none"), &["--timeout", "300ms"]);
    common::send(pid, Signal::SIGCONT);
    let line = String::from_utf8(ended.stderr).unwrap();
    // Its guest may wait for it at that moment.
    let named = line.contains("plugin plugin0") || line.contains("vcpu 0 waits");
    assert!(!ended.status.success() && named, "{line}");
    assert!(!at("none").exists());
    vm.wait_for_line("pause: n=");
    vm.snapshot(&at("next"), &[]);
    vm.wait_for_line("pause: n=");
    // A dead one is the end of the VM, and leaves no snapshot.
    common::send(pid, Signal::SIGKILL);
    let ended = vm.try_snapshot(&at("dead"), &[]);
    assert!(!ended.status.success() && !at("dead").exists(), "{ended:?}");
    assert!(!vm.wait_exit().success());
    let mut restored = with_plugin(Vm::restore(&at("next")), &c_plugin(), &[]).start();
    restored.wait_for_error("went on from");
    ends(restored);
}
