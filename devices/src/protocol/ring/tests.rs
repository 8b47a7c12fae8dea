use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cellblock_wire::{Access as Map, Mapping, sealed_memfd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;

const NEVER: fn() -> bool = || false;

struct Ring {
    memory: OwnedFd,
    doorbell: OwnedFd,
    producer: Arc<Producer>,
}

impl Ring {
    fn new(vcpus: usize, limit: Duration) -> Ring {
        let memory = sealed_memfd("ring", RING_BYTES as u64).expect("memfd");
        let doorbell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("eventfd");
        let doorbell = doorbell.as_fd().try_clone_to_owned().expect("dup");
        let mapping = Mapping::new(&memory, RING_BYTES, Map::ReadWrite).expect("map");
        let bell = doorbell.try_clone().expect("dup");
        let producer = Producer::with_limit(mapping, bell, vcpus, limit).expect("producer");
        Ring { memory, doorbell, producer: Arc::new(producer) }
    }

    fn map(&self) -> Mapping {
        Mapping::new(&self.memory, RING_BYTES, Map::ReadWrite).expect("map")
    }

    fn consumer(&self) -> Consumer {
        Consumer::new(self.map(), self.doorbell.try_clone().expect("dup")).expect("consumer")
    }

    /// The page as a hostile device has it.
    fn page(&self) -> Page {
        Page::new(self.map()).expect("page")
    }

    fn fill(&self) {
        for i in 0..SLOTS {
            self.producer.post_write(0, 0, i as u8, &NEVER).expect("room");
        }
    }

    fn rang(&self) -> bool {
        let mut fds = [PollFd::new(self.doorbell.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).expect("poll") == 1
    }

    fn faulted(&self) -> bool {
        let mut fds = [PollFd::new(self.producer.fault_event(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).expect("poll") == 1
    }
}

fn ring() -> Ring {
    Ring::new(1, Producer::LIMIT)
}

/// A device that calls `serve` with every access and sleeps in between.
fn device(
    mut consumer: Consumer,
    spin: Duration,
    stop: Arc<AtomicBool>,
    mut serve: impl FnMut(&mut Consumer, Access) + Send + 'static,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut last = Instant::now();
        while !stop.load(Ordering::SeqCst) {
            while let Some(access) = consumer.next().expect("sound ring") {
                serve(&mut consumer, access);
                last = Instant::now();
            }
            if last.elapsed() < spin {
                continue;
            }
            if consumer.prepare_sleep() {
                let mut fds = [PollFd::new(consumer.as_fd(), PollFlags::POLLIN)];
                // Long, so that a lost wake-up shows as a test that takes for ever.
                let n = poll(&mut fds, PollTimeout::from(3000u16)).expect("poll");
                assert!(n == 1 || stop.load(Ordering::SeqCst), "slept through");
                consumer.awake(n == 1);
            }
        }
    })
}

fn ring_doorbell(fd: &OwnedFd) {
    nix::unistd::write(fd, &1u64.to_ne_bytes()).expect("ring");
}

#[test]
fn accesses_come_out_in_order_and_reads_are_answered() {
    let ring = ring();
    let mut consumer = ring.consumer();
    ring.producer.post_write(0, 3, 0x80, &NEVER).expect("posted");
    let ticket = ring.producer.begin_read(0, 5, &NEVER).expect("begun");
    ring.producer.post_write(0, 0, b'x', &NEVER).expect("posted");
    assert_eq!(ring.producer.pending(), 3);

    let first = consumer.next().expect("sound");
    assert!(matches!(first, Some(Access::Write { offset: 3, value: 0x80 })), "{first:?}");
    let Some(Access::Read { offset: 5, reply }) = consumer.next().expect("sound") else {
        panic!("a read comes second");
    };
    consumer.reply(reply, 0x60);
    assert_eq!(ring.producer.wait_read(0, ticket, &NEVER), Ok(0x60));
    let third = consumer.next().expect("sound");
    assert!(matches!(third, Some(Access::Write { offset: 0, value: b'x' })), "{third:?}");
    assert_eq!(ring.producer.pending(), 1, "not carried out before the next call");
    assert!(consumer.next().expect("sound").is_none());
    assert!(ring.producer.is_idle());
    assert_eq!(ring.producer.counters(), Counters::default());
}

#[test]
fn the_doorbell_rings_only_for_a_sleeper() {
    let ring = ring();
    let mut consumer = ring.consumer();
    ring.producer.post_write(0, 0, 1, &NEVER).expect("posted");
    assert!(!ring.rang());
    assert!(!consumer.prepare_sleep(), "an access waits");
    assert!(consumer.next().expect("sound").is_some());
    assert!(consumer.prepare_sleep());
    ring.producer.post_write(0, 0, 2, &NEVER).expect("posted");
    assert!(ring.rang());
    consumer.awake(true);
    assert!(!ring.rang());
    ring.producer.post_write(0, 0, 3, &NEVER).expect("posted");
    assert!(!ring.rang());
}

#[test]
fn a_successor_goes_on_at_the_first_uncommitted_access() {
    let ring = ring();
    for value in 1..=3 {
        ring.producer.post_write(0, 0, value, &NEVER).expect("posted");
    }
    let mut first = ring.consumer();
    first.next().expect("sound");
    first.next().expect("sound"); // 2 was taken out, and perhaps not carried out
    drop(first);
    let next = ring.consumer().next().expect("sound");
    assert!(matches!(next, Some(Access::Write { value: 2, .. })), "{next:?}");
}

#[test]
fn only_the_own_ticket_is_believed() {
    let ring = Ring::new(2, Duration::from_millis(300));
    let page = ring.page();
    let old = ring.producer.begin_read(0, 5, &NEVER).expect("begun");
    assert_eq!(ring.producer.wait_read(0, old, &|| true), Err(Interrupted));
    let new = ring.producer.begin_read(0, 5, &NEVER).expect("begun");
    // The answer to the first read, and the second's in the slot of another vCPU.
    page.reply(0).store(reply_word(old.0.expect("published"), 7), Ordering::SeqCst);
    page.reply(1).store(reply_word(new.0.expect("published"), 7), Ordering::SeqCst);
    assert_eq!(ring.producer.wait_read(0, new, &|| true), Err(Interrupted));
    page.reply(0).store(reply_word(new.0.expect("published"), 9), Ordering::SeqCst);
    assert_eq!(ring.producer.wait_read(0, new, &|| true), Ok(9), "an answer goes before a kick");
}

#[test]
fn a_kick_reaches_a_waiting_read_and_the_answer_is_not_lost() {
    let ring = ring();
    let stop = Arc::new(AtomicBool::new(false));
    let ticket = ring.producer.begin_read(0, 5, &NEVER).expect("begun");
    let (producer, asked) = (ring.producer.clone(), stop.clone());
    let waiter = thread::spawn(move || {
        let kicked = || asked.load(Ordering::SeqCst);
        let begin = Instant::now();
        let first = producer.wait_read(0, ticket, &kicked);
        let took = begin.elapsed();
        asked.store(false, Ordering::SeqCst);
        (first, took, producer.wait_read(0, ticket, &kicked))
    });
    thread::sleep(Duration::from_millis(120));
    stop.store(true, Ordering::SeqCst);
    ring.producer.kick(0);
    thread::sleep(Duration::from_millis(120));
    let mut consumer = ring.consumer();
    let Some(Access::Read { reply, .. }) = consumer.next().expect("sound") else {
        panic!("the read is still there");
    };
    consumer.reply(reply, 0x42);
    let (first, took, second) = waiter.join().expect("waiter");
    assert_eq!(first, Err(Interrupted));
    assert!(took < Producer::LIMIT / 2, "{took:?}");
    assert_eq!(second, Ok(0x42));
}

/// How long the thread `waiter` takes to return after `act`, smallest of several.
fn fastest(mut once: impl FnMut() -> Duration) -> Duration {
    (0..5).map(|_| once()).min().expect("five")
}

#[test]
fn kicks_and_replies_wake_at_once_not_by_the_slice() {
    for wake in [0, 1, 2, 3, 4] {
        let best = fastest(|| {
            let ring = ring();
            if wake >= 3 {
                ring.fill();
            }
            let (producer, kicked) = (ring.producer.clone(), Arc::new(AtomicBool::new(false)));
            let asked = kicked.clone();
            let waiter = thread::spawn(move || {
                let kicked = || asked.load(Ordering::SeqCst);
                if wake >= 3 {
                    let _ = producer.post_write(0, 0, 1, &kicked);
                } else {
                    let ticket = producer.begin_read(0, 5, &kicked).expect("room");
                    let _ = producer.wait_read(0, ticket, &kicked);
                }
                Instant::now()
            });
            while wake < 3 && ring.producer.is_idle() {
                thread::yield_now();
            }
            // Somewhere in the middle of the first slices.
            thread::sleep(Duration::from_millis(70));
            let begin = Instant::now();
            match wake {
                0 | 4 => {
                    kicked.store(true, Ordering::SeqCst);
                    ring.producer.kick(0);
                }
                1 => ring.producer.set_dead(true),
                2 => {
                    let mut consumer = ring.consumer();
                    let Some(Access::Read { reply, .. }) = consumer.next().expect("sound") else {
                        panic!("a read");
                    };
                    consumer.reply(reply, 1);
                }
                _ => {
                    let mut consumer = ring.consumer();
                    while consumer.next().expect("sound").is_some() {}
                }
            }
            waiter.join().expect("waiter") - begin
        });
        assert!(best < Duration::from_millis(10), "wake-up {wake} took {best:?}");
    }
}

#[test]
fn a_dead_device_reads_as_an_empty_bus() {
    let ring = ring();
    let ticket = ring.producer.begin_read(0, 5, &NEVER).expect("begun");
    ring.producer.set_dead(true);
    assert_eq!(ring.producer.wait_read(0, ticket, &NEVER), Ok(0xff));
    ring.producer.post_write(0, 0, 1, &NEVER).expect("dropped");
    let ticket = ring.producer.begin_read(0, 5, &NEVER).expect("begun");
    assert_eq!(ring.producer.wait_read(0, ticket, &NEVER), Ok(0xff));
    assert_eq!(ring.producer.counters(), Counters { writes: 1, reads: 2 });
    assert!(ring.producer.is_idle() && !ring.faulted());

    // A successor finds the read that was published, and what comes from now on.
    ring.producer.set_dead(false);
    ring.producer.post_write(0, 0, 2, &NEVER).expect("posted");
    let mut consumer = ring.consumer();
    let Some(Access::Read { reply, .. }) = consumer.next().expect("sound") else {
        panic!("the old read");
    };
    consumer.reply(reply, 0);
    let next = consumer.next().expect("sound");
    assert!(matches!(next, Some(Access::Write { value: 2, .. })), "{next:?}");
}

#[test]
fn impossible_heads_condemn_the_device() {
    // (head after 10 writes, believed first, what the device claims then)
    for (honest, claimed) in [(0, 11), (0, u32::MAX), (5, 4), (5, 5 + SLOTS), (10, 1 << 31)] {
        let ring = ring();
        let page = ring.page();
        for i in 0..10 {
            ring.producer.post_write(0, 0, i, &NEVER).expect("posted");
        }
        page.head().store(honest, Ordering::SeqCst);
        assert_eq!(ring.producer.pending(), 10 - honest);
        page.head().store(claimed, Ordering::SeqCst);
        assert_eq!(ring.producer.pending(), 0);
        assert_eq!(ring.producer.fault(), Some(Fault::Index { claimed, from: honest, to: 10 }));
        assert!(ring.faulted());
        let ticket = ring.producer.begin_read(0, 5, &NEVER).expect("begun");
        assert_eq!(ring.producer.wait_read(0, ticket, &NEVER), Ok(0xff));

        ring.producer.set_dead(false);
        assert_eq!((ring.producer.fault(), ring.producer.pending()), (None, 0));
        ring.producer.post_write(0, 0, 99, &NEVER).expect("posted");
        let next = ring.consumer().next().expect("sound");
        assert!(matches!(next, Some(Access::Write { value: 99, .. })), "{next:?}");
    }
}

/// Whoever was looking at the head when the device died does not condemn the successor.
#[test]
fn a_successor_does_not_pay_for_what_the_one_before_claimed() {
    let ring = ring();
    let page = ring.page();
    let (looks, stop) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
    let (producer, of_thread, end) = (ring.producer.clone(), looks.clone(), stop.clone());
    let vcpu = thread::spawn(move || {
        while !end.load(Ordering::SeqCst) {
            producer.pending();
            of_thread.fetch_add(1, Ordering::SeqCst);
        }
    });
    let begun = Instant::now();
    let mut deaths = 0;
    while deaths < 100 || deaths < 20_000 && begun.elapsed() < Duration::from_secs(3) {
        page.head().store(1 << 31, Ordering::SeqCst);
        ring.producer.set_dead(false);
        // The look that was under way is over, and another one done.
        let seen = looks.load(Ordering::SeqCst);
        while looks.load(Ordering::SeqCst).wrapping_sub(seen) < 2 {
            thread::yield_now();
        }
        deaths += 1;
        assert_eq!(ring.producer.fault(), None, "after {deaths} deaths");
        ring.producer.post_write(0, 0, 1, &NEVER).expect("posted");
        assert_eq!(ring.producer.counters().writes, 0, "after {deaths} deaths");
        assert!(ring.consumer().next().expect("sound").is_some());
        page.head().store(page.tail().load(Ordering::SeqCst), Ordering::SeqCst);
    }
    stop.store(true, Ordering::SeqCst);
    vcpu.join().expect("vcpu");
}

#[test]
fn a_writer_at_a_full_ring_finds_a_forged_head_and_does_not_hang() {
    let ring = ring();
    let page = ring.page();
    ring.fill();
    page.head().store(SLOTS + 1, Ordering::SeqCst);
    ring.producer.post_write(0, 0, 1, &NEVER).expect("dropped");
    assert!(matches!(ring.producer.fault(), Some(Fault::Index { .. })));
    assert_eq!(ring.producer.counters().writes, 1);
}

#[test]
fn a_head_that_flickers_cannot_keep_a_vcpu_in_circles() {
    let ring = ring();
    ring.fill();
    let done = Arc::new(AtomicBool::new(false));
    let (page, over) = (ring.page(), done.clone());
    let flicker = thread::spawn(move || {
        while !over.load(Ordering::SeqCst) {
            page.head().store(1, Ordering::SeqCst);
            page.head().store(0, Ordering::SeqCst);
        }
    });
    let begin = Instant::now();
    for _ in 0..100 {
        ring.producer.post_write(0, 0, 1, &NEVER).expect("posted or dropped");
    }
    assert!(begin.elapsed() < Duration::from_secs(2));
    done.store(true, Ordering::SeqCst);
    flicker.join().expect("flicker");
    assert!(ring.producer.fault().is_some());
}

#[test]
fn a_stalled_device_costs_one_limit_then_nothing_until_it_moves() {
    let limit = Duration::from_millis(150);
    let ring = Ring::new(2, limit);
    ring.fill();
    let begin = Instant::now();
    ring.producer.post_write(0, 0, 1, &NEVER).expect("dropped");
    let took = begin.elapsed();
    assert!(took >= limit && took < limit * 3, "{took:?}");
    assert_eq!((ring.producer.fault(), ring.faulted()), (Some(Fault::Stalled), true));
    let begin = Instant::now();
    for _ in 0..100 {
        ring.producer.post_write(0, 0, 1, &NEVER).expect("dropped");
        let ticket = ring.producer.begin_read(1, 5, &NEVER).expect("begun");
        assert_eq!(ring.producer.wait_read(1, ticket, &NEVER), Ok(0xff));
    }
    assert!(begin.elapsed() < limit, "{:?}", begin.elapsed());
    assert_eq!(ring.producer.counters(), Counters { writes: 101, reads: 100 });

    let mut consumer = ring.consumer();
    let mut values = 0;
    while let Some(access) = consumer.next().expect("sound") {
        assert!(matches!(access, Access::Write { .. }));
        values += 1;
    }
    assert_eq!(values, SLOTS, "what was accepted is all there");
    ring.producer.post_write(0, 0, 1, &NEVER).expect("posted");
    assert!(consumer.next().expect("sound").is_some());
    assert_eq!(ring.producer.counters().writes, 101);
}

#[test]
fn a_silent_device_costs_a_read_one_limit_across_kicks() {
    let limit = Duration::from_millis(200);
    let ring = Ring::new(1, limit);
    let ticket = ring.producer.begin_read(0, 5, &NEVER).expect("begun");
    let begin = Instant::now();
    let calls = AtomicU32::new(0);
    let mut interrupted = 0;
    let value = loop {
        // Every second look is a kick.
        let kicked = || calls.fetch_add(1, Ordering::SeqCst) % 2 == 1;
        match ring.producer.wait_read(0, ticket, &kicked) {
            Ok(value) => break value,
            Err(Interrupted) => interrupted += 1,
        }
    };
    assert_eq!(value, 0xff);
    assert!(interrupted >= 2, "{interrupted}");
    assert!(begin.elapsed() >= limit && begin.elapsed() < limit * 3, "{:?}", begin.elapsed());
    assert_eq!(ring.producer.fault(), Some(Fault::Stalled));
}

#[test]
fn the_device_checks_the_page_too() {
    let ring = ring();
    let page = ring.page();
    page.tail().store(SLOTS + 1, Ordering::SeqCst);
    assert_eq!(
        ring.consumer().next().expect_err("too far"),
        Corrupt::Tail { head: 0, tail: SLOTS + 1 }
    );
    page.tail().store(1, Ordering::SeqCst);
    let no_kind = 0x0300_0000;
    let far_vcpu = read_entry(MAX_VCPUS, 5, 1);
    let no_ticket = read_entry(0, 5, 0);
    for entry in [no_kind, far_vcpu, no_ticket] {
        page.entry(0).store(entry, Ordering::SeqCst);
        assert_eq!(ring.consumer().next().expect_err("no access"), Corrupt::Entry(entry));
    }
}

#[test]
fn unfit_memory_and_too_many_vcpus_are_refused() {
    let ring = ring();
    let bell = || ring.doorbell.try_clone().expect("dup");
    let small = sealed_memfd("small", 4096).expect("memfd");
    let small = Mapping::new(&small, 4096, Map::ReadWrite).expect("map");
    assert!(matches!(Producer::new(small, bell(), 1), Err(RingError::Mapping)));
    let fixed = Mapping::new(&ring.memory, RING_BYTES, Map::ReadOnly).expect("map");
    assert!(matches!(Consumer::new(fixed, bell()), Err(RingError::Mapping)));
    let many = Producer::new(ring.map(), bell(), MAX_VCPUS + 1);
    assert!(matches!(many, Err(RingError::TooManyVcpus(65))));
}

/// Four vCPUs, a million accesses, kicks all the time, a device that dozes off.
#[test]
fn stress() {
    const VCPUS: usize = 4;
    const EACH: u32 = 250_000;
    for spin in [Duration::ZERO, Duration::from_micros(50)] {
        let ring = Ring::new(VCPUS, Producer::LIMIT);
        let stop = Arc::new(AtomicBool::new(false));
        // Per vCPU the device keeps what its last write left; a read gives it back, so
        // an answer proves that exactly the writes before it were carried out. The
        // total order is proved by `seen`: what vCPU 0 published before it told
        // vCPU 1 must come out before what vCPU 1 published after it heard.
        let seen = Arc::new(AtomicUsize::new(0));
        let counted = seen.clone();
        let mut registers: HashMap<u8, u8> = HashMap::new();
        let served = device(ring.consumer(), spin, stop.clone(), move |consumer, access| {
            counted.fetch_add(1, Ordering::Relaxed);
            match access {
                Access::Write { offset, value } => {
                    let last = registers.insert(offset, value).unwrap_or(0);
                    assert_eq!(value, last.wrapping_add(1), "order of register {offset}");
                }
                Access::Read { offset, reply } => {
                    let value = registers.get(&offset).copied().unwrap_or(0);
                    consumer.reply(reply, value);
                }
            }
        });
        let kicks: Arc<Vec<AtomicBool>> =
            Arc::new((0..VCPUS).map(|_| AtomicBool::new(false)).collect());
        // Register 100 is written by all vCPUs under a lock of theirs: total order.
        let total = Arc::new(std::sync::Mutex::new(0u8));
        let vcpus: Vec<_> = (0..VCPUS)
            .map(|vcpu| {
                let (producer, kicks, total) =
                    (ring.producer.clone(), kicks.clone(), total.clone());
                thread::spawn(move || {
                    let kicked = || kicks[vcpu].load(Ordering::SeqCst);
                    let (mut value, mut interrupted, mut begun) = (0u8, 0u64, None);
                    let park = || kicks[vcpu].store(false, Ordering::SeqCst);
                    let mut done = 0;
                    while done < EACH {
                        if done % 64 == 63 {
                            let ticket = match begun {
                                Some(ticket) => Ok(ticket),
                                None => producer.begin_read(vcpu, vcpu as u8, &kicked),
                            };
                            let Ok(ticket) = ticket else {
                                interrupted += 1;
                                park();
                                continue;
                            };
                            begun = Some(ticket);
                            let Ok(read) = producer.wait_read(vcpu, ticket, &kicked) else {
                                interrupted += 1;
                                park();
                                continue;
                            };
                            assert_eq!(read, value, "vCPU {vcpu} after {done}");
                            begun = None;
                        } else if done % 64 == 31 {
                            let mut shared = total.lock().expect("lock");
                            let next = shared.wrapping_add(1);
                            while producer.post_write(vcpu, 100, next, &kicked).is_err() {
                                park();
                            }
                            *shared = next;
                        } else {
                            let next = value.wrapping_add(1);
                            if producer.post_write(vcpu, vcpu as u8, next, &kicked).is_err() {
                                interrupted += 1;
                                park();
                                continue;
                            }
                            value = next;
                        }
                        done += 1;
                    }
                    interrupted
                })
            })
            .collect();
        let (producer, kicked, over) = (ring.producer.clone(), kicks.clone(), stop.clone());
        let kicker = thread::spawn(move || {
            for vcpu in (0..VCPUS).cycle() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                kicked[vcpu].store(true, Ordering::SeqCst);
                producer.kick(vcpu);
                thread::sleep(Duration::from_micros(100));
            }
        });
        let interrupted: u64 = vcpus.into_iter().map(|v| v.join().expect("vCPU")).sum();
        while !ring.producer.is_idle() {
            thread::sleep(Duration::from_millis(1));
        }
        stop.store(true, Ordering::SeqCst);
        ring_doorbell(&ring.doorbell);
        served.join().expect("device");
        kicker.join().expect("kicker");
        assert_eq!(seen.load(Ordering::SeqCst), VCPUS * EACH as usize);
        assert_eq!(ring.producer.counters(), Counters::default());
        assert_eq!(ring.producer.fault(), None);
        assert!(interrupted > 0, "no kick ever met a waiting vCPU");
    }
}
