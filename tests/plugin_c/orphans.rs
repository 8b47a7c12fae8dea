//! The VMM is killed under its plugins.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::proc::{Identity, family, wait_gone};
use super::run::{PROGRAM, compiled};
use super::{life, until};

/// How long what is left of a VM may take to be gone.
const GONE: Duration = Duration::from_secs(1);

/// With its plugin in any state: it waits for an event, holds a vCPU, or is stopped itself.
#[test]
fn a_plugin_ends_with_its_vmm() {
    for (sandbox, what, stopped) in [
        (true, "serve", false),
        (false, "serve", false),
        (true, "hang", false),
        (true, "serve", true),
    ] {
        let mut vm = life(&[what]).sandbox(sandbox).start();
        vm.expect("up");
        let all = family(vm.pid());
        let plugin = all.iter().find(|one| one.name.starts_with("plugin-life")).unwrap();
        if stopped {
            kill(Pid::from_raw(plugin.pid), Signal::SIGSTOP).unwrap();
        }
        kill(Pid::from_raw(vm.pid()), Signal::SIGKILL).unwrap();
        vm.finish();
        let left = wait_gone(&all, GONE);
        assert!(left.is_ok(), "sandbox {sandbox}, {what}: {left:?}");
    }
}

/// What a program that attached is in the middle of ends with an error, and the program goes on.
#[test]
fn an_attached_program_outlives_the_vmm() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("kernel"), cellblock::guest::BARE_GUEST).unwrap();
    let mut vmm = Command::new(PROGRAM)
        .args(["run", "--die-with-parent", "--kernel", "kernel", "--cpus", "2"])
        .args(["--memory", "64M", "--serial", "null", "--plugin-socket", "socket"])
        .args(["--cmdline", "mode=echo"])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    until("the socket", || dir.path().join("socket").exists());
    let mut plugin = Command::new(compiled("tests/plugins", "orphan"))
        .arg(dir.path().join("socket"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(plugin.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "busy");
    let all = family(vmm.id() as i32);
    // Stopped first, so that each thread is in the middle of its call.
    let pid = Pid::from_raw(vmm.id() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    let vmm_is = Identity::of(pid.as_raw()).unwrap();
    until("the VMM to stop", || vmm_is.state() == Some('T'));
    std::thread::sleep(Duration::from_millis(50));
    kill(pid, Signal::SIGKILL).unwrap();
    vmm.wait().unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "ended");
    assert!(plugin.wait().unwrap().success());
    assert!(wait_gone(&all, GONE).is_ok());
}
