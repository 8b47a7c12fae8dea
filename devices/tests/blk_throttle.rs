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

/// Reads of `len` bytes by turns on all `queues`, for so many seconds and until there were
/// `least`, however slow the machine is; how many there were.
fn reads(
    queues: &mut [Queue],
    memory: &GuestMemoryMmap<()>,
    len: u32,
    (seconds, least): (f64, u64),
) -> u64 {
    let (start, mut done) = (Instant::now(), 0);
    while start.elapsed().as_secs_f64() < seconds || done < least {
        for queue in &mut *queues {
            assert_eq!(queue.request(memory, T_IN, 0, &[into(DATA, len)]).0, 0);
            done += 1;
        }
    }
    done
}

/// Neither the burst nor the rate after it is exceeded, by not one request; and both are
/// come near to, as far as a busy machine lets anybody. (How near is for `cargo bench`.)
#[test]
fn bursts_and_rates_are_honoured_and_not_exceeded() {
    const LEN: u32 = 128 << 10;
    let bytes = ThrottleLimits { bytes: rate(100 << 20), requests: None };
    let few = ThrottleLimits { requests: Some(Rate { per_second: 500, burst: 1500 }), bytes: None };
    for (limits, len, per_second, burst) in [
        (requests(5000), 4096, 5000.0, 5000.0),
        (bytes, LEN, f64::from(100 << 20) / f64::from(LEN), 800.0),
        (few, 512, 500.0, 1500.0),
    ] {
        let options = Options { queues: 2, throttle: limits, ..Options::default() };
        let mut device = Device::start(&options, FEATURES);
        let mut queues = [0, 1].map(|i| Queue::set_up(&mut device, i, 16, FEATURES));
        let memory = device.memory.clone();
        let start = Instant::now();
        let done = reads(&mut queues, &memory, len, (1.2, 101)) as f64;
        let most = burst + start.elapsed().as_secs_f64() * per_second;
        assert!(done <= most, "{done} of at most {most} at {per_second} a second");
        let throttled = device.stats().throttled_count;
        assert!(done > burst - 1.0 || throttled == 0, "{done} is not the burst of {burst}");
    }
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

/// The driver may have reset the device when nobody served it.
#[test]
fn a_process_that_comes_after_one_that_was_stalled_waits_for_nothing() {
    let options = Options { stalled: true, ..Options::default() };
    let device = Device::start(&options, FEATURES);
    let counted = Snapshot { throttled_count: 1, ..Snapshot::default() };
    assert_eq!(device.stats(), counted);
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
