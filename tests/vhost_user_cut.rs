//! A machine whose disk another program serves: its snapshots, and one connection at a time.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use cellblock::control::client::Client;
use cellblock::control::protocol::EventKind;
use common::snapshot::refused_restore;
use common::{LIMIT, Options, Vm, poll, proc, send};
use nix::sys::signal::Signal;

/// A `cellblock vhost-user-blk` that serves `image` at `socket`, both in its directory, and says
/// what it does in `log`.
struct Server(Child);

impl Server {
    #[track_caller]
    fn start(dir: &Path) -> Server {
        let child = Command::new(env!("CARGO_BIN_EXE_cellblock"))
            .args(["--log", "info", "vhost-user-blk", "--die-with-parent"])
            .args(["--socket", "socket", "--disk", "image"])
            .current_dir(dir)
            .stderr(File::create(dir.join("log")).unwrap())
            .spawn()
            .unwrap();
        assert!(poll(LIMIT, || dir.join("socket").exists().then_some(())).is_some(), "no socket");
        Server(child)
    }

    /// In the place of this one, which is killed.
    #[track_caller]
    fn again(mut self, dir: &Path) -> Server {
        let family = proc::family(self.0.id() as i32);
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        proc::wait_gone(&family, LIMIT).expect("no process is left");
        fs::remove_file(dir.join("socket")).unwrap();
        Server::start(dir)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn served() -> (tempfile::TempDir, Server) {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("image")).unwrap().set_len(3 << 20).unwrap();
    let server = Server::start(dir.path());
    (dir, server)
}

fn vm_on(dir: &Path, cmdline: &str) -> Options {
    let socket = dir.join("socket");
    Vm::with(cmdline).arg("--disk").arg(format!("vhost-user={},id=far", socket.display()))
}

/// Its rings would run, under whoever copies memory.
#[test]
fn a_back_end_that_comes_back_waits_for_the_end_of_a_cut() {
    let (dir, server) = served();
    let mut vm = vm_on(dir.path(), "mode=blk mib=2 rounds=1000000 qd=16").start();
    vm.wait_for("generation=3");
    let events = vm.events();
    let mut holder = Client::connect(&vm.path("control")).unwrap();
    let cut = holder.snapshot(true, false, Duration::from_secs(5), "test", LIMIT).unwrap();
    let memory = File::from(cut.memory);
    let contents = || {
        let mut bytes = vec![0; memory.metadata().unwrap().len() as usize];
        memory.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let before = contents();
    let _server = server.again(dir.path());
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::BackEndGone { .. }));
    // It is tried five times a second.
    std::thread::sleep(Duration::from_secs(1));
    assert!(contents() == before, "memory that is held was written to");
    drop(holder);
    let back = vm.wait_for_event(&events, |kind| matches!(kind, EventKind::BackEndBack { .. }));
    assert_eq!(back.kind, EventKind::BackEndBack { id: "far".into(), resumed: true });
    vm.wait_for("verified=");
    vm.wait_for("verified=");
    vm.signal(Signal::SIGTERM);
    vm.ends_well();
}

/// Nobody would keep its writes off the image.
#[test]
fn a_back_ends_disk_is_not_restored_as_cow() {
    let (dir, _server) = served();
    let mut vm = vm_on(dir.path(), "mode=pause every=20").start();
    vm.wait_for_line("pause: n=20 ");
    let at = dir.path().join("s");
    vm.snapshot(&at, &["--stop"]);
    let before = fs::read(dir.path().join("image")).unwrap();
    let line = refused_restore(&at, &["--disk", "id=far,cow"]);
    assert!(line.contains("disk 'far' is served by another program"), "{line}");
    assert!(line.contains("leave 'cow' away"), "{line}");
    assert!(fs::read(dir.path().join("image")).unwrap() == before);
}

/// Who is slow to connect is asked again. Of two connections the first is used, and not ended for
/// the other.
#[test]
fn a_slow_spawner_makes_no_second_connection() {
    let (dir, server) = served();
    let mut vm = vm_on(dir.path(), "mode=blk mib=2 rounds=1000000 qd=16").start();
    vm.wait_for("generation=3");
    let events = vm.events();
    let spawner = vm.pid_of("spawner", "");
    send(spawner, Signal::SIGSTOP);
    let _server = server.again(dir.path());
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::BackEndGone { .. }));
    // It is asked at once, and after 5 s.
    std::thread::sleep(Duration::from_secs(6));
    send(spawner, Signal::SIGCONT);
    let is_back = |kind: &EventKind| matches!(kind, EventKind::BackEndBack { .. });
    vm.wait_for_event(&events, is_back);
    std::thread::sleep(Duration::from_secs(1)); // what must not happen gives no notice
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    assert_eq!(log.matches("a front end connected").count(), 1, "{log}");
    vm.wait_for("verified=");
    vm.wait_for("verified=");
    vm.signal(Signal::SIGTERM);
    vm.ends_well();
}
