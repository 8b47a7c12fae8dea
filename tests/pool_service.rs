//! `cellblock pool`: the service, its clients, and what becomes of VMs when either goes.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
mod pool_support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::Duration;

use cellblock::pool::service::client::{ClientError, PoolClient};
use cellblock::pool::service::protocol::{Answer, Claimed, Request};
use cellblock::pool::stats::PoolStats;
use common::proc::{self, Identity};
use nix::sys::signal::Signal;
use pool_support::{Console, LIMIT, Snapshot, cellblock};

struct Service {
    child: Child,
    stderr: common::output::Output,
    dir: tempfile::TempDir,
}

impl Service {
    fn start(snapshot: &Snapshot, words: &[&str]) -> Service {
        Service::start_in(tempfile::tempdir().unwrap(), snapshot, words)
    }

    fn start_in(dir: tempfile::TempDir, snapshot: &Snapshot, words: &[&str]) -> Service {
        Service::with(cellblock(&[]), dir, snapshot, words)
    }

    /// With so many file descriptors.
    fn start_small(files: usize, snapshot: &Snapshot, words: &[&str]) -> Service {
        let mut command = Command::new("sh");
        let script = format!("ulimit -n {files}; exec \"$0\" \"$@\"");
        command.arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_cellblock"));
        Service::with(command, tempfile::tempdir().unwrap(), snapshot, words)
    }

    fn with(
        command: Command,
        dir: tempfile::TempDir,
        snapshot: &Snapshot,
        words: &[&str],
    ) -> Service {
        let mut service = Service::begin(command, dir, snapshot, words);
        if service.stderr.wait_for("serving VMs on", LIMIT).is_none() {
            panic!("no service: {}", service.stderr.text());
        }
        service
    }

    /// Without waiting for it.
    fn begin(
        mut command: Command,
        dir: tempfile::TempDir,
        snapshot: &Snapshot,
        words: &[&str],
    ) -> Service {
        command.args(["pool", "serve", "--die-with-parent", "--snapshot"]).arg(snapshot.path());
        command.arg("--control").arg(dir.path().join("pool")).args(words);
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = common::output::Output::collect(child.stderr.take().unwrap());
        Service { child, stderr, dir }
    }

    /// Processor time that it has had, in clock ticks: hundreds a second.
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let words: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        words[11].parse::<u64>().unwrap() + words[12].parse::<u64>().unwrap()
    }

    #[track_caller]
    fn sleeps(&self) {
        let before = self.ticks();
        std::thread::sleep(Duration::from_millis(500));
        let ticks = self.ticks() - before;
        assert!(ticks < 10, "{ticks} ticks in half a second");
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("pool")
    }

    fn client(&self) -> PoolClient {
        PoolClient::connect(&self.path()).unwrap()
    }

    fn cli(&self, words: &[&str]) -> Output {
        let mut command = cellblock(&["pool"]);
        command.arg(words[0]).arg(self.path()).args(&words[1..]);
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn stats(&self) -> PoolStats {
        match self.client().ask(&Request::Stats).unwrap().0 {
            Answer::Stats(stats) => *stats,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn eventually(&self, what: &str, wanted: impl Fn(&PoolStats) -> bool) {
        let came = common::poll(LIMIT, || wanted(&self.stats()).then_some(()));
        assert!(came.is_some(), "{what}: {:?}\n{}", self.stats(), self.stderr.text());
    }

    fn family(&self) -> Vec<Identity> {
        proc::family(self.child.id() as i32)
    }

    /// It ends by itself, and leaves nothing.
    #[track_caller]
    fn ends(mut self, family: &[Identity]) {
        let status = common::poll(LIMIT, || self.child.try_wait().unwrap());
        assert!(status.is_some_and(|status| status.success()), "{status:?} {}", self.stderr.text());
        proc::wait_gone(family, LIMIT).expect("nothing of it is left");
        assert_eq!(std::fs::read_dir(self.dir.path()).unwrap().count(), 0, "files are left");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn claim(client: &mut PoolClient, data: &str) -> Result<Claimed, ClientError> {
    let request = Request::Claim {
        data: Some(data.into()),
        data_hex: None,
        disks: vec![],
        snapshot: None,
        timeout_us: Some(LIMIT.as_micros() as u64),
    };
    match client.ask(&request)?.0 {
        Answer::Claim(claimed) => Ok(claimed),
        other => panic!("{other:?}"),
    }
}

fn console(vm: &Claimed) -> Console {
    Console::new(UnixStream::connect(&vm.console).unwrap())
}

/// `cellblock pool claim`, holding a VM.
struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
    line: String,
}

impl Holder {
    fn start(service: &Service, words: &[&str]) -> Holder {
        let mut command = cellblock(&["pool", "claim"]);
        Holder::of(command.arg(service.path()).args(words))
    }

    fn of(command: &mut Command) -> Holder {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Holder { stdin: child.stdin.take(), child, line }
    }

    fn ends(mut self) {
        let status = common::poll(LIMIT, || self.child.try_wait().unwrap());
        assert!(status.is_some_and(|status| status.success()), "{status:?}");
    }
}

#[test]
fn a_vm_is_its_claimers_for_as_long_as_they_are_there() {
    let snapshot = Snapshot::take(",cow");
    let service = Service::start(&snapshot, &["--min", "2", "--max", "2", "--live", "2"]);
    // The command holds it until its input ends.
    let mut one = Holder::start(&service, &["--json", "--data", "first"]);
    let Answer::Claim(vm) = serde_json::from_str(&one.line).unwrap() else {
        panic!("{}", one.line)
    };
    assert_eq!(console(&vm).who().data, "first");
    let family = proc::family(vm.pid as i32);
    assert_eq!(family.len(), 4, "{family:?}");
    let pids = cellblock(&["ps"]).arg(&vm.control).output().unwrap();
    assert!(pids.status.success(), "{pids:?}");
    // Another by a connection, and there are no more than two.
    let mut client = service.client();
    let other = claim(&mut client, "second").unwrap();
    assert_eq!(console(&other).who().data, "second");
    let refused = service.cli(&["claim", "--timeout", "50ms"]);
    let text = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(text.contains("2 of 2 are in use") && text.contains("; try again"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    // A connection has one at a time.
    assert!(claim(&mut client, "more").unwrap_err().to_string().contains("a VM already"));
    assert_eq!(client.ask(&Request::Release).unwrap().0, Answer::Release);
    service.eventually("its release", |stats| stats.in_use == 1);
    claim(&mut client, "third").unwrap();
    drop(client);
    service.eventually("its return", |stats| stats.in_use == 1);
    one.stdin = None;
    one.ends();
    proc::wait_gone(&family, LIMIT).expect("nothing of it is left");
    service.eventually("its end", |stats| stats.in_use == 0);
    // A claimer that is killed gives it back as well, and so does one that is told to stop.
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let mut holder = Holder::start(&service, &[]);
        assert!(holder.line.starts_with("id  "), "{}", holder.line);
        assert_eq!(service.stats().in_use, 1);
        common::send(holder.child.id() as i32, signal);
        let status = holder.child.wait().unwrap();
        assert_eq!(status.success(), signal == Signal::SIGTERM);
        service.eventually("its return", |stats| stats.in_use == 0);
    }
    // A guest that ends is the end of its holder.
    Holder::start(&service, &["--data", "end"]).ends();
    service.eventually("its return", |stats| stats.in_use == 0 && stats.idle == 2);
    assert_eq!(service.stats().violations, 0);

    let text = String::from_utf8(service.cli(&["stats", "--prometheus"]).stdout).unwrap();
    assert!(text.contains("\ncellblock_pool_timeouts_total 1\n"), "{text}");
    let text = String::from_utf8(service.cli(&["stats"]).stdout).unwrap();
    assert!(text.contains("waited in vain"), "{text}");
    let text = String::from_utf8(service.cli(&["stats", "--json"]).stdout).unwrap();
    assert!(text.starts_with("{\"reply\":\"stats\",\"alive\":2,"), "{text}");
    let family = service.family();
    let text = String::from_utf8(service.cli(&["drain"]).stdout).unwrap();
    assert_eq!(text, "drained; the pool ends\n");
    service.ends(&family);
}

#[test]
fn a_drained_service_ends_with_its_last_vm() {
    let snapshot = Snapshot::take(",cow");
    let service = Service::start(&snapshot, &["--min", "1"]);
    let mut client = service.client();
    let vm = claim(&mut client, "touch").unwrap();
    let text = String::from_utf8(service.cli(&["drain", "--json"]).stdout).unwrap();
    assert_eq!(text, "{\"reply\":\"drain\",\"in_use\":1}\n");
    let mut late = service.client();
    assert!(claim(&mut late, "").unwrap_err().to_string().contains("takes no more claims"));
    assert_eq!(console(&vm).who().data, "touch");
    let family = service.family();
    drop(client);
    service.ends(&family);
}

#[test]
fn a_disk_can_be_another_one() {
    let snapshot = Snapshot::with("mode=clone blocks=0", ",ro", 64);
    let other = snapshot.disk().with_extension("other");
    std::fs::copy(snapshot.disk(), &other).unwrap();
    let service = Service::start(&snapshot, &["--min", "1"]);
    let disk = format!("id=disk0,path={}", other.display());
    let mut holder = Holder::start(&service, &["--json", "--disk", &disk, "--data", "touch"]);
    let Answer::Claim(vm) = serde_json::from_str(&holder.line).unwrap() else { panic!() };
    let files: Vec<String> = proc::files(vm.pid as i32).into_values().collect();
    assert!(files.iter().any(|file| file == other.to_str().unwrap()), "{files:?}");
    assert!(files.iter().all(|file| file != snapshot.disk().to_str().unwrap()), "{files:?}");
    assert_eq!(console(&vm).who().id, vm.id);
    holder.stdin = None;
    holder.ends();
    let wrong = service.cli(&["claim", "--disk", "id=disk9,path=/dev/null"]);
    let text = String::from_utf8(wrong.stderr).unwrap();
    assert!(text.contains("no disk 'disk9'"), "{text}");
    service.eventually("its return", |stats| stats.in_use == 0);
    let stats = service.stats();
    assert_eq!((stats.restore_failures, stats.violations), (0, 0));
    // A path is that of whoever claims, wherever the pool is.
    let mut command = cellblock(&["pool", "claim", "--json", "--disk", "id=disk0,path=disk.other"]);
    command.arg("--data").arg("touch").arg(service.path());
    let command = command.current_dir(other.parent().unwrap());
    let mut holder = Holder::of(command);
    let Answer::Claim(vm) = serde_json::from_str(&holder.line).unwrap() else { panic!() };
    let files: Vec<String> = proc::files(vm.pid as i32).into_values().collect();
    assert!(files.iter().any(|file| file == other.to_str().unwrap()), "{files:?}");
    holder.stdin = None;
    holder.ends();
}

#[test]
fn a_shell_that_waits_sleeps() {
    let snapshot = Snapshot::take(",cow");
    let service = Service::start(&snapshot, &["--min", "1", "--max", "1"]);
    // The first one was waited for, the second is made in the background.
    let mut client = service.client();
    claim(&mut client, "end").unwrap();
    drop(client);
    service.eventually("a shell", |stats| (stats.idle, stats.alive, stats.making) == (1, 1, 0));
    let threads = |process: &Identity| {
        let pid = process.pid;
        proc::threads(pid).into_iter().map(move |thread| (pid, thread))
    };
    let family = service.family();
    assert_eq!(family.len(), 5, "{family:?}");
    let all = family.iter().filter(|process| process.pid != service.child.id() as i32);
    let (pagers, others): (Vec<_>, Vec<_>) = all
        .flat_map(threads)
        .partition(|(pid, thread)| proc::status(*pid, *thread)["Name"] == "pager");
    assert_eq!((pagers.len(), others.len() > 8), (1, true), "{family:?}");
    let switches = || proc::status(pagers[0].0, pagers[0].1)["voluntary_ctxt_switches"].clone();
    let still = common::poll(LIMIT, || {
        let before = switches();
        std::thread::sleep(Duration::from_millis(500));
        (switches() == before).then_some(())
    });
    still.expect("its pager wakes again and again");
    // However it was made, what somebody waits for is not behind everybody else.
    for (pid, thread) in pagers.into_iter().chain(others) {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).unwrap();
        let class = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(38).unwrap();
        assert_eq!(class, "0", "thread {thread} of {pid} is of another class");
    }
}

#[test]
fn the_death_of_the_service_is_the_end_of_all_and_another_takes_its_place() {
    let snapshot = Snapshot::take(",cow");
    let mut service = Service::start(&snapshot, &["--min", "2", "--max", "2"]);
    let mut client = service.client();
    let vm = claim(&mut client, "touch").unwrap();
    assert_eq!(console(&vm).who().id, vm.id);
    service.eventually("shells", |stats| stats.idle == 2);
    let family = service.family();
    assert!(family.len() >= 13, "{family:?}");
    let holder = Holder::start(&service, &["--data", "touch"]);
    service.child.kill().unwrap();
    service.child.wait().unwrap();
    proc::wait_gone(&family, Duration::from_secs(5)).expect("nothing of it is left");
    assert!(client.hear().is_ok_and(|next| next.is_none()), "the connection should be over");
    let mut child = holder.child;
    assert_eq!(child.wait().unwrap().code(), Some(1), "its VM is gone");

    let dir = std::mem::replace(&mut service.dir, tempfile::tempdir().unwrap());
    let again = Service::start_in(dir, &snapshot, &["--min", "1"]);
    let second = cellblock(&["pool", "serve", "--snapshot"])
        .arg(snapshot.path())
        .arg("--control")
        .arg(again.path())
        .output()
        .unwrap();
    let text = String::from_utf8(second.stderr).unwrap();
    assert!(text.contains("is served at") && text.contains("end that one first"), "{text}");
    claim(&mut again.client(), "").unwrap();
    let family = again.family();
    common::send(again.child.id() as i32, Signal::SIGTERM);
    again.ends(&family);
}

#[test]
fn the_service_survives_the_death_of_any_process() {
    let snapshot = Snapshot::take(",cow");
    let service = Service::start(&snapshot, &["--min", "2", "--max", "2"]);
    let own = service.child.id() as i32;
    // Whatever they are: VMMs, spawners, device processes, all of idle shells.
    for round in 0..4 {
        service.eventually("shells", |stats| stats.idle == 2 && stats.making == 0);
        for victim in service.family().iter().filter(|p| p.pid != own).skip(round).step_by(3) {
            common::send(victim.pid, Signal::SIGKILL);
        }
        // One that is handed out at that very moment may be without a process yet to be missed.
        let whole = (0..8).any(|_| {
            let mut client = service.client();
            let vm = claim(&mut client, "touch").unwrap();
            let lines = UnixStream::connect(&vm.console).map(BufReader::new);
            let mut line = String::new();
            let read = lines.and_then(|mut lines| lines.read_line(&mut line));
            read.is_ok() && line.contains(&vm.id)
        });
        assert!(whole, "no claim gives a VM that is whole");
    }
    // And of VMs that are somebody's: they are told.
    let mut client = service.client();
    let vm = claim(&mut client, "touch").unwrap();
    common::send(vm.pid as i32, Signal::SIGKILL);
    assert_eq!(client.hear().unwrap().unwrap().0, Answer::Ended);
    service.eventually("its return", |stats| stats.in_use == 0);
    assert_eq!(service.stats().violations, 0);
    let family = service.family();
    common::send(own, Signal::SIGINT);
    service.ends(&family);
}

#[test]
fn what_makes_no_sense_is_refused_in_one_line() {
    let snapshot = Snapshot::take(",cow");
    let serve = |words: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let mut command = cellblock(&["pool", "serve", "--control"]);
        let output = command.arg(dir.path().join("pool")).args(words).output().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "files are left");
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        (output.status.code().unwrap(), text)
    };
    let path = snapshot.path();
    let path = path.to_str().unwrap();
    for (words, status, part) in [
        (&["--snapshot", "/nowhere"][..], 1, "/nowhere"),
        (&["--snapshot", path, "--max", "0", "--min", "0"], 1, "max_size of 1 or more"),
        (&["--snapshot", path, "--min", "3", "--max", "2"], 1, "min_size is 3"),
        (&["--snapshot", path, "--live", "0"], 1, "max_live of 1"),
        (&["--snapshot", path, "--memory-limit", "64M"], 1, "give more memory"),
        (&["--snapshot", path, "--disk", "id=disk9,cow"], 1, "no disk 'disk9'"),
        (&["--snapshot", path, "--mode", "shape", "--disk", "id=disk9,cow"], 1, "no disk 'disk9'"),
        (
            &["--snapshot", path, "--mode", "shape", "--on-release", "reset"],
            2,
            "leave --mode shape",
        ),
    ] {
        let (code, text) = serve(words);
        assert!(code == status && text.contains(part), "{words:?}: {code} {text}");
    }
    let shared = Snapshot::take("");
    let (code, text) = serve(&["--snapshot", shared.path().to_str().unwrap()]);
    assert!(code == 1 && text.contains("with '--disk id=disk0,cow'"), "{text}");
    let service = Service::start(&snapshot, &["--min", "0"]);
    let long = "x".repeat(5000);
    let output = service.cli(&["claim", "--data", &long]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("5000 bytes for the guest are more than the 3840"), "{text}");
    for (line, part) in [
        ("nonsense", "that is no request"),
        ("{\"request\":\"claim\",\"data_hex\":\"0\"}", "no hexadecimal digits"),
        ("{\"request\":\"claim\",\"disks\":[\"disk\"]}", "say which disk"),
        (
            "{\"request\":\"claim\",\"disks\":[\"id=a,path=b\"]}",
            "b: the pool wants paths that begin",
        ),
        (
            "{\"request\":\"claim\",\"disks\":[\"id=a,cow=b\"]}",
            "b: the pool wants paths that begin",
        ),
        ("{\"request\":\"claim\",\"snapshot\":\"s\"}", "s: the pool wants paths that begin"),
        ("{\"request\":\"release\"}", "has no VM"),
    ] {
        let mut stream = UnixStream::connect(service.path()).unwrap();
        writeln!(stream, "{line}").unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        assert!(answer.contains("\"reply\":\"error\"") && answer.contains(part), "{answer}");
    }
    let mut stream = UnixStream::connect(service.path()).unwrap();
    let _ = stream.write_all("y".repeat(100 << 10).as_bytes());
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    assert!(answer.contains("a line has an end"), "{answer}");
    assert_eq!(service.stats().violations, 0);
}

#[test]
fn clients_take_no_descriptors_that_vms_need() {
    let snapshot = Snapshot::take(",cow");
    let words = ["--min", "1", "--max", "2", "--live", "2"];
    let service = Service::start_small(280, &snapshot, &words);
    let mut first = service.client();
    // 64 are its own, and each of 4 VMs has 4.
    let idle: Vec<UnixStream> =
        (0..240).map(|_| UnixStream::connect(service.path()).unwrap()).collect();
    let mut refused = String::new();
    idle[239].set_read_timeout(Some(LIMIT)).unwrap();
    BufReader::new(&idle[239]).read_line(&mut refused).unwrap();
    assert!(refused.contains("the pool has 200 clients already"), "{refused}");
    service.sleeps();
    let vm = claim(&mut first, "touch").unwrap();
    assert_eq!(console(&vm).who().id, vm.id);
    first.ask(&Request::Release).unwrap();
    drop(idle);
    service.eventually("their end", |stats| (stats.in_use, stats.idle) == (0, 1));
    assert_eq!(service.stats().violations, 0);
    // Even without any a client is turned away, and it does not spin.
    let pid = service.child.id() as i32;
    let set = |files: usize| {
        let (pid, limit) = (pid.to_string(), format!("--nofile={files}:280"));
        let set = Command::new("prlimit").args(["--pid", &pid, &limit]).status().unwrap();
        assert!(set.success());
    };
    let files = || proc::files(pid).len();
    // All of them, one after the other.
    let steady = || {
        let before = files();
        std::thread::sleep(Duration::from_millis(200));
        (before < 64 && files() == before).then_some(before)
    };
    let before = common::poll(LIMIT, steady).expect("they are gone");
    let fill: Vec<UnixStream> =
        (0..32).map(|_| UnixStream::connect(service.path()).unwrap()).collect();
    common::poll(LIMIT, || (files() >= before + 32).then_some(())).expect("clients");
    set((0..).find(|fd| !proc::files(pid).contains_key(fd)).unwrap() as usize);
    for _ in 0..3 {
        let mut line = String::new();
        let stream = UnixStream::connect(service.path()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let read = BufReader::new(stream).read_line(&mut line);
        let waits = matches!(&read, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!waits && !matches!(read, Ok(1..)), "{read:?} {line}");
    }
    service.sleeps();
    set(280);
    drop(fill);
    assert_eq!(service.stats().violations, 0);
}

#[test]
fn who_goes_while_it_waits_waits_no_longer() {
    let snapshot = Snapshot::take(",cow");
    let service = Service::start(&snapshot, &["--min", "1", "--live", "1"]);
    let mut holder = service.client();
    claim(&mut holder, "touch").unwrap();
    let mut stream = UnixStream::connect(service.path()).unwrap();
    writeln!(stream, "{{\"request\":\"claim\",\"timeout_us\":600000000}}").unwrap();
    service.eventually("its wait", |stats| stats.waiting == 1);
    drop(stream);
    service.eventually("its end", |stats| (stats.waiting, stats.abandoned) == (0, 1));
    drop(holder);
    service.eventually("a return", |stats| stats.in_use == 0);
    assert_eq!(service.stats().violations, 0);
}

#[test]
fn another_user_is_refused_even_where_the_socket_lets_them_in() {
    if !common::is_root("acting as another user") {
        return;
    }
    let snapshot = Snapshot::take(",cow");
    let service = Service::start(&snapshot, &["--min", "0"]);
    let nobody = || {
        let mut command = cellblock(&["pool", "stats"]);
        let output = command.arg(service.path()).uid(65534).gid(65534).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let widen = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    widen(service.dir.path(), 0o755);
    let text = nobody();
    assert!(text.contains("Permission denied") && text.contains("pool's user"), "{text}");
    widen(&service.path(), 0o666);
    let text = nobody();
    assert!(text.contains("user id 65534 may not use this pool"), "{text}");
    assert_eq!(service.stats().violations, 0);
}

#[test]
fn a_signal_is_heard_before_all_are_made() {
    let snapshot = Snapshot::take(",cow");
    let dir = tempfile::tempdir().unwrap();
    let words = ["--min", "100", "--max", "100", "--memory-limit", "1T"];
    let mut service = Service::begin(cellblock(&[]), dir, &snapshot, &words);
    common::poll(LIMIT, || (service.family().len() > 3).then_some(())).expect("the first of them");
    let family = service.family();
    common::send(service.child.id() as i32, Signal::SIGTERM);
    let status = common::poll(LIMIT, || service.child.try_wait().unwrap());
    let text = service.stderr.text();
    assert!(status.is_some_and(|status| status.success()), "{status:?} {text}");
    assert!(!text.contains("serving"), "it made all of them first: {text}");
    proc::wait_gone(&family, LIMIT).expect("nothing of it is left");
    assert_eq!(std::fs::read_dir(service.dir.path()).unwrap().count(), 0, "files are left");
}
