//! The block device driver.
#![allow(unsafe_code)] // buffers shared with a device

use crate::arch::{apic, cpu};
use crate::boot::Boot;
use crate::heap::Heap;
use crate::pattern::SECTOR;
use crate::virtio::mmio::Transport;
use crate::virtio::queue::{Queue, Segment, Shape};

const DEVICE_ID: u32 = 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_CONFIG_WCE: u64 = 1 << 11;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
const FEATURE_MULTI_QUEUE: u64 = 1 << 12;
const FEATURE_INDIRECT: u64 = 1 << 28;
const FEATURE_EVENT_IDX: u64 = 1 << 29;

/// Most data segments of a request.
pub const MAX_SEGMENTS: usize = 16;
/// Most queues.
pub const MAX_QUEUES: usize = 32;
/// Where the configuration has the number of queues, in its upper half.
const CONFIG_QUEUES: u64 = 32;
/// Most requests in flight.
pub const MAX_DEPTH: usize = 128;
/// A timer tick, in microseconds, while the driver uses interrupts: it finds the lost ones.
const TICK: u32 = 10_000;
/// Ticks after which an interrupt that should have come is lost.
const LOST_AFTER: u64 = 300;

/// The request was carried out.
pub const OK: u8 = 0;
/// The request failed.
pub const IO_ERROR: u8 = 1;
/// The device does not know such a request.
pub const UNSUPPORTED: u8 = 2;
/// The device has not answered.
pub const NO_ANSWER: u8 = 0xff;

/// Request types.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Disk to memory.
    Read = 0,
    /// Memory to disk.
    Write = 1,
    /// Everything written so far is to be durable.
    Flush = 4,
    /// The disk's name, 20 bytes.
    GetId = 8,
    /// Give ranges up.
    Discard = 11,
    /// Zero ranges.
    WriteZeroes = 13,
}

impl Kind {
    /// Whether its data goes to the device.
    fn sends(self) -> bool {
        matches!(self, Kind::Write | Kind::Discard | Kind::WriteZeroes)
    }
}

/// How to drive the disk.
#[derive(Clone, Copy)]
pub struct Options {
    /// Requests in flight, at most [`MAX_DEPTH`].
    pub depth: usize,
    /// Bytes of each request's buffer.
    pub buffer: usize,
    /// Segments the data is cut into, at most [`MAX_SEGMENTS`].
    pub segments: usize,
    /// Wait for interrupts instead of polling.
    pub irq: bool,
    /// Use indirect descriptors.
    pub indirect: bool,
    /// Use event indices.
    pub event_idx: bool,
    /// Queues that requests are spread over, slot by slot.
    pub queues: usize,
}

impl Options {
    /// What the command line asks for.
    pub fn from_cmdline(boot: &Boot) -> Self {
        let cmdline = &boot.cmdline;
        let number = |key, default, max: usize| {
            let value = cmdline.number(key, default) as usize;
            if value == 0 || value > max {
                crate::exit::fail(format_args!("{key}={value}: must be between 1 and {max}"));
            }
            value
        };
        Self {
            depth: number("qd", 1, MAX_DEPTH),
            buffer: number("sectors", 8, 2048) * SECTOR,
            segments: number("segments", 1, MAX_SEGMENTS),
            irq: cmdline.flag("irq"),
            indirect: cmdline.flag("indirect"),
            event_idx: cmdline.flag("event-idx"),
            queues: number("queues", 1, MAX_QUEUES),
        }
    }
}

/// A request's header, as the device reads it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// Memory of one slot beside its data.
#[repr(C, align(64))]
struct Slot {
    header: Header,
    status: u8,
}

/// A completed request.
pub struct Done {
    /// The slot it had.
    pub slot: usize,
    /// Its status byte.
    pub status: u8,
    /// Bytes the device says it wrote, the status byte among them.
    pub written: u32,
}

/// A disk, ready for requests.
pub struct Disk {
    transport: Transport,
    /// The first `options.queues` are there. Slot s is slot s / n of queue s % n.
    queues: [Option<Queue>; MAX_QUEUES],
    /// The queue to look at first, so that none is starved.
    turn: usize,
    slots: *mut Slot,
    buffers: *mut u8,
    options: Options,
    /// Size in sectors.
    pub capacity: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Whether ranges can be discarded, and zeroed, and the cache turned off.
    pub clears: bool,
    /// Whether flush is offered.
    pub flush: bool,
}

impl Disk {
    /// Brings up the disk that `disk=` names (the first by default); fails the guest without one.
    pub fn open(boot: &Boot, heap: &mut Heap, options: Options) -> Self {
        let number = boot.cmdline.number("disk", 0) as usize;
        match Self::find(boot).nth(number) {
            Some(transport) => Self::start(transport, heap, options),
            None => crate::exit::fail(format_args!("there is no disk {number}")),
        }
    }

    /// All block devices of the machine.
    pub fn find(boot: &Boot) -> impl Iterator<Item = Transport> {
        boot.cmdline.mmio_devices().filter_map(|place| Transport::find(place, DEVICE_ID))
    }

    /// Resets and starts a disk.
    pub fn start(transport: Transport, heap: &mut Heap, options: Options) -> Self {
        let mut wanted = FEATURE_READ_ONLY | FEATURE_FLUSH;
        wanted |= FEATURE_CONFIG_WCE | FEATURE_DISCARD | FEATURE_WRITE_ZEROES;
        wanted |= if options.indirect { FEATURE_INDIRECT } else { 0 };
        wanted |= if options.event_idx { FEATURE_EVENT_IDX } else { 0 };
        wanted |= if options.queues > 1 { FEATURE_MULTI_QUEUE } else { 0 };
        let features = transport.negotiate(wanted);
        if options.queues > 1 {
            let offered = match features & FEATURE_MULTI_QUEUE {
                0 => 1,
                _ => transport.config32(CONFIG_QUEUES) >> 16,
            };
            if options.queues > offered as usize {
                crate::exit::fail(format_args!("the disk has {offered} queues only"));
            }
        }
        if (options.indirect && features & FEATURE_INDIRECT == 0)
            || (options.event_idx && features & FEATURE_EVENT_IDX == 0)
        {
            crate::exit::fail(format_args!("the disk has features {features:#x} only"));
        }
        let shape = Shape {
            slots: options.depth.div_ceil(options.queues) as u16,
            segments: options.segments as u16 + 2,
            indirect: options.indirect,
            event_idx: options.event_idx,
            interrupts: options.irq,
        };
        let mut queues = [const { None }; MAX_QUEUES];
        for (index, place) in (0..).zip(&mut queues).take(options.queues) {
            let queue = Queue::new(heap, transport.queue_size_max(index), shape);
            transport.set_queue(index, &queue);
            *place = Some(queue);
        }
        if options.irq {
            apic::enable_pin(transport.line);
            apic::start_timer(TICK);
        }
        let disk = Self {
            slots: heap.bytes(options.depth * size_of::<Slot>(), 4096).as_mut_ptr().cast(),
            buffers: heap.bytes(options.depth * options.buffer, 4096).as_mut_ptr(),
            capacity: transport.config64(0),
            read_only: features & FEATURE_READ_ONLY != 0,
            clears: features & FEATURE_DISCARD != 0
                && features & FEATURE_WRITE_ZEROES != 0
                && features & FEATURE_CONFIG_WCE != 0,
            flush: features & FEATURE_FLUSH != 0,
            transport,
            queues,
            turn: 0,
            options,
        };
        disk.transport.start();
        disk
    }

    /// A slot's data. Not while its request is in flight.
    pub fn data(&mut self, slot: usize) -> &mut [u8] {
        assert!(slot < self.options.depth);
        // SAFETY: each slot has its own part; the device does not use it now.
        unsafe {
            let start = self.buffers.add(slot * self.options.buffer);
            core::slice::from_raw_parts_mut(start, self.options.buffer)
        }
    }

    /// Fills a slot with a request over the first `bytes` of its data. [`Self::kick`] sends it.
    pub fn prepare(&mut self, slot: usize, kind: Kind, sector: u64, bytes: usize) {
        assert!(slot < self.options.depth && bytes <= self.options.buffer);
        let mut segments =
            [Segment { address: 0, length: 0, device_writes: false }; MAX_SEGMENTS + 2];
        let mut count = 0;
        let mut push = |segment| {
            segments[count] = segment;
            count += 1;
        };
        push(self.header(slot, kind as u32, sector));
        // SAFETY: the slot's own part.
        let mut address = unsafe { self.buffers.add(slot * self.options.buffer) } as u64;
        let end = address + bytes as u64;
        // Sector-sized steps, so that every segment is whole sectors (which no device requires of
        // us, but the specification allows it to).
        let step = bytes.div_ceil(self.options.segments).next_multiple_of(SECTOR) as u64;
        while address < end {
            let length = step.min(end - address) as u32;
            push(Segment { address, length, device_writes: !kind.sends() });
            address += u64::from(length);
        }
        push(self.status_segment(slot));
        self.prepare_raw(slot, &segments[..count]);
    }

    /// Fills a slot with whatever segments the caller likes.
    pub fn prepare_raw(&mut self, slot: usize, segments: &[Segment]) {
        let n = self.options.queues;
        if let Some(queue) = &mut self.queues[slot % n] {
            queue.push((slot / n) as u16, segments);
        }
    }

    /// Writes a slot's header; the segment that holds it.
    pub fn header(&mut self, slot: usize, kind: u32, sector: u64) -> Segment {
        // SAFETY: the slot's own memory, not in flight.
        let header = unsafe { &raw mut (*self.slots.add(slot)).header };
        // SAFETY: as above.
        unsafe { header.write_volatile(Header { kind, reserved: 0, sector }) };
        let length = size_of::<Header>() as u32;
        Segment { address: header as u64, length, device_writes: false }
    }

    /// Clears a slot's status byte; the segment that holds it.
    pub fn status_segment(&mut self, slot: usize) -> Segment {
        // SAFETY: the slot's own memory, not in flight.
        let status = unsafe { &raw mut (*self.slots.add(slot)).status };
        // SAFETY: as above.
        unsafe { status.write_volatile(NO_ANSWER) };
        Segment { address: status as u64, length: 1, device_writes: true }
    }

    /// Shows the device everything prepared, with a notification of each queue that wants one.
    pub fn kick(&mut self) {
        for (index, queue) in (0..).zip(self.queues.iter_mut().flatten()) {
            if queue.has_unpublished() && queue.publish() {
                self.transport.notify(index);
            }
        }
    }

    /// A completed request, if there is one.
    pub fn poll(&mut self) -> Option<Done> {
        let n = self.options.queues;
        let (index, used) = (0..n).find_map(|ahead| {
            let index = (self.turn + ahead) % n;
            Some((index, self.queues[index].as_mut()?.pop()?))
        })?;
        self.turn = (index + 1) % n;
        let slot = usize::from(used.slot) * n + index;
        // SAFETY: the slot's own memory; the device is done with it.
        let status = unsafe { (&raw const (*self.slots.add(slot)).status).read_volatile() };
        Some(Done { slot, status, written: used.written })
    }

    /// The next completed request, polling or halted until an interrupt, as the options say.
    pub fn wait(&mut self) -> Done {
        loop {
            if let Some(done) = self.poll() {
                return done;
            }
            if self.options.irq {
                self.sleep();
            } else {
                core::hint::spin_loop();
            }
        }
    }

    /// Halts until the device has completed something, and insists that it interrupted for it.
    fn sleep(&mut self) {
        let line = self.transport.line;
        let before = apic::pin_count(line);
        for queue in self.queues.iter_mut().flatten() {
            queue.request_interrupt();
        }
        // The line is an edge: what was raised before has to be taken back to be raised again.
        self.transport.acknowledge();
        if self.has_used() {
            return;
        }
        let mut overdue_since = None;
        cpu::interrupts_off();
        while apic::pin_count(line) == before {
            if self.has_used() {
                let now = apic::ticks();
                if now - *overdue_since.get_or_insert(now) > LOST_AFTER {
                    crate::exit::fail(format_args!("an interrupt of line {line} was lost"));
                }
            }
            cpu::wait_for_interrupt();
        }
        cpu::interrupts_on();
    }

    fn has_used(&self) -> bool {
        self.queues.iter().flatten().any(Queue::has_used)
    }

    /// One request from beginning to end, in slot 0; fails the guest unless it succeeds.
    pub fn request(&mut self, kind: Kind, sector: u64, bytes: usize) {
        self.prepare(0, kind, sector, bytes);
        self.kick();
        let done = self.wait();
        if done.status != OK {
            crate::exit::fail(format_args!(
                "request type {} at sector {sector}: status {}",
                kind as u32, done.status
            ));
        }
    }

    /// The disk's name, as far as it is text.
    pub fn id(&mut self) -> &str {
        self.request(Kind::GetId, 0, 20);
        let name = self.data(0)[..20].split(|&byte| byte == 0).next().unwrap_or_default();
        core::str::from_utf8(name).unwrap_or("(not text)")
    }

    /// The transport, for what only tests do.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// The first queue, for what only tests do.
    pub fn queue(&mut self) -> &mut Queue {
        match &mut self.queues[0] {
            Some(queue) => queue,
            None => crate::exit::fail(format_args!("there is no queue")),
        }
    }
}
