//! The VMM's side of the tests.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cellblock_seccomp::spawner::{self, Event, ExitStatus, Options, Request, Spawner};
use cellblock_seccomp::violation;
use cellblock_wire::{Access, Channel, Mapping};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Uid, fork, setgroups, setresgid, setresuid};

use crate::cell::{Answer, Ask, Hello};

pub const LIMIT: Duration = Duration::from_secs(10);

/// A started cell.
pub struct Cell {
    pub channel: Channel,
    pub pid: i32,
    pub page: Mapping,
}

pub fn request(role: &str, id: &str, sandbox: bool) -> Request {
    Request { role: role.into(), id: id.into(), sandbox }
}

pub fn spawner() -> Spawner {
    spawner::fork(Options::default()).expect("spawner")
}

pub fn hello(policy: &str) -> Hello {
    Hello { sandbox: true, policy: Some(policy.into()), log: false, thread_first: false }
}

impl Cell {
    /// Starts a cell, and waits until it is sealed.
    pub fn start(spawner: &mut Spawner, hello: &Hello) -> Cell {
        let cell = Cell::begin(spawner, hello);
        match cell.channel.recv_timeout(LIMIT) {
            Ok((Answer::Ready, _)) => cell,
            other => panic!("cell did not start: {other:?}"),
        }
    }

    /// Starts a cell and sends the hello.
    pub fn begin(spawner: &mut Spawner, hello: &Hello) -> Cell {
        let (near, far) = Channel::pair().expect("pair");
        let page = violation::new_page().expect("page");
        near.send(hello, &[page.as_fd()]).expect("hello");
        let role = hello.policy.as_deref().unwrap_or("none");
        let ticket =
            spawner.spawn(&request(role, "id0", hello.sandbox), &[far.as_fd()]).expect("spawn");
        drop(far);
        loop {
            match spawner.next_event(LIMIT) {
                Ok(Event::Started { ticket: t, pid, .. }) if t == ticket => {
                    let page =
                        Mapping::new(page, violation::PAGE, Access::ReadWrite).expect("page");
                    return Cell { channel: near, pid, page };
                }
                // A cell that the test dropped earlier.
                Ok(Event::Exited { .. }) => {}
                other => panic!("not started: {other:?}"),
            }
        }
    }

    pub fn ask(&self, ask: &Ask) -> Answer {
        self.channel.send(ask, &[]).expect("ask");
        self.channel.recv_timeout(LIMIT).unwrap_or_else(|e| panic!("{ask:?}: {e}")).0
    }

    pub fn value(&self, ask: &Ask) -> i64 {
        match self.ask(ask) {
            Answer::Value(value) => value,
            other => panic!("{ask:?}: {other:?}"),
        }
    }

    /// A call that must end the cell: the report and the exit status.
    pub fn violate(self, spawner: &mut Spawner, ask: &Ask) -> String {
        self.channel.send(ask, &[]).expect("ask");
        let answer = self.channel.recv_timeout::<Answer>(LIMIT);
        assert!(answer.is_err(), "{ask:?} was let through: {answer:?}");
        assert_eq!(exit_of(spawner, self.pid), ExitStatus::Code(violation::EXIT_STATUS), "{ask:?}");
        violation::read(&self.page).expect("reported").to_string()
    }
}

pub fn exit_of(spawner: &mut Spawner, wanted: i32) -> ExitStatus {
    match spawner.next_event(LIMIT) {
        Ok(Event::Exited { pid, status }) if pid == wanted => status,
        other => panic!("{wanted} did not exit: {other:?}"),
    }
}

/// `key: value` lines of /proc/PID/status.
pub fn status(pid: i32) -> BTreeMap<String, String> {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .expect("status")
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(k, v)| (k.to_string(), v.trim().to_string()))
        .collect()
}

pub fn namespace(pid: &str, name: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{name}")).expect("ns")
}

pub fn alive(pid: i32) -> bool {
    // A zombie that waits for its parent has nothing left.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|s| !s.rsplit(')').next().is_some_and(|s| s.starts_with(" Z")))
}

pub fn gone_within(pids: &[i32], limit: Duration) -> Result<Duration, Vec<i32>> {
    let start = Instant::now();
    loop {
        let left: Vec<i32> = pids.iter().copied().filter(|p| alive(*p)).collect();
        if left.is_empty() {
            return Ok(start.elapsed());
        }
        if start.elapsed() > limit {
            return Err(left);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs `body` in a process of its own; its panic fails the test.
pub fn in_process(body: impl FnOnce()) {
    assert_eq!(waitpid(start_process(body), None).map(code), Ok(0), "in its own process");
}

pub fn code(status: WaitStatus) -> i32 {
    match status {
        WaitStatus::Exited(_, code) => code,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        other => panic!("{other:?}"),
    }
}

/// Forks a process that runs `body` and exits.
pub fn start_process(body: impl FnOnce()) -> nix::unistd::Pid {
    // SAFETY: the tests have one thread.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_ok();
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(if ok { 0 } else { 99 }) }
        }
    }
}

/// Becomes an ordinary user, as if by login.
pub fn become_ordinary() {
    const ID: u32 = 47_011;
    setgroups(&[]).expect("groups");
    let (gid, uid) = (Gid::from_raw(ID), Uid::from_raw(ID));
    setresgid(gid, gid, gid).expect("gid");
    setresuid(uid, uid, uid).expect("uid");
    // A login would exec, which makes /proc/self one's own again.
    nix::sys::prctl::set_dumpable(true).expect("dumpable");
}
