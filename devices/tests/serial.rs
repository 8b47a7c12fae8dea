//! The serial process, run in a thread, with a register ring as the VMM has it.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cellblock_devices::protocol::ring::{Counters, Producer, RING_BYTES};
use cellblock_devices::protocol::{
    CellStats, FromCell, JOURNAL_BYTES, Marker, SerialEndpoint, SerialStart, ToCell,
};
use cellblock_devices::serial::{self, SerialError};
use cellblock_wire::{Access, Channel, Mapping, sealed_memfd};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv};

const DATA: u8 = 0;
const IER: u8 = 1;
const IIR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
/// Long enough for a machine that does much else.
const SOON: Duration = Duration::from_secs(20);

/// The VMM's and the guest's end of one serial device.
struct Vm {
    ring: Producer,
    interrupt: OwnedFd,
    cell: Channel,
    thread: Option<JoinHandle<Result<(), SerialError>>>,
}

fn event() -> OwnedFd {
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
    event.as_fd().try_clone_to_owned().unwrap()
}

/// What outlives a process: its journal, and its pipes.
fn kept() -> Vec<OwnedFd> {
    let mut kept = vec![sealed_memfd("journal", JOURNAL_BYTES as u64).unwrap()];
    for _ in 0..2 {
        let (from, to) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        kept.extend([from, to]);
    }
    kept
}

fn readable(fd: impl AsFd, limit: Duration) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(limit.as_millis()).unwrap()).unwrap() == 1
}

impl Vm {
    fn new(endpoint: SerialEndpoint, fds: Vec<OwnedFd>) -> Vm {
        Vm::with(SerialStart { endpoint, escape: false, buffer: 1 << 20 }, fds)
    }

    fn with(config: SerialStart, fds: Vec<OwnedFd>) -> Vm {
        let memory = sealed_memfd("ring", RING_BYTES as u64).unwrap();
        let (doorbell, interrupt) = (event(), event());
        let mapping = Mapping::new(&memory, RING_BYTES, Access::ReadWrite).unwrap();
        let ring = Producer::new(mapping, doorbell.try_clone().unwrap(), 2).unwrap();
        let mut all = vec![memory, doorbell, interrupt.try_clone().unwrap()];
        all.extend(kept());
        all.extend(fds);
        let (cell, far) = Channel::pair().unwrap();
        let serial = serial::prepare(config, all).unwrap();
        let thread = Some(thread::spawn(move || serial.serve(&far)));
        Vm { ring, interrupt, cell, thread }
    }

    fn outb(&self, offset: u8, value: u8) {
        self.ring.post_write(0, offset, value, &|| false).unwrap();
    }

    fn inb(&self, offset: u8) -> u8 {
        let ticket = self.ring.begin_read(0, offset, &|| false).unwrap();
        self.ring.wait_read(0, ticket, &|| false).unwrap()
    }

    fn print(&self, text: &[u8]) {
        text.iter().for_each(|&byte| self.outb(DATA, byte));
    }

    /// Reads `count` bytes as a polling guest does.
    fn type_in(&self, count: usize) -> Vec<u8> {
        let mut end = Instant::now() + SOON;
        let mut bytes = Vec::new();
        while bytes.len() < count && Instant::now() < end {
            if self.inb(LSR) & 1 != 0 {
                bytes.push(self.inb(DATA));
                end = Instant::now() + SOON;
            } else {
                thread::yield_now();
            }
        }
        bytes
    }

    /// Whether the interrupt was raised since the last call.
    fn interrupted(&self, limit: Duration) -> bool {
        let raised = readable(&self.interrupt, limit);
        if raised {
            nix::unistd::read(&self.interrupt, &mut [0; 8]).unwrap();
        }
        raised
    }

    fn heard(&self) -> FromCell {
        loop {
            match self.cell.recv_timeout(SOON).unwrap().0 {
                FromCell::Client => {} // kept for a successor, which there is none of here
                other => return other,
            }
        }
    }

    fn drain(&self, epoch: u64, limit_ms: u32) -> u64 {
        self.cell.send(&ToCell::Drain { epoch, limit_ms }, &[]).unwrap();
        match self.heard() {
            FromCell::Drained { epoch: of, dropped, .. } if of == epoch => dropped,
            other => panic!("{other:?}"),
        }
    }

    fn stats(&self) -> (u64, u64, u64) {
        self.cell.send(&ToCell::Stats, &[]).unwrap();
        match self.heard() {
            FromCell::Stats(CellStats::Serial { output, input, dropped }) => {
                (output, input, dropped)
            }
            other => panic!("{other:?}"),
        }
    }

    /// Closes the cell channel and waits for the end.
    fn close(mut self) -> Result<(), SerialError> {
        let (spare, _) = Channel::pair().unwrap();
        drop(std::mem::replace(&mut self.cell, spare));
        self.thread.take().unwrap().join().unwrap()
    }
}

fn pipe() -> (File, OwnedFd) {
    let (read, write) = nix::unistd::pipe().unwrap();
    (File::from(read), write)
}

fn null() -> OwnedFd {
    File::options().read(true).write(true).open("/dev/null").unwrap().into()
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|i| b"0123456789abcdefghijklmnopqrstuvwxyz\n"[i % 37]).collect()
}

/// `assert_eq!` without printing thousands of numbers.
#[track_caller]
fn same(got: &[u8], expected: &[u8]) {
    let at = got.iter().zip(expected).position(|(a, b)| a != b);
    assert!(got == expected, "{} bytes of {}, first other at {at:?}", got.len(), expected.len());
}

fn read_exactly(mut from: impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn output_arrives_whole_and_in_order() {
    let (reader, writer) = pipe();
    let vm = Vm::new(SerialEndpoint::File, vec![writer]);
    let sent = text(200_000);
    let expected = sent.clone();
    let got = thread::spawn(move || read_exactly(reader, expected.len()) == expected);
    vm.print(&sent);
    assert!(got.join().unwrap());
    assert_eq!(vm.stats(), (200_000, 0, 0));
    assert_eq!(vm.ring.counters(), Counters::default());
    vm.close().unwrap();
}

#[test]
fn a_prompt_without_a_line_end_is_shown_at_once() {
    let (reader, writer) = pipe();
    let vm = Vm::new(SerialEndpoint::File, vec![writer]);
    thread::sleep(Duration::from_millis(20)); // the device sleeps
    vm.print(b"login: ");
    assert!(readable(&reader, Duration::from_millis(500)));
    assert_eq!(read_exactly(&reader, 7), b"login: ");
    vm.close().unwrap();
}

#[test]
fn it_is_a_16550() {
    let vm = Vm::new(SerialEndpoint::Null, vec![]);
    assert_eq!(vm.inb(LSR), 0x60, "transmitter empty");
    assert_eq!(vm.inb(IIR) & 0xc1, 0xc1, "FIFOs, no interrupt");
    vm.outb(LCR, 0x83);
    vm.outb(DATA, 1);
    assert_eq!((vm.inb(DATA), vm.inb(LCR)), (1, 0x83), "divisor latch");
    vm.outb(LCR, 3);
    assert!(!vm.interrupted(Duration::ZERO));
    vm.outb(IER, 2);
    assert!(vm.interrupted(SOON), "transmitter empty interrupt");
    assert_eq!(vm.inb(IIR) & 0xf, 2);
    vm.outb(IER, 0);

    vm.outb(MCR, 0x18); // loopback
    vm.outb(DATA, b'L');
    assert_eq!(vm.inb(LSR) & 1, 1);
    assert_eq!(vm.inb(DATA), b'L');
    assert_eq!(vm.stats().0, 0, "a looped byte is no output");
    vm.close().unwrap();
}

#[test]
fn input_reaches_the_guest_with_an_interrupt() {
    let (input, mut user) = pipe_in();
    let vm = Vm::new(SerialEndpoint::Stdio, vec![input, null()]);
    vm.outb(IER, 1);
    assert!(!vm.interrupted(Duration::from_millis(20)));
    user.write_all(b"ls\n").unwrap();
    assert!(vm.interrupted(SOON));
    assert_eq!(vm.inb(IIR) & 0xf, 4);
    assert_eq!(vm.type_in(3), b"ls\n");
    assert_eq!(vm.stats().1, 3);
    assert_eq!(vm.inb(LSR) & 1, 0);
    vm.close().unwrap();
}

fn pipe_in() -> (OwnedFd, File) {
    let (read, write) = nix::unistd::pipe().unwrap();
    (read, File::from(write))
}

#[test]
fn much_input_waits_for_a_slow_guest_and_none_is_lost() {
    let (input, mut user) = pipe_in();
    let vm = Vm::new(SerialEndpoint::Stdio, vec![input, null()]);
    let sent = text(80_000);
    let expected = sent.clone();
    let typist = thread::spawn(move || user.write_all(&sent));
    while vm.stats().1 == 0 {}
    thread::sleep(Duration::from_millis(50));
    assert!(!typist.is_finished(), "it is not read ahead without end");
    assert_eq!(vm.stats().1, 64, "a FIFO full");
    same(&vm.type_in(expected.len()), &expected);
    typist.join().unwrap().unwrap();
    vm.close().unwrap();
}

#[test]
fn input_waits_while_the_guest_tests_its_loop() {
    let (input, mut user) = pipe_in();
    let vm = Vm::new(SerialEndpoint::Stdio, vec![input, null()]);
    vm.outb(MCR, 0x10);
    assert_eq!(vm.inb(MCR), 0x10);
    user.write_all(b"early").unwrap();
    thread::sleep(Duration::from_millis(30));
    assert_eq!(vm.inb(LSR) & 1, 0);
    vm.outb(MCR, 0x08);
    assert_eq!(vm.type_in(5), b"early");
    vm.close().unwrap();
}

#[test]
fn a_guest_that_stops_in_the_middle_is_reminded() {
    let (input, mut user) = pipe_in();
    let vm = Vm::new(SerialEndpoint::Stdio, vec![input, null()]);
    vm.outb(IER, 1);
    user.write_all(b"abcdef").unwrap();
    // It reads one byte per interrupt, which an edge on a 16550's level allows. While it is slow
    // it is reminded of what it comes to see anyway, and finds nothing at the next.
    let mut got = Vec::new();
    while got.len() < 6 {
        assert!(vm.interrupted(SOON), "not reminded after {got:?}");
        if vm.inb(IIR) & 0xf == 4 {
            got.push(vm.inb(DATA));
        }
    }
    assert_eq!(got, b"abcdef");
    if vm.interrupted(Duration::from_millis(500)) {
        assert_eq!(vm.inb(IIR) & 0xf, 1);
        assert!(!vm.interrupted(Duration::from_millis(500)), "there is nothing left");
    }
    vm.close().unwrap();
}

#[test]
fn a_file_or_null_as_stdin_ends_and_the_rest_goes_on() {
    let mut script = tempfile::tempfile().unwrap();
    script.write_all(b"typed\n").unwrap();
    script.seek(SeekFrom::Start(0)).unwrap();
    for (input, expected) in [(script.into(), &b"typed\n"[..]), (null(), b"")] {
        let (reader, writer) = pipe();
        let vm = Vm::new(SerialEndpoint::Stdio, vec![input, writer]);
        assert_eq!(vm.type_in(expected.len()), expected);
        vm.print(b"still here\n");
        assert_eq!(read_exactly(&reader, 11), b"still here\n");
        vm.close().unwrap();
    }
}

#[test]
fn a_reader_that_does_not_keep_up_loses_the_oldest_and_blocks_nothing() {
    let (reader, writer) = pipe();
    let config = SerialStart { endpoint: SerialEndpoint::File, escape: false, buffer: 8192 };
    let vm = Vm::with(config, vec![writer]);
    let sent: Vec<u8> = text(1 << 20);
    vm.print(&sent[..4096]);
    assert_eq!(vm.drain(6, 5000), 0, "the pipe has room for these");
    let begin = Instant::now();
    vm.print(&sent[4096..]);
    assert_eq!(vm.inb(LSR), 0x60, "the device answers");
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());

    // The reader is stuck: the drain ends at its limit and tells what was lost.
    let begin = Instant::now();
    let dropped = vm.drain(7, 100);
    assert!(begin.elapsed() >= Duration::from_millis(100) && begin.elapsed() < SOON);
    assert!(dropped > (1 << 20) - 100_000 && dropped < 1 << 20, "{dropped}");
    assert_eq!(vm.stats(), (1 << 20, 0, dropped));

    // What is left is what went first (into the pipe) and what came last.
    let kept = sent.len() - dropped as usize;
    let got = read_exactly(&reader, kept);
    assert_eq!(vm.drain(8, 5000), dropped);
    let newest = 8192;
    same(&got[kept - newest..], &sent[sent.len() - newest..]);
    same(&got[..4096], &sent[..4096]);
    vm.close().unwrap();
}

#[test]
fn drained_means_written() {
    let mut file = tempfile::tempfile().unwrap();
    let vm = Vm::new(SerialEndpoint::File, vec![file.try_clone().unwrap().into()]);
    for epoch in 1..=50 {
        let line = text(1000);
        vm.print(&line);
        assert_eq!(vm.drain(epoch, 5000), 0);
        let len = file.seek(SeekFrom::End(0)).unwrap();
        assert_eq!(len, epoch * 1000);
    }
    vm.close().unwrap();
}

#[test]
fn drains_overlap_and_are_answered_in_order() {
    let (reader, writer) = pipe();
    let vm = Vm::new(SerialEndpoint::File, vec![writer]);
    vm.print(&text(100_000)); // more than the pipe holds
    for epoch in [1, 2] {
        vm.cell.send(&ToCell::Drain { epoch, limit_ms: 5000 }, &[]).unwrap();
    }
    assert!(!readable(&vm.cell, Duration::from_millis(100)), "answered before it was written");
    same(&read_exactly(&reader, 100_000), &text(100_000));
    for epoch in [1, 2] {
        let answer = vm.heard();
        assert!(matches!(answer, FromCell::Drained { epoch: e, dropped: 0, .. } if e == epoch));
    }
    vm.close().unwrap();
}

#[test]
fn the_last_words_are_output_when_the_vmm_dies() {
    let (mut reader, writer) = pipe();
    let vm = Vm::new(SerialEndpoint::File, vec![writer]);
    let sent = text(40_000); // lines do not fill every page of the pipe
    vm.print(&sent);
    vm.close().unwrap();
    let mut got = Vec::new();
    reader.read_to_end(&mut got).unwrap(); // ends: the process holds nothing any more
    same(&got, &sent);
}

#[test]
fn a_stuck_reader_does_not_keep_the_process_alive() {
    let (_reader, writer) = pipe();
    let vm = Vm::new(SerialEndpoint::File, vec![writer]);
    vm.print(&text(100_000));
    let begin = Instant::now();
    vm.close().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
}

#[test]
fn a_reader_that_is_gone_only_costs_the_output() {
    let (reader, writer) = pipe();
    drop(reader);
    let vm = Vm::new(SerialEndpoint::File, vec![writer]);
    vm.print(b"nobody hears this\n");
    assert_eq!(vm.drain(1, 5000), 18);
    assert_eq!(vm.inb(LSR), 0x60);
    vm.close().unwrap();
}

#[test]
fn ctrl_a_x_quits_even_when_the_guest_does_not_read() {
    let (input, mut user) = pipe_in();
    let config = SerialStart { endpoint: SerialEndpoint::Stdio, escape: true, buffer: 4096 };
    let vm = Vm::with(config, vec![input, null()]);
    user.write_all(&text(20_000)).unwrap();
    user.write_all(b"\x01\x01\x01").unwrap();
    assert!(!readable(&vm.cell, Duration::from_millis(50)));
    user.write_all(b"x").unwrap();
    assert!(matches!(vm.heard(), FromCell::Quit));
    let mut expected = text(20_000);
    expected.push(1);
    same(&vm.type_in(20_001), &expected);
    vm.close().unwrap();
}

#[test]
fn marker_lines_are_reported_and_still_output() {
    let (reader, writer) = pipe();
    let vm = Vm::new(SerialEndpoint::File, vec![writer]);
    let printed = b"boot\r\ncellblock:heartbeat\r\nnot cellblock:parked\ncellblock:listener\n";
    vm.print(printed);
    assert!(matches!(vm.heard(), FromCell::Marker { number: 0, marker: Marker::Heartbeat }));
    assert!(matches!(vm.heard(), FromCell::Marker { number: 1, marker: Marker::Listener }));
    assert_eq!(read_exactly(&reader, printed.len()), printed);
    assert!(!readable(&vm.cell, Duration::from_millis(20)));
    vm.close().unwrap();
}

#[test]
fn a_flood_of_markers_blocks_nothing() {
    let vm = Vm::new(SerialEndpoint::Null, vec![]);
    for _ in 0..20_000 {
        vm.print(b"cellblock:parked\n");
    }
    assert_eq!(vm.inb(LSR), 0x60);
    // An answer comes behind the markers that were kept, and is not lost.
    vm.cell.send(&ToCell::Stats, &[]).unwrap();
    let mut markers = 0;
    while let FromCell::Marker { .. } = vm.heard() {
        markers += 1;
    }
    assert!(markers > 0 && markers < 20_000, "{markers}");
    vm.close().unwrap();
}

fn listening() -> (tempfile::TempDir, std::path::PathBuf, OwnedFd) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let listener = UnixListener::bind(&path).unwrap();
    (dir, path, listener.into())
}

#[test]
fn socket_clients_come_and_go() {
    let (_dir, path, listener) = listening();
    let vm = Vm::new(SerialEndpoint::Socket, vec![listener]);
    vm.print(b"before anybody came\n");
    let mut first = UnixStream::connect(&path).unwrap();
    first.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(read_exactly(&first, 20), b"before anybody came\n");
    first.write_all(b"hi").unwrap();
    assert_eq!(vm.type_in(2), b"hi");

    let mut second = UnixStream::connect(&path).unwrap();
    second.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(second.read(&mut [0; 8]).unwrap(), 0, "one client at a time");
    vm.print(b"first\n");
    assert_eq!(read_exactly(&first, 6), b"first\n");

    // What a client sent before it left counts; output waits for the next one.
    first.write_all(b"bye").unwrap();
    drop(first);
    assert_eq!(vm.type_in(3), b"bye");
    vm.print(b"between\n");
    let begin = Instant::now();
    assert_eq!(vm.drain(1, 10_000), 0);
    assert!(begin.elapsed() < Duration::from_secs(5), "no reader: nothing to wait for");
    let third = UnixStream::connect(&path).unwrap();
    third.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(read_exactly(&third, 8), b"between\n");
    assert_eq!(vm.stats().2, 0);
    vm.close().unwrap();
}

#[test]
fn a_client_that_only_listens_stays_and_one_that_leaves_much_unread_is_heard() {
    let (_dir, path, listener) = listening();
    let vm = Vm::new(SerialEndpoint::Socket, vec![listener]);
    let client = UnixStream::connect(&path).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    thread::sleep(Duration::from_millis(20));
    vm.print(b"for a listener\n");
    assert_eq!(read_exactly(&client, 15), b"for a listener\n");
    drop(client);

    let sent = text(50_000);
    let mut script = UnixStream::connect(&path).unwrap();
    script.write_all(&sent).unwrap();
    drop(script);
    thread::sleep(Duration::from_millis(20));
    same(&vm.type_in(sent.len()), &sent);
    vm.close().unwrap();
}

#[test]
fn a_client_that_does_not_read_loses_the_oldest_and_is_replaced() {
    let (_dir, path, listener) = listening();
    let config = SerialStart { endpoint: SerialEndpoint::Socket, escape: false, buffer: 4096 };
    let vm = Vm::with(config, vec![listener]);
    let stuck = UnixStream::connect(&path).unwrap();
    let sent = text(2 << 20);
    vm.print(&sent);
    let dropped = vm.drain(1, 50);
    assert!(dropped > 0);
    drop(stuck);
    thread::sleep(Duration::from_millis(20));
    let next = UnixStream::connect(&path).unwrap();
    next.set_read_timeout(Some(SOON)).unwrap();
    same(&read_exactly(&next, 4096), &sent[sent.len() - 4096..]);
    vm.close().unwrap();
}

#[test]
fn what_a_client_was_not_given_is_for_the_next_one() {
    let (_dir, path, listener) = listening();
    let vm = Vm::new(SerialEndpoint::Socket, vec![listener]);
    let first = UnixStream::connect(&path).unwrap();
    let sent: Vec<u8> = (0..100_000).flat_map(|i: u32| format!("{i:7}\n").into_bytes()).collect();
    vm.print(&sent);
    vm.drain(1, 200); // until the first one's socket is full
    let mut waiting = vec![0; sent.len()];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let given = recv(first.as_raw_fd(), &mut waiting, flags).unwrap();
    assert!(given > 0 && given < sent.len(), "{given}");
    drop(first);
    let second = UnixStream::connect(&path).unwrap();
    second.set_read_timeout(Some(SOON)).unwrap();
    same(&read_exactly(&second, sent.len() - given), &sent[given..]);
    assert_eq!(vm.stats().2, 0);
    vm.close().unwrap();
}

/// A raw pseudo-terminal: master, and the way to open the slave.
fn pty() -> (OwnedFd, impl Fn() -> File) {
    use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
    use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let mut raw = tcgetattr(&master).unwrap();
    cfmakeraw(&mut raw);
    tcsetattr(&master, SetArg::TCSANOW, &raw).unwrap();
    let name = ptsname_r(&master).unwrap();
    let open = move || File::options().read(true).write(true).open(&name).unwrap();
    (master.as_fd().try_clone_to_owned().unwrap(), open)
}

#[test]
fn a_pty_may_be_opened_closed_and_opened_again() {
    let (master, open) = pty();
    let vm = Vm::new(SerialEndpoint::Pty, vec![master]);
    vm.print(b"early\n");
    thread::sleep(Duration::from_millis(50));
    let mut slave = open();
    assert_eq!(read_exactly(&slave, 6), b"early\n");
    slave.write_all(b"in").unwrap();
    assert_eq!(vm.type_in(2), b"in");

    drop(slave);
    vm.print(b"nobody has it open\n");
    thread::sleep(Duration::from_millis(50));
    let begin = Instant::now();
    vm.drain(1, 5000);
    assert!(begin.elapsed() < Duration::from_secs(1), "waited for nobody");
    let mut slave = open();
    assert_eq!(read_exactly(&slave, 19), b"nobody has it open\n");
    slave.write_all(b"again").unwrap();
    assert_eq!(vm.type_in(5), b"again");
    assert_eq!(vm.stats().2, 0);
    vm.close().unwrap();
}

#[test]
fn stdin_and_stdout_stay_blocking() {
    let (input, _user) = pipe_in();
    let (reader, writer) = pipe();
    let (in_copy, out_copy) = (input.try_clone().unwrap(), writer.try_clone().unwrap());
    let vm = Vm::new(SerialEndpoint::Stdio, vec![input, writer]);
    vm.print(b"x\n");
    assert_eq!(read_exactly(&reader, 2), b"x\n");
    for fd in [in_copy, out_copy] {
        let flags = fcntl(&fd, FcntlArg::F_GETFL).unwrap();
        assert!(!OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
    }
    vm.close().unwrap();
}

#[test]
fn a_stdout_that_somebody_made_non_blocking_loses_nothing() {
    let (reader, writer) = pipe();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let vm = Vm::new(SerialEndpoint::File, vec![writer]);
    let sent = text(300_000);
    vm.print(&sent);
    same(&read_exactly(&reader, sent.len()), &sent);
    vm.close().unwrap();
}

#[test]
fn missing_fds_and_a_corrupt_ring_end_it_with_a_reason() {
    let config = |endpoint| SerialStart { endpoint, escape: false, buffer: 4096 };
    for (endpoint, needed) in [
        (SerialEndpoint::Null, 8),
        (SerialEndpoint::File, 9),
        (SerialEndpoint::Socket, 9),
        (SerialEndpoint::Pty, 9),
        (SerialEndpoint::Stdio, 10),
    ] {
        let memory = sealed_memfd("ring", RING_BYTES as u64).unwrap();
        let mut fds = vec![memory, event(), event()];
        fds.extend(kept());
        fds.extend((8..needed - 1).map(|_| null()));
        fds.truncate(needed - 1);
        let result = serial::prepare(config(endpoint), fds);
        assert!(matches!(result, Err(SerialError::MissingFd(e)) if e == endpoint));
    }
    let fds = (0..8).map(|_| null()).collect();
    let result = serial::prepare(config(SerialEndpoint::Null), fds);
    assert!(matches!(result, Err(SerialError::Map(_))));

    let memory = sealed_memfd("ring", RING_BYTES as u64).unwrap();
    let page = Mapping::new(&memory, RING_BYTES, Access::ReadWrite).unwrap();
    page.u32(0).store(5000, std::sync::atomic::Ordering::SeqCst);
    let mut fds = vec![memory, event(), event()];
    fds.extend(kept());
    let serial = serial::prepare(config(SerialEndpoint::Null), fds).unwrap();
    let (_cell, far) = Channel::pair().unwrap();
    assert!(matches!(serial.serve(&far), Err(SerialError::Corrupt(_))));
}

#[test]
fn two_vcpus_print_at_once() {
    let (reader, writer) = pipe();
    let vm = Arc::new(Vm::new(SerialEndpoint::File, vec![writer]));
    const EACH: usize = 20_000;
    let vcpus: Vec<_> = (0..2)
        .map(|vcpu| {
            let vm = Arc::clone(&vm);
            thread::spawn(move || {
                for i in 0..EACH {
                    let value = (vcpu as u8) << 7 | (i % 128) as u8;
                    vm.ring.post_write(vcpu, DATA, value, &|| false).unwrap();
                }
            })
        })
        .collect();
    let got = read_exactly(&reader, 2 * EACH);
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    for vcpu in 0..2u8 {
        let own: Vec<u8> = got.iter().filter(|&&b| b >> 7 == vcpu).map(|b| b & 127).collect();
        assert!(own.iter().enumerate().all(|(i, &b)| b == (i % 128) as u8), "vCPU {vcpu}");
    }
}
