//! The path of a request: ring, parser, engine, on this thread.
//!
//! Checked after every step: each chain that was available has come back in the
//! used ring with a length it can have, or the ring was poisoned for a reason the
//! driver gave; nothing was asked of the image beyond its end.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use vm_memory::{Bytes, GuestAddress};

use super::guest::{self, Guest};
use super::record::Damaged;
use super::{IMAGE, Input, Outcome, check_image, image, ram, start};
use crate::blk::config::SECTOR;
use crate::blk::execute::{Disk, Executor};
use crate::blk::request::{Limits, Operation, Parser, Request};
use crate::blk::ring::{Layout, Ring, RingError};
use crate::blk::view::View;

/// Most chains of a program: one that rewrites its ring by its own reads has no end.
const MAX_CHAINS: u32 = 2048;

/// What a corpus has to reach.
#[cfg(test)]
pub const NAMES: [&str; 15] = [
    "bad head",
    "bad index",
    "bad layout",
    "bad record",
    "clear",
    "failed",
    "flush",
    "get-id",
    "ioerr",
    "read",
    "recovered",
    "request",
    "unanswerable",
    "unsupported",
    "write",
];

/// What outlives an input, as it outlives a guest.
struct Bench {
    guest: Guest,
    disks: [Disk; 2],
    /// A file that ends in the middle of the disk it is to be.
    short: Disk,
    record: Damaged,
}

thread_local! {
    static BENCH: std::cell::RefCell<Bench> = std::cell::RefCell::new(Bench::new());
}

impl Bench {
    fn new() -> Bench {
        let disk = |read_only| {
            let fd = image();
            let fd = if read_only { reopen(&fd) } else { fd };
            crate::blk::open(&start(read_only, 1), fd, None).expect("the image is good")
        };
        let short = disk(false);
        short.file.set_len(IMAGE / 2).expect("cut");
        let (guest, record) = (Guest::new(&ram()), Damaged::new(1));
        Bench { guest, disks: [disk(false), disk(true)], short, record }
    }
}

/// The same file, opened to be read.
pub(super) fn reopen(fd: &std::os::fd::OwnedFd) -> std::os::fd::OwnedFd {
    use std::os::fd::AsRawFd;
    std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("reopen").into()
}

/// Runs one program.
///
/// # Panics
/// If the request path did what it must never do.
pub fn requests(input: &[u8]) -> Outcome {
    let mut outcome = Outcome::new();
    BENCH.with_borrow_mut(|bench| {
        let _ = run(bench, &mut Input(input), &mut outcome);
        bench.disks.iter().for_each(|disk| check_image(&disk.file));
        assert!(bench.short.file.metadata().expect("metadata").len() <= IMAGE, "the short image");
        bench.short.file.set_len(IMAGE / 2).expect("cut");
    });
    outcome
}

fn run(bench: &mut Bench, input: &mut Input<'_>, outcome: &mut Outcome) -> Option<()> {
    let (shape, rules) = (input.u8()?, input.u8()?);
    let bit = |n: u8| rules & 1 << n != 0;
    let disk = if bit(6) { &bench.short } else { &bench.disks[usize::from(bit(0))] };
    let limits = Limits {
        sectors: disk.size / SECTOR,
        read_only: disk.read_only,
        size_max: bit(1).then_some(2048),
        discard: bit(2) && !disk.read_only,
        write_zeroes: bit(3) && !disk.read_only,
        failed: false,
    };
    let mut layout = Layout {
        size: 1 << (shape & 0xf).min(8),
        descriptors: GuestAddress(guest::DESCRIPTORS),
        avail: GuestAddress(guest::AVAIL),
        used: GuestAddress(guest::USED),
        next_avail: if shape & 0x10 != 0 { 0xfffe } else { 0 },
        event_idx: shape & 0x20 != 0,
        record: None,
    };
    if shape & 0x40 != 0 {
        let mut anywhere = || input.u16().map(|code| GuestAddress(guest::address(code)));
        layout.descriptors = anywhere()?;
        layout.avail = anywhere()?;
        layout.used = anywhere()?;
    }
    let record = (shape & 0x80 != 0).then(|| bench.record.map());
    if let Some(records) = &record {
        records.clear();
        bench.record.damage(input)?;
        layout.record = records.queue(0);
    }
    let guest = &mut bench.guest;
    guest.restart(layout.size, layout.avail.0, layout.next_avail);
    let memory = guest.memory().clone();
    let view = View::new(&memory).expect("regions");
    let mut ring = match Ring::new(&view, &layout) {
        Ok(ring) => ring,
        Err(error) => {
            let record = matches!(error, RingError::Record(_));
            *outcome.entry(if record { "bad record" } else { "bad layout" }).or_default() += 1;
            return None;
        }
    };
    let recovered = ring.left();
    if recovered > 0 {
        *outcome.entry("recovered").or_default() += recovered as u64;
    }
    let mut device = Device {
        view: &view,
        layout,
        disk,
        parser: Parser::new(&view, limits),
        engine: Executor::new(bit(4)),
        outcome,
        left: MAX_CHAINS,
    };
    loop {
        let step = input.u8();
        match step.map(|step| step % (guest::STEPS + 1)) {
            Some(step @ ..guest::STEPS) if guest.step(step, input).is_some() => {}
            more => {
                device.serve(&mut ring)?;
                more?;
            }
        }
    }
}

/// The device's side, as the thread of a queue has it.
struct Device<'d, 'm> {
    view: &'m View<'m>,
    layout: Layout,
    disk: &'d Disk,
    parser: Parser<'m>,
    engine: Executor,
    outcome: &'d mut Outcome,
    left: u32,
}

impl<'m> Device<'_, 'm> {
    /// Answers all that is available; none when the ring is not to be used any more.
    fn serve(&mut self, ring: &mut Ring<'m>) -> Option<()> {
        match self.try_serve(ring) {
            Ok(()) => (self.left > 0).then_some(()),
            Err(error) => {
                self.check_poison(ring, &error);
                None
            }
        }
    }

    fn try_serve(&mut self, ring: &mut Ring<'m>) -> Result<(), RingError> {
        loop {
            ring.suppress_kicks()?;
            loop {
                if self.left == 0 {
                    return Ok(());
                }
                let (before, unfinished) = (ring.next_avail(), ring.left());
                let Some(chain) = ring.pop()? else { break };
                self.left -= 1;
                let (new, old) = match unfinished {
                    0 => (1, 0),
                    some => (0, some - 1),
                };
                assert_eq!(ring.next_avail(), before.wrapping_add(new), "one chain at a time");
                assert_eq!(ring.left(), old, "one chain at a time");
                let head = chain.head_index();
                let len = match self.parser.parse(chain) {
                    Ok(request) => answer(&mut self.engine, self.disk, &request, self.outcome),
                    Err(_) => {
                        self.count("unanswerable");
                        0
                    }
                };
                let used = self.load(self.layout.used.0 + 2);
                ring.push_used(head, len)?;
                ring.publish()?;
                self.check_used(used, head, len);
            }
            ring.wants_interrupt()?;
            if !ring.request_kicks()? {
                assert!(!ring.has_work()?, "a chain is left behind");
                if let Some(record) = &self.layout.record {
                    assert!(record.is_at_rest(), "a mark is left behind");
                }
                return Ok(());
            }
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.outcome.entry(what).or_default() += 1;
    }

    fn load(&self, at: u64) -> u16 {
        self.view.load(GuestAddress(at), Ordering::Relaxed).expect("a part of the ring")
    }

    /// The chain is in the used ring, unless the driver put the ring over itself.
    fn check_used(&self, before: u16, head: u16, len: u32) {
        let used = self.layout.used.0;
        assert!(len <= 16 * guest::BYTES as u32 * 16, "a length of {len}");
        if self.layout.used.0 == guest::USED {
            // Where a read has gone over the ring's index, the ring has its own.
            let index = self.load(used + 2);
            let entry = used + 4 + 8 * u64::from(index.wrapping_sub(1) % self.layout.size);
            assert_eq!(u32::from(self.load(entry)), u32::from(head), "after index {before}");
        }
    }

    /// Only a driver that broke the ring has it stopped.
    fn check_poison(&mut self, ring: &Ring<'_>, error: &RingError) {
        if error.is_invalid_avail_idx() {
            let ahead = self.load(self.layout.avail.0 + 2).wrapping_sub(ring.next_avail());
            assert!(ahead > self.layout.size, "{ahead} chains are not too many");
            self.count("bad index");
        } else {
            let slot = ring.next_avail().wrapping_sub(1) % self.layout.size;
            assert_eq!(ring.left(), 0, "a chain that was left unfinished is in the ring");
            let head = self.load(self.layout.avail.0 + 4 + 2 * u64::from(slot));
            assert!(head >= self.layout.size, "head {head} is good: {error:?}");
            self.count("bad head");
        }
    }
}

/// Executes a request and writes its status; the length for the used entry.
fn answer(
    engine: &mut Executor,
    disk: &Disk,
    request: &Request<'_, '_>,
    seen: &mut Outcome,
) -> u32 {
    let mut count = |what| *seen.entry(what).or_default() += 1;
    count("request");
    let mut filled = 0;
    let status = match request.body {
        Ok((operation, data)) => {
            let bytes: u64 = data.iter().map(|slice| slice.len() as u64).sum();
            check_range(disk, operation, bytes);
            for range in request.ranges {
                let end = range.offset.checked_add(range.len).expect("no overflow");
                assert!(end <= disk.size, "{range:?} is beyond the end");
            }
            match engine.execute(disk, operation, data, request.ranges, &mut filled) {
                Ok(()) => {
                    count(match operation {
                        Operation::Read(_) => "read",
                        Operation::Write(_) => "write",
                        Operation::Flush => "flush",
                        Operation::GetId => "get-id",
                        Operation::Clear(_) => "clear",
                    });
                    VIRTIO_BLK_S_OK as u8
                }
                Err(_) => {
                    count("failed");
                    VIRTIO_BLK_S_IOERR as u8
                }
            }
        }
        Err(refusal) => {
            let ioerr = refusal.status() == VIRTIO_BLK_S_IOERR as u8;
            count(if ioerr { "ioerr" } else { "unsupported" });
            refusal.status()
        }
    };
    assert!(filled <= request.writable, "{filled} bytes of {}", request.writable);
    request.status.write_obj(status, 0).expect("the status byte is in memory");
    let last = request.status.read_obj::<u8>(0).expect("the status byte is in memory");
    assert_eq!(last, status);
    u32::try_from(filled + u64::from(filled == request.writable)).unwrap_or(u32::MAX)
}

fn check_range(disk: &Disk, operation: Operation, bytes: u64) {
    if let Operation::Read(offset) | Operation::Write(offset) = operation {
        assert!(bytes > 0 && bytes.is_multiple_of(SECTOR), "{bytes} bytes");
        let end = offset.checked_add(bytes).expect("no overflow");
        assert!(end <= disk.size, "{bytes} bytes at {offset} are beyond the end");
        assert!(!(disk.read_only && matches!(operation, Operation::Write(_))), "read-only");
    }
}
