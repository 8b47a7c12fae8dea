//! A step that fails is named, with its remedy.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, ExitCode};

use cellblock_seccomp::jail;
use cellblock_seccomp::spawner::{self, Event, Options, SpawnError};
use cellblock_wire::Channel;
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};

use crate::Test;
use crate::cell::Answer;
use crate::host::{
    Cell, LIMIT, become_ordinary, hello, in_process, request, spawner, start_process, status,
};

pub const TESTS: &[Test] = &[
    ("no user namespaces: the step is named", || in_process(no_user_namespaces)),
    ("no processes: the step is named", || in_process(no_processes)),
    ("a program others may not execute: the step is named", not_executable),
    ("a jail is refused to a process with threads", threads_first),
    ("in a chroot: the step is named", || in_process(chrooted)),
    ("the VMM's own privileges", || in_process(vmm_privileges)),
    ("the spawner is not forked beside threads", || in_process(fork_beside_threads)),
];

/// Spawns one cell and says how that failed.
fn failure() -> (String, String) {
    let mut spawner = spawner();
    let (_near, far) = Channel::pair().expect("pair");
    let ticket = spawner.spawn(&request("blk", "disk0", true), &[far.as_fd()]).expect("spawn");
    match spawner.next_event(LIMIT) {
        Ok(Event::Failed { ticket: t, step, message }) if t == ticket => (step, message),
        other => panic!("{other:?}"),
    }
}

fn no_user_namespaces() {
    // The limit is per user namespace: set in one of our own.
    unshare(CloneFlags::CLONE_NEWUSER).expect("unshare");
    fs::write("/proc/self/uid_map", "0 0 1").expect("map");
    fs::write("/proc/sys/user/max_user_namespaces", "0").expect("limit");
    let (step, message) = failure();
    assert_eq!(step, "create process and namespaces");
    assert!(message.contains("ENOSPC") && message.contains("user.max_*_namespaces"), "{message}");
}

fn no_processes() {
    become_ordinary();
    let mut spawner = {
        // The spawner itself is the last process allowed.
        let spawner = spawner();
        setrlimit(Resource::RLIMIT_NPROC, 1, 1).expect("limit");
        drop(spawner);
        setrlimit(Resource::RLIMIT_NPROC, 2, 2).ok();
        spawner::fork(Options::default())
    };
    match &mut spawner {
        // Room for the spawner, then none for a child; or not even for it.
        Err(SpawnError::Prepare { what, .. }) => assert!(what.contains("ulimit -u"), "{what}"),
        Ok(spawner) => {
            let (_near, far) = Channel::pair().expect("pair");
            spawner.spawn(&request("blk", "disk0", true), &[far.as_fd()]).expect("spawn");
            match spawner.next_event(LIMIT) {
                Ok(Event::Failed { step, message, .. }) => {
                    assert_eq!(step, "create process and namespaces");
                    assert!(message.contains("ulimit -u"), "{message}");
                }
                other => panic!("{other:?}"),
            }
        }
        Err(other) => panic!("{other}"),
    }
}

/// As `program @spawn-once`: prints how starting one cell failed.
pub fn spawn_once() -> ExitCode {
    let (step, message) = failure();
    println!("{step}\n{message}");
    ExitCode::SUCCESS
}

fn not_executable() {
    let folder = tempfile::tempdir().expect("folder");
    let program = folder.path().join("cellblock");
    fs::copy("/proc/self/exe", &program).expect("copy");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).expect("mode");
    let output = Command::new(&program).arg("@spawn-once").output().expect("run");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.starts_with("execute cellblock\n"), "{text}");
    assert!(text.contains("EACCES") && text.contains("chmod o+rx"), "{text}");
}

fn threads_first() {
    let mut spawner = spawner();
    let mut hello = hello("blk");
    hello.thread_first = true;
    let cell = Cell::begin(&mut spawner, &hello);
    match cell.channel.recv_timeout(LIMIT) {
        Ok((Answer::Failed(text), _)) => {
            assert!(text.contains("`check that there is one thread`"), "{text}");
            assert!(text.contains("EINVAL"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

/// In a chroot that is not a mount point, user namespaces are refused: said so.
fn chrooted() {
    let folder = tempfile::tempdir().expect("folder");
    for name in ["proc", "dev"] {
        fs::create_dir(folder.path().join(name)).expect("folder");
    }
    unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
    let bind = nix::mount::MsFlags::MS_BIND | nix::mount::MsFlags::MS_REC;
    let private = nix::mount::MsFlags::MS_PRIVATE | nix::mount::MsFlags::MS_REC;
    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private");
    for name in ["proc", "dev"] {
        let from = format!("/{name}");
        nix::mount::mount(
            Some(from.as_str()),
            &folder.path().join(name),
            None::<&str>,
            bind,
            None::<&str>,
        )
        .expect("bind");
    }
    nix::unistd::chroot(folder.path()).expect("chroot");
    nix::unistd::chdir("/").expect("chdir");
    let (step, message) = failure();
    assert_eq!(step, "create process and namespaces");
    assert!(message.contains("EPERM") && message.contains("leave the chroot"), "{message}");
}

fn vmm_privileges() {
    let mut spawner = spawner();
    jail::drop_vmm_privileges().expect("drop");
    let status = status(std::process::id() as i32);
    for set in ["CapInh", "CapEff", "CapPrm", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    // The spawner can still make jails, and still looks at the VMM.
    let cell = Cell::start(&mut spawner, &hello("blk"));
    spawner.inspect().expect("inspect");
    let Ok(Event::Processes(list)) = spawner.next_event(LIMIT) else { panic!("no answer") };
    assert_eq!((list[0].cap_eff, list[0].no_new_privs), (0, true));
    assert_eq!(list[0].namespaces.len(), 7, "{:?}", list[0]);
    drop(cell);
}

fn fork_beside_threads() {
    let child = start_process(|| {
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || wait.recv().is_err());
        assert!(matches!(spawner::fork(Options::default()), Err(SpawnError::Threads(_))));
        assert!(jail::drop_vmm_privileges().is_err());
        drop(stop);
        thread.join().expect("join");
    });
    assert_eq!(nix::sys::wait::waitpid(child, None).map(crate::host::code), Ok(0));
}
