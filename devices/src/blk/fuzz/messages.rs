//! The vhost-user messages: a whole device with its queues' threads, and a front
//! end that sends what the program says, with file descriptors of every kind.
//!
//! Checked: no message panics or hangs, what was refused ends the connection or is
//! answered, the image keeps its size, and no descriptor is left open.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::VhostUserMemoryRegion;

use super::guest::{self, Guest};
use super::record::Damaged;
use super::{Input, Outcome, check_image, image, ram, start};
use crate::blk::{Blk, prepare};
use crate::protocol::counters::{CountersPage, new_counters};
use cellblock_wire::Access;

/// What a corpus has to reach.
#[cfg(test)]
pub const NAMES: [&str; 6] =
    ["accepted", "connection ended", "flush", "read", "ring broken", "write"];

const QUEUES: u16 = 2;
const NEED_REPLY: u32 = 1 << 3;

/// Requests of the front end, by their numbers in the standard.
mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
}

/// Runs one program.
///
/// # Panics
/// If the back end did what it must never do.
pub fn messages(input: &[u8]) -> Outcome {
    let before = open_descriptors();
    let mut outcome = Outcome::new();
    run(&mut Input(input), &mut outcome);
    if let (Some(before), Some(after)) = (before, open_descriptors()) {
        assert_eq!(before, after, "descriptors are left open");
    }
    outcome
}

/// How many there are. Not in a test, where other tests have theirs.
fn open_descriptors() -> Option<usize> {
    (!cfg!(test)).then(|| std::fs::read_dir("/proc/self/fd").expect("proc").count())
}

fn run(input: &mut Input<'_>, outcome: &mut Outcome) {
    let read_only = input.u8().is_some_and(|byte| byte & 1 != 0);
    let (image, page) = (image(), new_counters().expect("page"));
    let image = if read_only { super::requests::reopen(&image) } else { image };
    let file = File::from(image.try_clone().expect("dup"));
    let counters = CountersPage::map(&page, Access::ReadOnly).expect("map");
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let device = prepare(start(read_only, QUEUES), vec![image, page], theirs).expect("prepare");
    let mut front = FrontEnd::new(device, ours);
    if front.follow(input).is_some() {
        front.end(outcome);
    } else {
        *outcome.entry("connection ended").or_default() += 1;
    }
    front.device.backend().stop().expect("every thread is there");
    if front.accepted > 0 {
        *outcome.entry("accepted").or_default() += front.accepted;
    }
    for queue in 0..QUEUES {
        let counted = counters.queue(queue).snapshot();
        let broken = counted.invalid_avail_idx_count;
        let seen = [
            ("read", counted.reads_completed),
            ("write", counted.writes_completed),
            ("flush", counted.flushes_completed),
            ("ring broken", broken),
        ];
        for (what, times) in seen.into_iter().filter(|(_, times)| *times > 0) {
            *outcome.entry(what).or_default() += times;
        }
    }
    drop(front);
    check_image(&file);
}

/// The front end, and the device it talks to, which is served on this thread.
struct FrontEnd {
    device: Blk,
    socket: UnixStream,
    guest: Guest,
    files: Files,
    accepted: u64,
}

/// What a message can have attached.
struct Files {
    ram: File,
    unsealed: OwnedFd,
    event: EventFd,
    /// Blocks a reader.
    blocking: EventFd,
    pipe: (OwnedFd, OwnedFd),
    ordinary: File,
    record: Damaged,
}

/// Its number among them.
const RECORD: u8 = 7;

impl Files {
    fn new() -> Files {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let event = |flags| EventFd::from_flags(EfdFlags::EFD_CLOEXEC | flags).expect("eventfd");
        Files {
            ram: ram(),
            unsealed: memfd_create(c"unsealed", MFdFlags::MFD_CLOEXEC).expect("memfd"),
            event: event(EfdFlags::EFD_NONBLOCK),
            blocking: event(EfdFlags::empty()),
            pipe: nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("pipe"),
            ordinary: File::open("/proc/self/status").expect("file"),
            record: Damaged::new(QUEUES),
        }
    }

    fn get(&self, number: u8) -> RawFd {
        match number {
            0 => self.ram.as_raw_fd(),
            1 => self.unsealed.as_raw_fd(),
            2 => self.event.as_raw_fd(),
            3 => self.blocking.as_raw_fd(),
            4 => self.pipe.0.as_raw_fd(),
            5 => self.pipe.1.as_raw_fd(),
            6 => self.ordinary.as_raw_fd(),
            _ => self.record.file.as_raw_fd(),
        }
    }
}

impl FrontEnd {
    fn new(device: Blk, socket: UnixStream) -> FrontEnd {
        socket.set_nonblocking(true).expect("socket");
        let files = Files::new();
        let mut guest = Guest::new(&files.ram);
        guest.restart(16, guest::AVAIL, 0);
        FrontEnd { device, socket, guest, files, accepted: 0 }
    }

    /// Follows the program; `None` when the device ends the connection before it does.
    fn follow(&mut self, input: &mut Input<'_>) -> Option<()> {
        while let Some(step) = input.u8() {
            let done = match step % 16 {
                step @ ..guest::STEPS => {
                    let _ = self.guest.step(step, input);
                    true
                }
                7 => self.agree(input),
                8 => self.record(input),
                9 => self.memory(),
                10 => self.ring(input),
                11 => self.message(input),
                12 => {
                    let _ = self.files.record.damage(input);
                    true
                }
                13 => {
                    let _ = self.files.event.write(1);
                    true
                }
                14 => self.wait(),
                _ => {
                    // Bytes that may be a part of a message, and then no more.
                    let _ = self.socket.write_all(input.take(input.0.len())?);
                    self.hang_up();
                    return Some(());
                }
            };
            done.then_some(())?;
        }
        self.hang_up();
        Some(())
    }

    fn hang_up(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
    }

    /// Has the device handle what is left in the socket, to its end.
    fn end(&mut self, outcome: &mut Outcome) {
        while self.serve() {}
        *outcome.entry("connection ended").or_default() += 1;
    }

    /// One message handled; false when the connection is over.
    fn serve(&mut self) -> bool {
        let more = matches!(self.device.serve_front_end(), Ok(true));
        self.accepted += u64::from(more);
        let mut replies = [0; 8192];
        while let Ok(1..) = self.socket.read(&mut replies) {}
        more
    }

    /// Sends a message and has it handled.
    fn send(&mut self, request: u32, flags: u32, body: &[u8], files: &[u8]) -> bool {
        let header = [request, 1 | flags, body.len() as u32];
        let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let fds: Vec<RawFd> = files.iter().map(|number| self.files.get(*number)).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &rights[..0] } else { &rights };
        let parts = [IoSlice::new(&bytes), IoSlice::new(body)];
        let socket = self.socket.as_raw_fd();
        let sent = sendmsg::<()>(socket, &parts, rights, MsgFlags::MSG_NOSIGNAL, None);
        sent.is_ok() && self.serve()
    }

    /// Any message, whole.
    fn message(&mut self, input: &mut Input<'_>) -> bool {
        let mut parse = || {
            let (request, flags) = (input.u8()?, input.u8()?);
            let (kinds, len) = (input.u16()?, input.u8()?);
            let files = [kinds & 7, kinds >> 3 & 7, kinds >> 6 & 7].map(|kind| kind as u8);
            let files = &files[..usize::from(flags >> 4 & 3)];
            let body = input.take(len.into())?;
            Some((u32::from(request), u32::from(flags & 0xf) & !1, body, files.to_vec()))
        };
        let Some((request, flags, body, files)) = parse() else { return true };
        self.send(request, flags, body, &files)
    }

    fn agree(&mut self, input: &mut Input<'_>) -> bool {
        let Some(choice) = input.u8() else { return true };
        let (features, protocol) = {
            let mut backend = self.device.backend();
            (backend.get_features(), backend.get_protocol_features())
        };
        let (features, protocol) =
            (features.expect("features"), protocol.expect("features").bits());
        // All of them, or all but one.
        let left_out = |kind: u8| if choice >> 6 == kind { 1 << (choice & 0x3f) } else { 0 };
        let features = (features & !left_out(2)).to_ne_bytes();
        let protocol = (protocol & !left_out(3)).to_ne_bytes();
        self.send(code::GET_FEATURES, 0, &[], &[])
            && self.send(code::GET_PROTOCOL_FEATURES, 0, &[], &[])
            && self.send(code::SET_PROTOCOL_FEATURES, 0, &protocol, &[])
            && self.send(code::SET_FEATURES, NEED_REPLY, &features, &[])
    }

    /// The whole of guest memory.
    fn memory(&mut self) -> bool {
        let regions = guest::regions();
        let mut body = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
        for region in &regions {
            let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, mmap_offset } =
                *region;
            let words = [guest_phys_addr, memory_size, user_addr, mmap_offset];
            body.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        }
        self.send(code::SET_MEM_TABLE, NEED_REPLY, &body, &[0, 0, 0])
    }

    /// A ring from nothing to running, stopped before if it ran.
    fn ring(&mut self, input: &mut Input<'_>) -> bool {
        let (Some(index), Some(size)) = (input.u8(), input.u8()) else { return true };
        let index = u32::from(index % QUEUES as u8);
        self.guest.size = 1 << (size & 0xf).min(8);
        let state = |value: u32| [index, value].map(u32::to_ne_bytes).concat();
        let at = |address: u64| guest::USER + address;
        let addresses = [at(guest::DESCRIPTORS), at(guest::USED), at(guest::AVAIL), 0];
        let mut vring = [index, 0].map(u32::to_ne_bytes).concat();
        vring.extend(addresses.iter().flat_map(|word| word.to_ne_bytes()));
        let fd = u64::from(index).to_ne_bytes();
        let size = u32::from(self.guest.size);
        self.send(code::GET_VRING_BASE, 0, &state(0), &[])
            && self.send(code::SET_VRING_NUM, NEED_REPLY, &state(size), &[])
            && self.send(code::SET_VRING_BASE, NEED_REPLY, &state(0), &[])
            && self.send(code::SET_VRING_ADDR, NEED_REPLY, &vring, &[])
            && self.send(code::SET_VRING_CALL, NEED_REPLY, &fd, &[3])
            && self.send(code::SET_VRING_ERR, NEED_REPLY, &fd, &[3])
            && self.send(code::SET_VRING_KICK, NEED_REPLY, &fd, &[2])
            && self.send(code::SET_VRING_ENABLE, NEED_REPLY, &state(1), &[])
    }

    /// Asks for a record, or gives one that may be damaged, in a shape that may be another.
    fn record(&mut self, input: &mut Input<'_>) -> bool {
        let (Some(how), Some(other)) = (input.u8(), input.u8()) else { return true };
        let mut shape = self.files.record.shape();
        match how & 7 {
            1 => shape.num_queues = other.into(),
            2 => shape.queue_size = u16::from(other) * 2,
            3 => shape.mmap_size = u64::from(other) << 8,
            4 => shape.mmap_offset = other.into(),
            _ => {}
        }
        let mut body = [shape.mmap_size, shape.mmap_offset].map(u64::to_ne_bytes).concat();
        body.extend([shape.num_queues, shape.queue_size, 0, 0].map(u16::to_ne_bytes).concat());
        if how & 8 != 0 {
            return self.send(code::GET_INFLIGHT_FD, 0, &body, &[]);
        }
        let file = if how & 0x70 == 0 { other % 8 } else { RECORD };
        self.send(code::SET_INFLIGHT_FD, NEED_REPLY, &body, &[file])
    }

    /// Gives the queues' threads a moment to use all that is available.
    fn wait(&self) -> bool {
        // A test has a few programs and a busy machine; a fuzzer has neither.
        let limit = Duration::from_micros(if cfg!(test) { 5000 } else { 300 });
        let end = Instant::now() + limit;
        while self.guest.is_waiting() && Instant::now() < end {
            std::thread::yield_now();
        }
        true
    }
}
