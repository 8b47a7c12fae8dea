//! The control socket: a real server in this process, real clients, the real program.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cellblock::control::protocol::{
    CapSet, DeviceState, DiskStats, EventKind, Limits, Process, Reply, Request, SerialStats,
    Shutdown, State, Stats, Thread, VcpuStats,
};
use cellblock::control::server::{
    ControlServer, HISTORY, Handler, MAX_CLIENTS, MAX_LINE, Response, Token,
};
use cellblock_devices::protocol::counters::VirtioBlkCountersSnapshot;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

/// Answers as a VM would; a `ps` is answered in a later round.
#[derive(Default)]
struct Vm {
    paused: bool,
    epoch: u64,
    stopped: bool,
    later: Vec<Token>,
}

impl Handler for Vm {
    fn handle(&mut self, request: Request, token: Token) -> Response {
        Response::Now(match request {
            Request::Pause if self.paused => {
                Reply::error("the VM is paused already", Some("resume it first"))
            }
            Request::Pause => {
                self.paused = true;
                self.epoch += 1;
                Reply::Pause { epoch: self.epoch, took_us: 1234 }
            }
            Request::Resume => {
                self.paused = false;
                Reply::Resume { epoch: self.epoch, took_us: 5 }
            }
            Request::Stop => {
                self.stopped = true;
                Reply::Stop
            }
            Request::Stats => Reply::Stats(Box::new(stats(self.paused))),
            Request::Ps => {
                self.later.push(token);
                return Response::Later;
            }
            Request::Throttle { id, bw, bw_burst, iops, iops_burst } if id == "disk0" => {
                Reply::Throttle { id, limits: Limits { bw, bw_burst, iops, iops_burst } }
            }
            Request::Throttle { id, .. } => {
                Reply::error(format!("there is no disk {id}"), Some("see 'cellblock stats'"))
            }
            Request::Snapshot { .. }
            | Request::Held
            | Request::Kept { .. }
            | Request::AwaitTrigger
            | Request::Reset => Reply::error("not of this VM", None),
            Request::Events => unreachable!("the server's own"),
        })
    }
}

fn stats(paused: bool) -> Stats {
    let state = if paused { State::Paused } else { State::Running };
    Stats {
        version: "1".into(),
        pid: 7,
        state,
        epoch: 0,
        uptime_us: 1_500_000,
        phases: Vec::new(),
        memory: 64 << 20,
        vcpus: vec![VcpuStats { id: 0, state, exits: None }],
        disks: vec![DiskStats {
            id: "disk0".into(),
            pid: Some(8),
            restarts: 0,
            state: DeviceState::Running,
            read_only: false,
            size: 1 << 20,
            reads: 1,
            writes: 2,
            flushes: 3,
            errors: 0,
            throttle: Default::default(),
            counters: VirtioBlkCountersSnapshot {
                bytes_read: 4,
                bytes_written: 5,
                throttled_count: 6,
                ..Default::default()
            },
            queues: vec![Default::default(), Default::default()],
        }],
        serials: vec![SerialStats {
            id: "com1".into(),
            pid: None,
            restarts: 0,
            state: DeviceState::Dead,
            output: 1,
            input: 2,
            dropped: 3,
        }],
        plugin_socket: None,
    }
}

fn processes() -> Vec<Process> {
    let process = |role: &str, id: &str, inode| Process {
        role: role.into(),
        id: id.into(),
        pid: 7,
        uid: 0,
        seccomp: 2,
        no_new_privs: true,
        cap_eff: CapSet(0),
        cap_prm: CapSet(0),
        cap_bnd: CapSet(0),
        namespaces: [("net".to_owned(), inode)].into(),
        rss_kib: 1000,
        pss_kib: 500,
        threads: vec![Thread { name: "main".into(), tid: 7, seccomp: 2 }],
    };
    vec![process("vmm", "", 1), process("blk", "disk0", 2)]
}

/// Drives a server in a thread, as a VM's main loop does, and measures its rounds.
struct Running {
    dir: tempfile::TempDir,
    events: Sender<EventKind>,
    end: Option<JoinHandle<Duration>>,
}

impl Running {
    fn start() -> Running {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let server = ControlServer::bind(&dir.path().join("vm")).unwrap();
        let (events, inbox) = channel();
        let end = Some(std::thread::spawn(move || main_loop(server, &inbox)));
        Running { dir, events, end }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("vm")
    }

    fn connect(&self) -> Talk {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Talk(BufReader::new(stream))
    }

    fn cli(&self, args: &[&str]) -> Output {
        let (command, rest) = args.split_first().unwrap();
        Command::new(env!("CARGO_BIN_EXE_cellblock"))
            .arg(command)
            .arg(self.path())
            .args(rest)
            .output()
            .unwrap()
    }

    /// Stops the VM and returns the longest round of its main loop.
    fn stop(mut self) -> Duration {
        assert_eq!(self.connect().ask("stop")["reply"], "stop");
        self.end.take().unwrap().join().expect("the main loop lives")
    }
}

fn main_loop(mut server: ControlServer, inbox: &Receiver<EventKind>) -> Duration {
    let mut vm = Vm::default();
    let mut longest = Duration::ZERO;
    while !vm.stopped {
        let mut fds = [PollFd::new(server.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(5u8)).unwrap();
        let start = Instant::now();
        server.poll(&mut vm);
        for token in vm.later.drain(..) {
            server.complete(token, &Reply::Ps { processes: processes() });
            server.complete(token, &Reply::error("a second answer", None));
        }
        while let Ok(kind) = inbox.try_recv() {
            server.broadcast(kind);
        }
        longest = longest.max(start.elapsed());
    }
    server.broadcast(EventKind::Shutdown { reason: Shutdown::Stopped, message: None });
    let start = Instant::now();
    drop(server.finish(Duration::from_millis(200)));
    assert!(start.elapsed() < Duration::from_secs(1), "the end is bounded");
    longest
}

struct Talk(BufReader<UnixStream>);

impl Talk {
    fn send(&mut self, line: &str) {
        self.0.get_mut().write_all(line.as_bytes()).unwrap();
    }

    fn ask(&mut self, request: &str) -> Value {
        self.send(&format!("{{\"request\":\"{request}\"}}\n"));
        self.line().expect("an answer")
    }

    /// The next line, or `None` at the end of the stream.
    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).expect("JSON")),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(e) => panic!("reading: {e}"),
        }
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn requests_are_answered_in_order_on_one_connection() {
    let vm = Running::start();
    let mut talk = vm.connect();
    assert_eq!(talk.ask("pause")["epoch"], 1);
    let refusal = talk.ask("pause");
    assert_eq!(refusal["reply"], "error");
    assert_eq!(refusal["remedy"], "resume it first");
    assert_eq!(talk.ask("stats")["state"], "paused");
    assert_eq!(talk.ask("ps")["processes"][1]["id"], "disk0");

    // Many at once, a late answer among them: as many answers, in the same order.
    let round = ["resume", "ps", "stats", "pause"];
    let all: String =
        (0..100).flat_map(|_| round).map(|r| format!(" {{\"request\":\"{r}\"}}\r\n\n")).collect();
    talk.send(&all);
    for n in 0..100 {
        for request in round {
            let reply = talk.line().expect("an answer");
            assert_eq!(reply["reply"], request, "round {n}: {reply}");
        }
    }
    vm.stop();
}

#[test]
fn a_client_that_stops_sending_still_gets_its_answers() {
    let vm = Running::start();
    let mut talk = vm.connect();
    talk.send("{\"request\":\"ps\"}\n{\"request\":\"stats\"}\n");
    talk.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(talk.line().unwrap()["reply"], "ps");
    assert_eq!(talk.line().unwrap()["reply"], "stats");
    assert_eq!(talk.line(), None);
    vm.stop();
}

#[test]
fn a_client_that_leaves_with_a_request_in_flight_is_forgotten() {
    let vm = Running::start();
    for _ in 0..3 * MAX_CLIENTS {
        vm.connect().send("{\"request\":\"ps\"}\n{\"request\":\"ps\"}\n");
    }
    // Every place is free again.
    let deadline = Instant::now() + Duration::from_secs(10);
    while vm.connect().ask("stats")["reply"] == "error" {
        assert!(Instant::now() < deadline, "places are not freed");
    }
    vm.stop();
}

/// It may have left something undone, like any that goes.
#[test]
fn a_client_that_is_found_gone_when_it_is_told_something_is_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm");
    let mut server = ControlServer::bind(&path).unwrap();
    let mut vm = Vm::default();
    let connect = |request: &str| {
        let mut stream = UnixStream::connect(&path).unwrap();
        writeln!(stream, "{{\"request\":\"{request}\"}}").unwrap();
        stream
    };
    let streams = [connect("ps"), connect("events")];
    let end = Instant::now() + Duration::from_secs(10);
    while vm.later.is_empty() || server.clients() < 2 {
        assert!(Instant::now() < end);
        server.poll(&mut vm);
    }
    server.poll(&mut vm);
    drop(streams);
    server.complete(vm.later[0], &Reply::Ps { processes: processes() });
    assert_eq!((server.take_lost().len(), server.clients()), (1, 1));
    server.broadcast(EventKind::Start);
    assert_eq!((server.take_lost().len(), server.clients()), (1, 0));
    assert!(server.take_lost().is_empty());
}

#[test]
fn garbage_is_answered_with_an_error_and_the_end() {
    let vm = Running::start();
    let deep = format!("{}\n", "[".repeat(60_000));
    for bad in ["pause\n", "{}\n", "{\"request\":\"explode\"}\n", "\0\0\0\n", deep.as_str()] {
        let mut talk = vm.connect();
        talk.send(bad);
        let reply = talk.line().expect("an error");
        assert_eq!(reply["reply"], "error");
        assert_eq!(talk.line(), None, "closed after {reply}");
    }
    // Bytes that are not even text.
    let mut talk = vm.connect();
    talk.0.get_mut().write_all(&[0xff, 0xfe, b'\n']).unwrap();
    assert_eq!(talk.line().expect("an error")["reply"], "error");
    assert_eq!(vm.connect().ask("stats")["reply"], "stats");
    vm.stop();
}

#[test]
fn a_line_without_end_is_cut_off() {
    let vm = Running::start();
    let mut talk = vm.connect();
    // The server may close before all of it is written.
    let _ = talk.0.get_mut().write_all(&vec![b'x'; 16 * MAX_LINE]);
    if let Some(reply) = talk.line() {
        assert!(reply["message"].as_str().unwrap().contains("65536 bytes"), "{reply}");
        assert_eq!(talk.line(), None);
    }
    // Up to the limit, a line is read: this one is a request with much white space.
    let mut talk = vm.connect();
    let request = "{\"request\":\"stats\"}\n";
    talk.send(&format!("{}{request}", " ".repeat(MAX_LINE - request.len() - 1)));
    assert_eq!(talk.line().unwrap()["reply"], "stats");
    vm.stop();
}

#[test]
fn a_client_too_many_is_told_so() {
    let vm = Running::start();
    let mut all: Vec<Talk> = (0..MAX_CLIENTS).map(|_| vm.connect()).collect();
    for talk in &mut all {
        assert_eq!(talk.ask("stats")["reply"], "stats");
    }
    let refused = vm.cli(&["stats"]);
    assert_eq!(refused.status.code(), Some(1));
    let line = text(&refused.stderr);
    assert!(line.contains("has 64 control clients already; end one"), "{line}");
    drop(all.pop());
    let deadline = Instant::now() + Duration::from_secs(10);
    while !vm.cli(&["stats"]).status.success() {
        assert!(Instant::now() < deadline, "a place is free again");
    }
    all.pop();
    std::thread::sleep(Duration::from_millis(50));
    vm.stop();
}

#[test]
fn readers_that_do_not_read_neither_block_nor_grow() {
    let vm = Running::start();
    // One asks without ever reading an answer, one subscribes without reading.
    let mut greedy = vm.connect();
    greedy.0.get_ref().set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let flood = "{\"request\":\"ps\"}\n".repeat(1 << 16);
    // Back pressure: its requests are not even read any more.
    greedy.0.get_mut().write_all(flood.as_bytes()).expect_err("the flood is not swallowed");
    let mut deaf = vm.connect();
    assert_eq!(deaf.ask("events")["reply"], "events");
    let mut other = vm.connect();
    let message = "x".repeat(1000);
    for _ in 0..3000 {
        let event = EventKind::Shutdown { reason: Shutdown::Error, message: Some(message.clone()) };
        vm.events.send(event).unwrap();
    }
    for _ in 0..100 {
        assert_eq!(other.ask("stats")["reply"], "stats");
    }
    // The subscriber was dropped: what its socket held is all there is.
    let mut rest = Vec::new();
    let _ = deaf.0.read_to_end(&mut rest);
    assert!(rest.len() < 3000 * 1000, "{} bytes", rest.len());
    let longest = vm.stop();
    assert!(longest < Duration::from_secs(1), "a round took {longest:?}");
}

#[test]
fn subscribers_get_the_recent_past_and_what_follows() {
    let vm = Running::start();
    for epoch in 1..=HISTORY as u64 + 10 {
        vm.events.send(EventKind::Pause { epoch, took_us: 1 }).unwrap();
    }
    std::thread::sleep(Duration::from_millis(100));
    let mut talk = vm.connect();
    assert_eq!(talk.ask("events")["reply"], "events");
    vm.events.send(EventKind::Resume { epoch: 1 }).unwrap();
    for seq in 11..=HISTORY as u64 + 10 {
        let event = talk.line().unwrap();
        assert_eq!((&event["seq"], &event["event"]), (&seq.into(), &"pause".into()));
        assert!(event["time_us"].as_u64().unwrap() > 1_700_000_000_000_000);
    }
    assert_eq!(talk.line().unwrap()["event"], "resume");
    vm.stop();
    assert_eq!(talk.line().unwrap()["event"], "shutdown");
    assert_eq!(talk.line(), None);
}

#[test]
fn the_program_pauses_resumes_shows_and_stops() {
    let vm = Running::start();
    let paused = vm.cli(&["pause"]);
    assert_eq!(text(&paused.stdout), "paused in 1.234 ms (pause 1)\n");
    let again = vm.cli(&["pause"]);
    assert_eq!(again.status.code(), Some(1));
    assert_eq!(
        text(&again.stderr),
        "cellblock: error: the VM is paused already; resume it first\n"
    );
    let resumed = vm.cli(&["resume", "--json"]);
    assert_eq!(text(&resumed.stdout), "{\"reply\":\"resume\",\"epoch\":1,\"took_us\":5}\n");

    let throttle = vm.cli(&["throttle", "disk0", "bw=100M", "bw-burst=1G"]);
    assert_eq!(
        text(&throttle.stdout),
        "disk0\nbytes     100.0 MiB a second, 1.0 GiB at once\nrequests  no limit\n"
    );
    for (limits, line) in [
        ("iops", "'iops' is not a limit: it is a number of requests"),
        ("ops=1", "'ops=1' is not a limit: the keys are bw, bw-burst, iops, iops-burst"),
    ] {
        let wrong = vm.cli(&["throttle", "disk0", limits]);
        assert_eq!(wrong.status.code(), Some(2));
        assert_eq!(text(&wrong.stderr), format!("cellblock: error: {line}\n"));
    }
    assert_eq!(vm.cli(&["throttle", "disk9", "iops=1"]).status.code(), Some(1));
    let stats = vm.cli(&["stats"]);
    for part in ["running", "64 MiB", "disk0", "1.0 MiB", "com1", "dead"] {
        assert!(text(&stats.stdout).contains(part), "{part}: {}", text(&stats.stdout));
    }
    let stats: Value = serde_json::from_slice(&vm.cli(&["stats", "--json"]).stdout).unwrap();
    assert_eq!(stats["disks"][0]["bytes_written"], 5);
    assert_eq!(stats["disks"][0]["throttled_count"], 6);
    assert_eq!(stats["disks"][0]["queues"][1]["io_errors"], 0);
    assert_eq!(stats["serials"][0]["pid"], Value::Null);

    let ps = vm.cli(&["ps"]);
    let rows: Vec<&str> = text(&ps.stdout).lines().collect();
    assert_eq!(rows.len(), 3);
    assert!(rows[2].starts_with("blk") && rows[2].contains("net"), "{}", rows[2]);
    let ps: Value = serde_json::from_slice(&vm.cli(&["ps", "--json"]).stdout).unwrap();
    assert_eq!(ps["processes"][1]["cap_eff"], "0000000000000000");

    let mut follower = Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .arg("events")
        .arg(vm.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    vm.events.send(EventKind::Start).unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().ends_with("Z  started"));
    let path = vm.path();
    let stopped = vm.cli(&["stop"]);
    assert_eq!(text(&stopped.stdout), "stopping\n", "{}", text(&stopped.stderr));
    assert!(stopped.status.success());
    assert!(lines.next().unwrap().unwrap().ends_with("ended: stopped from outside"));
    assert!(follower.wait().unwrap().success());
    assert!(!path.exists(), "the socket is gone when the command returns");
}

#[test]
fn a_vm_that_vanishes_is_an_error_for_its_followers() {
    let dir = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("vm")).unwrap();
    let follow = |answer: &'static str| {
        let child = Command::new(env!("CARGO_BIN_EXE_cellblock"))
            .args([Path::new("events"), &dir.path().join("vm")])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 21];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
        drop(stream);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(follow("").contains("closed the connection without an answer; it ended"));
    assert!(follow("{\"reply\":\"events\"}\n").contains("without a shutdown event; it ended"));
    assert!(follow("{\"reply\":\"eve").contains("not one of Cellblock's control protocol"));
    assert!(follow("SSH-2.0\n").contains("not one of Cellblock's control protocol"));
    let evil = follow("{\"reply\":\"error\",\"message\":\"\\u001b[2J\\nx\"}\n");
    assert!(evil.lines().count() == 1 && !evil.contains('\x1b'), "{evil:?}");
}

/// Puts the program where other users reach it. Another process copies it: a file that
/// this one has open for writing, a child forked meanwhile has too, and is not executable.
fn copy_program(to: &Path) {
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_cellblock")).arg(to).status();
    assert!(copied.unwrap().success());
}

/// The user id is checked by the server, not only by the socket's mode. Only root can try.
#[test]
fn another_user_is_refused_even_where_the_mode_lets_it_in() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let vm = Running::start();
    let program = vm.dir.path().join("cellblock");
    copy_program(&program);
    let ask = || {
        let mut command = Command::new(&program);
        command.arg("stop").arg(vm.path()).uid(65534).gid(65534).output().unwrap()
    };
    let by_mode = ask();
    assert!(text(&by_mode.stderr).contains("Permission denied"), "{}", text(&by_mode.stderr));

    std::fs::set_permissions(vm.path(), std::fs::Permissions::from_mode(0o666)).unwrap();
    let by_uid = ask();
    assert_eq!(by_uid.status.code(), Some(1));
    assert_eq!(
        text(&by_uid.stderr),
        "cellblock: error: user id 65534 may not control this VM; \
         run the command as the VM's user or as root\n"
    );
    vm.stop();
}
