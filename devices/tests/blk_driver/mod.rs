//! A virtio-blk driver and a vhost-user front end for tests: real sockets, real
//! shared memory, real eventfds, and a block device on a thread of this process.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cellblock_devices::blk::{self, BlkError};
use cellblock_devices::protocol::counters::{
    CountersPage, VirtioBlkCountersSnapshot, new_counters,
};
use cellblock_devices::protocol::{BlkStart, EngineKind, ThrottleLimits};
use cellblock_wire::{Access, Channel, sealed_memfd};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const REGION: u64 = 8 << 20;
pub const HIGH: u64 = 4 << 30;
/// What the front end calls guest address 0: an address nobody has mapped.
pub const USER: u64 = 0x7000_0000_0000;
pub const PATIENCE: Duration = Duration::from_secs(5);

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;

pub const F_SIZE_MAX: u64 = 1 << 1;
pub const F_RO: u64 = 1 << 5;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

/// How to make a device.
#[derive(Clone)]
pub struct Options {
    pub bytes: u64,
    pub queues: u16,
    pub read_only: bool,
    pub poll_us: u32,
    pub throttle: ThrottleLimits,
    pub engine: EngineKind,
    /// Where the image is to be, sparse; else it is full of patterns, where all such files are.
    pub dir: Option<PathBuf>,
    /// A process before this one died with a request of queue 0 put back.
    pub stalled: bool,
    /// A process before this one died with so many requests of queue 0 begun.
    pub begun: u16,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            bytes: 1 << 20,
            queues: 1,
            read_only: false,
            poll_us: 0,
            throttle: Default::default(),
            engine: engine_under_test(),
            dir: None,
            stalled: false,
            begun: 0,
        }
    }
}

/// The engine that a test program is about: `blk_io_uring` runs other programs' tests
/// again on the other engine.
pub fn engine_under_test() -> EngineKind {
    match env!("CARGO_CRATE_NAME") {
        "blk_io_uring" => EngineKind::IoUring,
        _ => EngineKind::Sync,
    }
}

/// A running block device and everything around it.
pub struct Device {
    pub front: Frontend,
    pub memory: GuestMemoryMmap<()>,
    pub ram: File,
    pub image: tempfile::NamedTempFile,
    pub cell: Channel,
    pub counters: CountersPage,
    pub queues: u16,
    pub offered: u64,
    pub thread: Option<JoinHandle<Result<(), BlkError>>>,
}

/// The content of sector `n` of a fresh image.
pub fn pattern(sector: u64) -> [u8; 512] {
    std::array::from_fn(|i| (sector as u8).wrapping_mul(31).wrapping_add(i as u8))
}

impl Device {
    /// Makes a device and does nothing on its vhost-user socket yet.
    pub fn bare(options: &Options) -> (Device, UnixStream) {
        let dir = options.dir.clone().unwrap_or_else(std::env::temp_dir);
        let image = tempfile::NamedTempFile::new_in(dir).expect("image");
        image.as_file().set_len(options.bytes).expect("size");
        let filled = if options.dir.is_none() { options.bytes / 512 } else { 0 };
        for sector in 0..filled {
            use std::os::unix::fs::FileExt;
            image.as_file().write_all_at(&pattern(sector), sector * 512).expect("fill");
        }
        let opened = File::options()
            .read(true)
            .write(!options.read_only)
            .open(image.path())
            .expect("open image");
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let (cell, cell_end) = Channel::pair().expect("channel");
        let start = BlkStart {
            read_only: options.read_only,
            size: options.bytes,
            serial: "test-disk".into(),
            queues: options.queues,
            poll_us: options.poll_us,
            throttle: options.throttle,
            engine: Some(options.engine),
            failed: false,
            cow: false,
        };
        let page = new_counters().expect("page");
        let counters = CountersPage::map(&page, Access::ReadOnly).expect("map");
        let before = CountersPage::map(&page, Access::ReadWrite).expect("map").queue(0);
        (0..options.begun).for_each(|_| before.begin());
        if options.stalled {
            before.stalled();
        }
        let fds = vec![OwnedFd::from(opened), page];
        let device = blk::prepare(start, fds, theirs).expect("prepare");
        let thread = std::thread::spawn(move || device.serve(&cell_end));
        let ram = File::from(sealed_memfd("guest", 2 * REGION).expect("memfd"));
        let dup = || ram.try_clone().expect("dup");
        let memory = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(0), REGION as usize, Some(FileOffset::new(dup(), 0))),
            (GuestAddress(HIGH), REGION as usize, Some(FileOffset::new(dup(), REGION))),
        ])
        .expect("map");
        let socket = ours.try_clone().expect("dup");
        let front = Frontend::from_stream(ours, options.queues.into());
        let (queues, thread) = (options.queues, Some(thread));
        let device =
            Device { front, memory, ram, image, cell, counters, queues, offered: 0, thread };
        (device, socket)
    }

    /// Makes a device and agrees with it on `features`.
    pub fn start(options: &Options, features: u64) -> Device {
        let (mut device, _) = Device::bare(options);
        device.negotiate(features);
        device.set_memory();
        device
    }

    pub fn negotiate(&mut self, features: u64) {
        self.agree();
        self.tell(features);
    }

    /// Agrees on how to speak with it.
    pub fn agree(&mut self) {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.front.set_owner().expect("owner");
        self.offered = self.front.get_features().expect("features");
        assert_eq!(self.offered & protocol, protocol);
        let offered = self.front.get_protocol_features().expect("protocol features");
        self.front.set_protocol_features(offered).expect("set protocol features");
        assert!(offered.contains(VhostUserProtocolFeatures::REPLY_ACK));
        self.front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }

    /// Tells it what its driver accepted.
    pub fn tell(&mut self, features: u64) {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.front.set_features(features | protocol).expect("set features");
    }

    pub fn set_memory(&self) {
        self.front.set_mem_table(&self.regions()).expect("memory table");
    }

    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        [(0, 0), (HIGH, REGION)]
            .map(|(guest, offset)| VhostUserMemoryRegionInfo {
                guest_phys_addr: guest,
                memory_size: REGION,
                userspace_addr: USER + guest,
                mmap_offset: offset,
                mmap_handle: self.ram.as_raw_fd(),
            })
            .to_vec()
    }

    /// The counters of all queues.
    pub fn stats(&self) -> VirtioBlkCountersSnapshot {
        let queues = (0..self.queues).map(|queue| self.counters.queue(queue).snapshot());
        queues.fold(VirtioBlkCountersSnapshot::default(), |sum, queue| sum.saturating_add(&queue))
    }

    /// Waits for the device to end by itself.
    pub fn join(&mut self) -> Result<(), BlkError> {
        self.thread.take().expect("joined once").join().expect("no panic")
    }

    pub fn image_sectors(&self, sector: u64, count: usize) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; count * 512];
        self.image.as_file().read_exact_at(&mut bytes, sector * 512).expect("read image");
        bytes
    }
}

/// A buffer of a chain.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    pub write: bool,
}

pub fn out(address: u64, len: u32) -> Buffer {
    Buffer { address, len, write: false }
}

pub fn into(address: u64, len: u32) -> Buffer {
    Buffer { address, len, write: true }
}

/// The driver's side of one queue.
pub struct Queue {
    pub index: usize,
    pub size: u16,
    pub base: u64,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    pub event_idx: bool,
    pub indirect: bool,
    pub avail: u16,
    pub used: u16,
    free: u16,
}

const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x1_0000;
const HEADERS: u64 = 0x8000;

impl Queue {
    /// Tells the device about ring `index` in memory that was zero.
    pub fn set_up(device: &mut Device, index: usize, size: u16, features: u64) -> Queue {
        let queue = Queue::new(index, size, features);
        queue.connect(device, 0);
        queue
    }

    pub fn new(index: usize, size: u16, features: u64) -> Queue {
        let event = || EventFd::new(EFD_NONBLOCK).expect("eventfd");
        Queue {
            index,
            size,
            base: 0x8_0000 * index as u64,
            kick: event(),
            call: event(),
            err: event(),
            event_idx: features & F_EVENT_IDX != 0,
            indirect: features & F_INDIRECT != 0,
            avail: 0,
            used: 0,
            free: 0,
        }
    }

    pub fn config(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: USER + self.base,
            used_ring_addr: USER + self.base + USED,
            avail_ring_addr: USER + self.base + AVAIL,
            log_addr: None,
        }
    }

    /// Sets the ring up, from available entry `next_avail` on, and enables it.
    pub fn connect(&self, device: &mut Device, next_avail: u16) {
        let (front, i) = (&mut device.front, self.index);
        front.set_vring_num(i, self.size).expect("num");
        front.set_vring_addr(i, &self.config()).expect("addr");
        front.set_vring_base(i, next_avail).expect("base");
        front.set_vring_call(i, &self.call).expect("call");
        front.set_vring_err(i, &self.err).expect("err");
        front.set_vring_kick(i, &self.kick).expect("kick");
        front.set_vring_enable(i, true).expect("enable");
    }

    /// Writes a chain and makes it available; returns its head.
    pub fn add(&mut self, memory: &GuestMemoryMmap<()>, buffers: &[Buffer]) -> u16 {
        let head = self.place(memory, buffers);
        self.announce(memory);
        head
    }

    /// Writes a chain that the next [`Queue::announce`] makes available; returns its head.
    pub fn place(&mut self, memory: &GuestMemoryMmap<()>, buffers: &[Buffer]) -> u16 {
        let (head, table) = if self.indirect {
            let head = self.free;
            self.free = (self.free + 1) % self.size;
            let table = self.base + INDIRECT + u64::from(head) * 0x400;
            let len = 16 * buffers.len() as u32;
            self.descriptor(memory, self.base, head, table, len, 4, 0);
            (head, table)
        } else {
            let head = self.free;
            self.free = (self.free + buffers.len() as u16) % self.size;
            (head, self.base)
        };
        for (i, buffer) in buffers.iter().enumerate() {
            let number = |i: usize| {
                if self.indirect { i as u16 } else { (head + i as u16) % self.size }
            };
            let more = i + 1 < buffers.len();
            let flags = u16::from(more) | if buffer.write { 2 } else { 0 };
            let (at, next) = (number(i), number(i + 1));
            self.descriptor(memory, table, at, buffer.address, buffer.len, flags, next);
        }
        self.enter(memory, head);
        head
    }

    #[allow(clippy::too_many_arguments)] // the fields of a descriptor
    pub fn descriptor(
        &self,
        memory: &GuestMemoryMmap<()>,
        table: u64,
        number: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = GuestAddress(table + 16 * u64::from(number));
        let mut bytes = [0u8; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        memory.write_slice(&bytes, at).expect("descriptor");
    }

    /// Makes the chain at `head` available.
    pub fn publish(&mut self, memory: &GuestMemoryMmap<()>, head: u16) {
        self.enter(memory, head);
        self.announce(memory);
    }

    fn enter(&mut self, memory: &GuestMemoryMmap<()>, head: u16) {
        let slot = self.base + AVAIL + 4 + 2 * u64::from(self.avail % self.size);
        memory.write_obj(head, GuestAddress(slot)).expect("avail entry");
        self.avail = self.avail.wrapping_add(1);
    }

    /// Shows the device every chain entered so far, at once.
    pub fn announce(&self, memory: &GuestMemoryMmap<()>) {
        let index = GuestAddress(self.base + AVAIL + 2);
        memory.store(self.avail, index, Ordering::Release).expect("avail idx");
    }

    /// Kicks if the device asked for it since available index `from`; true if it did.
    pub fn kick(&self, memory: &GuestMemoryMmap<()>, from: u16) -> bool {
        fence(Ordering::SeqCst);
        let used = self.base + USED;
        let wanted = if self.event_idx {
            let at = GuestAddress(used + 4 + 8 * u64::from(self.size));
            let event: u16 = memory.load(at, Ordering::Relaxed).expect("avail event");
            self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(from)
        } else {
            memory.load::<u16>(GuestAddress(used), Ordering::Relaxed).expect("flags") & 1 == 0
        };
        if wanted {
            self.kick.write(1).expect("kick");
        }
        wanted
    }

    /// Asks for an interrupt when the used index passes `at` (EVENT_IDX).
    pub fn set_used_event(&self, memory: &GuestMemoryMmap<()>, at: u16) {
        let address = GuestAddress(self.base + AVAIL + 4 + 2 * u64::from(self.size));
        memory.store(at, address, Ordering::SeqCst).expect("used event");
    }

    pub fn used_index(&self, memory: &GuestMemoryMmap<()>) -> u16 {
        memory.load(GuestAddress(self.base + USED + 2), Ordering::Acquire).expect("used idx")
    }

    /// The next used entry: head and length. Looks at the ring, needs no interrupt.
    pub fn next_used(&mut self, memory: &GuestMemoryMmap<()>) -> Option<(u32, u32)> {
        let end = Instant::now() + PATIENCE;
        while self.used_index(memory) == self.used {
            if Instant::now() > end {
                return None;
            }
            std::hint::spin_loop();
        }
        let slot = self.base + USED + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let id = memory.read_obj(GuestAddress(slot)).expect("id");
        let len = memory.read_obj(GuestAddress(slot + 4)).expect("len");
        Some((id, len))
    }

    /// Where [`Queue::header`] puts header number `n` and its status byte.
    pub fn slot(&self, n: u64) -> (u64, u64) {
        let at = self.base + HEADERS + 32 * n;
        (at, at + 16)
    }

    /// Writes a request header and spoils the status byte.
    pub fn header(
        &self,
        memory: &GuestMemoryMmap<()>,
        n: u64,
        kind: u32,
        sector: u64,
    ) -> [Buffer; 2] {
        let (header, status) = self.slot(n);
        memory.write_obj(kind, GuestAddress(header)).expect("type");
        memory.write_obj(0u32, GuestAddress(header + 4)).expect("reserved");
        memory.write_obj(sector, GuestAddress(header + 8)).expect("sector");
        memory.write_obj(0xffu8, GuestAddress(status)).expect("status");
        [out(header, 16), into(status, 1)]
    }

    pub fn status(&self, memory: &GuestMemoryMmap<()>, n: u64) -> u8 {
        memory.read_obj(GuestAddress(self.slot(n).1)).expect("status")
    }

    /// One request with `data` between header and status: status and used length.
    pub fn request(
        &mut self,
        memory: &GuestMemoryMmap<()>,
        kind: u32,
        sector: u64,
        data: &[Buffer],
    ) -> (u8, u32) {
        let [header, status] = self.header(memory, 0, kind, sector);
        let from = self.avail;
        let head = self.add(memory, &[&[header], data, &[status]].concat());
        self.kick(memory, from);
        let (id, len) = self.next_used(memory).expect("an answer in time");
        assert_eq!(id, u32::from(head));
        (self.status(memory, 0), len)
    }

    /// Waits for an interrupt.
    pub fn interrupted(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while self.call.read().is_err() {
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        true
    }
}
