//! Rings that a process takes over from one before it, by the record of requests in flight:
//! what is done before a ring is given back, what it costs, and what stays broken.
#![allow(clippy::expect_used)] // a test fails by panicking

#[allow(dead_code)] // shared; each program uses a part
mod blk_driver;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use blk_driver::{
    Device, F_FLUSH, F_VERSION_1, Options, PATIENCE, Queue, T_FLUSH, T_IN, into, out,
};
use cellblock_devices::protocol::{Rate, ThrottleLimits};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserVirtioFeatures,
};
use vm_memory::{Bytes, GuestAddress};

const FEATURES: u64 = F_VERSION_1 | F_FLUSH;
const SIZE: u16 = 256;
const F_CONFIG_WCE: u64 = 1 << 11;
/// Where the cache mode is in the configuration space.
const WRITEBACK: u32 = 32;
const HEADERS: u64 = 0x8000;
const DATA: u64 = 0x10_0000;
const LEN: u32 = 64 << 10;

type Record = (VhostUserInflight, File);

fn record(device: &mut Device) -> Record {
    let shape = VhostUserInflight::new(0, 0, device.queues, SIZE);
    device.front.get_inflight_fd(&shape).expect("record")
}

fn hand_over(device: &mut Device, (shape, file): &Record) {
    device.front.set_inflight_fd(shape, file.as_raw_fd()).expect("hand the record over");
}

/// Has `record` say that a process died with the first `taken` chains of 3 descriptors each.
fn leave_unfinished(record: &Record, taken: u16) {
    let word = |at: u64, value: u64| record.1.write_all_at(&value.to_ne_bytes(), at);
    word(8, 1 | u64::from(SIZE) << 16).expect("header");
    for n in 0..u64::from(taken) {
        let entry = 16 * (1 + 3 * n);
        word(entry + 8, n).expect("counter");
        word(entry, 1).expect("mark");
    }
}

/// Makes so many reads of [`LEN`] bytes available, and tells nobody.
fn read_much(device: &Device, queue: &mut Queue, chains: u16) {
    let memory = &device.memory;
    for n in 0..chains {
        let header = HEADERS + 32 * u64::from(n);
        memory.write_obj(T_IN, GuestAddress(header)).expect("type");
        memory.write_obj(0u64, GuestAddress(header + 8)).expect("sector");
        memory.write_obj(0xffu8, GuestAddress(header + 16)).expect("status");
        queue.add(memory, &[out(header, 16), into(DATA, LEN), into(header + 16, 1)]);
    }
}

#[test]
fn what_was_left_is_answered_before_a_ring_is_given_back() {
    let chains = 80;
    let options = Options { begun: chains, ..Options::default() };
    let mut device = Device::start(&options, FEATURES);
    let record = record(&mut device);
    leave_unfinished(&record, chains);
    hand_over(&mut device, &record);
    let mut queue = Queue::new(0, SIZE, FEATURES);
    read_much(&device, &mut queue, chains);
    queue.connect(&mut device, 0);
    let base = device.front.get_vring_base(0).expect("base");
    assert_eq!((base, queue.used_index(&device.memory)), (u32::from(chains), chains));
    assert_eq!(device.stats().reads_completed, u64::from(chains));
}

/// What was let through when it was begun need not be again. A record that says more was begun
/// than the disk knows of is a front end's invention.
#[test]
fn what_was_left_has_paid_if_it_was_begun() {
    let chains = 20;
    let requests = Some(Rate { per_second: 1, burst: 1 });
    let throttle = ThrottleLimits { requests, ..ThrottleLimits::default() };
    for begun in [0, 7, chains] {
        let options = Options { throttle, begun, ..Options::default() };
        let mut device = Device::start(&options, FEATURES);
        let record = record(&mut device);
        leave_unfinished(&record, chains);
        hand_over(&mut device, &record);
        let mut queue = Queue::new(0, SIZE, FEATURES);
        // The bucket has a token for one that has not paid; the next has to wait.
        read_much(&device, &mut queue, chains + 2);
        queue.connect(&mut device, 0);
        let end = Instant::now() + PATIENCE;
        while device.stats().throttled_count == 0 {
            assert!(Instant::now() < end, "one has to wait");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(device.stats().reads_completed, u64::from(begun) + 1);
        // Nor is a ring held by one that waits; and it comes through no faster by that.
        let base = device.front.get_vring_base(0).expect("base");
        let answered = queue.used_index(&device.memory);
        assert!(base >= answered.into() && answered <= begun + 2, "{base}, {answered}");
    }
}

#[test]
fn a_cache_that_was_turned_off_stays_off_until_the_driver_starts_over() {
    let features = FEATURES | F_CONFIG_WCE;
    let writeback = |device: &mut Device| config(device, WRITEBACK);
    let mut device = Device::start(&Options::default(), features);
    let record = record(&mut device);
    hand_over(&mut device, &record);
    let queue = Queue::set_up(&mut device, 0, 16, features);
    assert_eq!(writeback(&mut device), 1);
    set_config(&mut device, WRITEBACK, 0);
    assert_eq!(writeback(&mut device), 0);
    // Not every front end says it again.
    let mut successor = Device::start(&Options::default(), features);
    assert_eq!(writeback(&mut successor), 1);
    hand_over(&mut successor, &record);
    assert_eq!(writeback(&mut successor), 0);
    // Turned on again, it is on.
    set_config(&mut device, WRITEBACK, 1);
    let mut successor = Device::start(&Options::default(), features);
    hand_over(&mut successor, &record);
    assert_eq!(writeback(&mut successor), 1);
    drop(queue);
}

/// The state of a device is taken before its driver's features are told, or after.
#[test]
fn a_cache_that_was_turned_off_stays_off_where_its_state_is_taken() {
    let features = FEATURES | F_CONFIG_WCE;
    let mut device = Device::start(&Options::default(), features);
    set_config(&mut device, WRITEBACK, 0);
    let (mut from, to) = std::io::pipe().expect("pipe");
    transfer(&device, VhostTransferStateDirection::SAVE, to.into());
    let mut state = Vec::new();
    from.read_to_end(&mut state).expect("state");
    let take = |device: &Device| {
        let (from, mut to) = std::io::pipe().expect("pipe");
        transfer(device, VhostTransferStateDirection::LOAD, from.into());
        to.write_all(&state).expect("state");
        drop(to);
        device.front.check_device_state().expect("taken");
    };
    let mut after = Device::start(&Options::default(), features);
    take(&after);
    assert_eq!(config(&mut after, WRITEBACK), 0);
    let (mut before, _) = Device::bare(&Options::default());
    before.agree();
    take(&before);
    before.tell(features);
    assert_eq!(config(&mut before, WRITEBACK), 0);
    // The next driver has a cache again.
    before.front.reset_device().expect("reset");
    before.tell(features);
    assert_eq!(config(&mut before, WRITEBACK), 1);
}

fn transfer(device: &Device, direction: VhostTransferStateDirection, pipe: OwnedFd) {
    let phase = VhostTransferStatePhase::STOPPED;
    let own = device.front.set_device_state_fd(direction, phase, pipe).expect("transfer");
    assert!(own.is_none());
}

/// A driver without flushes has no cache to begin with, and the next one has again.
#[test]
fn the_cache_begins_as_the_features_say() {
    let mut device = Device::start(&Options::default(), F_VERSION_1 | F_CONFIG_WCE);
    assert_eq!(config(&mut device, WRITEBACK), 0);
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    device.front.set_features(FEATURES | F_CONFIG_WCE | protocol).expect("features");
    assert_eq!(config(&mut device, WRITEBACK), 1);
}

fn config(device: &mut Device, at: u32) -> u8 {
    let flags = VhostUserConfigFlags::empty();
    device.front.get_config(at, 1, flags, &[0]).expect("config").1[0]
}

fn set_config(device: &mut Device, at: u32, value: u8) {
    let flags = VhostUserConfigFlags::WRITABLE;
    device.front.set_config(at, flags, &[value]).expect("config");
}

#[test]
fn a_broken_ring_stays_broken_until_the_driver_starts_over() {
    let mut device = Device::start(&Options::default(), FEATURES);
    let memory = device.memory.clone();
    let record = record(&mut device);
    hand_over(&mut device, &record);
    let mut queue = Queue::set_up(&mut device, 0, 16, FEATURES);
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
    let set_avail = |index: u16| {
        memory.write_obj(index, GuestAddress(queue.base + 0x2002)).expect("avail idx");
    };
    set_avail(500);
    queue.kick.write(1).expect("kick");
    let told = |queue: &Queue| {
        let end = Instant::now() + PATIENCE;
        while queue.err.read().is_err() {
            assert!(Instant::now() < end, "the front end is told");
        }
    };
    told(&queue);
    // Repaired, it would be a good ring; and its descriptors change, and it is stopped for a
    // snapshot and started again.
    set_avail(2);
    let untouched = |device: &Device, queue: &Queue| {
        told(queue);
        queue.kick.write(1).expect("kick");
        std::thread::sleep(Duration::from_millis(20)); // what must not happen gives no notice
        assert_eq!(queue.used_index(&device.memory), 1);
    };
    device.front.set_vring_call(0, &queue.call).expect("call");
    untouched(&device, &queue);
    device.front.get_vring_base(0).expect("base");
    queue.connect(&mut device, 1);
    untouched(&device, &queue);
    assert_eq!(device.stats().invalid_avail_idx_count, 1);

    // A successor knows it from the record.
    let mut successor = Device::start(&Options::default(), FEATURES);
    hand_over(&mut successor, &record);
    let index = GuestAddress(queue.base + 0x3002);
    successor.memory.write_obj(1u16, index).expect("used idx");
    queue.connect(&mut successor, 1);
    untouched(&successor, &queue);
    assert_eq!(successor.stats().invalid_avail_idx_count, 0);

    // A driver that starts over gets a record of its own.
    device.front.get_vring_base(0).expect("base");
    set_avail(1);
    let record = self::record(&mut device);
    hand_over(&mut device, &record);
    queue.connect(&mut device, 1);
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
}
