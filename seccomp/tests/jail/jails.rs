//! What a jailed process has, seen from /proc.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use cellblock_seccomp::spawner::{Event, ExitStatus, Spawner};
use cellblock_wire::Channel;

use crate::Test;
use crate::cell::{Answer, Ask, Hello};
use crate::host::{
    Cell, LIMIT, become_ordinary, exit_of, hello, in_process, namespace, request, spawner, status,
};

pub const TESTS: &[Test] = &[
    ("root: a cell is jailed", || a_cell_is_jailed(true)),
    ("ordinary user: a cell is jailed", || {
        in_process(|| {
            become_ordinary();
            a_cell_is_jailed(false);
        })
    }),
    ("root directory is empty and read-only", root_is_empty),
    ("fds are exactly those given", fds_are_exact),
    ("live jails of root have distinct host ids", distinct_ids),
    ("inspect describes every process", inspect),
    ("without sandbox there are no namespaces", no_sandbox),
    ("exits are reported with their status", exits),
];

const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

fn a_cell_is_jailed(root: bool) {
    let mut spawner = spawner();
    for policy in ["blk", "serial"] {
        let cell = Cell::start(&mut spawner, &hello(policy));
        check_jail(&cell, root);
    }
}

fn check_jail(cell: &Cell, root: bool) {
    let pid = cell.pid;
    for task in fs::read_dir(format!("/proc/{pid}/task")).expect("tasks") {
        let tid: i32 = task.expect("task").file_name().to_str().expect("tid").parse().expect("tid");
        let status = status(tid);
        assert_eq!(status["Seccomp"], "2", "thread {tid}");
        assert_eq!(status["NoNewPrivs"], "1", "thread {tid}");
        for set in ["CapInh", "CapEff", "CapPrm", "CapBnd", "CapAmb"] {
            assert_eq!(status[set], "0000000000000000", "{set} of thread {tid}");
        }
    }
    let status = status(pid);
    assert_eq!(status["Threads"], "2", "the early thread was there");
    assert_eq!(status["NSpid"].split_whitespace().nth(1), Some("1"), "init of its namespace");
    for name in NAMESPACES {
        assert_ne!(namespace(&pid.to_string(), name), namespace("self", name), "{name}");
    }
    let uid: u32 = status["Uid"].split_whitespace().next().expect("uid").parse().expect("uid");
    if root {
        assert!(uid >= 0x7000_0000, "host id {uid}");
        assert_eq!(status["Groups"], "");
        let setgroups = fs::read_to_string(format!("/proc/{pid}/setgroups")).expect("setgroups");
        assert_eq!(setgroups.trim(), "allow");
    } else {
        assert_eq!(uid, nix::unistd::getuid().as_raw());
        let setgroups = fs::read_to_string(format!("/proc/{pid}/setgroups")).expect("setgroups");
        assert_eq!(setgroups.trim(), "deny");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
    for line in
        ["Max core file size        0                    0", "Max open files            512"]
    {
        assert!(limits.contains(line), "{limits}");
    }
    assert!(limits.contains("Max file size             unlimited"), "{limits}");
    let environment = fs::read(format!("/proc/{pid}/environ")).expect("environ");
    assert_eq!(environment, b"", "no environment");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let session = stat.rsplit(')').next().and_then(|s| s.split_whitespace().nth(3));
    assert_eq!(session, Some(pid.to_string().as_str()), "a session of its own");
}

fn root_is_empty() {
    let mut spawner = spawner();
    let mut hello = hello("blk");
    hello.policy = None; // no filter, so that the cell can try
    let cell = Cell::start(&mut spawner, &hello);
    let count = fs::read_dir(format!("/proc/{}/root", cell.pid)).expect("root").count();
    assert_eq!(count, 0);
    match cell.ask(&Ask::Look) {
        // Landlock may refuse even the look.
        Answer::Text(t) if t.contains("ermission denied") => {}
        Answer::Text(t) => assert!(t.starts_with("[] 0 ") && t.contains("ead-only"), "{t}"),
        other => panic!("{other:?}"),
    }
    let outside = cell.value(&Ask::Open("/proc/self/status".into()));
    assert!(outside == -i64::from(libc::ENOENT) || outside == -i64::from(libc::EACCES));
    // Without the filter, the rest of the jail still refuses to make files or mounts.
    assert!(cell.value(&Ask::Call(libc::SYS_chroot, [c".".as_ptr() as u64; 6])) < 0);
}

fn fds_are_exact() {
    // A stray inheritable fd in the VMM must not get through.
    let stray = nix::unistd::dup(std::io::stderr()).expect("dup");
    let mut spawner = spawner();
    drop(stray);
    let cell = Cell::start(&mut spawner, &hello("blk"));
    assert_eq!(fds(cell.pid), BTreeSet::from([0, 1, 2, 3]));
    for fd in 0..3 {
        let target = fs::read_link(format!("/proc/{}/fd/{fd}", cell.pid)).expect("fd");
        assert_eq!(target.to_str(), Some("/dev/null"), "fd {fd}");
    }
    // With a second socket, as a virtio device has.
    let (near, far) = Channel::pair().expect("pair");
    let (user_near, user_far) = std::os::unix::net::UnixStream::pair().expect("pair");
    spawner.spawn(&request("blk", "d", true), &[far.as_fd(), user_far.as_fd()]).expect("spawn");
    let Ok(Event::Started { pid, .. }) = spawner.next_event(LIMIT) else { panic!("no start") };
    // While it waits for the hello; before, its loader still opens libraries.
    let start = Instant::now();
    while fds(pid) != BTreeSet::from([0, 1, 2, 3, 4]) {
        assert!(start.elapsed() < LIMIT, "{:?}", fds(pid));
    }
    drop((near, user_near));
    assert_eq!(exit_of(&mut spawner, pid), ExitStatus::Code(0), "end of file ends a cell");
    // The spawner keeps none of what it passed on.
    let own = fds(spawner.pid());
    assert_eq!(own.len(), 3 + 4 + 1, "stdio, channel, pidfd, program, null, one child: {own:?}");
}

fn fds(pid: i32) -> BTreeSet<i32> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("fds")
        .map(|e| e.expect("fd").file_name().to_str().expect("fd").parse().expect("fd"))
        .collect()
}

fn distinct_ids() {
    let mut spawner = spawner();
    let cells: Vec<Cell> = (0..3).map(|_| Cell::start(&mut spawner, &hello("serial"))).collect();
    let ids: BTreeSet<String> = cells.iter().map(|c| status(c.pid)["Uid"].clone()).collect();
    assert_eq!(ids.len(), 3, "{ids:?}");
}

fn inspect() {
    let mut spawner = spawner();
    let cell = Cell::start(&mut spawner, &hello("serial"));
    spawner.inspect().expect("inspect");
    let Ok(Event::Processes(list)) = spawner.next_event(LIMIT) else { panic!("no answer") };
    let roles: Vec<&str> = list.iter().map(|p| p.role.as_str()).collect();
    assert_eq!(roles, ["vmm", "spawner", "serial"]);
    let [vmm, own, serial] = &list[..] else { panic!("three") };
    assert_eq!(vmm.pid, std::process::id() as i32);
    assert_eq!(own.pid, spawner.pid());
    assert!(own.no_new_privs && own.cap_eff == 0xc0 && own.cap_bnd == 0xc0, "{own:x?}");
    assert_eq!((serial.pid, serial.id.as_str()), (cell.pid, "id0"));
    assert_eq!((serial.seccomp, serial.no_new_privs), (2, true));
    assert_eq!((serial.cap_eff, serial.cap_prm, serial.cap_bnd), (0, 0, 0));
    assert_eq!(serial.namespaces.len(), 7);
    for (name, inode) in &serial.namespaces {
        assert_ne!(own.namespaces.get(name), Some(inode), "{name}");
    }
    assert!(serial.rss_kib > 0 && serial.pss_kib > 0 && serial.pss_kib <= serial.rss_kib);
    assert!(serial.threads.iter().any(|t| t.name == "worker" && t.seccomp == 2), "{serial:?}");
}

fn no_sandbox() {
    let mut spawner = spawner();
    let cell = Cell::start(
        &mut spawner,
        &Hello { sandbox: false, policy: None, log: false, thread_first: false },
    );
    for name in NAMESPACES {
        assert_eq!(namespace(&cell.pid.to_string(), name), namespace("self", name), "{name}");
    }
    assert_eq!(fds(cell.pid), BTreeSet::from([0, 1, 2, 3]));
}

fn exits() {
    let mut spawner = spawner();
    let cell = Cell::start(&mut spawner, &hello("blk"));
    cell.channel.send(&Ask::Exit(7), &[]).expect("send");
    assert_eq!(exit_of(&mut spawner, cell.pid), ExitStatus::Code(7));
    let cell = Cell::start(&mut spawner, &hello("blk"));
    spawner.kill(std::process::id() as i32).expect("ignored: not a child");
    spawner.kill(cell.pid).expect("kill");
    assert_eq!(exit_of(&mut spawner, cell.pid), ExitStatus::Signal(9));
    assert!(spawner.try_event().expect("alive").is_none());
    assert!(spawner.shutdown(LIMIT));
}

/// `cargo test --release -p cellblock-seccomp --test jail -- @measure`: prints the
/// time from request to sealed, quickest and median, in milliseconds.
pub fn measure() {
    for (what, count, sandbox) in
        [("one jail", 1, true), ("three jails", 3, true), ("one process without jail", 1, false)]
    {
        let mut spawner = spawner();
        let mut times: Vec<Duration> =
            (0..50).map(|_| start_many(&mut spawner, count, sandbox)).collect();
        times.sort_unstable();
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        println!("{what}: {:.2} {:.2}", ms(times[0]), ms(times[times.len() / 2]));
    }
}

/// From the first request until the last cell is sealed.
fn start_many(spawner: &mut Spawner, count: usize, sandbox: bool) -> Duration {
    let mut hello = hello("blk");
    hello.sandbox = sandbox;
    if !sandbox {
        hello.policy = None;
    }
    let start = Instant::now();
    let channels: Vec<Channel> = (0..count)
        .map(|_| {
            let (near, far) = Channel::pair().expect("pair");
            let page = cellblock_seccomp::violation::new_page().expect("page");
            near.send(&hello, &[page.as_fd()]).expect("hello");
            spawner.spawn(&request("blk", "d", sandbox), &[far.as_fd()]).expect("spawn");
            near
        })
        .collect();
    for channel in &channels {
        match channel.recv_timeout::<Answer>(LIMIT) {
            Ok((Answer::Ready, _)) => {}
            other => panic!("{other:?}"),
        }
    }
    let elapsed = start.elapsed();
    drop(channels);
    let mut exited = 0;
    while exited < count {
        if let Event::Exited { .. } = spawner.next_event(LIMIT).expect("event") {
            exited += 1;
        }
    }
    elapsed
}
