//! Drivers that break every rule, and front ends that change everything under way. Held
//! to, whatever they do: a chain comes back or the ring is broken, counted and told of;
//! every message is answered in time; the image keeps its size and whoever may not write
//! writes nothing; and after a reset the device serves as if nothing had been.

#[allow(dead_code)] // shared with other tests; each uses a part
mod blk_driver;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blk_driver::*;
use proptest::prelude::*;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const BASIC: u64 = F_VERSION_1 | F_FLUSH;
const DATA: u64 = 0x20_0000;
/// Indirect tables of these tests: where no ring and no header is.
const TABLES: u64 = 0x10_0000;
const TABLE: u64 = 0x1000;
const SECTORS: u64 = 128;
const SIZE: u16 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn cases(count: u32) -> ProptestConfig {
    ProptestConfig { cases: count, failure_persistence: None, ..ProptestConfig::default() }
}

struct Rig {
    device: Device,
    queue: Queue,
    memory: GuestMemoryMmap<()>,
    features: u64,
}

impl Rig {
    fn new(read_only: bool, features: u64) -> Rig {
        let options = Options { bytes: SECTORS * 512, read_only, ..Options::default() };
        let features = if read_only { features | F_RO } else { features };
        let mut device = Device::start(&options, features);
        let queue = Queue::set_up(&mut device, 0, SIZE, features);
        let memory = device.memory.clone();
        Rig { device, queue, memory, features }
    }

    fn descriptor(&self, table: u64, number: u16, raw: Raw) {
        let Raw { address, len, flags, next } = raw;
        self.queue.descriptor(&self.memory, table, number, address, len, flags, next);
    }

    /// Starts over, as a driver would, and has a request done.
    fn recover(&mut self) {
        self.device.front.reset_device().expect("reset");
        self.memory.write_slice(&[0; 0x4000], GuestAddress(0)).expect("clear the rings");
        self.device.negotiate(self.features);
        self.device.set_memory();
        self.queue = Queue::set_up(&mut self.device, 0, SIZE, self.features);
        let answer = self.queue.request(&self.memory, T_IN, 1, &[into(DATA, 512)]);
        assert_eq!(answer, (0, 513), "after all that");
    }

    fn image(&self) -> Vec<u8> {
        let image = self.device.image.as_file();
        assert_eq!(image.metadata().expect("metadata").len(), SECTORS * 512);
        self.device.image_sectors(0, SECTORS as usize)
    }

    fn events(&self) -> u64 {
        let counted = self.device.stats();
        counted.io_errors + counted.invalid_avail_idx_count
    }

    /// Waits until all is used, or the ring is told to be broken; true if all is used.
    fn settle(&self) -> bool {
        let end = Instant::now() + PATIENCE;
        loop {
            if self.queue.used_index(&self.memory) == self.queue.avail {
                return true;
            }
            if self.queue.err.read().is_ok() {
                assert!(self.events() > 0, "broken and not counted");
                return false;
            }
            assert!(Instant::now() < end, "no progress: {:?}", self.device.stats());
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// A descriptor as it is in memory.
#[derive(Clone, Copy, Debug)]
struct Raw {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A chain that a driver could make available.
#[derive(Clone, Debug)]
enum Chain {
    /// As it should be.
    Good { write: bool, sector: u64, indirect: bool },
    /// Its last descriptor leads back into it.
    Loop { len: u16, back: u16, indirect: bool },
    /// A table in a table.
    Nested,
    /// A table of no bytes, of a part of a descriptor, or of more than there are.
    Table { len: u32 },
    /// A table that is not in memory, or not all of it.
    Outside { address: u64 },
    /// A descriptor of a table that goes on beside it.
    Both { flags: u16 },
    /// A buffer that is not in memory, as the `at`th of three.
    Buffer { address: u64, len: u32, at: u16 },
    /// Anything.
    Any(Vec<Raw>),
}

fn edges() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(REGION - 8),
        Just(REGION),
        Just(HIGH - 1),
        Just(HIGH + REGION - 1),
        Just(HIGH + REGION),
        Just(u64::MAX - 15),
        Just(u64::MAX),
        any::<u64>(),
    ]
}

fn raws() -> impl Strategy<Value = Raw> {
    // Data and outside, but never the rings: what is there would not be what was put there.
    let address = prop_oneof![4 => DATA..DATA + 0x1000, 1 => edges().prop_map(|at| at.max(DATA))];
    let len = prop_oneof![3 => 0u32..2048, 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0u16..4, 1 => any::<u16>()];
    (address, len, flags, 0..SIZE).prop_map(|(address, len, flags, next)| Raw {
        address,
        len: len.min(REGION as u32 - DATA as u32),
        flags,
        next,
    })
}

fn chains() -> impl Strategy<Value = Chain> {
    prop_oneof![
        (any::<bool>(), 0..SECTORS + 2, any::<bool>())
            .prop_map(|(write, sector, indirect)| Chain::Good { write, sector, indirect }),
        (1u16..4, 0u16..4, any::<bool>()).prop_map(|(len, back, indirect)| Chain::Loop {
            len,
            back: back % len,
            indirect
        }),
        Just(Chain::Nested),
        prop_oneof![Just(0), 1u32..16, 17u32..32, Just(u32::MAX), Just(1 << 20)]
            .prop_map(|len| Chain::Table { len }),
        edges().prop_map(|address| Chain::Outside { address: address.max(DATA) }),
        prop_oneof![Just(INDIRECT | NEXT), Just(INDIRECT | WRITE), Just(INDIRECT | NEXT | WRITE)]
            .prop_map(|flags| Chain::Both { flags }),
        (edges(), 1u32..4096, 0u16..3).prop_map(|(address, len, at)| Chain::Buffer {
            address: address.max(DATA),
            len,
            at
        }),
        prop::collection::vec(raws(), 1..5).prop_map(Chain::Any),
    ]
}

impl Rig {
    /// Writes chain number `n`, in descriptors of its own as far as it keeps to them.
    fn place(&mut self, n: u16, chain: &Chain) {
        let (head, base) = (4 * n, self.queue.base);
        let table = TABLES + TABLE * u64::from(n);
        let [header, status] = self.queue.header(&self.memory, n.into(), T_IN, 1);
        let raw = |buffer: Buffer, flags: u16, next: u16| Raw {
            address: buffer.address,
            len: buffer.len,
            flags: flags | if buffer.write { WRITE } else { 0 },
            next,
        };
        let data = DATA + 0x1000 * u64::from(n);
        // A good request in `table`, whose first descriptor has number `first`.
        let request = |rig: &Rig, table: u64, first: u16, middle: Buffer| {
            for (at, buffer) in [header, middle, status].into_iter().enumerate() {
                let (number, more) = (first + at as u16, if at < 2 { NEXT } else { 0 });
                rig.descriptor(table, number, raw(buffer, more, number + 1));
            }
        };
        let whole = |address, len, flags| Raw { address, len, flags, next: head + 1 };
        match chain {
            Chain::Good { write, sector, indirect } => {
                let kind = if *write { T_OUT } else { T_IN };
                self.queue.header(&self.memory, n.into(), kind, *sector);
                let middle = if *write { out(data, 512) } else { into(data, 512) };
                if *indirect {
                    request(self, table, 0, middle);
                    self.descriptor(base, head, whole(table, 48, INDIRECT));
                } else {
                    request(self, base, head, middle);
                }
            }
            Chain::Loop { len, back, indirect } => {
                let (at, first) = if *indirect { (table, 0) } else { (base, head) };
                for number in 0..*len {
                    let next = if number + 1 < *len { number + 1 } else { *back };
                    self.descriptor(at, first + number, raw(into(data, 64), NEXT, first + next));
                }
                if *indirect {
                    self.descriptor(base, head, whole(table, 16 * u32::from(*len), INDIRECT));
                }
            }
            Chain::Nested => {
                request(self, table + 64, 0, into(data, 512));
                self.descriptor(table, 0, whole(table + 64, 48, INDIRECT));
                self.descriptor(base, head, whole(table, 16, INDIRECT));
            }
            Chain::Table { len } => {
                request(self, table, 0, into(data, 512));
                self.descriptor(base, head, whole(table, *len, INDIRECT));
            }
            Chain::Outside { address } => {
                self.descriptor(base, head, whole(*address, 48, INDIRECT));
            }
            Chain::Both { flags } => {
                request(self, table, 0, into(data, 512));
                self.descriptor(base, head, whole(table, 48, *flags));
                self.descriptor(base, head + 1, raw(into(data, 64), 0, 0));
            }
            Chain::Buffer { address, len, at } => {
                request(self, base, head, into(data, 512));
                let flags = [NEXT, NEXT | WRITE, WRITE][usize::from(*at)];
                let next = head + at + 1;
                self.descriptor(base, head + at, Raw { address: *address, len: *len, flags, next });
            }
            Chain::Any(raws) => {
                for (at, raw) in raws.iter().take(4).enumerate() {
                    self.descriptor(base, head + at as u16, *raw);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(96))]

    /// Every chain, however broken, is given back once, in the used ring's order.
    #[test]
    fn every_chain_comes_back(
        chains in prop::collection::vec(chains(), 1..5),
        indirect in any::<bool>(),
        event_idx in any::<bool>(),
        read_only in any::<bool>(),
    ) {
        let mut features = BASIC;
        features |= if indirect { F_INDIRECT } else { 0 };
        features |= if event_idx { F_EVENT_IDX } else { 0 };
        let mut rig = Rig::new(read_only, features);
        let before = rig.image();
        let mut heads = Vec::new();
        for (n, chain) in (0..).zip(&chains) {
            rig.place(n, chain);
            heads.push(u32::from(4 * n));
        }
        for head in &heads {
            rig.queue.publish(&rig.memory, *head as u16);
        }
        rig.queue.kick.write(1).expect("kick");
        prop_assert!(rig.settle(), "good heads do not break a ring");
        let memory = rig.memory.clone();
        let mut used: Vec<u32> =
            heads.iter().map(|_| rig.queue.next_used(&memory).expect("used").0).collect();
        used.sort_unstable();
        prop_assert_eq!(used, heads);
        // Sectors that nobody wrote to are what they were.
        let after = rig.image();
        for sector in 0..SECTORS {
            let written = chains.iter().any(|chain| match chain {
                Chain::Good { write, sector: at, .. } => *write && *at == sector,
                Chain::Any(_) => true,
                _ => false,
            });
            let range = sector as usize * 512..(sector as usize + 1) * 512;
            prop_assert!(
                (written && !read_only) || before[range.clone()] == after[range],
                "sector {} has changed", sector
            );
        }
        rig.recover();
    }

    /// Rings anywhere, over each other and over the ends of memory, are refused or served.
    #[test]
    fn rings_lie_where_they_can(
        parts in prop::array::uniform3(prop_oneof![
            6 => 0u64..0x2000,
            1 => REGION - 0x400..REGION + 0x400,
            1 => Just(u64::MAX - USER - 0x100),
        ]),
        size in prop_oneof![Just(1u32), Just(2), Just(16), Just(256), 0u32..70000],
        next_avail in any::<u16>(),
        index in any::<u16>(),
        event_idx in any::<bool>(),
    ) {
        let features = BASIC | if event_idx { F_EVENT_IDX } else { 0 };
        let mut rig = Rig::new(false, features);
        let front = &mut rig.device.front;
        front.get_vring_base(0).expect("stop");
        let address = |at: usize, align: u64| USER.wrapping_add(parts[at] & !(align - 1));
        let config = VringConfigData {
            queue_max_size: 256,
            queue_size: size as u16,
            flags: 0,
            desc_table_addr: address(0, 16),
            avail_ring_addr: address(1, 2),
            used_ring_addr: address(2, 4),
            log_addr: None,
        };
        let _ = rig.memory.write_obj(index, GuestAddress((parts[1] & !1).wrapping_add(2)));
        let mut steps = || -> vhost::Result<()> {
            front.set_vring_num(0, size as u16)?;
            front.set_vring_addr(0, &config)?;
            front.set_vring_base(0, next_avail)?;
            front.set_vring_kick(0, &rig.queue.kick)?;
            front.set_vring_enable(0, true)
        };
        let served = steps().is_ok();
        rig.queue.kick.write(1).expect("kick");
        if served {
            let end = Instant::now() + Duration::from_millis(2);
            while Instant::now() < end {
                std::thread::yield_now();
            }
        }
        let start = Instant::now();
        let _ = rig.device.front.get_vring_base(0);
        prop_assert!(start.elapsed() < PATIENCE, "it stops in time");
        rig.image();
        rig.recover();
    }
}

/// What a front end may do to a ring that runs.
#[derive(Clone, Copy, Debug)]
enum Change {
    Resize(u16),
    Move(u64),
    Base(u16),
    Features,
    Memory,
    Kick,
    Call,
    Disable,
    Restart,
    Config(u8),
}

fn changes() -> impl Strategy<Value = Change> {
    prop_oneof![
        any::<u16>().prop_map(Change::Resize),
        (0u64..0x4000).prop_map(|at| Change::Move(at & !15)),
        any::<u16>().prop_map(Change::Base),
        Just(Change::Features),
        Just(Change::Memory),
        Just(Change::Kick),
        Just(Change::Call),
        Just(Change::Disable),
        Just(Change::Restart),
        any::<u8>().prop_map(Change::Config),
    ]
}

/// Makes a change; a running ring may refuse it, but goes on.
fn make(rig: &mut Rig, change: Change) {
    let queue = &rig.queue;
    let regions = rig.device.regions();
    let front = &mut rig.device.front;
    match change {
        Change::Resize(size) => {
            front.set_vring_num(0, size).expect_err("a ring that runs is not resized");
        }
        Change::Move(by) => {
            let mut config = queue.config();
            config.avail_ring_addr += by;
            front.set_vring_addr(0, &config).expect_err("a ring that runs is not moved");
        }
        Change::Base(base) => {
            front.set_vring_base(0, base).expect_err("a ring that runs is not put elsewhere");
        }
        Change::Features => {
            let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
            front.set_features(protocol).expect_err("features of a ring that runs do not change");
        }
        Change::Memory => drop(front.set_mem_table(&regions).expect("memory")),
        Change::Kick => front.set_vring_kick(0, &queue.kick).expect("kick"),
        Change::Call => front.set_vring_call(0, &queue.call).expect("call"),
        Change::Disable => {
            front.set_vring_enable(0, false).expect("disable");
            front.set_vring_enable(0, true).expect("enable");
        }
        Change::Restart => {
            let base = front.get_vring_base(0).expect("stop") as u16;
            front.set_vring_base(0, base).expect("base");
            front.set_vring_call(0, &queue.call).expect("call");
            front.set_vring_kick(0, &queue.kick).expect("kick");
        }
        Change::Config(value) => {
            let flags = VhostUserConfigFlags::WRITABLE;
            front.set_config(32, flags, &[value]).expect("cache mode");
        }
    }
}

proptest! {
    #![proptest_config(cases(48))]

    /// Whatever changes while requests are under way, each is answered once and well.
    #[test]
    fn changes_under_way_lose_nothing(
        changes in prop::collection::vec((changes(), 1u16..5), 1..12),
        event_idx in any::<bool>(),
    ) {
        let features = BASIC | if event_idx { F_EVENT_IDX } else { 0 };
        let mut rig = Rig::new(false, features);
        let memory = rig.memory.clone();
        let mut next = 0u64;
        for (change, count) in changes {
            let first = next;
            let from = rig.queue.avail;
            for _ in 0..count {
                let [header, status] = rig.queue.header(&memory, next % 5, T_IN, next % SECTORS);
                let data = into(DATA + 512 * (next % 5), 512);
                rig.queue.place(&memory, &[header, data, status]);
                next += 1;
            }
            rig.queue.announce(&memory);
            rig.queue.kick(&memory, from);
            make(&mut rig, change);
            for n in first..next {
                prop_assert!(rig.queue.next_used(&memory).is_some(), "request {} is lost", n);
            }
            for n in first..next {
                prop_assert_eq!(rig.queue.status(&memory, n % 5), 0);
                let mut bytes = [0; 512];
                memory.read_slice(&mut bytes, GuestAddress(DATA + 512 * (n % 5))).expect("read");
                prop_assert_eq!(bytes, pattern(n % SECTORS));
            }
        }
        prop_assert_eq!(rig.queue.used_index(&memory), next as u16, "none is answered twice");
        let counted = rig.device.stats();
        prop_assert_eq!((counted.reads_completed, counted.bytes_read), (next, 512 * next));
        prop_assert_eq!(rig.events(), 0);
    }

    /// A reset in the middle of it all: when it is answered, the device has let go of memory.
    #[test]
    fn a_reset_lets_go(
        count in 1u64..5,
        delay in 0u64..200,
        stop in any::<bool>(),
    ) {
        let mut rig = Rig::new(false, BASIC);
        let memory = rig.memory.clone();
        for n in 0..count {
            let [header, status] = rig.queue.header(&memory, n, T_IN, n);
            rig.queue.place(&memory, &[header, into(DATA + 0x1000 * n, 4096), status]);
        }
        rig.queue.announce(&memory);
        rig.queue.kick.write(1).expect("kick");
        let until = Instant::now() + Duration::from_micros(delay);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        if stop {
            rig.device.front.get_vring_base(0).expect("stop");
        } else {
            rig.device.front.reset_device().expect("reset");
        }
        let used = rig.queue.used_index(&memory);
        let counted = rig.device.stats().reads_completed;
        prop_assert_eq!(u64::from(used), counted, "what is counted is in the ring");
        for n in 0..count {
            let status = rig.queue.status(&memory, n);
            prop_assert_eq!(status, if n < counted { 0 } else { 0xff });
        }
        // The driver has its memory for itself now.
        memory.write_slice(&[0x5a; 0x5000], GuestAddress(DATA)).expect("write");
        std::thread::sleep(Duration::from_millis(1));
        let mut bytes = vec![0; 0x5000];
        memory.read_slice(&mut bytes, GuestAddress(DATA)).expect("read");
        prop_assert!(bytes.iter().all(|byte| *byte == 0x5a), "memory was written to after the end");
        prop_assert_eq!(rig.queue.used_index(&memory), used);
        rig.recover();
    }
}

/// Another vCPU writes over rings, tables and headers while they are read.
#[test]
fn memory_that_changes_while_it_is_read() {
    for (read_only, seed) in [(false, 1u64), (true, 2), (true, 3)] {
        let features = BASIC | F_INDIRECT | F_EVENT_IDX;
        let mut rig = Rig::new(read_only, features);
        let before = rig.image();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _end = Stop(&stop);
            scope.spawn(|| mutate(&rig.memory, seed, &stop));
            let start = Instant::now();
            let mut queue = Queue::new(0, SIZE, features);
            // Until something was found to be wrong at least once, however slow it is here.
            while start.elapsed() < Duration::from_millis(500) || rig.events() == 0 {
                assert!(start.elapsed() < PATIENCE, "nothing was tried: {:?}", rig.device.stats());
                for n in 0..4 {
                    let kind = [T_IN, T_OUT, T_FLUSH, T_GET_ID][n as usize];
                    let [header, status] = queue.header(&rig.memory, n, kind, n);
                    queue.place(&rig.memory, &[header, into(DATA, 512), status]);
                }
                queue.announce(&rig.memory);
                rig.queue.kick.write(1).expect("kick");
                std::thread::sleep(Duration::from_micros(200));
                if rig.queue.err.read().is_ok() {
                    // A ring that was broken is stopped and put where it was.
                    let stopped = rig.device.front.get_vring_base(0).expect("stop");
                    let base = rig.memory.read_obj(GuestAddress(0x2002)).unwrap_or(stopped as u16);
                    queue.avail = base;
                    rig.queue.connect(&mut rig.device, base);
                }
            }
        });
        let start = Instant::now();
        rig.device.front.get_vring_base(0).expect("stop");
        assert!(start.elapsed() < PATIENCE, "it stops in time");
        let after = rig.image();
        assert!(!read_only || before == after, "a read-only image was written");
        rig.recover();
    }
}

/// Ends the other thread, in a panic too.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes what may pass for something into rings, tables and headers.
fn mutate(memory: &GuestMemoryMmap<()>, seed: u64, stop: &AtomicBool) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    while !stop.load(Ordering::Relaxed) {
        let r = random();
        let address = match r % 8 {
            0..4 => random() % 0x100,          // descriptors
            4 => 0x2000 + random() % 0x30,     // available ring
            5 => 0x8000 + random() % 0x80,     // headers and status bytes
            6 => 0x1_0000 + random() % 0x1000, // indirect tables
            _ => 0x3000 + random() % 0x90,     // used ring
        };
        let value = match r >> 8 & 3 {
            0 => random() & 7,
            1 => random() & 0xffff,
            2 => DATA + (random() & 0xfff),
            _ => random(),
        };
        let at = GuestAddress(address & !1);
        match r >> 10 & 1 {
            0 => memory.write_obj(value as u16, at).expect("write"),
            _ => memory.write_obj(value, at).expect("write"),
        }
        if r >> 20 & 0x3f == 0 {
            std::thread::yield_now();
        }
    }
}
