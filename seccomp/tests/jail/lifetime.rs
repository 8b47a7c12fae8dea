//! Nothing is left behind, however the VM ends.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use cellblock_seccomp::spawner::{self, Event, Options};
use cellblock_wire::Channel;
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::Test;
use crate::host::{
    Cell, LIMIT, alive, become_ordinary, code, gone_within, hello, in_process, request, spawner,
    start_process,
};

pub const TESTS: &[Test] = &[
    ("root: SIGKILL of the VMM ends everything", || vmm_killed(false)),
    ("ordinary user: SIGKILL of the VMM ends everything", || vmm_killed(true)),
    ("root: SIGKILL of the spawner ends all cells", || spawner_killed(false)),
    ("ordinary user: SIGKILL of the spawner ends all cells", || spawner_killed(true)),
    ("dropping the handle ends everything", handle_dropped),
    ("a stopped VMM's cells die with it", stopped),
    ("the spawner ignores the terminal's signals", signals),
    ("a malformed request ends the VM", malformed),
    ("the terminal is restored when the VMM is killed", terminal),
    ("a mode that is not raw is left alone", terminal_in_use),
];

const SECOND: Duration = Duration::from_secs(1);

/// Starts a VMM with two jailed cells and one without jail, hands their pids and
/// the spawner's over, and lets `then` act in the VMM.
fn vm(ordinary: bool, then: impl FnOnce(Vec<Cell>, spawner::Spawner)) -> (Pid, Vec<i32>) {
    let (near, far) = Channel::pair().expect("pair");
    let vmm = start_process(|| {
        if ordinary {
            become_ordinary();
        }
        let mut spawner = spawner();
        let mut cells: Vec<Cell> =
            ["blk", "serial"].iter().map(|p| Cell::start(&mut spawner, &hello(p))).collect();
        let mut bare = hello("blk");
        bare.sandbox = false;
        cells.push(Cell::start(&mut spawner, &bare));
        let mut pids: Vec<i32> = cells.iter().map(|c| c.pid).collect();
        pids.push(spawner.pid());
        far.send(&pids, &[]).expect("pids");
        then(cells, spawner);
    });
    let pids: Vec<i32> = near.recv_timeout(LIMIT).expect("the VM started").0;
    assert!(pids.iter().all(|p| alive(*p)), "{pids:?}");
    (vmm, pids)
}

fn sleep(cells: Vec<Cell>, spawner: spawner::Spawner) {
    std::thread::sleep(Duration::from_secs(60));
    drop((cells, spawner));
}

fn vmm_killed(ordinary: bool) {
    let (vmm, pids) = vm(ordinary, sleep);
    kill(vmm, Signal::SIGKILL).expect("kill");
    let took = gone_within(&pids, SECOND).unwrap_or_else(|left| panic!("left: {left:?}"));
    print!("[{took:.1?}] ");
    waitpid(vmm, None).expect("reap");
}

fn spawner_killed(ordinary: bool) {
    let (vmm, pids) = vm(ordinary, sleep);
    kill(Pid::from_raw(*pids.last().expect("spawner")), Signal::SIGKILL).expect("kill");
    // The VMM still holds the channels: only the parent-death signal can end them.
    let took = gone_within(&pids, SECOND).unwrap_or_else(|left| panic!("left: {left:?}"));
    print!("[{took:.1?}] ");
    assert!(alive(vmm.as_raw()));
    kill(vmm, Signal::SIGKILL).expect("kill");
    waitpid(vmm, None).expect("reap");
}

fn handle_dropped() {
    let (vmm, pids) = vm(false, |cells, spawner| {
        std::mem::forget(cells); // their channels stay open
        std::thread::sleep(Duration::from_millis(100)); // they are seen alive
        drop(spawner);
        std::thread::sleep(Duration::from_secs(5));
    });
    gone_within(&pids, SECOND).unwrap_or_else(|left| panic!("left: {left:?}"));
    kill(vmm, Signal::SIGKILL).expect("kill");
    waitpid(vmm, None).expect("reap");
}

/// Stopped cells and a stopped spawner cannot act on an end of file.
fn stopped() {
    let (vmm, pids) = vm(false, sleep);
    for pid in &pids[..3] {
        kill(Pid::from_raw(*pid), Signal::SIGSTOP).expect("stop");
    }
    kill(vmm, Signal::SIGKILL).expect("kill");
    gone_within(&pids, SECOND).unwrap_or_else(|left| panic!("left: {left:?}"));
    waitpid(vmm, None).expect("reap");
}

fn signals() {
    let mut spawner = spawner();
    for signal in
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP]
    {
        kill(Pid::from_raw(spawner.pid()), signal).expect("kill");
    }
    // It still works, and what it starts has the default actions again.
    let mut bare = hello("blk");
    (bare.sandbox, bare.policy) = (false, None);
    let cell = Cell::start(&mut spawner, &bare);
    let ignored = u64::from_str_radix(&crate::host::status(cell.pid)["SigIgn"], 16).expect("hex");
    // SIGPIPE is Rust's doing; 32 and 33 are glibc's own.
    assert_eq!(ignored & !(3 << 31), 1 << (libc::SIGPIPE - 1), "{ignored:x}");
    assert_eq!(crate::host::status(cell.pid)["SigBlk"], "0000000000000000");
}

fn malformed() {
    in_process(|| {
        let vmm = start_process(|| {
            let mut spawner = spawner();
            let cell = Cell::start(&mut spawner, &hello("blk"));
            let pids = [cell.pid, spawner.pid()];
            fs::write(format!("/tmp/cb-malformed-{}", std::process::id()), format!("{pids:?}"))
                .expect("note");
            nix::unistd::write(spawner.as_fd(), &[0xff; 20]).expect("write");
            std::thread::sleep(Duration::from_secs(30));
        });
        assert_eq!(waitpid(vmm, None).map(code), Ok(128 + 9), "the VMM is killed");
        let note = format!("/tmp/cb-malformed-{vmm}");
        let text = fs::read_to_string(&note).expect("note");
        fs::remove_file(note).expect("note");
        let pids: Vec<i32> =
            text.trim_matches(['[', ']']).split(", ").map(|p| p.parse().expect("pid")).collect();
        gone_within(&pids, SECOND).unwrap_or_else(|left| panic!("left: {left:?}"));
    });
    // What the handle refuses never reaches the spawner.
    let mut spawner = spawner();
    let (_near, far) = Channel::pair().expect("pair");
    assert!(spawner.spawn(&request("../blk", "x", true), &[far.as_fd()]).is_err());
    assert!(spawner.spawn(&request("blk", "x", true), &[]).is_err());
    assert!(spawner.spawn(&request("blk", "x", true), &[far.as_fd(); 9]).is_err());
    spawner.inspect().expect("alive");
    assert!(matches!(spawner.next_event(LIMIT), Ok(Event::Processes(_))));
}

fn terminal() {
    let pty = openpty(None, None).expect("pty");
    let before = tcgetattr(&pty.slave).expect("mode");
    let (near, far) = Channel::pair().expect("pair");
    let vmm = start_process(|| {
        let restore_terminal = Some(pty.slave.as_raw_fd());
        let spawner =
            spawner::fork(Options { restore_terminal, ..Default::default() }).expect("spawner");
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &raw).expect("raw");
        far.send(&spawner.pid(), &[]).expect("pid");
        std::thread::sleep(Duration::from_secs(60));
    });
    let pid: i32 = near.recv_timeout(LIMIT).expect("started").0;
    assert!(!tcgetattr(&pty.slave).expect("mode").local_flags.contains(LocalFlags::ICANON));
    kill(vmm, Signal::SIGKILL).expect("kill");
    gone_within(&[pid], SECOND).unwrap_or_else(|left| panic!("left: {left:?}"));
    assert!(tcgetattr(&pty.slave).expect("mode") == before, "restored");
    waitpid(vmm, None).expect("reap");
}

/// A shell that edits a line already: no echo, no line editing, but signals on.
fn terminal_in_use() {
    let pty = openpty(None, None).expect("pty");
    let options = Options { restore_terminal: Some(pty.slave.as_raw_fd()), ..Default::default() };
    let spawner = spawner::fork(options).expect("spawner");
    let mut shell = tcgetattr(&pty.slave).expect("mode");
    shell.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &shell).expect("set");
    assert!(spawner.shutdown(LIMIT));
    assert!(tcgetattr(&pty.slave).expect("mode") == shell, "left alone");
}
