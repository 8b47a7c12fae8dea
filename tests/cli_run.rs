//! `cellblock run` on the built-in guest: the terminal, the endpoints, the control commands.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use cellblock::guest::BARE_GUEST;
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);

/// A directory with a guest and a disk. VMs are killed with it.
struct Place {
    dir: tempfile::TempDir,
    vms: Vec<Child>,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("kernel"), BARE_GUEST).unwrap();
        File::create(dir.path().join("disk")).unwrap().set_len(8 << 20).unwrap();
        Place { dir, vms: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a VM whose guest reports and then waits for what it is told.
    fn start(&mut self, args: &[&str], streams: impl FnOnce(&mut Command)) -> &mut Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        command
            .current_dir(self.dir.path())
            .args(["run", "--kernel", "kernel", "-m", "64M", "--cmdline", "mode=demo mib=1"])
            .args(["--disk", "disk", "--control", "control"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        streams(&mut command);
        self.vms.push(command.spawn().unwrap());
        self.vms.last_mut().unwrap()
    }

    /// Runs a control command.
    fn control(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        command.current_dir(self.dir.path()).arg(args[0]).arg("control").args(&args[1..]);
        command.output().unwrap()
    }

    fn json(&self, command: &str) -> Value {
        let output = self.control(&[command, "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn wait_for_control(&self) {
        eventually("a control socket", || self.control(&["stats"]).status.success());
    }

    /// Waits for the last VM to end.
    fn end(&mut self) -> ExitStatus {
        let vm = self.vms.last_mut().unwrap();
        let mut status = None;
        eventually("the end of the VM", || {
            status = vm.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for vm in &mut self.vms {
            let _ = vm.kill();
            let _ = vm.wait();
        }
    }
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "no {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A terminal with a VM on it.
struct Terminal {
    user: File,
    slave: OwnedFd,
}

impl Terminal {
    fn start(place: &mut Place) -> Terminal {
        let pty = openpty(None, None).unwrap();
        assert!(cooked(&pty.slave));
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        place.start(&[], |command| {
            command.stdin(end()).stdout(end()).stderr(end());
        });
        let mut terminal = Terminal { user: pty.master.into(), slave: pty.slave };
        let seen = terminal.read_until("guest: ready");
        assert!(seen.starts_with("cellblock: ctrl-a x stops the VM\r\n"), "{seen}");
        assert!(!cooked(&terminal.slave), "the terminal is raw while the VM runs");
        terminal
    }

    fn read_until(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        let mut chunk = [0; 512];
        let end = Instant::now() + PATIENCE;
        while !String::from_utf8_lossy(&seen).contains(text) {
            assert!(Instant::now() < end, "no {text:?} in {}", String::from_utf8_lossy(&seen));
            let count = self.user.read(&mut chunk).unwrap();
            seen.extend_from_slice(&chunk[..count]);
        }
        String::from_utf8_lossy(&seen).into_owned()
    }
}

fn cooked(terminal: &OwnedFd) -> bool {
    let cooked = LocalFlags::ICANON | LocalFlags::ISIG | LocalFlags::ECHO;
    tcgetattr(terminal).unwrap().local_flags.contains(cooked)
}

fn signal(vm: &Child, signal: Signal) {
    kill(Pid::from_raw(vm.id() as i32), signal).unwrap();
}

#[test]
fn the_escape_quits_and_ctrl_c_does_not() {
    let mut place = Place::new();
    let mut terminal = Terminal::start(&mut place);
    terminal.user.write_all(b"\x03").unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(place.vms[0].try_wait().unwrap().is_none(), "ctrl-c is the guest's");
    terminal.user.write_all(b"\x01x").unwrap();
    assert!(place.end().success());
    assert!(cooked(&terminal.slave));
    assert!(!place.path("control").exists());
}

#[test]
fn signals_stop_the_vm_and_restore_the_terminal() {
    for how in [Signal::SIGTERM, Signal::SIGINT] {
        let mut place = Place::new();
        let terminal = Terminal::start(&mut place);
        signal(&place.vms[0], how);
        assert!(place.end().success(), "{how}");
        assert!(cooked(&terminal.slave), "{how}");
        assert!(!place.path("control").exists(), "{how}");
    }
}

#[test]
fn a_killed_vmm_leaves_a_working_terminal() {
    let mut place = Place::new();
    let terminal = Terminal::start(&mut place);
    signal(&place.vms[0], Signal::SIGKILL);
    place.end();
    eventually("terminal in its old mode", || cooked(&terminal.slave));
    // What it left at the path says so, and how to go on.
    let output = place.control(&["stats"]);
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(line.contains("the VM that made it is gone"), "{line}");
}

#[test]
fn a_start_that_fails_leaves_the_terminal_alone() {
    let mut place = Place::new();
    std::fs::write(place.path("kernel"), "no kernel").unwrap();
    let pty = openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    place.start(&[], |command| {
        command.stdin(end()).stdout(end()).stderr(Stdio::piped());
    });
    let mut line = String::new();
    place.vms[0].stderr.take().unwrap().read_to_string(&mut line).unwrap();
    assert_eq!(place.end().code(), Some(1));
    assert!(line.contains("cellblock: error: ") && line.contains("kernel"), "{line}");
    assert!(cooked(&pty.slave));
}

#[test]
fn the_control_commands_on_a_real_vm() {
    let mut place = Place::new();
    place.start(&["--serial", "file=console", "-c", "2"], |_| {});
    eventually("guest that is ready", || {
        std::fs::read_to_string(place.path("console")).is_ok_and(|s| s.contains("guest: ready"))
    });

    let processes = place.json("ps")["processes"].clone();
    let roles: Vec<&str> =
        processes.as_array().unwrap().iter().map(|p| p["role"].as_str().unwrap()).collect();
    assert_eq!(roles[..2], ["vmm", "spawner"]);
    assert!(roles.contains(&"blk") && roles.contains(&"serial") && roles.len() == 4, "{roles:?}");
    for process in processes.as_array().unwrap() {
        let role = &process["role"];
        assert!(process["pss_kib"].as_u64().unwrap() > 0, "{role}");
        if role == "blk" || role == "serial" {
            assert_eq!(process["seccomp"], 2);
            assert_eq!(process["no_new_privs"], true);
            assert_eq!(process["cap_eff"], "0000000000000000");
            for (kind, inode) in process["namespaces"].as_object().unwrap() {
                assert_ne!(*inode, processes[0]["namespaces"][kind], "{role} {kind}");
            }
        }
    }

    let stats = place.json("stats");
    assert_eq!(stats["state"], "running");
    assert_eq!(stats["memory"], 64 << 20);
    assert_eq!(stats["vcpus"].as_array().unwrap().len(), 2);
    assert_eq!(stats["disks"][0]["id"], "disk0");
    assert!(stats["disks"][0]["bytes_written"].as_u64().unwrap() >= 1 << 20);
    let (disk, queue) = (&stats["disks"][0], &stats["disks"][0]["queues"][0]);
    for counter in ["reads_completed", "writes_completed", "bytes_written", "io_errors"] {
        assert_eq!(disk[counter], queue[counter], "{counter}");
    }
    assert_eq!((&disk["writes"], &disk["errors"]), (&disk["writes_completed"], &disk["io_errors"]));
    assert!(stats["serials"][0]["output"].as_u64().unwrap() > 0);

    assert_eq!(place.json("pause")["epoch"], 1);
    assert_eq!(place.json("stats")["vcpus"][1]["state"], "paused");
    let again = place.control(&["pause"]);
    assert_eq!(again.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&again.stderr).lines().count(), 1);
    assert_eq!(place.json("resume")["epoch"], 1);

    let mut events = Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .current_dir(place.dir.path())
        .args(["events", "control", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(events.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap(); // it follows now
    assert!(place.control(&["stop"]).status.success());
    assert!(!place.path("control").exists());
    // Nobody holds the disk any more when the command returns.
    let spec: cellblock::spec::DiskSpec = place.path("disk").to_str().unwrap().parse().unwrap();
    spec.open().unwrap();
    assert!(place.end().success());
    let kinds: Vec<String> = std::iter::once(first)
        .chain(lines)
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap())
        .map(|event| event["event"].as_str().unwrap().to_owned())
        .collect();
    assert!(events.wait().unwrap().success());
    let at = |kind: &str| kinds.iter().position(|k| k == kind).unwrap_or_else(|| panic!("{kind}"));
    assert_eq!(kinds[0], "start");
    assert!(at("pause") < at("resume") && at("resume") < at("shutdown"), "{kinds:?}");
}

#[test]
fn a_disk_in_use_is_refused_to_the_next_vm() {
    let mut place = Place::new();
    place.start(&["--serial", "null"], |_| {});
    place.wait_for_control();
    let output = Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .current_dir(place.dir.path())
        .args(["run", "--kernel", "kernel", "--serial", "null", "--disk", "disk"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(line.contains("disk disk is in use") && line.lines().count() == 1, "{line}");

    // The lock goes with the VM, even if that is killed.
    signal(&place.vms[0], Signal::SIGKILL);
    place.end();
    std::fs::remove_file(place.path("control")).unwrap();
    eventually("disk that is free again", || {
        let spec: cellblock::spec::DiskSpec = place.path("disk").to_str().unwrap().parse().unwrap();
        spec.open().is_ok()
    });
}

#[test]
fn a_pty_is_named_and_carries_the_console() {
    let mut place = Place::new();
    let vm = place.start(&["--serial", "pty"], |command| {
        command.stderr(Stdio::piped());
    });
    let mut line = String::new();
    BufReader::new(vm.stderr.take().unwrap()).read_line(&mut line).unwrap();
    let name = line.trim_end().strip_prefix("cellblock: serial console on ").expect(&line);
    let console = File::options().read(true).write(true).open(name).unwrap();
    let seen = BufReader::new(console).lines().map(|l| l.unwrap()).find(|l| l.contains("ready"));
    assert!(seen.is_some());
    place.wait_for_control();
    assert!(place.control(&["stop"]).status.success());
    assert!(place.end().success());
}
