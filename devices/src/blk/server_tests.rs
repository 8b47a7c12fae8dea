use super::*;
use crate::blk::memory::Memory;
use crate::blk::request::Limits;
use crate::blk::ring::Layout;
use crate::protocol::ThrottleLimits;
use crate::protocol::counters::{CountersPage, new_counters};
use crate::protocol::write_log::WriteLog;
use cellblock_wire::Access;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::fs::File;
use std::os::fd::OwnedFd;
use vm_memory::GuestAddress;

const SIZE: u16 = 32;
const DESCRIPTORS: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADERS: u64 = 0x4000;

/// Takes longer over a request than the driver should wait for those before it, and notes what
/// the driver knew when each began.
struct Slow<'a> {
    memory: &'a Memory,
    control: &'a Control,
    call: &'a File,
    seen: Vec<(u16, u64)>,
}

impl<'m> Engine<'m> for &mut Slow<'_> {
    fn begin(
        &mut self,
        job: Job<'m>,
        _: &[Slice<'m>],
        _: &[Range],
    ) -> Result<Option<Done<'m>>, EngineError> {
        let used = self.memory.read_obj::<u16>(GuestAddress(USED + 2)).expect("used index");
        let mut count = [0; 8];
        let told =
            nix::unistd::read(self.call, &mut count).map_or(0, |_| u64::from_ne_bytes(count));
        self.seen.push((used, told));
        if self.seen.len() == usize::from(SIZE) {
            self.control.stop.store(true, Ordering::Relaxed);
        }
        std::thread::sleep(2 * SLOW);
        Ok(Some(Done { job, filled: 0, result: Ok(()) }))
    }

    fn has_room(&self) -> bool {
        true
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn reap(&mut self) -> Option<Done<'m>> {
        None
    }
}

#[test]
fn the_driver_is_told_of_answers_before_others_that_take_long() {
    let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).expect("memory");
    for n in 0..u64::from(SIZE / 2) {
        // Flushes: a header and a status byte.
        let (header, status) = (HEADERS + 32 * n, HEADERS + 32 * n + 16);
        memory.write_obj(4u32, GuestAddress(header)).expect("type");
        let descriptor = |at: u64, address: u64, len: u32, flags: u16, next: u16| {
            let at = DESCRIPTORS + 16 * at;
            memory.write_obj(address, GuestAddress(at)).expect("address");
            let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
            memory.write_obj(rest, GuestAddress(at + 8)).expect("descriptor");
        };
        descriptor(2 * n, header, 16, 1, 2 * n as u16 + 1);
        descriptor(2 * n + 1, status, 1, 2, 0);
    }
    // Each chain is made available twice.
    for n in 0..SIZE {
        let entry = GuestAddress(AVAIL + 4 + 2 * u64::from(n));
        memory.write_obj(2 * (n % (SIZE / 2)), entry).expect("entry");
    }
    memory.write_obj(SIZE, GuestAddress(AVAIL + 2)).expect("avail index");

    let event = || {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        File::from(OwnedFd::from(EventFd::from_flags(flags).expect("eventfd")))
    };
    let control = Arc::new(Control::new().expect("control"));
    let page = CountersPage::map(new_counters().expect("page"), Access::ReadWrite).expect("map");
    let file = tempfile::tempfile().expect("image");
    let (read_only, id, direct, overlay) = (false, Default::default(), None, None);
    let disk = Disk { file, block_size: 512, size: 1 << 20, read_only, id, direct, overlay };
    let queue = Queue {
        number: 0,
        control: control.clone(),
        disk: Arc::new(disk),
        sync_failed: Arc::default(),
        counters: page.queue(0),
        throttle: Arc::new(Throttle::new(&ThrottleLimits::default(), page.clone(), now())),
        poll: Duration::ZERO,
        reported: AtomicBool::new(false),
    };
    let layout = Layout {
        size: SIZE,
        descriptors: GuestAddress(DESCRIPTORS),
        avail: GuestAddress(AVAIL),
        used: GuestAddress(USED),
        next_avail: 0,
        event_idx: false,
        record: None,
    };
    let limits = Limits {
        sectors: 2048,
        read_only: false,
        size_max: None,
        discard: false,
        write_zeroes: false,
        failed: false,
    };
    let call = Arc::new(event());
    let start = Start {
        memory: Arc::new(memory),
        layout,
        limits,
        write_through: false,
        kick: Arc::new(event().into()),
        call: Some(call.clone()),
        err: None,
        interrupt: false,
        broken: false,
    };
    let view = View::new(&start.memory).expect("view");
    let ring = Ring::new(&view, &start.layout).expect("ring");
    let parser = Parser::new(&view, start.limits);
    let mut slow = Slow { memory: &start.memory, control: &control, call: &call, seen: Vec::new() };
    let service = Service::new(ring, parser, &mut slow, 0);
    let end = queue.run(&start, service, &mut 0);
    assert!(matches!(end, Err(End::Stopped)));
    // When a request begins, the driver knows of all before it, or of all but one.
    let seen = slow.seen;
    for (n, (used, _)) in (0..).zip(&seen) {
        assert!(used + 1 >= n, "{seen:?}");
    }
    let told: u64 = seen.iter().map(|(_, told)| told).sum();
    assert!(told >= u64::from(SIZE) / 2, "{seen:?}");
}

/// What is written to guest memory on the way to the driver is marked once it is: the VMM may have
/// taken the marks of before.
#[test]
fn answers_are_marked_when_they_are_written() {
    const STATUS: u64 = 0x5000;
    let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("memory");
    let (log, _fd) = WriteLog::new(0x1_0000).expect("log");
    let view = View::logged(&memory, &log);
    let layout = Layout {
        size: SIZE,
        descriptors: GuestAddress(DESCRIPTORS),
        avail: GuestAddress(AVAIL),
        used: GuestAddress(USED),
        next_avail: 0,
        event_idx: false,
        record: None,
    };
    let mut ring = Ring::new(&view, &layout).expect("ring");
    let taken = || {
        let mut pages = 0;
        log.take(|_, bits| pages |= bits);
        pages
    };
    let used = 1 << (USED >> 12);
    assert_eq!(taken(), used, "before anything is written to it");
    let status = view.slices(GuestAddress(STATUS), 1).next().expect("one").expect("there");
    assert_eq!(answer(&ring, status, 0, 0, 0), 1);
    assert_eq!(taken(), 1 << (STATUS >> 12));
    ring.push_used(0, 1).expect("used");
    ring.publish().expect("published");
    assert_eq!(taken(), used, "the ring");
    ring.suppress_kicks().expect("suppressed");
    assert_eq!(taken(), used, "its flags");
    ring.request_kicks().expect("requested");
    assert_eq!(taken(), used, "its flags again");
}
