use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::blk::memory::Memory;
use crate::blk::ring::{Layout, Ring};
use crate::blk::view::View;

const SIZE: u16 = 8;
const DESCRIPTORS: u64 = 0x0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

fn told(queues: u16, entries: u16) -> VhostUserInflight {
    VhostUserInflight::new(record_bytes(queues, entries) as u64, 0, queues, entries)
}

fn memfd(bytes: usize) -> File {
    File::from(sealed_memfd("record", bytes as u64).expect("memfd"))
}

fn records(queues: u16, entries: u16) -> Records {
    let file = memfd(record_bytes(queues, entries));
    Records::map(&told(queues, entries), &file, queues).expect("map")
}

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory")
}

/// The driver's side of a ring whose every descriptor is a request of its own.
struct Driver<'m> {
    memory: &'m Memory,
    avail: u16,
    seen: u16,
    free: Vec<u16>,
    /// How often each request, by its available position, was answered.
    answers: Vec<u32>,
    /// Which request a descriptor carries.
    carries: [usize; SIZE as usize],
}

impl<'m> Driver<'m> {
    fn new(memory: &'m Memory, start: u16) -> Driver<'m> {
        memory.write_obj(start, GuestAddress(AVAIL + 2)).expect("write");
        memory.write_obj(start, GuestAddress(USED + 2)).expect("write");
        let free = (0..SIZE).rev().collect();
        let (avail, seen) = (start, start);
        Driver { memory, avail, seen, free, answers: Vec::new(), carries: [0; SIZE as usize] }
    }

    fn submit(&mut self) {
        let Some(head) = self.free.pop() else { return };
        self.carries[usize::from(head)] = self.answers.len();
        self.answers.push(0);
        let slot = AVAIL + 4 + 2 * u64::from(self.avail % SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).expect("write");
        self.avail = self.avail.wrapping_add(1);
        self.memory.write_obj(self.avail, GuestAddress(AVAIL + 2)).expect("write");
    }

    fn reap(&mut self) {
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).expect("read");
        while self.seen != used {
            let slot = USED + 4 + 8 * u64::from(self.seen % SIZE);
            let head: u32 = self.memory.read_obj(GuestAddress(slot)).expect("read");
            self.answers[self.carries[head as usize]] += 1;
            self.free.push(head as u16);
            self.seen = self.seen.wrapping_add(1);
        }
    }

    fn layout(record: &Record) -> Layout {
        Layout {
            size: SIZE,
            descriptors: GuestAddress(DESCRIPTORS),
            avail: GuestAddress(AVAIL),
            used: GuestAddress(USED),
            next_avail: 0,
            event_idx: false,
            record: Some(record.clone()),
        }
    }
}

/// One thing that happens to a ring.
#[derive(Clone, Copy, Debug)]
enum Step {
    Submit,
    Pop,
    /// Puts the last one taken back.
    PutBack,
    /// Answers one of those held.
    Push(usize),
    /// Shows what was answered.
    Publish,
    Reap,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Submit),
        4 => Just(Step::Pop),
        1 => Just(Step::PutBack),
        4 => (0usize..8).prop_map(Step::Push),
        2 => Just(Step::Publish),
        1 => Just(Step::Reap),
    ]
}

/// Serves `steps` as one process; what it holds is lost with it.
fn serve(driver: &mut Driver<'_>, ring: &mut Ring<'_>, steps: &[Step], order: &mut Vec<u16>) {
    let mut held: Vec<u16> = Vec::new();
    let mut last = None;
    for step in steps {
        match step {
            Step::Submit => driver.submit(),
            Step::Pop => {
                last = ring.pop().expect("a ring that nobody broke").map(|c| c.head_index());
                held.extend(last);
                order.extend(last);
            }
            Step::PutBack => {
                if let Some(head) = last.take() {
                    ring.put_back();
                    held.retain(|other| *other != head);
                }
            }
            Step::Push(n) if !held.is_empty() => {
                let head = held.remove(n % held.len());
                if last == Some(head) {
                    last = None;
                }
                ring.push_used(head, 0).expect("push");
            }
            Step::Push(_) => {}
            Step::Publish => ring.publish().expect("publish"),
            Step::Reap => driver.reap(),
        }
    }
}

/// Runs `lives`, each of which ends at the given place or with its steps, then one that
/// answers everything; every request must then have been answered once.
fn live_and_die(start: u16, lives: &[(Vec<Step>, u32)]) {
    let memory = memory();
    let view = View::new(&memory).expect("view");
    let records = records(1, SIZE);
    let record = records.queue(0).expect("queue");
    let mut driver = Driver::new(&memory, start);
    let mut first = true;
    for (steps, death) in lives {
        let mut layout = Driver::layout(&record);
        if first {
            layout.next_avail = start;
        }
        first = false;
        crash::at(Some(*death));
        let life = catch_unwind(AssertUnwindSafe(|| {
            let mut ring = Ring::new(&view, &layout).expect("ring");
            serve(&mut driver, &mut ring, steps, &mut Vec::new());
        }));
        crash::at(None);
        if let Err(end) = life
            && !end.is::<crash::Died>()
        {
            std::panic::resume_unwind(end);
        }
    }
    let mut layout = Driver::layout(&record);
    if first {
        layout.next_avail = start;
    }
    let mut ring = Ring::new(&view, &layout).expect("ring");
    driver.reap();
    while let Some(chain) = ring.pop().expect("pop") {
        ring.push_used(chain.head_index(), 0).expect("push");
    }
    ring.publish().expect("publish");
    driver.reap();
    assert!(driver.answers.iter().all(|n| *n == 1), "{:?}", driver.answers);
    assert_eq!(ring.next_avail(), driver.avail);
    let past = record.recover(SIZE, driver.seen).expect("recover");
    assert!(past.unfinished.is_empty());
}

/// A death between any two steps of every operation, and another one in the life after it.
#[test]
fn every_answer_appears_once_wherever_a_process_dies() {
    use Step::{Pop, Publish, Push, PutBack, Reap, Submit};
    let story = vec![
        Submit,
        Submit,
        Submit,
        Submit,
        Pop,
        Pop,
        Push(1),
        Publish,
        Pop,
        PutBack,
        Submit,
        Reap,
        Pop,
        Push(1),
        Push(0),
        Publish,
        Submit,
        Submit,
        Pop,
        Push(0),
        Reap,
        Publish,
        Pop,
    ];
    // The pops write at 2 places, the pushes at 1, publishing at 3 and 1 a request, putting
    // back at 1, each start at some.
    for first in 0..60 {
        for second in 0..30 {
            live_and_die(0xfffd, &[(story.clone(), first), (story.clone(), second)]);
        }
    }
}

/// A batch behind a request that stays in flight, and deaths while its marks are cleared and
/// while what they left is read.
#[test]
fn a_batch_is_forgotten_once_and_nothing_beside_it() {
    use Step::{Pop, Publish, Push, Submit};
    let story: Vec<Step> =
        [vec![Submit; 6], vec![Pop; 5], vec![Push(1); 3], vec![Publish]].concat();
    let idle = vec![Pop; 6];
    for first in 0..40 {
        for second in 0..20 {
            for third in [0, 1, 2, 3, 5, 8, 100] {
                let lives = [(story.clone(), first), (idle.clone(), second), (idle.clone(), third)];
                live_and_die(3, &lives);
            }
        }
    }
}

proptest! {
    /// Any stories, any deaths.
    #[test]
    fn any_lives_and_deaths_answer_once(
        start in prop_oneof![Just(0u16), any::<u16>()],
        lives in prop::collection::vec((prop::collection::vec(step(), 0..40), 0u32..120), 0..6),
    ) {
        live_and_die(start, &lives);
    }

    /// A record with anything in it is refused, or gives a ring that stays within bounds.
    #[test]
    fn a_hostile_record_is_bounded(
        words in prop::collection::vec(
            prop_oneof![
                3 => Just(0u64),
                3 => Just(1u64),
                1 => any::<u64>(),
                1 => (any::<u16>(), any::<u16>()).prop_map(|(head, used)| Header {
                    version: VERSION, entries: SIZE, last_head: head % 10, used: used % 12,
                }.pack()),
            ],
            2 * (1 + usize::from(SIZE)),
        ),
        header in any::<bool>(),
        used in 0u16..12,
        avail in 0u16..24,
    ) {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let records = records(1, SIZE);
        let record = records.queue(0).expect("queue");
        for (n, word) in words.iter().enumerate() {
            record.word(8 * n).store(*word, Ordering::Relaxed);
        }
        if header {
            let good = Header { version: VERSION, entries: SIZE, last_head: 3, used: 2 };
            record.word(8).store(good.pack(), Ordering::Relaxed);
        }
        memory.write_obj(used, GuestAddress(USED + 2)).expect("write");
        memory.write_obj(avail, GuestAddress(AVAIL + 2)).expect("write");
        let Ok(mut ring) = Ring::new(&view, &Driver::layout(&record)) else { return Ok(()) };
        for _ in 0..3 * SIZE {
            let Ok(Some(chain)) = ring.pop() else { break };
            prop_assert!(chain.head_index() < SIZE);
            ring.push_used(chain.head_index(), 0).expect("push");
            ring.publish().expect("publish");
        }
        // Whatever was there, a ring that was served under it can be again.
        if ring.pop().is_ok() {
            let used: u16 = memory.read_obj(GuestAddress(USED + 2)).expect("read");
            prop_assert!(record.recover(SIZE, used).is_ok());
        }
    }
}

#[test]
fn what_was_left_comes_first_and_in_its_order() {
    let memory = memory();
    let view = View::new(&memory).expect("view");
    let record = records(1, SIZE).queue(0).expect("queue");
    let mut driver = Driver::new(&memory, 0);
    let heads = |ring: &mut Ring<'_>| -> Vec<u16> {
        std::iter::from_fn(|| ring.pop().expect("pop")).map(|c| c.head_index()).collect()
    };
    (0..5).for_each(|_| driver.submit());
    let mut ring = Ring::new(&view, &Driver::layout(&record)).expect("ring");
    assert_eq!(heads(&mut ring), [0, 1, 2, 3, 4]);
    ring.push_used(1, 0).expect("push");
    ring.push_used(3, 0).expect("push");
    ring.publish().expect("publish");
    driver.reap();
    driver.submit(); // descriptor 3 again, behind the others
    driver.submit();
    let mut ring = Ring::new(&view, &Driver::layout(&record)).expect("ring");
    assert!(ring.has_work().expect("look"));
    assert_eq!(ring.next_avail(), 5);
    assert_eq!(heads(&mut ring), [0, 2, 4, 3, 1]);
    // A second death changes nothing of that.
    let mut ring = Ring::new(&view, &Driver::layout(&record)).expect("ring");
    let first = ring.pop().expect("pop").expect("chain").head_index();
    ring.put_back();
    assert_eq!((first, heads(&mut ring)), (0, vec![0, 2, 4, 3, 1]));
}

#[test]
fn records_of_another_shape_are_refused() {
    let file = memfd(record_bytes(2, 256));
    let map = |told: VhostUserInflight| Records::map(&told, &file, 2).map(|_| ());
    assert!(map(told(2, 256)).is_ok());
    let refused = |told| assert!(matches!(map(told), Err(InflightError::Shape { .. })));
    refused(told(3, 256));
    refused(told(0, 256));
    refused(told(1, 0));
    refused(told(1, 257));
    refused(VhostUserInflight { mmap_offset: 4096, ..told(1, 8) });
    refused(VhostUserInflight { mmap_size: told(2, 256).mmap_size - 1, ..told(2, 256) });
    let small = memfd(record_bytes(2, 256) - 1);
    let map = |file: &File| Records::map(&told(2, 256), file, 2).map(|_| ());
    assert!(matches!(map(&small), Err(InflightError::Map(ShmError::TooSmall { .. }))));
    let plain = tempfile::tempfile().expect("file");
    plain.set_len(1 << 20).expect("size");
    assert!(matches!(map(&plain), Err(InflightError::Map(ShmError::Unsealed))));
}

#[test]
fn headers_that_make_no_sense_are_refused() {
    let record = records(1, SIZE).queue(0).expect("queue");
    let recover = |header: Header, ring, used| {
        record.word(8).store(header.pack(), Ordering::Relaxed);
        record.recover(ring, used).map(|past| past.known)
    };
    let good = Header { version: VERSION, entries: SIZE, last_head: 0, used: 7 };
    assert_eq!(recover(good, SIZE, 7).ok(), Some(true));
    assert_eq!(recover(good, 4, 7).ok(), Some(true), "a ring may be smaller");
    let odd = |header, ring, used| {
        matches!(recover(header, ring, used), Err(InflightError::Header { .. }))
    };
    assert!(odd(Header { version: 2, ..good }, SIZE, 7));
    assert!(odd(Header { entries: 4, ..good }, 4, 7));
    assert!(odd(good, 16, 7));
    assert!(matches!(recover(good, SIZE, 16), Err(InflightError::Used { .. })));
    assert!(matches!(recover(good, SIZE, 6), Err(InflightError::Used { .. })));
    record.mark(6).store(2, Ordering::Relaxed);
    assert!(matches!(recover(good, SIZE, 7), Err(InflightError::Mark { head: 6, mark: 2 })));
    record.mark(6).store(1, Ordering::Relaxed);
    assert!(matches!(recover(good, 4, 7), Err(InflightError::Mark { head: 6, mark: 1 })));
    assert_eq!(recover(good, SIZE, 7).ok(), Some(true));
}

#[test]
fn an_offer_is_sealed_and_as_new() {
    let offer = Offer::new(2).expect("offer");
    let (shape, file) = offer.give(&VhostUserInflight::new(0, 0, 2, 128)).expect("give");
    let records = Records::map(&shape, &file, 2).expect("map");
    let record = records.queue(1).expect("queue");
    assert!(records.queue(2).is_none());
    record.recover(128, 0).expect("begin").tracker.take(5);
    assert!(record.is_used());
    let fd: OwnedFd = file.into();
    assert!(nix::unistd::ftruncate(&fd, 0).is_err());
    offer.give(&VhostUserInflight::new(0, 0, 2, 256)).expect("give again");
    assert!(!record.is_used());
    assert!(offer.give(&VhostUserInflight::new(0, 0, 3, 256)).is_err());
    assert!(offer.give(&VhostUserInflight::new(0, 0, 1, 300)).is_err());
}
