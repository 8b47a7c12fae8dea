//! The throttle of a block device, on its real threads and by the real clock. A disk
//! that is too fast is a fault wherever the test runs; one that is slower than its rate
//! is told from a slow machine by a wide margin.

#[allow(dead_code)] // shared with other tests; each uses a part
mod blk_driver;

use std::time::{Duration, Instant};

use blk_driver::*;
use cellblock_devices::protocol::counters::VirtioBlkCountersSnapshot as Snapshot;
use cellblock_devices::protocol::{Rate, ThrottleLimits, ToCell};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const FEATURES: u64 = F_VERSION_1 | F_FLUSH;
const DATA: u64 = 0x20_0000;

fn rate(per_second: u64) -> Option<Rate> {
    Some(Rate { per_second, burst: per_second })
}

fn requests(per_second: u64) -> ThrottleLimits {
    ThrottleLimits { requests: rate(per_second), bytes: None }
}

fn rig(throttle: ThrottleLimits) -> (Device, Queue, GuestMemoryMmap<()>) {
    let mut device = Device::start(&Options { throttle, ..Options::default() }, FEATURES);
    let queue = Queue::set_up(&mut device, 0, 16, FEATURES);
    let memory = device.memory.clone();
    (device, queue, memory)
}

/// Reads of `len` bytes for `time`, after `skip` of them; how many a second.
fn reads(queue: &mut Queue, memory: &GuestMemoryMmap<()>, len: u32, skip: usize, time: f64) -> f64 {
    for _ in 0..skip {
        assert_eq!(queue.request(memory, T_IN, 0, &[into(DATA, len)]).0, 0);
    }
    let (start, mut done) = (Instant::now(), 0.0);
    while start.elapsed().as_secs_f64() < time {
        assert_eq!(queue.request(memory, T_IN, 0, &[into(DATA, len)]).0, 0);
        done += 1.0;
    }
    done / start.elapsed().as_secs_f64()
}

#[test]
fn requests_come_at_their_rate() {
    let (device, mut queue, memory) = rig(requests(1000));
    let rate = reads(&mut queue, &memory, 512, 1000, 1.5);
    // What came while the burst was used up is at most a moment's worth more.
    assert!((800.0..1100.0).contains(&rate), "{rate} requests a second");
    let counted = device.stats();
    assert!(counted.throttled_count > 0, "{counted:?}");
}

#[test]
fn bytes_come_at_their_rate() {
    let limits = ThrottleLimits { bytes: rate(16 << 20), requests: None };
    let (_device, mut queue, memory) = rig(limits);
    let rate = reads(&mut queue, &memory, 64 << 10, 256, 1.5) * 65536.0 / f64::from(1 << 20);
    assert!((12.8..17.6).contains(&rate), "{rate} MiB a second");
}

#[test]
fn a_reset_by_the_guest_refills_nothing() {
    let (mut device, mut queue, memory) = rig(requests(10));
    let start = Instant::now();
    for _ in 0..10 {
        queue.request(&memory, T_FLUSH, 0, &[]);
    }
    device.front.reset_device().expect("reset");
    memory.write_slice(&[0; 0x4000], GuestAddress(queue.base)).expect("clear the rings");
    device.negotiate(FEATURES);
    let mut queue = Queue::set_up(&mut device, 0, 16, FEATURES);
    for _ in 0..5 {
        queue.request(&memory, T_FLUSH, 0, &[]);
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(499), "15 requests, 10 at once, in {took:?}");
}

#[test]
fn a_stall_shows_and_a_change_ends_it() {
    let (device, mut queue, memory) = rig(requests(1));
    queue.request(&memory, T_FLUSH, 0, &[]);
    let [header, status] = queue.header(&memory, 0, T_IN, 0);
    let from = queue.avail;
    queue.add(&memory, &[header, into(DATA, 512), status]);
    queue.kick(&memory, from);
    wait_until(|| device.stats().currently_throttled_gauge == 1);
    let stalled = Snapshot {
        flushes_completed: 1,
        throttled_count: 1,
        currently_throttled_gauge: 1,
        ..Snapshot::default()
    };
    assert_eq!(device.stats(), stalled);
    // A kick is no token.
    queue.kick.write(1).expect("kick");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(device.stats(), stalled);
    device.cell.send(&ToCell::Throttle(ThrottleLimits::default()), &[]).expect("send");
    assert!(queue.next_used(&memory).is_some());
    let flows =
        Snapshot { reads_completed: 1, bytes_read: 512, currently_throttled_gauge: 0, ..stalled };
    assert_eq!(device.stats(), flows);
}

#[test]
fn a_ring_that_waits_for_tokens_stops_and_gives_the_request_back() {
    let (mut device, mut queue, memory) = rig(requests(1));
    queue.request(&memory, T_FLUSH, 0, &[]);
    let [header, status] = queue.header(&memory, 0, T_FLUSH, 0);
    let from = queue.avail;
    queue.add(&memory, &[header, status]);
    queue.kick(&memory, from);
    wait_until(|| device.stats().currently_throttled_gauge == 1);
    let start = Instant::now();
    assert_eq!(device.front.get_vring_base(0).expect("stop"), 1, "not the one that waits");
    assert!(start.elapsed() < Duration::from_millis(500), "it does not wait for tokens");
    assert_eq!(device.stats().currently_throttled_gauge, 0);
    queue.connect(&mut device, 1);
    assert!(queue.next_used(&memory).is_some(), "it is answered in the end");
}

#[test]
fn nothing_invalid_takes_a_token() {
    let one = Some(Rate { per_second: 1, burst: 512 });
    let (device, mut queue, memory) = rig(ThrottleLimits { bytes: one, requests: rate(1) });
    for _ in 0..20 {
        assert_eq!(queue.request(&memory, T_IN, 1 << 40, &[into(DATA, 512)]).0, 1);
        assert_eq!(queue.request(&memory, 77, 0, &[]).0, 2);
    }
    assert_eq!(queue.request(&memory, T_IN, 0, &[into(DATA, 512)]).0, 0);
    let counted = device.stats();
    assert_eq!((counted.throttled_count, counted.io_errors), (0, 20));
}

#[test]
fn queues_share_one_budget() {
    let options = Options { queues: 2, throttle: requests(20), ..Options::default() };
    let mut device = Device::start(&options, FEATURES);
    let mut queues = [0, 1].map(|i| Queue::set_up(&mut device, i, 16, FEATURES));
    let memory = device.memory.clone();
    let start = Instant::now();
    for n in 0..30 {
        queues[n % 2].request(&memory, T_FLUSH, 0, &[]);
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(499), "30 requests, 20 at once, in {took:?}");
}

fn wait_until(mut what: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < end, "in time");
        std::thread::sleep(Duration::from_millis(1));
    }
}
