//! The block device through its real interfaces: a front end on a socket, guest
//! memory in a sealed memfd, kicks and interrupts by eventfd, a file as the image.

#[allow(dead_code)] // shared with the benchmark; each uses a part
mod blk_driver;

use std::time::{Duration, Instant};

use blk_driver::*;
use cellblock_devices::blk::{BlkError, prepare};
use cellblock_devices::protocol::counters::{VirtioBlkCountersSnapshot, new_counters};
use cellblock_devices::protocol::{BlkStart, EngineKind, FromCell, ToCell};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BASIC: u64 = F_VERSION_1 | F_FLUSH;
const ALL: u64 = BASIC | F_INDIRECT | F_EVENT_IDX | F_SIZE_MAX;
const DATA: u64 = 0x20_0000;

fn rig(features: u64) -> (Device, Queue) {
    let mut device = Device::start(&Options::default(), features);
    let queue = Queue::set_up(&mut device, 0, 16, features);
    (device, queue)
}

fn bytes(device: &Device, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    device.memory.read_slice(&mut bytes, GuestAddress(at)).expect("guest memory");
    bytes
}

#[test]
fn reads_writes_flushes_and_names_itself() {
    for features in [BASIC, BASIC | F_INDIRECT, BASIC | F_EVENT_IDX, ALL] {
        let (device, mut queue) = rig(features);
        let memory = device.memory.clone();
        assert_eq!(queue.request(&memory, T_IN, 7, &[into(DATA, 512)]), (0, 513));
        assert_eq!(bytes(&device, DATA, 512), pattern(7));

        // Scattered over both regions of memory, cut inside sectors.
        let parts = [(DATA, 100), (HIGH + 0x1000, 1000), (DATA + 0x5000, 436)];
        let mut fill = 0u8;
        let mut want = Vec::new();
        for (at, len) in parts {
            let part: Vec<u8> = (0..len)
                .map(|_| {
                    fill = fill.wrapping_mul(5).wrapping_add(3);
                    fill
                })
                .collect();
            memory.write_slice(&part, GuestAddress(at)).expect("write");
            want.extend(part);
        }
        let gather = parts.map(|(at, len)| out(at, len));
        assert_eq!(queue.request(&memory, T_OUT, 100, &gather), (0, 1));
        assert_eq!(device.image_sectors(100, 3), want);
        assert_eq!(device.image_sectors(99, 1), pattern(99));
        assert_eq!(device.image_sectors(103, 1), pattern(103));

        let scatter = [into(HIGH + 0x9001, 7), into(DATA + 0x777, 1529)];
        assert_eq!(queue.request(&memory, T_IN, 100, &scatter), (0, 1537));
        let got = [bytes(&device, HIGH + 0x9001, 7), bytes(&device, DATA + 0x777, 1529)].concat();
        assert_eq!(got, want);

        assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
        assert_eq!(queue.request(&memory, T_GET_ID, 0, &[into(DATA, 20)]), (0, 21));
        assert_eq!(&bytes(&device, DATA, 20), b"test-disk\0\0\0\0\0\0\0\0\0\0\0");

        assert_eq!(queue.request(&memory, 77, 0, &[into(DATA, 512)]), (2, 0));
        assert_eq!(queue.request(&memory, T_IN, 2048, &[into(DATA, 512)]), (1, 0));
        assert_eq!(
            device.stats(),
            VirtioBlkCountersSnapshot {
                reads_completed: 2,
                writes_completed: 1,
                flushes_completed: 1,
                bytes_read: 2048,
                bytes_written: 1536,
                io_errors: 1,
                ..Default::default()
            }
        );
    }
}

#[test]
fn a_read_only_disk_is_read_only() {
    let options = Options { read_only: true, ..Options::default() };
    let mut device = Device::start(&options, ALL | F_RO);
    assert_ne!(device.offered & F_RO, 0);
    let mut queue = Queue::set_up(&mut device, 0, 16, ALL);
    let memory = device.memory.clone();
    assert_eq!(queue.request(&memory, T_OUT, 0, &[out(DATA, 512)]), (1, 1));
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
    assert_eq!(queue.request(&memory, T_IN, 0, &[into(DATA, 512)]), (0, 513));
    assert_eq!(device.image_sectors(0, 1), pattern(0));
    let stats = device.stats();
    assert_eq!((stats.reads_completed, stats.writes_completed), (1, 0));
    assert_eq!((stats.flushes_completed, stats.io_errors), (1, 1));
}

#[test]
fn the_configuration_space_says_what_the_disk_is() {
    let (mut device, _queue) = rig(ALL);
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = device.front.get_config(0, 60, flags, &[0; 60]).expect("config");
    assert_eq!(config[..8], 2048u64.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    let (_, tail) = device.front.get_config(20, 4, flags, &[0; 4]).expect("config");
    assert_eq!(tail, 512u32.to_le_bytes());
    let (_, beyond) = device.front.get_config(57, 199, flags, &[0; 199]).expect("config");
    assert_eq!(beyond, [0; 199]);
    device.front.set_config(0, flags, &[1]).expect_err("the capacity is not writable");
    device.front.set_config(32, flags, &[1, 0]).expect_err("nor what is behind the cache mode");
    assert_eq!(device.front.get_queue_num().expect("and it goes on"), 1);
}

/// Discard and write-zeroes belong to features, in segments of which none is obeyed
/// unless all are good.
#[test]
fn ranges_are_cleared_where_the_driver_may() {
    const T_DISCARD: u32 = 11;
    const T_WRITE_ZEROES: u32 = 13;
    let segment = |device: &Device, n: u64, sector: u64, count: u32| {
        let at = DATA + 16 * n;
        device.memory.write_obj(sector, GuestAddress(at)).expect("sector");
        device.memory.write_obj(u64::from(count), GuestAddress(at + 8)).expect("count, flags");
    };
    let (device, mut queue) = rig(ALL);
    let memory = device.memory.clone();
    segment(&device, 0, 8, 8);
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        assert_eq!(queue.request(&memory, kind, 0, &[out(DATA, 16)]), (2, 1));
    }
    for (kind, feature) in [(T_DISCARD, 13), (T_WRITE_ZEROES, 14)] {
        let (device, mut queue) = rig(ALL | 1 << feature);
        let memory = device.memory.clone();
        segment(&device, 0, 8, 8);
        segment(&device, 1, 2047, 2);
        let request = |queue: &mut Queue, data: &[_]| queue.request(&memory, kind, 0, data).0;
        assert_eq!(request(&mut queue, &[out(DATA, 32)]), 1, "beyond the end");
        assert_eq!(request(&mut queue, &[out(DATA, 15)]), 1, "not a whole segment");
        assert_eq!(request(&mut queue, &[into(DATA, 16)]), 1, "the wrong direction");
        assert_eq!(request(&mut queue, &[]), 1, "nothing");
        assert_eq!(device.image_sectors(8, 1), pattern(8), "a refused request cleared");
        segment(&device, 1, 2047, 1);
        assert_eq!(request(&mut queue, &[out(DATA, 5), out(DATA + 5, 27)]), 0);
        assert_eq!(device.image_sectors(8, 8), [0; 8 * 512]);
        assert_eq!(device.image_sectors(2047, 1), [0; 512]);
        assert_eq!(device.image_sectors(7, 1), pattern(7));
        assert_eq!(device.image_sectors(16, 1), pattern(16));
    }
}

#[test]
fn the_cache_mode_changes_while_a_ring_runs() {
    let (mut device, mut queue) = rig(ALL | 1 << 11);
    let memory = device.memory.clone();
    let flags = VhostUserConfigFlags::empty();
    for mode in [0, 1, 0] {
        device.front.set_config(32, VhostUserConfigFlags::WRITABLE, &[mode]).expect("set");
        let (_, found) = device.front.get_config(32, 1, flags, &[0]).expect("config");
        assert_eq!(found, [mode]);
        assert_eq!(queue.request(&memory, T_OUT, 1, &[out(DATA, 512)]), (0, 1));
        assert_eq!(queue.request(&memory, T_IN, 1, &[into(DATA, 512)]), (0, 513));
    }
}

#[test]
fn interrupts_are_raised_and_suppressed() {
    // Without EVENT_IDX: the flag in the available ring.
    let (device, mut queue) = rig(BASIC);
    let memory = device.memory.clone();
    queue.request(&memory, T_FLUSH, 0, &[]);
    assert!(queue.interrupted(PATIENCE));
    memory.write_obj(1u16, GuestAddress(queue.base + 0x2000)).expect("flags");
    queue.request(&memory, T_FLUSH, 0, &[]);
    assert!(!queue.interrupted(Duration::from_millis(50)));

    // With it: once per batch, and only when the index asked for is passed.
    let (device, mut queue) = rig(ALL);
    let memory = device.memory.clone();
    queue.set_used_event(&memory, 0);
    queue.request(&memory, T_FLUSH, 0, &[]);
    assert!(queue.interrupted(PATIENCE));
    queue.set_used_event(&memory, 2);
    queue.request(&memory, T_FLUSH, 0, &[]);
    assert!(!queue.interrupted(Duration::from_millis(50)));
    queue.request(&memory, T_FLUSH, 0, &[]);
    assert!(queue.interrupted(PATIENCE));
}

/// One, but where the worker got no CPU for so long that what is there is announced at once.
#[test]
fn a_batch_is_answered_with_one_interrupt() {
    const BATCHES: u64 = 25;
    let (device, mut queue) = rig(BASIC | F_INDIRECT);
    let memory = device.memory.clone();
    let mut interrupts = 0;
    for batch in 0..BATCHES {
        let from = queue.avail;
        for n in 0..8 {
            let [header, status] = queue.header(&memory, n, T_IN, batch + n);
            queue.place(&memory, &[header, into(DATA + n * 512, 512), status]);
        }
        queue.announce(&memory);
        queue.kick(&memory, from);
        for _ in 0..8 {
            queue.next_used(&memory).expect("an answer");
        }
        for n in 0..8 {
            assert_eq!(queue.status(&memory, n), 0);
            assert_eq!(bytes(&device, DATA + n * 512, 512), pattern(batch + n));
        }
        std::thread::sleep(Duration::from_millis(2));
        interrupts += queue.call.read().unwrap_or(0);
    }
    assert!((1..4 * BATCHES).contains(&interrupts), "{interrupts} for {BATCHES} batches of 8");
}

#[test]
fn a_polling_device_needs_no_kick() {
    for features in [BASIC, ALL] {
        let options = Options { poll_us: 3_000_000, ..Options::default() };
        let mut device = Device::start(&options, features);
        let mut queue = Queue::set_up(&mut device, 0, 16, features);
        let memory = device.memory.clone();
        assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
        // Fewer than it takes to find that CPUs are short, which they may well be here.
        for n in 0..25 {
            let [header, status] = queue.header(&memory, 0, T_IN, n);
            let from = queue.avail;
            queue.add(&memory, &[header, into(DATA, 512), status]);
            assert!(!queue.kick(&memory, from), "kicks are suppressed while it polls");
            queue.next_used(&memory).expect("an answer");
            assert_eq!(bytes(&device, DATA, 512), pattern(n));
        }
        // It can be stopped although it polls.
        device.front.get_vring_base(0).expect("base");
    }
}

#[test]
fn a_ring_stops_and_goes_on_where_it_was() {
    let (mut device, mut queue) = rig(ALL);
    let memory = device.memory.clone();
    for n in 0..40 {
        assert_eq!(queue.request(&memory, T_IN, n, &[into(DATA, 512)]), (0, 513));
    }
    assert_eq!(device.front.get_vring_base(0).expect("base"), 40);
    // Kicked or not, a stopped ring is left alone.
    let [header, status] = queue.header(&memory, 1, T_IN, 5);
    queue.add(&memory, &[header, into(DATA, 512), status]);
    queue.kick.write(1).expect("kick");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(queue.used_index(&memory), 40);
    assert_eq!(device.front.get_vring_base(0).expect("again"), 40);
    // It looks at what is there when it starts, without a kick.
    queue.kick.read().expect("take the kick back");
    queue.connect(&mut device, 40);
    queue.next_used(&memory).expect("an answer");
    assert_eq!(bytes(&device, DATA, 512), pattern(5));
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
    // Disabled is stopped as well, and enabled goes on.
    device.front.set_vring_enable(0, false).expect("disable");
    let [header, status] = queue.header(&memory, 1, T_IN, 6);
    queue.add(&memory, &[header, into(DATA, 512), status]);
    queue.kick.write(1).expect("kick");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(queue.used_index(&memory), 42);
    device.front.set_vring_enable(0, true).expect("enable");
    queue.next_used(&memory).expect("an answer");
    assert_eq!(bytes(&device, DATA, 512), pattern(6));
}

#[test]
fn stopping_under_load_loses_and_repeats_nothing() {
    const WRITES: u32 = 10;
    let mut device = Device::start(&Options::default(), BASIC);
    let mut queue = Queue::set_up(&mut device, 0, 128, F_INDIRECT);
    let memory = device.memory.clone();
    let mut written = vec![None; 2000];
    let mut partial = 0;
    // Until it was caught in the middle of a batch a few times.
    for round in 0..1000u32 {
        let from = queue.avail;
        for n in 0..WRITES {
            let (tag, at) = (round * WRITES + n, DATA + u64::from(n) * 512);
            let sector = tag as usize % written.len();
            let [header, status] = queue.header(&memory, n.into(), T_OUT, sector as u64);
            memory.write_obj(tag, GuestAddress(at)).expect("tag");
            queue.add(&memory, &[header, out(at, 512), status]);
            written[sector] = Some(tag);
            // A slow one after each, so that there is a middle to stop in.
            let [header, status] = queue.header(&memory, (WRITES + n).into(), T_IN, 0);
            queue.add(&memory, &[header, into(HIGH, 1 << 20), status]);
        }
        queue.kick(&memory, from);
        std::thread::sleep(Duration::from_micros(20) * (round % 50));
        let base = device.front.get_vring_base(0).expect("base") as u16;
        assert_eq!(base, queue.used_index(&memory), "what was taken is answered");
        assert_eq!(queue.call.read().is_ok(), base != from, "and the driver is told");
        // By io_uring a batch is taken before its first request is done.
        let in_the_middle = base != queue.avail || engine_under_test() == EngineKind::IoUring;
        partial += u32::from(base != from && in_the_middle);
        queue.connect(&mut device, base);
        // Answers come in any order.
        let answer = |_| queue.next_used(&memory).expect("an answer").1;
        let reads = (0..2 * WRITES).map(answer).filter(|len| *len == (1 << 20) + 1).count();
        assert_eq!(reads, WRITES as usize);
        // The interrupt for the rest comes behind its used entries.
        device.front.get_vring_base(0).expect("base");
        let _ = queue.call.read();
        queue.connect(&mut device, queue.avail);
        if partial == 5 {
            break;
        }
    }
    assert_eq!(partial, 5, "stops came in the middle of batches");
    for (sector, tag) in written.iter().enumerate() {
        if let Some(tag) = tag {
            assert_eq!(device.image_sectors(sector as u64, 1)[..4], tag.to_le_bytes());
        }
    }
}

#[test]
fn descriptors_and_memory_are_replaced_while_a_ring_runs() {
    let (device, mut queue) = rig(ALL);
    let memory = device.memory.clone();
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
    queue.interrupted(PATIENCE);
    queue.call = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    device.front.set_vring_call(0, &queue.call).expect("call");
    assert!(queue.interrupted(PATIENCE), "one for whatever was missed");
    queue.kick = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    device.front.set_vring_kick(0, &queue.kick).expect("kick");
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
    device.set_memory();
    assert_eq!(queue.request(&memory, T_IN, 3, &[into(HIGH, 512)]), (0, 513));
    assert_eq!(bytes(&device, HIGH, 512), pattern(3));
    // A table without the ring stops it, and says so; the right one brings it back.
    let mut regions = device.regions();
    regions.remove(0);
    device.front.set_mem_table(&regions).expect_err("the ring is outside");
    device.set_memory();
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
}

#[test]
fn queues_are_independent() {
    let options = Options { queues: 3, ..Options::default() };
    let mut device = Device::start(&options, ALL);
    assert_eq!(device.front.get_queue_num().expect("queues"), 3);
    let memory = device.memory.clone();
    let mut queues: Vec<Queue> = (0..3).map(|i| Queue::set_up(&mut device, i, 16, ALL)).collect();
    for round in 0..50 {
        for (i, queue) in queues.iter_mut().enumerate() {
            let at = DATA + 0x1000 * i as u64;
            let sector = round * 3 + i as u64;
            assert_eq!(queue.request(&memory, T_IN, sector, &[into(at, 512)]), (0, 513));
            assert_eq!(bytes(&device, at, 512), pattern(sector));
        }
    }
    device.front.get_vring_base(1).expect("stop one");
    assert_eq!(queues[2].request(&memory, T_FLUSH, 0, &[]), (0, 1));
    assert_eq!(device.stats().reads_completed, 150);
}

#[test]
fn a_reset_device_starts_over() {
    let (mut device, mut queue) = rig(ALL);
    let memory = device.memory.clone();
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
    device.front.reset_device().expect("reset");
    memory.write_slice(&[0; 0x4000], GuestAddress(0)).expect("clear the rings");
    device.negotiate(BASIC);
    let mut queue = Queue::set_up(&mut device, 0, 8, BASIC);
    assert_eq!(queue.request(&memory, T_IN, 1, &[into(DATA, 512)]), (0, 513));
    let stats = device.stats();
    let counted = (stats.reads_completed, stats.flushes_completed);
    assert_eq!(counted, (1, 1), "counters outlive a reset");
}

#[test]
fn a_broken_ring_is_stopped_and_the_device_lives() {
    let options = Options { queues: 2, ..Options::default() };
    let mut device = Device::start(&options, ALL);
    let memory = device.memory.clone();
    let mut bad = Queue::set_up(&mut device, 0, 16, ALL);
    let mut good = Queue::set_up(&mut device, 1, 16, ALL);
    assert_eq!(bad.request(&memory, T_FLUSH, 0, &[]), (0, 1));
    memory.write_obj(500u16, GuestAddress(bad.base + 0x2002)).expect("avail idx");
    bad.kick.write(1).expect("kick");
    let end = Instant::now() + PATIENCE;
    while bad.err.read().is_err() {
        assert!(Instant::now() < end, "the front end is told");
    }
    bad.kick.write(1).expect("later kicks are ignored");
    std::thread::sleep(Duration::from_millis(20));
    assert!(bad.err.read().is_err(), "told once");
    assert_eq!(bad.used_index(&memory), 1);
    assert_eq!(good.request(&memory, T_IN, 1, &[into(DATA, 512)]), (0, 513));
    // Taken back and repaired, it works again.
    assert_eq!(device.front.get_vring_base(0).expect("base"), 1);
    bad.avail = 1;
    memory.write_obj(1u16, GuestAddress(bad.base + 0x2002)).expect("avail idx");
    bad.connect(&mut device, 1);
    assert_eq!(bad.request(&memory, T_FLUSH, 0, &[]), (0, 1));
}

#[test]
fn unanswerable_chains_come_back_empty() {
    let (device, mut queue) = rig(BASIC);
    let memory = device.memory.clone();
    // A loop, a bad link, a chain without a status, a table that is not one.
    let chains: [&[(u64, u32, u16, u16)]; 5] = [
        &[(DATA, 16, 1, 0)],
        &[(DATA, 16, 1, 99)],
        &[(DATA, 16, 0, 0)],
        &[(DATA, 17, 4, 0)],
        &[(DATA, 16, 1, 1), (u64::MAX - 7, 16, 2, 0)],
    ];
    for (i, chain) in chains.iter().enumerate() {
        for (number, (address, len, flags, next)) in chain.iter().enumerate() {
            queue.descriptor(&memory, queue.base, number as u16, *address, *len, *flags, *next);
        }
        let from = queue.avail;
        queue.publish(&memory, 0);
        queue.kick(&memory, from);
        assert_eq!(queue.next_used(&memory), Some((0, 0)));
        assert_eq!(device.stats().io_errors, i as u64 + 1);
    }
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
}

#[test]
fn bad_messages_are_refused_in_their_acknowledgement() {
    let mut device = Device::start(&Options::default(), ALL);
    let queue = Queue::new(0, 16, ALL);
    let front = &device.front;
    front.set_features(1 << 60).expect_err("not offered");
    front.set_features(ALL | 1 << 30).expect("offered");
    for num in [0, 3, 512, 0x8000] {
        front.set_vring_num(0, num).expect_err("not a size");
    }
    let event = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    // An fd that cannot be waited for, where a kick is expected.
    let file = tempfile::tempfile().expect("file");
    #[allow(unsafe_code)] // the interface has no other way to make the mistake
    // SAFETY: the fd is owned by nobody else; that it is no eventfd is the point.
    let not_an_event = unsafe { EventFd::from_raw_fd(file.into_raw_fd()) };
    queue.connect(&mut device, 0);
    let front = &device.front;
    front.set_vring_num(0, 16).expect_err("the ring runs");
    front.set_vring_addr(0, &queue.config()).expect_err("the ring runs");
    front.set_vring_base(0, 3).expect_err("the ring runs");
    front.set_features(BASIC | 1 << 30).expect_err("the ring runs");
    front.set_vring_kick(0, &not_an_event).expect_err("no eventfd");
    front.set_vring_kick(0, &queue.kick).expect("and back");
    front.set_vring_call(0, &event).expect("call");
    let mut queue = queue;
    let memory = device.memory.clone();
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));

    device.front.get_vring_base(0).expect("stop");
    let addresses = |change: fn(&mut VringConfigData)| {
        let mut config = queue.config();
        change(&mut config);
        config
    };
    let wrong: [fn(&mut VringConfigData); 4] = [
        |c| c.desc_table_addr = USER - 16,
        |c| c.desc_table_addr = USER + REGION - 16,
        |c| c.avail_ring_addr = USER + REGION,
        |c| c.used_ring_addr = u64::MAX - 3,
    ];
    for change in wrong {
        device.front.set_vring_addr(0, &addresses(change)).expect("nothing starts yet");
        device.front.set_vring_kick(0, &queue.kick).expect_err("does not start");
        device.front.get_vring_base(0).expect("forget the kick");
    }
    device.front.get_vring_base(0).expect("stop");
    device.front.set_vring_addr(0, &queue.config()).expect("good addresses");
    device.front.set_vring_kick(0, &queue.kick).expect("starts");
    assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
}

#[test]
fn a_refusal_that_nobody_is_told_of_ends_the_device() {
    let (mut device, _queue) = rig(ALL);
    device.front.get_vring_base(0).expect("stop");
    device.front.set_hdr_flags(VhostUserHeaderFlag::empty());
    device.front.set_vring_num(0, 3).expect("sent, no more is known");
    // Whoever asks for less must not take the next success for this one's too.
    device.front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    device.front.set_vring_base(0, 0).expect_err("the connection has ended");
    assert!(matches!(device.join(), Err(BlkError::FrontEnd(_))));
}

#[test]
fn a_malformed_message_ends_the_device() {
    let (mut device, queue) = rig(ALL);
    device.front.get_vring_base(0).expect("stop");
    // The standard's alignment; there is no answer to a message that breaks it.
    let config =
        VringConfigData { used_ring_addr: queue.config().used_ring_addr + 2, ..queue.config() };
    device.front.set_vring_addr(0, &config).expect_err("misaligned");
    assert!(matches!(device.join(), Err(BlkError::FrontEnd(_))));
}

#[test]
fn memory_that_could_shrink_is_refused() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let (mut device, _socket) = Device::bare(&Options::default());
    device.negotiate(ALL);
    let unsealed = memfd_create(c"unsealed", MFdFlags::MFD_ALLOW_SEALING).expect("memfd");
    nix::unistd::ftruncate(&unsealed, REGION as i64).expect("size");
    let region = |fd: i32, size: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: size,
        userspace_addr: 0,
        mmap_offset: 0,
        mmap_handle: fd,
    };
    device.front.set_mem_table(&[region(unsealed.as_raw_fd(), REGION)]).expect_err("unsealed");
    let ram = device.ram.as_raw_fd();
    device.front.set_mem_table(&[region(ram, 3 * REGION)]).expect_err("too short");
    device.front.set_mem_table(&[region(ram, 2 * REGION)]).expect("sealed and long enough");
}

#[test]
fn either_peer_leaving_ends_the_device() {
    let (mut device, queue) = rig(ALL);
    queue.kick.write(1).expect("kick");
    let front = device.front.clone();
    device.cell = cellblock_wire::Channel::pair().expect("pair").0;
    device.join().expect("the VMM left");
    assert!(front.get_features().is_err());

    let (mut device, socket) = Device::bare(&Options::default());
    socket.shutdown(std::net::Shutdown::Both).expect("shutdown");
    device.join().expect("the front end left");
}

#[test]
fn the_cell_channel_is_answered() {
    let (mut device, _queue) = rig(ALL);
    device.cell.send(&ToCell::Drain { epoch: 9, limit_ms: 0 }, &[]).expect("ask");
    let answer = device.cell.recv_timeout::<FromCell>(PATIENCE).expect("answer").0;
    assert!(matches!(answer, FromCell::Drained { epoch: 9, dropped: 0, .. }));
    device.cell.send(&"not a message", &[]).expect("send");
    device.join().expect_err("garbage ends the device");
}

#[test]
fn prepare_names_what_is_wrong() {
    let image = tempfile::NamedTempFile::new().expect("image");
    image.as_file().set_len(4096).expect("size");
    let open = |read, write, append| {
        let mut options = std::fs::File::options();
        let file = options.read(read).write(write).append(append).open(image.path());
        vec![OwnedFd::from(file.expect("open")), new_counters().expect("page")]
    };
    let good = BlkStart {
        read_only: false,
        size: 4096,
        serial: "x".repeat(20),
        queues: 1,
        poll_us: 0,
        throttle: Default::default(),
        engine: Default::default(),
        failed: false,
        cow: false,
    };
    let prepare = |start: BlkStart, fds: Vec<OwnedFd>| {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("pair");
        prepare(start, fds, ours).map(|_| ()).map_err(|e| e.to_string())
    };
    let rw = || open(true, true, false);
    let ro = || open(true, false, false);
    assert_eq!(prepare(good.clone(), rw()), Ok(()));
    assert_eq!(prepare(BlkStart { read_only: true, ..good.clone() }, ro()), Ok(()));
    let wrong = |start: BlkStart, fds, part: &str| {
        let error = prepare(start, fds).expect_err(part);
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    };
    wrong(good.clone(), vec![], "four with an overlay, not 0");
    wrong(good.clone(), [rw(), rw()].into_iter().flatten().collect(), "not 4");
    wrong(good.clone(), rw().into_iter().rev().collect(), "the page of the counters");
    wrong(BlkStart { size: 0, ..good.clone() }, rw(), "size of 0 bytes");
    wrong(BlkStart { size: 513, ..good.clone() }, rw(), "size of 513 bytes");
    wrong(BlkStart { size: 4608, ..good.clone() }, rw(), "has 4096 bytes where the disk has 4608");
    wrong(BlkStart { serial: "x".repeat(21), ..good.clone() }, rw(), "serial");
    wrong(BlkStart { serial: "\u{e9}".into(), ..good.clone() }, rw(), "serial");
    wrong(BlkStart { queues: 0, ..good.clone() }, rw(), "queues, not 0");
    wrong(BlkStart { queues: 33, ..good.clone() }, rw(), "queues, not 33");
    wrong(good.clone(), ro(), "read-only where the device is for writing");
    wrong(
        BlkStart { read_only: true, ..good.clone() },
        rw(),
        "for writing where the device is read-only",
    );
    wrong(good, open(true, false, true), "open for appending");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Whatever comes on the socket, the device ends or answers; it does not panic.
    #[test]
    fn garbage_on_the_socket_is_survived(
        messages in prop::collection::vec(
            (0u32..50, prop::sample::select(vec![1u32, 9, 5]), prop::collection::vec(any::<u8>(), 0..64)),
            1..8,
        ),
    ) {
        let (mut device, mut socket) = Device::bare(&Options { bytes: 4096, ..Options::default() });
        for (code, flags, body) in messages {
            let mut message = Vec::new();
            for word in [code, flags, body.len() as u32] {
                message.extend(word.to_le_bytes());
            }
            message.extend(body);
            if socket.write_all(&message).is_err() {
                break;
            }
        }
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let _ = socket.read_to_end(&mut Vec::new());
        let _ = device.join();
    }
}
