//! A plugin's jail: a C program that says what it can see and do.

use std::fs::{self, File};
use std::io::{PipeReader, Read, pipe};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cellblock_seccomp::minijail::{Policy, Violation};
use cellblock_seccomp::plugin::{self, GidMap, Mount, Plan, PlanError, Spec, stub};
use cellblock_seccomp::spawner::{self, Event, ExitStatus, Options, Request, Spawner};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use nix::sys::wait::waitpid;

use crate::Test;
use crate::host::{
    LIMIT, alive, become_ordinary, code, exit_of, gone_within, in_process, namespace, start_process,
};

pub const TESTS: &[Test] = &[
    ("plugin_sees_only_its_own", sees_only_its_own),
    ("plugin_static", static_plugin),
    ("plugin_of_an_ordinary_user", ordinary_user),
    ("plugin_mounts_and_groups", mounts_and_groups),
    ("plugin_policies", policies),
    ("plugin_under_landlock", under_landlock),
    ("plugin_libraries_by_rpath", libraries_by_rpath),
    ("plugin_that_cannot_start", cannot_start),
    ("plugin_without_a_jail", without_a_jail),
    ("plugin_ends_with_the_spawner", ends_with_the_spawner),
    ("plugin_is_fixed_at_the_fork", fixed_at_the_fork),
];

/// A folder that an ordinary user can reach, with the probe in it.
struct Probe {
    dir: tempfile::TempDir,
}

impl Probe {
    fn new(options: &[&str]) -> Probe {
        let dir = tempfile::tempdir().expect("a folder");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("mode");
        let probe = Probe { dir };
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/plugin/probe.c");
        compile(&[&["-o", probe.path().to_str().expect("text"), source], options].concat());
        probe
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("probe")
    }

    fn spec(&self, arguments: &[&str]) -> Spec {
        Spec {
            program: self.path(),
            arguments: arguments.iter().map(Into::into).collect(),
            environment: Vec::new(),
            mounts: Vec::new(),
            gid_maps: Vec::new(),
            policy: None,
            violation: Violation::Kill,
            sandbox: true,
        }
    }
}

fn compile(arguments: &[&str]) {
    let output = Command::new("cc").arg("-Wall").args(arguments).output().expect("cc runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

struct Plugin {
    spawner: Spawner,
    pid: i32,
    output: PipeReader,
    report: Option<(String, String)>,
}

fn start(spec: &Spec) -> Plugin {
    let plan = Plan::new(spec).expect("a plan");
    let options = Options { plugin: Some(plan), ..Options::default() };
    let mut spawner = spawner::fork(options).expect("spawner");
    let flags = SockFlag::SOCK_CLOEXEC;
    let pair = || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("pair");
    let ((channel, far), (_connection, socket)) = (pair(), pair());
    let (output, write) = pipe().expect("pipe");
    let null = File::open("/dev/null").expect("null");
    let request = Request { role: plugin::ROLE.into(), id: "plugin".into(), sandbox: spec.sandbox };
    let fds = [far.as_fd(), socket.as_fd(), write.as_fd(), null.as_fd(), write.as_fd()];
    spawner.spawn(&request, &fds).expect("spawn");
    drop((far, write));
    let pid = match spawner.next_event(LIMIT) {
        Ok(Event::Started { pid, .. }) => pid,
        other => panic!("not started: {other:?}"),
    };
    let mut report = [0; stub::MAX_REPORT];
    let len = recv(std::os::fd::AsRawFd::as_raw_fd(&channel), &mut report, MsgFlags::empty());
    let report = stub::parse_report(&report[..len.expect("report or end")]);
    Plugin { spawner, pid, output, report }
}

impl Plugin {
    /// All it said, and how it ended.
    fn finish(mut self) -> (String, ExitStatus) {
        assert_eq!(self.report, None);
        let mut text = String::new();
        self.output.read_to_string(&mut text).expect("text");
        (text, exit_of(&mut self.spawner, self.pid))
    }
}

fn run(spec: &Spec) -> (String, ExitStatus) {
    start(spec).finish()
}

fn value<'a>(text: &'a str, key: &str) -> &'a str {
    let of = |line: &'a str| line.strip_prefix(key)?.strip_prefix('=');
    text.lines().find_map(of).unwrap_or_else(|| panic!("no {key} in {text}")).trim()
}

fn sees_only_its_own() {
    let probe = Probe::new(&[]);
    let (text, status) = run(&probe.spec(&["first", "", "third"]));
    assert_eq!(status, ExitStatus::Code(7), "{text}");
    confined(&text, &probe.path());
    assert_eq!(value(&text, "argc"), "3");
    assert_eq!((value(&text, "argv0"), value(&text, "argv1")), ("first", ""));
    let host = fs::read_dir(probe.dir.path()).expect("lists").count();
    assert_eq!(host, 1, "nothing was made on the host");
}

/// What holds for every jailed plugin.
fn confined(text: &str, program: &Path) {
    for (key, expected) in [
        ("Pid", "1"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("CapEff", "0000000000000000"),
        ("dev", "full null urandom zero"),
        // Its three, the connection, and the folder being read.
        ("fds", "0 1 2 3 4"),
        ("passwd", &format!("-{}", libc::ENOENT)),
        ("cpuinfo", &format!("-{}", libc::ENOENT)),
        ("inet", &format!("-{}", libc::EACCES)),
        ("fork", &format!("-{}", libc::EPERM)),
        ("null", "1"),
        ("zero", "1"),
        ("memfd", "1"),
        ("exe", program.to_str().expect("text")),
    ] {
        assert_eq!(value(text, key), expected, "{key} in {text}");
    }
    for key in ["create", "mkdir", "selfwrite", "mem"] {
        let errno = value(text, key).parse::<i32>().expect("a number");
        assert!([-libc::EROFS, -libc::EACCES].contains(&errno), "{key} in {text}");
    }
    let environment: Vec<_> = text.lines().filter_map(|l| l.strip_prefix("env ")).collect();
    assert_eq!(environment, ["CROSVM_SOCKET=4"]);
    // Of the processes it sees only itself, and of /proc only processes.
    assert_eq!(value(text, "proc"), "1 self thread-self".to_string().as_str(), "{text}");
    assert!(text.contains("to standard error"));
}

fn static_plugin() {
    let probe = Probe::new(&["-static"]);
    let (text, status) = run(&probe.spec(&[]));
    assert_eq!(status, ExitStatus::Code(7), "{text}");
    confined(&text, &probe.path());
    assert!(!value(&text, "root").contains("lib"), "{text}");
}

fn ordinary_user() {
    let probe = Probe::new(&[]);
    let spec = probe.spec(&["x"]);
    in_process(|| {
        become_ordinary();
        let (text, status) = run(&spec);
        assert_eq!(status, ExitStatus::Code(7), "{text}");
        confined(&text, &spec.program);
        // Groups that are not its own an ordinary user cannot give.
        let mut spec = spec.clone();
        spec.gid_maps = vec![GidMap { inside: 100, outside: 100, count: 1 }];
        let plan = Plan::new(&spec).expect("a plan");
        let options = Options { plugin: Some(plan), ..Options::default() };
        let mut spawner = spawner::fork(options).expect("spawner");
        let null = File::open("/dev/null").expect("null");
        let request = Request { role: "plugin".into(), id: "p".into(), sandbox: true };
        spawner.spawn(&request, &[null.as_fd(); 5]).expect("spawn");
        match spawner.next_event(LIMIT) {
            Ok(Event::Failed { step, .. }) => assert_eq!(step, "write id maps"),
            other => panic!("{other:?}"),
        }
    });
}

fn mounts_and_groups() {
    let probe = Probe::new(&[]);
    let shared = tempfile::tempdir().expect("a folder");
    fs::set_permissions(shared.path(), fs::Permissions::from_mode(0o777)).expect("mode");
    fs::write(shared.path().join("there"), "").expect("written");
    let mount = |to: &str, writable| Mount {
        source: shared.path().into(),
        destination: to.into(),
        writable,
    };
    let mut spec = probe.spec(&["p", "write", "/rw/made"]);
    spec.mounts = vec![mount("/ro/deep", false), mount("/rw", true)];
    assert_eq!(run(&spec).0, "write=1\n");
    assert_eq!(fs::read(shared.path().join("made")).expect("made"), b"x");
    for path in ["/ro/deep/made", "/ro/deep/other", "/ro/x"] {
        spec.arguments = ["p", "write", path].map(Into::into).to_vec();
        let text = run(&spec).0;
        assert!(
            [-libc::EROFS, -libc::EACCES].iter().any(|e| text == format!("write={e}\n")),
            "{text}"
        );
    }
    // A group that opens what others may not read.
    let secret = shared.path().join("secret");
    fs::write(&secret, "s").expect("written");
    std::os::unix::fs::chown(&secret, None, Some(4242)).expect("chown");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o060)).expect("mode");
    spec.arguments = ["p", "write", "/rw/secret"].map(Into::into).to_vec();
    assert_eq!(run(&spec).0, format!("write=-{}\n", libc::EACCES));
    spec.gid_maps = vec![GidMap { inside: 500, outside: 4242, count: 1 }];
    assert_eq!(run(&spec).0, "write=1\n");
    spec.arguments = vec!["p".into()];
    let text = run(&spec).0;
    assert_eq!(value(&text, "Groups"), "500", "{text}");
}

fn policies() {
    let probe = Probe::new(&[]);
    let call = |number: i64, argument: &str| {
        let mut spec = probe.spec(&["p", "call"]);
        spec.arguments.extend([number.to_string().into(), argument.into()]);
        spec
    };
    let killed = ExitStatus::Signal(libc::SIGSYS);
    assert_eq!(run(&call(libc::SYS_unshare, "0x10000000")).1, killed);
    assert_eq!(run(&call(libc::SYS_setns, "0")).1, killed);
    assert_eq!(run(&call(libc::SYS_getppid, "0")).0, "result=0\n");
    // Nothing but what a program needs to start, and what is said here.
    let mut spec = call(libc::SYS_getpriority, "3");
    let base = "{write, ioctl}: 1\ngetpriority: arg0 == 3; return EXDEV\n";
    spec.policy = Some(Policy::parse("p", base).expect("reads"));
    assert_eq!(run(&spec), (format!("result=-{}\n", libc::EINVAL), ExitStatus::Code(0)));
    *spec.arguments.last_mut().expect("there") = "4".into();
    assert_eq!(run(&spec).0, format!("result=-{}\n", libc::EXDEV));
    spec.policy = Some(Policy::parse("p", "{write, ioctl}: 1").expect("reads"));
    assert_eq!(run(&spec).1, killed);
    spec.violation = Violation::Log;
    assert_eq!(run(&spec).1, ExitStatus::Code(0));
    // The stub's exec is not the plugin's.
    assert_eq!(run(&probe.spec(&["p", "exec"])).0, format!("exec=-{}\n", libc::EACCES));
    let mut spec = probe.spec(&["p", "exec"]);
    spec.policy = Some(Policy::parse("p", "{write, ioctl}: 1").expect("reads"));
    assert_eq!(run(&spec).1, killed);
}

/// What a policy lets through by mistake: Landlock refuses it all the same. Before version 4 it knew
/// nothing of TCP; then there is only no way to anywhere.
fn under_landlock() {
    let probe = Probe::new(&[]);
    let mut spec = probe.spec(&["p", "connect"]);
    let policy = Policy::parse("p", "{write, ioctl, socket, connect}: 1");
    spec.policy = Some(policy.expect("reads"));
    let expected = if landlock_version() >= 4 { libc::EACCES } else { libc::ENETUNREACH };
    assert_eq!(run(&spec), (format!("connect=-{expected}\n"), ExitStatus::Code(0)));
}

/// Of this kernel; 0 where it is not in use.
#[allow(unsafe_code)] // the call has no wrapper that does nothing else
fn landlock_version() -> i64 {
    const VERSION: u32 = 1;
    // SAFETY: no memory is involved.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, VERSION) };
    version.max(0)
}

fn libraries_by_rpath() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name).to_str().expect("text").to_string();
    fs::create_dir(at("lib")).expect("a folder");
    fs::write(at("one.c"), "int two(void); int one(void) { return two(); }").expect("written");
    fs::write(at("two.c"), "int two(void) { return 40; }").expect("written");
    fs::write(at("main.c"), "int one(void); int main(void) { return one() + 2; }")
        .expect("written");
    let shared = ["-shared", "-fPIC", "-o"];
    compile(&[&shared[..], &[&at("lib/libtwo.so"), &at("two.c")]].concat());
    // One finds two by its own RUNPATH, the program finds one by its RPATH.
    let by = ["-L", &at("lib"), "-ltwo", "-Wl,-rpath,$ORIGIN"];
    compile(&[&shared[..], &[&at("lib/libone.so"), &at("one.c")], &by].concat());
    let options = ["-L", &at("lib"), "-lone", "-Wl,-rpath,$ORIGIN/lib", "-Wl,--disable-new-dtags"];
    let link = format!("-Wl,-rpath-link,{}", at("lib"));
    compile(&[&["-o", &at("main"), &at("main.c")], &options[..], &[&link]].concat());
    let spec = Spec { program: at("main").into(), ..Probe::new(&[]).spec(&["p"]) };
    assert_eq!(run(&spec), (String::new(), ExitStatus::Code(42)));
    fs::remove_file(at("lib/libtwo.so")).expect("removed");
    let error = Plan::new(&spec).expect_err("a library is missing").to_string();
    assert!(error.contains("libone.so needs the library libtwo.so"), "{error}");
}

fn cannot_start() {
    let probe = Probe::new(&[]);
    let spec = probe.spec(&[]);
    let plan = |spec: &Spec| Plan::new(spec).expect_err("no plan").to_string();
    let script = probe.dir.path().join("script");
    fs::write(&script, "#!/bin/sh\nexit 0\n").expect("written");
    let error = plan(&Spec { program: script, ..spec.clone() });
    assert!(error.contains("script cannot be used: it is a script"), "{error}");
    let error = plan(&Spec { program: "/nowhere".into(), ..spec.clone() });
    assert!(error.contains("opening /nowhere"), "{error}");
    let missing = Mount { source: "/nowhere".into(), destination: "/x".into(), writable: false };
    let error = plan(&Spec { mounts: vec![missing], ..spec.clone() });
    assert!(error.contains("opening /nowhere for the plugin's root"), "{error}");
    let error = Plan::new(&Spec { arguments: vec!["x".repeat(1 << 17).into()], ..spec.clone() });
    assert!(matches!(error, Err(PlanError::TooLarge(_))), "{error:?}");
    // Nobody but its owner may execute it, and in the jail it is somebody else.
    fs::set_permissions(probe.path(), fs::Permissions::from_mode(0o700)).expect("mode");
    let plugin = start(&spec);
    let (step, message) = plugin.report.clone().expect("a report");
    assert!(step.starts_with("execute the plugin"), "{step}");
    assert!(message.contains("EACCES") && message.contains("chmod o+rx"), "{message}");
}

fn without_a_jail() {
    let probe = Probe::new(&[]);
    let mut spec = probe.spec(&["p"]);
    (spec.sandbox, spec.environment) = (false, vec!["A=b".into()]);
    let (text, status) = run(&spec);
    assert_eq!(status, ExitStatus::Code(7), "{text}");
    assert!(text.contains("env A=b\nenv CROSVM_SOCKET=4\n"), "{text}");
    assert_eq!(value(&text, "Seccomp"), "0");
    assert_ne!(value(&text, "Pid"), "1");
}

fn ends_with_the_spawner() {
    let probe = Probe::new(&[]);
    let mut plugin = start(&probe.spec(&["p", "sleep"]));
    let mut up = [0; 3];
    plugin.output.read_exact(&mut up).expect("up");
    let pid = plugin.pid;
    assert!(alive(pid));
    for name in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        assert_ne!(namespace(&pid.to_string(), name), namespace("self", name), "{name}");
    }
    drop(plugin);
    assert!(gone_within(&[pid], LIMIT).is_ok());
}

/// A VMM that asks for a plugin where none was fixed is in somebody else's hands.
fn fixed_at_the_fork() {
    let vmm = start_process(|| {
        let mut spawner = spawner::fork(Options::default()).expect("spawner");
        let null = File::open("/dev/null").expect("null");
        let request = Request { role: plugin::ROLE.into(), id: "p".into(), sandbox: true };
        spawner.spawn(&request, &[null.as_fd(); 5]).expect("spawn");
        std::thread::sleep(LIMIT);
    });
    assert_eq!(waitpid(vmm, None).map(code), Ok(128 + libc::SIGKILL));
}
