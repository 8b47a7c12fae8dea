//! What each counter of a block device counts, by real requests: every row of the
//! table moves its own counters and no other.

#[allow(dead_code)] // shared with other tests; each uses a part
mod blk_driver;

use std::time::{Duration, Instant};

use blk_driver::*;
use cellblock_devices::protocol::counters::VirtioBlkCountersSnapshot as Snapshot;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress};

const FEATURES: u64 = F_VERSION_1 | F_FLUSH | F_SIZE_MAX;
const DATA: u64 = 0x20_0000;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// One request, and what it is answered and counted as.
struct Row {
    what: &'static str,
    kind: u32,
    sector: u64,
    data: Vec<Buffer>,
    status: u8,
    counted: Snapshot,
}

fn row(
    what: &'static str,
    kind: u32,
    sector: u64,
    data: Vec<Buffer>,
    status: u8,
    counted: Snapshot,
) -> Row {
    Row { what, kind, sector, data, status, counted }
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

fn rows() -> Vec<Row> {
    let wrote = Snapshot { writes_completed: 1, bytes_written: 1024, ..none() };
    // Sectors of the disk: 2048.
    vec![
        row("read", T_IN, 0, vec![into(DATA, 512)], OK, read(512)),
        row("scattered read", T_IN, 5, vec![into(DATA, 100), into(DATA, 924)], OK, read(1024)),
        row("write", T_OUT, 0, vec![out(DATA, 1024)], OK, wrote),
        row("flush", T_FLUSH, 0, vec![], OK, flush()),
        row("get-id", T_GET_ID, 0, vec![into(DATA, 20)], OK, none()),
        row("unknown type", 77, 0, vec![into(DATA, 512)], UNSUPP, none()),
        row("long chain", T_IN, 0, vec![into(DATA, 512); 255], IOERR, error()),
        row("long segment", T_IN, 0, vec![into(DATA, (4 << 20) + 512)], IOERR, error()),
        row("read of nothing", T_IN, 0, vec![], IOERR, error()),
        row("write of nothing", T_OUT, 0, vec![], IOERR, error()),
        row("get-id into nothing", T_GET_ID, 0, vec![], IOERR, error()),
        row("flush of something", T_FLUSH, 0, vec![out(DATA, 512)], IOERR, error()),
        row("part of a sector", T_IN, 0, vec![into(DATA, 513)], IOERR, error()),
        row("read, wrong way", T_IN, 0, vec![out(DATA, 512)], IOERR, error()),
        row("write, wrong way", T_OUT, 0, vec![into(DATA, 512)], IOERR, error()),
        row("beyond the end", T_IN, 2047, vec![into(DATA, 1024)], IOERR, error()),
        row("beyond all numbers", T_IN, u64::MAX, vec![into(DATA, 512)], IOERR, error()),
        row("outside memory", T_IN, 0, vec![into(1 << 40, 512)], IOERR, error()),
    ]
}

#[test]
fn every_row_moves_its_counters_and_no_other() {
    for row in rows() {
        let features = FEATURES | F_INDIRECT;
        let mut device = Device::start(&Options::default(), features);
        let mut queue = Queue::set_up(&mut device, 0, 16, features);
        let memory = device.memory.clone();
        let (status, _) = queue.request(&memory, row.kind, row.sector, &row.data);
        assert_eq!(status, row.status, "{}", row.what);
        assert_eq!(device.stats(), row.counted, "{}", row.what);
    }
}

#[test]
fn a_read_only_disk_flushes_and_does_not_write() {
    let options = Options { read_only: true, ..Options::default() };
    let mut device = Device::start(&options, FEATURES | F_RO);
    let mut queue = Queue::set_up(&mut device, 0, 16, FEATURES);
    let memory = device.memory.clone();
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]).0, OK);
    assert_eq!(device.stats(), flush());
    assert_eq!(queue.request(&memory, T_OUT, 0, &[out(DATA, 512)]).0, IOERR);
    assert_eq!(device.stats(), Snapshot { io_errors: 1, ..flush() });
}

#[test]
fn an_image_that_fails_counts_an_error_and_no_bytes() {
    let mut device = Device::start(&Options::default(), FEATURES);
    let mut queue = Queue::set_up(&mut device, 0, 16, FEATURES);
    let memory = device.memory.clone();
    device.image.as_file().set_len(700).expect("truncate");
    assert_eq!(queue.request(&memory, T_IN, 0, &[into(DATA, 1024)]).0, IOERR);
    assert_eq!(device.stats(), error());
}

#[test]
fn an_available_index_too_far_ahead_counts_once() {
    let mut device = Device::start(&Options::default(), FEATURES);
    let queue = Queue::set_up(&mut device, 0, 16, FEATURES);
    let memory = device.memory.clone();
    memory.write_obj(17u16, GuestAddress(queue.base + 0x2002)).expect("avail idx");
    let end = Instant::now() + PATIENCE;
    while queue.err.read().is_err() {
        queue.kick.write(1).expect("kick");
        assert!(Instant::now() < end, "the front end is told");
        std::thread::sleep(Duration::from_millis(1));
    }
    queue.kick.write(1).expect("kick");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(device.stats(), Snapshot { invalid_avail_idx_count: 1, ..none() });
}

#[test]
fn a_head_beyond_the_table_and_a_broken_chain_are_errors() {
    let mut device = Device::start(&Options::default(), FEATURES);
    let mut queue = Queue::set_up(&mut device, 0, 16, FEATURES);
    let memory = device.memory.clone();
    queue.descriptor(&memory, queue.base, 0, DATA, 16, 0, 0); // no status
    queue.publish(&memory, 0);
    queue.kick.write(1).expect("kick");
    assert_eq!(queue.next_used(&memory), Some((0, 0)));
    assert_eq!(device.stats(), error());
    queue.publish(&memory, 16);
    queue.kick.write(1).expect("kick");
    let end = Instant::now() + PATIENCE;
    while queue.err.read().is_err() {
        assert!(Instant::now() < end, "the front end is told");
    }
    assert_eq!(device.stats(), Snapshot { io_errors: 2, ..none() });
}

#[test]
fn queues_count_apart_and_over_resets() {
    let options = Options { queues: 2, ..Options::default() };
    let mut device = Device::start(&options, FEATURES);
    let memory = device.memory.clone();
    for _ in 0..2 {
        let mut second = Queue::set_up(&mut device, 1, 16, FEATURES);
        assert_eq!(second.request(&memory, T_IN, 3, &[into(DATA, 512)]).0, OK);
        device.front.reset_device().expect("reset");
        memory.write_slice(&[0; 0x4000], GuestAddress(second.base)).expect("clear the rings");
        device.negotiate(FEATURES);
    }
    assert_eq!(device.counters.queue(0).snapshot(), none());
    let twice = Snapshot { reads_completed: 2, ..read(1024) };
    assert_eq!(device.counters.queue(1).snapshot(), twice);
}

#[test]
fn the_counters_of_the_dead_can_be_read() {
    let mut device = Device::start(&Options::default(), FEATURES);
    let mut queue = Queue::set_up(&mut device, 0, 16, FEATURES);
    let memory = device.memory.clone();
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]).0, OK);
    let (cell, _) = cellblock_wire::Channel::pair().expect("channel");
    drop(std::mem::replace(&mut device.cell, cell));
    device.join().expect("end");
    assert_eq!(device.stats(), flush());
}
