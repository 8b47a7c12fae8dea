//! The serial process as it really runs: made by the spawner, jailed, sealed, with
//! the seccomp policy that ends it at the first call it should not make.
//!
//! No test harness: the program starts itself anew as the device process, and has
//! to fork the spawner while it has one thread. Arguments select checks by name.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use cellblock_devices::protocol::ring::{Counters, Interrupted, Producer, RING_BYTES};
use cellblock_devices::protocol::{
    CellStats, FromCell, Hello, JOURNAL_BYTES, LogLevel, Marker, SeccompMode, SerialEndpoint,
    SerialStart, Start, ToCell,
};
use cellblock_seccomp::spawner::{self, Event, ExitStatus, Request, Spawner};
use cellblock_seccomp::violation;
use cellblock_wire::{Access, Channel, ChannelError, Mapping, sealed_memfd};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;

const DATA: u8 = 0;
const IER: u8 = 1;
const LSR: u8 = 5;
const SOON: Duration = Duration::from_secs(10);

type Check = fn(&mut Spawner);
const CHECKS: &[(&str, Check)] = &[
    ("a whole life under seccomp", a_whole_life),
    ("every thread is sealed", every_thread_is_sealed),
    ("clients of a socket", socket_clients),
    ("a pseudo-terminal", pseudo_terminal),
    ("output flood, stuck reader", flood),
    ("death while a vCPU waits", death),
    ("a successor on the same ring", successor),
    ("marker lines are told once", marks),
    ("a start that fails says why", failed_start),
    ("idle costs no CPU time", idle),
    ("round trips", round_trips),
];

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|arg| arg == spawner::CELL_ARG) {
        cellblock_devices::cell::main(&args);
    }
    let only = args.get(1).filter(|arg| !arg.starts_with('-'));
    let mut spawner = spawner::fork(spawner::Options::default()).unwrap();
    for (name, check) in CHECKS.iter().filter(|(name, _)| only.is_none_or(|o| name.contains(o))) {
        println!("{name}");
        check(&mut spawner);
    }
    assert!(spawner.shutdown(SOON), "the spawner has not ended");
    println!("ok");
}

/// What a device keeps when its process is replaced.
struct Wiring {
    ring: Producer,
    memory: OwnedFd,
    doorbell: OwnedFd,
    interrupt: OwnedFd,
    /// What outlives a process: its journal, and its pipes.
    kept: [OwnedFd; 5],
}

struct Vm {
    wiring: Wiring,
    cell: Channel,
    page: Mapping,
    ticket: u32,
    pid: i32,
}

fn event() -> OwnedFd {
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
    event.as_fd().try_clone_to_owned().unwrap()
}

fn readable(fd: impl AsFd, limit: Duration) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(limit.as_millis()).unwrap()).unwrap() == 1
}

fn null() -> OwnedFd {
    File::options().read(true).write(true).open("/dev/null").unwrap().into()
}

fn pipe() -> (File, File) {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    (read.into(), write.into())
}

fn read_exactly(mut from: impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

impl Wiring {
    fn new() -> Wiring {
        let memory = sealed_memfd("ring", RING_BYTES as u64).unwrap();
        let doorbell = event();
        let mapping = Mapping::new(&memory, RING_BYTES, Access::ReadWrite).unwrap();
        let ring = Producer::new(mapping, doorbell.try_clone().unwrap(), 2).unwrap();
        let journal = sealed_memfd("journal", JOURNAL_BYTES as u64).unwrap();
        let pipe = || nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (output, input) = (pipe(), pipe());
        let kept = [journal, output.0, output.1, input.0, input.1];
        Wiring { ring, memory, doorbell, interrupt: event(), kept }
    }
}

fn config(endpoint: SerialEndpoint) -> SerialStart {
    SerialStart { endpoint, escape: false, buffer: 1 << 16 }
}

/// Asks for a process; its first message decides.
fn launch(
    spawner: &mut Spawner,
    role: &str,
    start: SerialStart,
    wiring: &Wiring,
    fds: &[BorrowedFd<'_>],
) -> (Channel, Mapping, u32) {
    let (cell, far) = Channel::pair().unwrap();
    // Little fits in, so that there is something that does not.
    let far = far.into_fd();
    setsockopt(&far, sockopt::SndBuf, &0).unwrap();
    let page = violation::new_page().unwrap();
    let hello = Hello {
        lazy: None,
        logged: None,
        id: "com1".into(),
        seccomp: SeccompMode::Kill,
        sandbox: true,
        log: LogLevel::Trace,
        start: Start::Serial(start),
    };
    let mut all = vec![
        page.as_fd(),
        wiring.memory.as_fd(),
        wiring.doorbell.as_fd(),
        wiring.interrupt.as_fd(),
    ];
    all.extend(wiring.kept.iter().map(|fd| fd.as_fd()));
    all.extend(fds);
    cell.send(&hello, &all).unwrap();
    let request = Request { role: role.into(), id: "com1".into(), sandbox: true };
    let ticket = spawner.spawn(&request, &[far.as_fd()]).unwrap();
    let page = Mapping::new(&page, violation::PAGE, Access::ReadOnly).unwrap();
    (cell, page, ticket)
}

impl Vm {
    fn new(spawner: &mut Spawner, start: SerialStart, fds: &[BorrowedFd<'_>]) -> Vm {
        Vm::on(Wiring::new(), spawner, start, fds)
    }

    fn on(wiring: Wiring, spawner: &mut Spawner, start: SerialStart, fds: &[BorrowedFd<'_>]) -> Vm {
        let (cell, page, ticket) = launch(spawner, "serial", start, &wiring, fds);
        match cell.recv_timeout::<FromCell>(SOON) {
            Ok((FromCell::Ready, _)) => {}
            other => panic!("{other:?}, {:?}, {:?}", violation::read(&page), spawner.try_event()),
        }
        let pid = loop {
            match spawner.next_event(SOON).unwrap() {
                Event::Started { ticket: of, pid, .. } if of == ticket => break pid,
                Event::Exited { .. } => {} // of an earlier check
                other => panic!("{other:?}"),
            }
        };
        Vm { wiring, cell, page, ticket, pid }
    }

    fn outb(&self, offset: u8, value: u8) {
        self.wiring.ring.post_write(0, offset, value, &|| false).unwrap();
    }

    fn inb(&self, offset: u8) -> u8 {
        let ring = &self.wiring.ring;
        let ticket = ring.begin_read(0, offset, &|| false).unwrap();
        ring.wait_read(0, ticket, &|| false).unwrap()
    }

    fn print(&self, text: &[u8]) {
        text.iter().for_each(|&byte| self.outb(DATA, byte));
    }

    fn type_in(&self, count: usize) -> Vec<u8> {
        let end = Instant::now() + SOON;
        let mut bytes = Vec::new();
        while bytes.len() < count && Instant::now() < end {
            if self.inb(LSR) & 1 != 0 {
                bytes.push(self.inb(DATA));
            }
        }
        bytes
    }

    /// The next message, log lines shown and left out.
    fn heard(&self) -> FromCell {
        loop {
            match self.cell.recv_timeout::<FromCell>(SOON) {
                Ok((FromCell::Log { level, message }, _)) => println!("  {level:?}: {message}"),
                Ok((message, _)) => return message,
                Err(error) => panic!("{error}: {:?}", violation::read(&self.page)),
            }
        }
    }

    fn drain(&self, limit_ms: u32) -> u64 {
        self.cell.send(&ToCell::Drain { epoch: 9, limit_ms }, &[]).unwrap();
        match self.heard() {
            FromCell::Drained { epoch: 9, dropped, .. } => dropped,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for the end of the process.
    fn ended(&self, spawner: &mut Spawner) -> ExitStatus {
        loop {
            match spawner.next_event(SOON).unwrap() {
                Event::Exited { pid, status } if pid == self.pid => return status,
                Event::Exited { .. } => {}
                other => panic!("{other:?} for ticket {}", self.ticket),
            }
        }
    }

    fn close(mut self, spawner: &mut Spawner) {
        let (spare, _) = Channel::pair().unwrap();
        drop(std::mem::replace(&mut self.cell, spare));
        let status = self.ended(spawner);
        assert_eq!(status, ExitStatus::Code(0), "{:?}", violation::read(&self.page));
    }
}

fn a_whole_life(spawner: &mut Spawner) {
    let (input, mut user) = pipe();
    let (reader, output) = pipe();
    let start = SerialStart { escape: true, ..config(SerialEndpoint::Stdio) };
    let vm = Vm::new(spawner, start, &[input.as_fd(), output.as_fd()]);
    vm.print(b"Linux version\ncellblock:heartbeat\n");
    assert!(matches!(vm.heard(), FromCell::Marker { number: 0, marker: Marker::Heartbeat }));
    assert_eq!(read_exactly(&reader, 34), b"Linux version\ncellblock:heartbeat\n");

    vm.outb(IER, 1);
    user.write_all(b"abc").unwrap();
    assert!(readable(&vm.wiring.interrupt, SOON));
    assert_eq!(vm.inb(DATA), b'a');
    nix::unistd::read(&vm.wiring.interrupt, &mut [0; 8]).unwrap();
    assert!(readable(&vm.wiring.interrupt, SOON), "reminded of b and c");
    assert_eq!(vm.type_in(2), b"bc");

    // Sleeps and wakes, many times.
    for _ in 0..50 {
        thread::sleep(Duration::from_millis(1));
        vm.print(b".");
        assert_eq!(vm.inb(LSR), 0x60);
    }
    vm.print(&[b'x'; 50_000]);
    assert_eq!(read_exactly(&reader, 50_050).len(), 50_050);
    assert_eq!(vm.drain(5000), 0);
    vm.cell.send(&ToCell::Stats, &[]).unwrap();
    let stats = vm.heard();
    let FromCell::Stats(CellStats::Serial { output: 50_084, input: 3, dropped: 0 }) = stats else {
        panic!("{stats:?}");
    };
    user.write_all(b"\x01x").unwrap();
    assert!(matches!(vm.heard(), FromCell::Quit));
    drop(user); // end of file
    thread::sleep(Duration::from_millis(20));

    // Last words, and the end of the channel.
    drop(output);
    vm.print(b"last words\n");
    vm.close(spawner);
    let mut rest = String::new();
    (&reader).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "last words\n");
}

fn every_thread_is_sealed(spawner: &mut Spawner) {
    let (input, _user) = pipe();
    let vm = Vm::new(spawner, config(SerialEndpoint::Stdio), &[input.as_fd(), null().as_fd()]);
    // A thread names itself when it first runs, which may be after the process is ready.
    let end = Instant::now() + Duration::from_secs(10);
    let names = loop {
        let names = sealed_threads(vm.pid);
        if names == ["serial", "serial-in", "serial-out"] || Instant::now() > end {
            break names;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(names, ["serial", "serial-in", "serial-out"]);
    vm.close(spawner);
}

/// Names of a process's threads, in order; each has to be sealed.
fn sealed_threads(pid: i32) -> Vec<String> {
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line[name.len()..].trim().to_owned()
        };
        assert_eq!(field("Seccomp:"), "2", "{status}");
        assert_eq!(field("NoNewPrivs:"), "1");
        for set in ["CapEff:", "CapPrm:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        names.push(field("Name:"));
    }
    names.sort();
    names
}

fn socket_clients(spawner: &mut Spawner) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let listener = UnixListener::bind(&path).unwrap();
    let vm = Vm::new(spawner, config(SerialEndpoint::Socket), &[listener.as_fd()]);
    for i in 0..3 {
        vm.print(b"early\n");
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(read_exactly(&client, 6), b"early\n", "client {i}");
        client.write_all(b"hi").unwrap();
        assert_eq!(vm.type_in(2), b"hi");
        let mut second = UnixStream::connect(&path).unwrap();
        second.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(second.read(&mut [0; 8]).unwrap(), 0, "refused");
        drop(client);
        thread::sleep(Duration::from_millis(20));
    }
    vm.close(spawner);
}

fn pseudo_terminal(spawner: &mut Spawner) {
    use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
    use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let mut raw = tcgetattr(&master).unwrap();
    cfmakeraw(&mut raw);
    tcsetattr(&master, SetArg::TCSANOW, &raw).unwrap();
    let name = ptsname_r(&master).unwrap();
    let vm = Vm::new(spawner, config(SerialEndpoint::Pty), &[master.as_fd()]);
    for _ in 0..3 {
        vm.print(b"hello\n");
        thread::sleep(Duration::from_millis(30)); // a write finds nobody there
        let mut slave = File::options().read(true).write(true).open(&name).unwrap();
        assert_eq!(read_exactly(&slave, 6), b"hello\n");
        slave.write_all(b"yes").unwrap();
        assert_eq!(vm.type_in(3), b"yes");
        drop(slave);
        thread::sleep(Duration::from_millis(20));
    }
    vm.close(spawner);
}

fn flood(spawner: &mut Spawner) {
    let (reader, output) = pipe();
    let vm = Vm::new(spawner, config(SerialEndpoint::File), &[output.as_fd()]);
    let begin = Instant::now();
    vm.print(&vec![b'#'; 1 << 20]);
    assert_eq!(vm.inb(LSR), 0x60);
    println!("  1 MiB of register writes in {:?}", begin.elapsed());
    let dropped = vm.drain(50);
    assert!(dropped > 0);
    assert_eq!(vm.wiring.ring.counters(), Counters::default());
    let rest = (1 << 20) - dropped as usize;
    assert_eq!(read_exactly(&reader, rest).len(), rest);
    vm.close(spawner);
}

fn death(spawner: &mut Spawner) {
    let vm = Vm::new(spawner, config(SerialEndpoint::Null), &[]);
    kill(Pid::from_raw(vm.pid), Signal::SIGSTOP).unwrap();
    let ticket = vm.wiring.ring.begin_read(0, LSR, &|| false).unwrap();
    let begin = Instant::now();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| vm.wiring.ring.wait_read(0, ticket, &|| false));
        thread::sleep(Duration::from_millis(70));
        kill(Pid::from_raw(vm.pid), Signal::SIGKILL).unwrap();
        assert_eq!(vm.ended(spawner), ExitStatus::Signal(9));
        assert!(!waiter.is_finished(), "it is for the VMM to say that the device is dead");
        vm.wiring.ring.set_dead(true);
        assert_eq!(waiter.join().unwrap(), Ok(0xff));
    });
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    assert!(matches!(vm.cell.recv::<FromCell>(), Err(ChannelError::Closed)));
}

fn successor(spawner: &mut Spawner) {
    let (reader, output) = pipe();
    let first = Vm::new(spawner, config(SerialEndpoint::File), &[output.as_fd()]);
    first.print(b"carried out\n");
    assert_eq!(first.drain(5000), 0);
    kill(Pid::from_raw(first.pid), Signal::SIGSTOP).unwrap();
    first.print(b"accepted\n");
    let ticket = first.wiring.ring.begin_read(0, LSR, &|| false).unwrap();
    let kicked = first.wiring.ring.wait_read(0, ticket, &|| true);
    assert_eq!(kicked, Err(Interrupted), "a kick reaches a vCPU whose device is stopped");
    kill(Pid::from_raw(first.pid), Signal::SIGKILL).unwrap();
    assert_eq!(first.ended(spawner), ExitStatus::Signal(9));

    // The read is answered, the writes are output, by a process that was not there.
    let start = config(SerialEndpoint::File);
    let second = Vm::on(first.wiring, spawner, start, &[output.as_fd()]);
    assert_eq!(second.wiring.ring.wait_read(0, ticket, &|| false), Ok(0x60));
    assert_eq!(second.drain(5000), 0);
    drop(output);
    second.close(spawner);
    let mut text = String::new();
    (&reader).read_to_string(&mut text).unwrap();
    assert_eq!(text, "carried out\naccepted\n");
}

/// A process that dies before it has told all of them.
fn marks(spawner: &mut Spawner) {
    const LINES: u32 = 200;
    let first = Vm::new(spawner, config(SerialEndpoint::Null), &[]);
    (0..LINES).for_each(|_| first.print(b"cellblock:heartbeat\n"));
    // All of it is carried out, and it has had time to tell.
    assert_eq!(first.inb(LSR), 0x60);
    thread::sleep(Duration::from_millis(20));
    kill(Pid::from_raw(first.pid), Signal::SIGKILL).unwrap();
    assert_eq!(first.ended(spawner), ExitStatus::Signal(9));
    let told = |cell: &Channel| {
        std::iter::from_fn(|| match cell.recv_timeout::<FromCell>(SOON) {
            Ok((FromCell::Marker { number, .. }, _)) => Some(Some(number)),
            Ok((FromCell::Drained { .. }, _)) | Err(ChannelError::Closed) => None,
            Ok((FromCell::Log { .. }, _)) => Some(None),
            other => panic!("{other:?}"),
        })
        .flatten()
        .collect::<Vec<_>>()
    };
    let mut all = told(&first.cell);
    println!("  {} of {LINES} by the first", all.len());
    assert!(!all.is_empty() && all.len() < LINES as usize);
    let second = Vm::on(first.wiring, spawner, config(SerialEndpoint::Null), &[]);
    // A drain is answered behind them.
    second.cell.send(&ToCell::Drain { epoch: 9, limit_ms: 5000 }, &[]).unwrap();
    all.extend(told(&second.cell));
    assert_eq!(all, (0..LINES).collect::<Vec<_>>());
    second.close(spawner);
}

fn failed_start(spawner: &mut Spawner) {
    for (role, endpoint, step) in [
        ("serial", SerialEndpoint::Socket, "prepare the device"),
        ("serial", SerialEndpoint::Pty, "prepare the device"),
        ("plant", SerialEndpoint::Null, "receive hello"),
    ] {
        let (cell, _page, ticket) = launch(spawner, role, config(endpoint), &Wiring::new(), &[]);
        let said = cell.recv_timeout::<FromCell>(SOON).unwrap().0;
        let FromCell::Failed { step: at, message } = said else { panic!("{said:?}") };
        println!("  {at}: {message}");
        assert_eq!(at, step);
        loop {
            match spawner.next_event(SOON).unwrap() {
                Event::Exited { status, .. } => {
                    assert_eq!(status, ExitStatus::Code(1));
                    break;
                }
                Event::Started { ticket: of, .. } if of == ticket => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// CPU time of all threads of a process.
fn cpu_time(pid: i32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let times = tasks.map(|task| {
        let stat = fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
        stat.split(' ').next().unwrap().parse::<u64>().unwrap()
    });
    Duration::from_nanos(times.sum())
}

fn idle(spawner: &mut Spawner) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let listener = UnixListener::bind(&path).unwrap();
    let master = nix::pty::posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
    nix::pty::grantpt(&master).unwrap();
    nix::pty::unlockpt(&master).unwrap();
    let name = nix::pty::ptsname_r(&master).unwrap();
    drop(File::options().read(true).write(true).open(name).unwrap()); // hung up from now on
    let (input, mut user) = pipe();
    user.write_all(&[b'x'; 5000]).unwrap(); // the guest does not read it
    let vms = [
        Vm::new(spawner, config(SerialEndpoint::Pty), &[master.as_fd()]),
        Vm::new(spawner, config(SerialEndpoint::Socket), &[listener.as_fd()]),
        Vm::new(spawner, config(SerialEndpoint::Stdio), &[input.as_fd(), null().as_fd()]),
    ];
    for vm in &vms {
        vm.outb(IER, 1);
        vm.print(b"waiting\n");
    }
    // A client that left input behind, which the guest does not read either.
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&[b'x'; 10_000]).unwrap();
    thread::sleep(Duration::from_millis(50));
    drop(client);
    thread::sleep(Duration::from_millis(50));
    let before: Vec<_> = vms.iter().map(|vm| cpu_time(vm.pid)).collect();
    thread::sleep(Duration::from_secs(1));
    for (vm, before) in vms.iter().zip(before) {
        let spent = cpu_time(vm.pid) - before;
        println!("  {spent:?} in a second");
        assert!(spent < Duration::from_millis(20), "{spent:?}");
    }
    for vm in vms {
        vm.close(spawner);
    }
}

fn round_trips(spawner: &mut Spawner) {
    let vm = Vm::new(spawner, config(SerialEndpoint::Null), &[]);
    let measure = |what: &str, pause: Duration, count: usize| {
        let mut times: Vec<_> = (0..count)
            .map(|_| {
                thread::sleep(pause);
                let begin = Instant::now();
                assert_eq!(vm.inb(LSR), 0x60);
                begin.elapsed()
            })
            .collect();
        times.sort();
        let (low, mid, high) = (times[count / 10], times[count / 2], times[count * 9 / 10]);
        println!("  read, {what}: median {mid:?} (10%: {low:?}, 90%: {high:?})");
        mid
    };
    measure("device awake", Duration::ZERO, 20_000);
    measure("device asleep", Duration::from_millis(2), 500);
    let begin = Instant::now();
    vm.print(&[b'x'; 100_000]);
    assert_eq!(vm.inb(LSR), 0x60);
    println!("  posted write: {:?} each", begin.elapsed() / 100_000);
    vm.close(spawner);
}
