//! What each counter of a block device counts, by real requests: every row of the
//! table moves its own counters and no other. The rules are in the order in which a
//! request is held to them.

#[allow(dead_code)] // shared with other tests; each uses a part
mod blk_driver;

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blk_driver::*;
use cellblock_devices::protocol::counters::VirtioBlkCountersSnapshot as Snapshot;
use cellblock_devices::protocol::{Rate, ThrottleLimits, ToCell};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const DATA: u64 = 0x20_0000;
/// Where memory ends; behind it is a hole.
const EDGE: u64 = REGION;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
/// The queue that is used; the one beside it must count nothing.
const QUEUE: u16 = 1;
/// Sectors of the disk.
const SECTORS: u64 = 2048;

/// A device, and the driver of its second queue.
struct Rig {
    device: Device,
    queue: Queue,
    memory: GuestMemoryMmap<()>,
    features: u64,
}

impl Rig {
    fn new(read_only: bool, throttle: ThrottleLimits) -> Rig {
        Rig::with(Options { read_only, throttle, ..Options::default() })
    }

    fn with(options: Options) -> Rig {
        let options = Options { queues: 2, ..options };
        let clear = if options.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        let features = F_VERSION_1 | F_FLUSH | F_SIZE_MAX | F_INDIRECT | clear;
        let mut device = Device::start(&options, features);
        let queue = Queue::set_up(&mut device, QUEUE.into(), 16, features);
        let memory = device.memory.clone();
        Rig { device, queue, memory, features }
    }

    fn counted(&self) -> Snapshot {
        self.device.counters.queue(QUEUE).snapshot()
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
        self.queue.request(&self.memory, kind, sector, data).0
    }

    /// Any chain at all; the length in its used entry.
    fn chain(&mut self, buffers: &[Buffer]) -> u32 {
        let from = self.queue.avail;
        let head = self.queue.add(&self.memory, buffers);
        self.queue.kick(&self.memory, from);
        let (id, len) = self.queue.next_used(&self.memory).expect("an answer in time");
        assert_eq!(id, u32::from(head));
        len
    }

    /// Makes a request available that has to wait.
    fn stall(&mut self) {
        assert_eq!(self.request(T_FLUSH, 0, &[]), OK, "it takes the only token");
        let [header, status] = self.queue.header(&self.memory, 0, T_IN, 0);
        let from = self.queue.avail;
        self.queue.add(&self.memory, &[header, into(DATA, 512), status]);
        self.queue.kick(&self.memory, from);
        self.until(|rig| rig.counted().currently_throttled_gauge == 1);
    }

    fn reset(&mut self) {
        self.device.front.reset_device().expect("reset");
        self.memory.write_slice(&[0; 0x4000], GuestAddress(self.queue.base)).expect("clear");
        self.device.negotiate(self.features);
        self.queue = Queue::set_up(&mut self.device, QUEUE.into(), 16, self.features);
    }

    /// Kicks until the front end is told that the ring is broken, and then some more.
    fn break_ring(&mut self) {
        let told = |rig: &mut Rig| {
            rig.queue.kick.write(1).expect("kick");
            rig.queue.err.read().is_ok()
        };
        self.until(told);
        for _ in 0..3 {
            self.queue.kick.write(1).expect("kick");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn until(&mut self, mut what: impl FnMut(&mut Rig) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !what(self) {
            assert!(Instant::now() < end, "in time");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn segment(&self, sector: u64, sectors: u32, flags: u32) {
        self.memory.write_obj(sector, GuestAddress(DATA)).expect("sector");
        self.memory.write_obj(sectors, GuestAddress(DATA + 8)).expect("sectors");
        self.memory.write_obj(flags, GuestAddress(DATA + 12)).expect("flags");
    }

    /// What a read put into memory is what the image has.
    fn assert_data(&self, sector: u64) {
        let mut bytes = [0; 512];
        self.memory.read_slice(&mut bytes, GuestAddress(DATA)).expect("read");
        assert_eq!(bytes, pattern(sector));
    }
}

/// What is done, and what it counts.
struct Row {
    what: &'static str,
    read_only: bool,
    throttle: ThrottleLimits,
    act: Box<dyn Fn(&mut Rig)>,
    counts: Snapshot,
}

impl Row {
    fn read_only(self) -> Row {
        Row { read_only: true, ..self }
    }
}

/// Anything that can be done.
fn act(what: &'static str, counts: Snapshot, act: impl Fn(&mut Rig) + 'static) -> Row {
    Row { what, read_only: false, throttle: Default::default(), act: Box::new(act), counts }
}

/// A well-formed request, or one whose data is wrong.
fn ask(
    what: &'static str,
    kind: u32,
    sector: u64,
    data: &[Buffer],
    status: u8,
    counts: Snapshot,
) -> Row {
    let data = data.to_vec();
    act(what, counts, move |rig| assert_eq!(rig.request(kind, sector, &data), status, "{what}"))
}

/// A chain with nowhere to put a status: it comes back with no length.
fn unanswerable(what: &'static str, chain: &[Buffer]) -> Row {
    let chain = chain.to_vec();
    act(what, error(), move |rig| {
        let [header, _] = rig.queue.header(&rig.memory, 0, T_IN, 0);
        let chain: Vec<_> = [&[header], &chain[..]].concat();
        assert_eq!(rig.chain(&chain), 0, "{what}");
    })
}

/// A chain whose first buffers are not a header of 16 bytes.
fn headless(what: &'static str, front: &[Buffer]) -> Row {
    let front = front.to_vec();
    act(what, error(), move |rig| {
        let [_, status] = rig.queue.header(&rig.memory, 0, T_IN, 0);
        rig.chain(&[&front[..], &[status]].concat());
        assert_eq!(rig.queue.status(&rig.memory, 0), IOERR, "{what}");
    })
}

fn one_request_a_second(row: Row) -> Row {
    let requests = Some(Rate { per_second: 1, burst: 1 });
    Row { throttle: ThrottleLimits { requests, bytes: None }, ..row }
}

fn none() -> Snapshot {
    Snapshot::default()
}

fn error() -> Snapshot {
    Snapshot { io_errors: 1, ..none() }
}

fn flush() -> Snapshot {
    Snapshot { flushes_completed: 1, ..none() }
}

fn read(bytes: u64) -> Snapshot {
    Snapshot { reads_completed: 1, bytes_read: bytes, ..none() }
}

fn wrote(bytes: u64) -> Snapshot {
    Snapshot { writes_completed: 1, bytes_written: bytes, ..none() }
}

/// What is done.
fn done() -> Vec<Row> {
    let (to, from) = (into(DATA, 512), out(DATA, 512));
    vec![
        act("read", read(512), |rig| {
            assert_eq!(rig.request(T_IN, 7, &[into(DATA, 512)]), OK);
            rig.assert_data(7);
        }),
        ask("scattered read", T_IN, 5, &[into(DATA, 100), into(DATA, 924)], OK, read(1024)),
        ask("last sector", T_IN, SECTORS - 1, &[to], OK, read(512)),
        ask("as many segments as there can be", T_IN, 0, &[to; 254], OK, read(254 * 512)),
        ask("write", T_OUT, 0, &[out(DATA, 1024)], OK, wrote(1024)),
        ask("flush", T_FLUSH, 0, &[], OK, flush()),
        ask("flush of what cannot be written", T_FLUSH, 0, &[], OK, flush()).read_only(),
        ask("get-id", T_GET_ID, 0, &[into(DATA, 20)], OK, none()),
        act("discard", none(), |rig| {
            rig.segment(8, 8, 0);
            assert_eq!(rig.request(T_DISCARD, 0, &[out(DATA, 16)]), OK);
            assert_eq!(rig.device.image_sectors(8, 8), vec![0; 4096]);
        }),
        act("write-zeroes", none(), |rig| {
            rig.segment(9, 1, 0);
            assert_eq!(rig.request(T_WRITE_ZEROES, 0, &[out(DATA, 16)]), OK);
            assert_eq!(rig.device.image_sectors(9, 1), vec![0; 512]);
        }),
        ask("unknown type", 77, 0, &[to], UNSUPP, none()),
        ask("unknown type without data", 77, 0, &[], UNSUPP, none()),
        ask("unknown type with data", 77, 0, &[from], UNSUPP, none()).read_only(),
        act("unknown flags", none(), |rig| {
            rig.segment(0, 1, 2);
            assert_eq!(rig.request(T_WRITE_ZEROES, 0, &[out(DATA, 16)]), UNSUPP);
        }),
    ]
}

/// What is refused, by rule.
fn refused() -> Vec<Row> {
    let (to, from) = (into(DATA, 512), out(DATA, 512));
    let long = into(DATA, (4 << 20) + 512);
    vec![
        // The ring is ready.
        act("a kick of a ring that is not there", none(), |rig| {
            rig.device.front.get_vring_base(QUEUE.into()).expect("stop");
            let [header, status] = rig.queue.header(&rig.memory, 0, T_FLUSH, 0);
            rig.queue.add(&rig.memory, &[header, status]);
            rig.queue.kick.write(1).expect("kick");
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(rig.queue.status(&rig.memory, 0), 0xff, "not answered");
        }),
        // Chain length.
        ask("long chain", T_IN, 0, &[to; 255], IOERR, error()),
        ask("long chain of an unknown type", 77, 0, &[to; 255], IOERR, error()),
        // A status descriptor.
        unanswerable("nowhere to put a status", &[]),
        unanswerable("nothing to put a status into", &[into(DATA, 0)]),
        unanswerable("a status outside memory", &[into(EDGE, 1)]),
        unanswerable("a status that begins in memory", &[into(EDGE - 1, 2)]),
        unanswerable("a long chain without a status", &[from; 300]),
        act("a chain that loops", error(), |rig| {
            rig.queue.indirect = false;
            let [header, _] = rig.queue.header(&rig.memory, 0, T_IN, 0);
            let base = rig.queue.base;
            rig.queue.descriptor(&rig.memory, base, 0, header.address, 16, 1, 1);
            rig.queue.descriptor(&rig.memory, base, 1, DATA, 512, 1 | 2, 1);
            rig.queue.publish(&rig.memory, 0);
            rig.queue.kick.write(1).expect("kick");
            assert_eq!(rig.queue.next_used(&rig.memory), Some((0, 0)));
        }),
        // A header of 16 readable bytes.
        headless("no header", &[]),
        headless("a short header", &[out(DATA, 15)]),
        headless("a header that is written to", &[into(DATA, 16)]),
        headless("a header outside memory", &[out(EDGE - 8, 16)]),
        headless("a short header and data", &[out(DATA, 8), into(DATA, 512)]),
        // Segment size.
        ask("long segment", T_IN, 0, &[long], IOERR, error()),
        ask("long segment of an unknown type", 77, 0, &[long], IOERR, error()),
        ask("outside memory", T_IN, 0, &[into(1 << 40, 512)], IOERR, error()),
        // Data, or none.
        ask("read of nothing", T_IN, 0, &[], IOERR, error()),
        ask("write of nothing", T_OUT, 0, &[], IOERR, error()),
        ask("get-id into nothing", T_GET_ID, 0, &[], IOERR, error()),
        ask("discard of nothing", T_DISCARD, 0, &[], IOERR, error()),
        ask("flush of something", T_FLUSH, 0, &[from], IOERR, error()),
        ask("flush into something", T_FLUSH, 0, &[to], IOERR, error()),
        // Whole sectors.
        ask("read of a part", T_IN, 0, &[into(DATA, 513)], IOERR, error()),
        ask("write of a part", T_OUT, 0, &[out(DATA, 511)], IOERR, error()),
        ask("discard of a part", T_DISCARD, 0, &[out(DATA, 15)], IOERR, error()),
        // Read-only.
        ask("write", T_OUT, 0, &[from], IOERR, error()).read_only(),
        ask("write beyond the end", T_OUT, SECTORS, &[from], IOERR, error()).read_only(),
        ask("discard", T_DISCARD, 0, &[out(DATA, 16)], IOERR, error()).read_only(),
        ask("write-zeroes", T_WRITE_ZEROES, 0, &[out(DATA, 16)], IOERR, error()).read_only(),
        // Direction.
        ask("read, wrong way", T_IN, 0, &[from], IOERR, error()),
        ask("write, wrong way", T_OUT, 0, &[to], IOERR, error()),
        ask("get-id, wrong way", T_GET_ID, 0, &[from], IOERR, error()),
        ask("discard, wrong way", T_DISCARD, 0, &[into(DATA, 16)], IOERR, error()),
        ask("both ways", T_IN, 0, &[from, to], IOERR, error()),
        // The end of the disk, and of all numbers.
        ask("over the end", T_IN, SECTORS - 1, &[into(DATA, 1024)], IOERR, error()),
        ask("behind the end", T_OUT, SECTORS, &[from], IOERR, error()),
        ask("last number", T_IN, u64::MAX, &[to], IOERR, error()),
        ask("wraps to zero", T_OUT, u64::MAX - 1, &[out(DATA, 2048)], IOERR, error()),
        ask("wraps in bytes", T_OUT, 1 << 55, &[from], IOERR, error()),
        act("discard over the end", error(), |rig| {
            rig.segment(SECTORS - 1, 2, 0);
            assert_eq!(rig.request(T_DISCARD, 0, &[out(DATA, 16)]), IOERR);
        }),
    ]
}

/// What goes wrong otherwise, and what has to wait.
fn events() -> Vec<Row> {
    let poisoned = Snapshot { invalid_avail_idx_count: 1, ..none() };
    let waits = Snapshot { throttled_count: 1, currently_throttled_gauge: 1, ..flush() };
    let waited = Snapshot { throttled_count: 1, ..flush() };
    vec![
        act("an image that has become shorter", error(), |rig| {
            rig.device.image.as_file().set_len(700).expect("truncate");
            assert_eq!(rig.request(T_IN, 0, &[into(DATA, 1024)]), IOERR);
        }),
        act("a head beyond the table", error(), |rig| {
            rig.queue.publish(&rig.memory, 16);
            rig.break_ring();
        }),
        act("an index too far ahead", poisoned.clone(), |rig| {
            let index = GuestAddress(rig.queue.base + 0x2002);
            rig.memory.write_obj(17u16, index).expect("avail idx");
            rig.break_ring();
        }),
        act(
            "a poisoned ring, until a reset",
            Snapshot { reads_completed: 1, bytes_read: 512, ..poisoned },
            |rig| {
                let index = GuestAddress(rig.queue.base + 0x2002);
                rig.memory.write_obj(u16::MAX, index).expect("avail idx");
                rig.break_ring();
                // Good again by itself, but not cleared.
                rig.memory.write_obj(0u16, index).expect("avail idx");
                let [header, status] = rig.queue.header(&rig.memory, 0, T_FLUSH, 0);
                rig.queue.add(&rig.memory, &[header, status]);
                rig.queue.kick.write(1).expect("kick");
                std::thread::sleep(Duration::from_millis(20));
                assert_eq!(rig.queue.status(&rig.memory, 0), 0xff, "not answered");
                rig.reset();
                assert_eq!(rig.request(T_IN, 3, &[into(DATA, 512)]), OK);
                rig.assert_data(3);
            },
        ),
        one_request_a_second(act("a request that waits", waits.clone(), |rig| {
            rig.stall();
            // Kicks are no tokens.
            rig.queue.kick.write(1).expect("kick");
            std::thread::sleep(Duration::from_millis(20));
        })),
        one_request_a_second(act(
            "a request that has waited",
            Snapshot { reads_completed: 1, bytes_read: 512, ..waited.clone() },
            |rig| {
                rig.stall();
                let free = ToCell::Throttle(ThrottleLimits::default());
                rig.device.cell.send(&free, &[]).expect("send");
                assert!(rig.queue.next_used(&rig.memory).is_some());
            },
        )),
        one_request_a_second(act("a request that waits, and a reset", waited, |rig| {
            rig.stall();
            rig.device.front.reset_device().expect("reset");
        })),
        act(
            "requests before and after a reset",
            Snapshot { writes_completed: 2, ..wrote(1024) },
            |rig| {
                assert_eq!(rig.request(T_OUT, 0, &[out(DATA, 512)]), OK);
                rig.reset();
                assert_eq!(rig.request(T_OUT, 0, &[out(DATA, 512)]), OK);
            },
        ),
    ]
}

#[test]
fn every_row_moves_its_counters_and_no_other() {
    let rows = || done().into_iter().chain(refused()).chain(events());
    for row in rows() {
        let mut rig = Rig::new(row.read_only, row.throttle);
        (row.act)(&mut rig);
        assert_eq!(rig.counted(), row.counts, "{}", row.what);
        let other = rig.device.counters.queue(1 - QUEUE).snapshot();
        assert_eq!(other, none(), "{}, on the other queue", row.what);
    }
    let moved = rows().fold(none(), |sum, row| sum.saturating_add(&row.counts));
    let fields = serde_json::to_value(moved).expect("plain data");
    let fields = fields.as_object().expect("fields");
    assert_eq!(fields.len(), 9);
    assert!(fields.values().all(|sum| *sum != 0), "a counter that no row moves: {fields:?}");
}

/// With one token there is, everything that is refused passes, and leaves it.
#[test]
fn nothing_refused_takes_a_token_or_touches_the_image() {
    for row in refused().into_iter().map(one_request_a_second) {
        let mut rig = Rig::new(row.read_only, row.throttle);
        let image = rig.device.image_sectors(0, SECTORS as usize);
        (row.act)(&mut rig);
        assert_eq!(rig.counted(), row.counts, "{}", row.what);
        rig.reset();
        assert_eq!(rig.request(T_FLUSH, 0, &[]), OK, "{}", row.what);
        assert_eq!(rig.counted(), row.counts.saturating_add(&flush()), "{}", row.what);
        assert_eq!(rig.device.image_sectors(0, SECTORS as usize), image, "{}", row.what);
    }
}

/// A file system of its own, as small as it is to be. It goes with the process.
struct SmallFileSystem(Child);

impl SmallFileSystem {
    fn new(bytes: u64) -> SmallFileSystem {
        let script = format!("mount -t tmpfs -o size={bytes} small /mnt && echo made && cat");
        let mut child = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut line = [0; 5];
        child.stdout.as_mut().expect("output").read_exact(&mut line).expect("it is made");
        SmallFileSystem(child)
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/root/mnt", self.0.id()).into()
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_full_file_system_is_an_error_and_not_the_end() {
    let small = SmallFileSystem::new(64 << 10);
    let mut rig = Rig::with(Options { dir: Some(small.path()), ..Options::default() });
    let mut written = 0;
    let write = |rig: &mut Rig, n: u64| rig.request(T_OUT, 8 * n, &[out(DATA, 4096)]);
    while write(&mut rig, written) == OK {
        written += 1;
        assert!(written <= 16, "there is no room for more");
    }
    assert!(written > 0);
    let full = Snapshot { writes_completed: written, ..wrote(4096 * written) };
    assert_eq!(rig.counted(), Snapshot { io_errors: 1, ..full.clone() });
    // What was written is still read, and room that is made can be used.
    assert_eq!(rig.request(T_IN, 0, &[into(DATA, 512)]), OK);
    rig.segment(0, 8, 0);
    assert_eq!(rig.request(T_DISCARD, 0, &[out(DATA, 16)]), OK);
    assert_eq!(write(&mut rig, written), OK);
    let counted = rig.counted();
    assert_eq!((counted.writes_completed, counted.io_errors), (written + 1, 1));
}

#[test]
fn the_counters_of_the_dead_can_be_read() {
    let mut rig = Rig::new(false, ThrottleLimits::default());
    assert_eq!(rig.request(T_FLUSH, 0, &[]), OK);
    let (cell, _) = cellblock_wire::Channel::pair().expect("channel");
    drop(std::mem::replace(&mut rig.device.cell, cell));
    rig.device.join().expect("end");
    assert_eq!(rig.counted(), flush());
}
