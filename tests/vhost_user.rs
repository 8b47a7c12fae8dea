//! vhost-user with programs that are not ours to start: `cellblock vhost-user-blk` for
//! other front ends, and other back ends for `cellblock run`.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cellblock::control::protocol::{DeviceState, EventKind};
use cellblock_wire::sealed_memfd;
use common::output::Output;
use common::{LIMIT, Vm, poll, proc, send};
use nix::sys::signal::Signal;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

const MIB: u64 = 1 << 20;

/// A running `cellblock vhost-user-blk`, with an image of its own.
struct Server {
    child: Child,
    stderr: Output,
    dir: tempfile::TempDir,
}

impl Server {
    #[track_caller]
    fn start(options: &str) -> Server {
        Server::with(options, &[])
    }

    #[track_caller]
    fn with(options: &str, args: &[&str]) -> Server {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("image")).unwrap().set_len(3 * MIB).unwrap();
        let mut server = Server::start_in(dir, options, args);
        server.says("serving disk0 on socket");
        server
    }

    fn start_in(dir: tempfile::TempDir, options: &str, args: &[&str]) -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_cellblock"))
            .args(["--log", "info", "vhost-user-blk", "--die-with-parent"])
            .args(["--socket", "socket", "--disk", &format!("image{options}")])
            .args(args)
            .current_dir(dir.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = Output::collect(File::from(OwnedFd::from(child.stderr.take().unwrap())));
        Server { child, stderr, dir }
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    #[track_caller]
    fn says(&mut self, text: &str) -> String {
        match self.stderr.wait_for(text, LIMIT) {
            Some(line) => line,
            None => panic!("the server does not say {text:?}:\n{}", self.stderr.text()),
        }
    }

    /// Waits for the next front end; returns the block process that serves it.
    #[track_caller]
    fn serves(&mut self) -> i32 {
        let text = match self.stderr.wait_for_line("a front end connected", LIMIT) {
            Some(line) => line,
            None => panic!("nobody connected:\n{}", self.stderr.text()),
        };
        text.rsplit_once("pid=").unwrap().1.parse().unwrap()
    }

    /// Ends it by a signal; everything of it goes, and it was satisfied.
    #[track_caller]
    fn ends_well(mut self, signal: Signal) {
        let family = proc::family(self.pid());
        send(self.pid(), signal);
        let status = poll(LIMIT, || self.child.try_wait().unwrap()).expect("it ends");
        assert_eq!(status.code(), Some(0), "{}", self.stderr.text());
        assert!(!self.path("socket").exists(), "the socket is left");
        proc::wait_gone(&family, Duration::from_secs(1)).expect("no process is left");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects and asks what any front end asks first.
fn connect(socket: &Path) -> (UnixStream, u64) {
    let stream = UnixStream::connect(socket).unwrap();
    let front_end = Frontend::from_stream(stream.try_clone().unwrap(), 1);
    front_end.set_owner().unwrap();
    let features = front_end.get_features().unwrap();
    (stream, features)
}

/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;

#[test]
fn front_ends_come_and_go() {
    let mut server = Server::start(",id=disk0");
    let socket = fs::metadata(server.path("socket")).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o600, "others may connect");
    for _ in 0..3 {
        let (stream, features) = connect(&server.path("socket"));
        assert_ne!(features & VERSION_1, 0);
        server.says("a front end connected");
        drop(stream);
        server.says("the front end disconnected");
    }
    assert!(!server.stderr.text().contains("error"), "{}", server.stderr.text());
    server.ends_well(Signal::SIGTERM);
}

#[test]
fn each_front_end_has_a_jailed_process_of_its_own() {
    let mut server = Server::start("");
    let (first, _) = connect(&server.path("socket"));
    let pid = server.serves();
    let facts = proc::status(pid, pid);
    assert_eq!(facts["Seccomp"], "2");
    assert_eq!(facts["NoNewPrivs"], "1");
    assert_eq!(facts["CapEff"].trim_start_matches('0'), "");
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let own = proc::namespace(std::process::id() as i32, kind);
        assert_ne!(proc::namespace(pid, kind), own, "{kind}");
    }
    let facts = proc::status(server.pid(), server.pid());
    assert_eq!((facts["Seccomp"].as_str(), facts["NoNewPrivs"].as_str()), ("2", "1"));

    // The next one waits for its turn, and gets another process.
    let second = UnixStream::connect(server.path("socket")).unwrap();
    let front_end = Frontend::from_stream(second, 1);
    std::thread::sleep(Duration::from_millis(50)); // what must not happen gives no notice
    assert_eq!(server.stderr.text().matches("connected").count(), 1);
    drop(first);
    assert_ne!(front_end.get_features().unwrap() & VERSION_1, 0);
    assert_ne!(server.serves(), pid);
    server.ends_well(Signal::SIGINT);
}

#[test]
fn a_dead_block_process_is_named_and_the_next_front_end_served() {
    let mut server = Server::start("");
    let (stream, _) = connect(&server.path("socket"));
    let pid = server.serves();
    send(pid, Signal::SIGKILL);
    let line = server.says("device process died");
    assert!(line.contains("error: "), "{line}");
    let text = server.stderr.text();
    assert!(text.contains(&format!("pid={pid}")) && text.contains("signal 9"), "{text}");
    drop(stream);

    // What a front end gets wrong ends its own process only.
    let stream = UnixStream::connect(server.path("socket")).unwrap();
    std::io::Write::write_all(&mut &stream, &[0xff; 64]).unwrap();
    server.says("device process died");
    drop(stream);

    let (_stream, features) = connect(&server.path("socket"));
    assert_ne!(features & VERSION_1, 0);
    server.ends_well(Signal::SIGTERM);
}

/// One that does not even end with its front end keeps nobody else waiting.
#[test]
fn a_block_process_that_hangs_is_ended_and_the_next_front_end_served() {
    let mut server = Server::with("", &["--device-timeout", "400ms"]);
    let (stream, _) = connect(&server.path("socket"));
    let pid = server.serves();
    // As long as it lives it is left alone.
    std::thread::sleep(Duration::from_secs(1));
    assert!(!server.stderr.text().contains("no sign of life"));
    send(pid, Signal::SIGSTOP);
    drop(stream);
    let (_stream, features) = connect(&server.path("socket"));
    assert_ne!(features & VERSION_1, 0);
    let line = server.says("no sign of life in 400ms: it is ended");
    assert!(line.contains(&format!("pid={pid}")), "{line}");
    server.ends_well(Signal::SIGTERM);
}

/// Sends the messages of a front end one by one and leaves after `steps` of them.
fn leave_after(socket: &Path, steps: usize) {
    let stream = UnixStream::connect(socket).unwrap();
    let mut front_end = Frontend::from_stream(stream, 1);
    let ram = sealed_memfd("ram", 1 << 16).unwrap();
    let event = || vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let (kick, call) = (event(), event());
    let memory = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 1 << 16,
        userspace_addr: 0,
        mmap_offset: 0,
        mmap_handle: ram.as_raw_fd(),
    };
    let ring = VringConfigData {
        queue_max_size: 16,
        queue_size: 16,
        flags: 0,
        desc_table_addr: 0,
        avail_ring_addr: 0x1000,
        used_ring_addr: 0x2000,
        log_addr: None,
    };
    // A flush, available from the start.
    let file = File::from(ram.try_clone().unwrap());
    let write = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
    write(0, &0x3000u64.to_le_bytes());
    write(8, &[16, 0, 0, 0, 1, 0, 1, 0]);
    write(16, &0x3100u64.to_le_bytes());
    write(24, &[1, 0, 0, 0, 2, 0, 0, 0]);
    write(0x1002, &[1, 0]);
    write(0x3000, &[4]);
    type Step<'a> = &'a dyn Fn(&mut Frontend) -> vhost::Result<()>;
    let all: [Step<'_>; LEAVES] = [
        &|f| f.set_owner(),
        &|f| f.get_features().map(drop),
        &|f| f.get_protocol_features().and_then(|p| f.set_protocol_features(p)).map(drop),
        &|f| f.set_features(VERSION_1 | 1 << 30),
        &|f| f.set_mem_table(&[memory]).map(drop),
        &|f| f.set_vring_num(0, 16),
        &|f| f.set_vring_addr(0, &ring),
        &|f| f.set_vring_base(0, 0),
        &|f| f.set_vring_call(0, &call),
        &|f| f.set_vring_kick(0, &kick),
        &|f| f.set_vring_enable(0, true),
        &|f| f.get_vring_base(0).map(drop),
    ];
    for step in &all[..steps] {
        step(&mut front_end).unwrap();
    }
}

/// How many messages it can leave after.
const LEAVES: usize = 12;

#[test]
fn front_ends_that_leave_anywhere_leave_the_service() {
    let mut server = Server::start("");
    for steps in 0..=LEAVES {
        leave_after(&server.path("socket"), steps);
    }
    // Many at once, of which most are gone before it is their turn.
    let crowd: Vec<_> =
        (0..64).map(|_| UnixStream::connect(server.path("socket")).unwrap()).collect();
    drop(crowd);
    let (_stream, features) = connect(&server.path("socket"));
    assert_ne!(features & VERSION_1, 0);
    assert!(!server.stderr.text().contains("error: "), "{}", server.stderr.text());
    server.says("the front end disconnected");
    server.ends_well(Signal::SIGTERM);
}

#[test]
fn a_front_end_that_stops_in_a_message_holds_nothing_up() {
    use std::io::Write;
    let set_features = [2u32, 1, 8].map(u32::to_ne_bytes).concat();
    for part in [&set_features[..0], &set_features[..5], &set_features[..]] {
        // Its end lets the next one in...
        let mut server = Server::start("");
        let mut stream = UnixStream::connect(server.path("socket")).unwrap();
        stream.write_all(part).unwrap();
        server.serves();
        drop(stream);
        let (stream, _) = connect(&server.path("socket"));
        server.serves();
        drop(stream);
        // ...and the server's end does not wait for it.
        let mut stream = UnixStream::connect(server.path("socket")).unwrap();
        stream.write_all(part).unwrap();
        server.serves();
        server.ends_well(Signal::SIGTERM);
    }
}

#[test]
fn what_cannot_be_served_is_said() {
    let run = |args: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("taken"), "").unwrap();
        File::create(dir.path().join("image")).unwrap().set_len(MIB).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_cellblock"))
            .arg("vhost-user-blk")
            .args(args)
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(dir.path().join("taken").exists());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for (args, status, part) in [
        (&["--socket", "taken", "--disk", "image"][..], 1, "exists and is no socket; choose"),
        (&["--socket", "s", "--disk", "none"], 1, "opening disk none"),
        (&["--socket", "no/s", "--disk", "image"], 1, "make the directory first"),
        (&["--socket", "s", "--disk", "image,rw"], 2, "unknown key 'rw'"),
        (&["--socket", "s", "--disk", "vhost-user=x"], 2, "cannot be served again"),
        (&["--disk", "image"], 2, "--socket <PATH>"),
        (&["--socket", "s"], 2, "--disk <SPEC>"),
    ] {
        let (code, text) = run(args);
        assert_eq!((code, text.lines().count()), (Some(status), 1), "{text}");
        assert!(text.contains(part), "{text}");
    }
}

/// A vhost-user-blk back end of somebody else's: QEMU's.
struct StorageDaemon(Child);

impl StorageDaemon {
    /// In the place of one that was killed.
    #[track_caller]
    fn again(dir: &Path) -> StorageDaemon {
        for name in ["pid", "socket"] {
            std::fs::remove_file(dir.join(name)).unwrap();
        }
        StorageDaemon::start(dir)
    }

    /// Serves `image` at `socket`, both in `dir`.
    #[track_caller]
    fn start(dir: &Path) -> StorageDaemon {
        StorageDaemon::with(dir, 1)
    }

    /// As [`StorageDaemon::start`], with so many queues.
    #[track_caller]
    fn with(dir: &Path, queues: u16) -> StorageDaemon {
        let export = "type=vhost-user-blk,id=e,node-name=disk,writable=on";
        let export = format!("{export},num-queues={queues},addr.type=unix,addr.path=socket");
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", "driver=file,node-name=disk,filename=image"])
            .args(["--export", &export])
            // Written when everything is set up; the socket is there before it listens.
            .args(["--pidfile", "pid"])
            .current_dir(dir)
            .spawn();
        let daemon = StorageDaemon(child.unwrap_or_else(|error| {
            panic!(
                "qemu-storage-daemon: {error}; install the Debian package qemu-system-common, \
                 or qemu-utils on newer releases"
            )
        }));
        poll(LIMIT, || dir.join("pid").exists().then_some(())).expect("it listens");
        daemon
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn image_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("image")).unwrap().set_len(3 * MIB).unwrap();
    dir
}

/// Our VM with the disk at `socket`.
fn vm_on(socket: &Path, cmdline: &str) -> common::Options {
    vm_with(socket, "", cmdline)
}

/// As [`vm_on`], with `options` in the disk's SPEC.
fn vm_with(socket: &Path, options: &str, cmdline: &str) -> common::Options {
    let spec = format!("vhost-user={},id=far{options}", socket.display());
    Vm::with(cmdline).arg("--disk").arg(spec)
}

#[test]
fn a_guest_of_ours_on_qemu_storage_daemon() {
    let dir = image_dir();
    let _daemon = StorageDaemon::start(dir.path());
    for (round, how) in
        ["qd=1", "qd=32 irq", "qd=32 irq event-idx indirect segments=4"].iter().enumerate()
    {
        let seed = 20 + round;
        let cmdline = format!("mode=blk mib=2 seed={seed} {how}");
        let mut vm = vm_on(&dir.path().join("socket"), &cmdline).start();
        let line = vm.wait_for_line("blk: capacity=");
        assert!(line.starts_with("blk: capacity=6144 ro=0 flush=1"), "{line}");
        vm.wait_for(&format!("blk: verified=2097152 bytes generation={seed}"));
        vm.wait_for("blk: ok");
        vm.ends_well();
        let image = fs::read(dir.path().join("image")).unwrap();
        // Of each sector the guest writes its number and the seed: see its `pattern.rs`.
        for (sector, bytes) in image.chunks(512).enumerate().take(4096) {
            assert_eq!(bytes[8..16], (sector as u64).to_le_bytes(), "{how}");
            assert_eq!(bytes[16..24], (seed as u64).to_le_bytes(), "{how}");
        }
    }
}

#[test]
fn a_guest_of_ours_on_a_block_process_of_ours() {
    let mut server = Server::start("");
    let mut vm = vm_on(&server.path("socket"), "mode=blk mib=2 rounds=1000000 qd=8 irq").start();
    vm.wait_for_line("blk: capacity=6144 ro=0");
    vm.wait_for("generation=3");
    let stats = vm.stats();
    assert_eq!((stats.disks[0].id.as_str(), stats.disks[0].size), ("far", 3 * MIB));
    assert!(!stats.disks[0].read_only && stats.disks[0].pid.is_none());
    assert_eq!(stats.disks[0].state, DeviceState::Running);
    server.says("a front end connected");
    let throttle = Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .arg("throttle")
        .arg(vm.path("control"))
        .args(["far", "iops=1"])
        .output()
        .unwrap();
    assert_eq!(throttle.status.code(), Some(1), "no limit of ours holds there");
    let said = String::from_utf8_lossy(&throttle.stderr).into_owned();
    assert!(said.contains("another program's back end serves this disk"), "{said}");
    vm.signal(Signal::SIGTERM);
    vm.ends_well();
    server.says("the front end disconnected");
    server.ends_well(Signal::SIGTERM);
}

/// As many queues as the back end has and the machine has vCPUs, or as many as are asked for.
#[test]
fn a_disk_of_another_program_has_several_queues() {
    let dir = image_dir();
    let _daemon = StorageDaemon::with(dir.path(), 4);
    let server = Server::start(",queues=4");
    for socket in [dir.path().join("socket"), server.path("socket")] {
        for (cpus, options, queues) in
            [(1, "", 1), (2, "", 2), (8, "", 4), (1, ",queues=4", 4), (8, ",queues=3", 3)]
        {
            let what = format!("{} {cpus}{options}", socket.display());
            let mut vm = vm_with(&socket, options, &format!("mode=blk queues={}", queues + 1))
                .cpus(cpus)
                .start();
            let refusal = format!("FAIL: the disk has {queues} queues only");
            assert!(
                vm.console.wait_for(&refusal, LIMIT).is_some(),
                "{what}: {}",
                vm.console.text()
            );
            vm.wait_exit();
            let how = format!("mode=blk mib=2 queues={queues} qd=32 irq event-idx rounds=2");
            let mut vm = vm_with(&socket, options, &how).cpus(cpus).start();
            vm.wait_for("blk: verified=2097152 bytes generation=2");
            vm.wait_for("blk: ok");
            vm.ends_well();
        }
        let mut vm = vm_with(&socket, ",queues=5", "mode=blk").start();
        assert_eq!(vm.wait_exit().code(), Some(1));
        let line = vm.stderr.finished(LIMIT);
        assert!(line.contains("far has 4 queues, not 5: give queues=4"), "{line}");
    }
    server.ends_well(Signal::SIGTERM);
}

/// A back end with a record of requests goes on where it died.
#[test]
fn a_back_end_that_keeps_a_record_loses_nothing() {
    let mut server = Server::start(",queues=4");
    let how = "mode=blk mib=2 rounds=1000000 qd=16 queues=4";
    let mut vm = vm_with(&server.path("socket"), ",queues=4", how).start();
    vm.wait_for("generation=3");
    let events = vm.events();
    for round in 1..=3 {
        send(server.serves(), Signal::SIGKILL);
        let back = poll(LIMIT, || (vm.stats().disks[0].restarts >= round).then_some(()));
        assert!(back.is_some(), "{}", vm.stderr.text());
        // All it wrote is verified, in every round.
        let rounds = |vm: &Vm| vm.console.text().matches("verified=").count();
        let before = rounds(&vm);
        let more = poll(LIMIT, || (rounds(&vm) > before + 2).then_some(()));
        assert!(more.is_some(), "{}", vm.console.text());
    }
    let resumed = EventKind::BackEndBack { id: "far".into(), resumed: true };
    assert_eq!(events.all().into_iter().filter(|event| event.kind == resumed).count(), 3);
    vm.signal(Signal::SIGTERM);
    vm.ends_well();
}

/// A disk that another program serves goes along with a snapshot, if that gives its state.
#[test]
fn a_back_end_that_gives_its_state_goes_along_with_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let snapshot = |vm: &Vm, options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        command.arg("snapshot").arg(vm.path("control")).arg(&at).args(options);
        command.output().unwrap()
    };
    let mut server = Server::start(",queues=2");
    let mut vm = vm_on(&server.path("socket"), "mode=pause every=20").cpus(2).start();
    vm.wait_for_line("pause: n=40 ");
    server.serves();
    // Nobody knows what it writes to memory.
    let live = snapshot(&vm, &["--live"]);
    let line = String::from_utf8(live.stderr).unwrap();
    assert!(
        !live.status.success() && line.contains("disk far") && line.contains("--live"),
        "{line}"
    );
    vm.wait_for_line("pause: n=");
    let taken = snapshot(&vm, &[]);
    assert!(taken.status.success(), "{taken:?}");
    vm.wait_for_line("pause: n=");
    fs::remove_dir_all(&at).unwrap();
    let taken = snapshot(&vm, &["--stop"]);
    assert!(taken.status.success(), "{taken:?}");
    for _ in 0..2 {
        let mut restored = Vm::restore(&at).start();
        restored.wait_for_line("pause: n=");
        server.serves();
        restored.say(b"q");
        restored.wait_for("pause: ok");
        assert!(!restored.console.text().contains("FAIL"), "{}", restored.console.text());
        restored.ends_well();
    }
    let mut lazy = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    lazy.arg("restore").arg(&at).args(["--serial", "null", "--memory-mode", "lazy"]);
    let line = String::from_utf8(lazy.output().unwrap().stderr).unwrap();
    assert!(line.contains("cannot take part in lazy memory"), "{line}");
    server.ends_well(Signal::SIGTERM);
    // One that does not give it is the reason why there is no snapshot.
    fs::remove_dir_all(&at).unwrap();
    let image = image_dir();
    let _daemon = StorageDaemon::start(image.path());
    let mut vm = vm_on(&image.path().join("socket"), "mode=pause every=20").start();
    vm.wait_for_line("pause: n=20 ");
    let refused = snapshot(&vm, &[]);
    let line = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && line.contains("F_DEVICE_STATE"), "{line}");
    vm.wait_for_line("pause: n=");
}

#[test]
fn a_back_end_that_dies_and_comes_back_is_used_again() {
    let dir = image_dir();
    let daemon = StorageDaemon::start(dir.path());
    let mut vm = vm_on(&dir.path().join("socket"), "mode=blk mib=2 rounds=1000000 qd=4").start();
    vm.wait_for("generation=3");
    let events = vm.events();
    drop(daemon);
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::BackEndGone { id } if id == "far"));
    vm.wait_for_error("the vhost-user back end is gone");
    assert_eq!(vm.stats().disks[0].state, DeviceState::Dead);
    // The machine is as alive as before.
    vm.pause();
    vm.resume();
    // This one keeps no record of what it left unfinished: its driver has to begin anew.
    let daemon = StorageDaemon::again(dir.path());
    let back = vm.wait_for_event(&events, |kind| matches!(kind, EventKind::BackEndBack { .. }));
    assert_eq!(back.kind, EventKind::BackEndBack { id: "far".into(), resumed: false });
    assert_eq!(
        (vm.stats().disks[0].state, vm.stats().disks[0].restarts),
        (DeviceState::Running, 1)
    );
    drop(daemon);
    vm.signal(Signal::SIGTERM);
    vm.ends_well();
}

#[test]
fn a_silent_back_end_is_given_up() {
    let dir = image_dir();
    let socket = dir.path().join("socket");
    let start = |what: &str| {
        let begun = Instant::now();
        let mut vm = vm_on(&socket, "mode=blk").start();
        let status = vm.wait_exit();
        let line = vm.stderr.finished(LIMIT);
        assert_eq!((status.code(), line.lines().count()), (Some(1), 1), "{line}");
        assert!(line.contains(what), "{line}");
        assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());
    };
    start("No such file or directory (os error 2); start the back end first");
    // It accepts nobody's messages; the connection waits in its queue.
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    start("far did not answer within 5s");
    // Nor anybody any more: with that one still in it, the queue is full.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    start("it serves another front end, or hangs");
    drop(listener);
    start("Connection refused (os error 111); start the back end first");
}

/// The budget is the disk's, whoever is connected to it, and by however many processes it is
/// served: each would otherwise begin with a full bucket.
#[test]
fn front_ends_that_come_again_have_spent_what_they_had() {
    let mut server = Server::start(",iops=2000,iops-burst=2000");
    let begun = Instant::now();
    let mut vm = vm_on(&server.path("socket"), "mode=storm n=6000 qd=16 mib=1").start();
    for _ in 0..3 {
        let process = server.serves();
        std::thread::sleep(Duration::from_millis(150));
        send(process, Signal::SIGKILL);
    }
    server.serves();
    vm.wait_for("storm: ok");
    vm.ends_well();
    // It does not find an empty disk, and looks at nothing.
    let mut vm = vm_on(&server.path("socket"), "mode=storm n=2000 qd=16 mib=1 errors").start();
    vm.wait_for("storm: ok");
    vm.ends_well();
    // So many and 256 reads between, less the burst, at 2000 a second.
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(3128), "{took:?}");
    server.ends_well(Signal::SIGTERM);
}
