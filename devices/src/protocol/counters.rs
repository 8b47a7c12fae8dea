//! The page in which a block process counts, for its VMM to read at any time.
//!
//! A sealed memfd made by the VMM, which maps it read-only: it can be read although
//! the process is stuck or dead, and outlives it. A block of its own for each queue,
//! written by that queue's thread alone, so that an increment is a plain load and
//! store and no two threads share a cache line. In front of them the balance of the
//! throttle, written by whoever holds its lock.
//!
//! To the VMM it is hostile memory: a copy is taken with plain loads, and nothing is
//! derived from it but figures for people.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cellblock_wire::{Access, Mapping, ShmError, sealed_memfd};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};

/// Bytes from one block to the next: two cache lines, for what fetches them in pairs.
const BLOCK: usize = 128;
/// Most queues of a block device: as many as a VM has vCPUs.
pub const MAX_QUEUES: u16 = 32;
/// Bytes of the page.
pub const COUNTERS_BYTES: usize = 8192;

const _: () = assert!(BLOCK * (1 + MAX_QUEUES as usize) <= COUNTERS_BYTES);

/// Makes a page with all counters zero.
pub fn new_counters() -> Result<OwnedFd, ShmError> {
    sealed_memfd("cellblock-counters", COUNTERS_BYTES as u64)
}

/// The page, mapped.
#[derive(Clone, Debug)]
pub struct CountersPage(Arc<Mapping>);

impl CountersPage {
    /// Maps a page made by [`new_counters`]: the VMM to read, the process to write.
    pub fn map(fd: impl AsFd, access: Access) -> Result<CountersPage, ShmError> {
        Ok(CountersPage(Arc::new(Mapping::new(fd, COUNTERS_BYTES, access)?)))
    }

    /// The counters of a queue.
    ///
    /// # Panics
    /// If `queue` is not below [`MAX_QUEUES`].
    pub fn queue(&self, queue: u16) -> VirtioBlkCounters {
        assert!(queue < MAX_QUEUES, "a block device has no queue {queue}");
        VirtioBlkCounters { page: self.0.clone(), base: BLOCK * (1 + usize::from(queue)) }
    }

    /// Word `n` of what the throttle keeps.
    pub(crate) fn throttle(&self, n: usize) -> &AtomicU64 {
        debug_assert!(n < BLOCK / 8, "the throttle has {} words", BLOCK / 8);
        self.0.u64(8 * n)
    }
}

/// Words of a queue's block, in the order of the snapshot's fields.
#[derive(Clone, Copy)]
enum Word {
    ReadsCompleted,
    WritesCompleted,
    FlushesCompleted,
    BytesRead,
    BytesWritten,
    ThrottledCount,
    IoErrors,
    CurrentlyThrottledGauge,
    InvalidAvailIdxCount,
    // Not in the snapshot: whether the queue's thread lives,
    Beats,
    Excused,
    // and how many requests were begun and are not answered.
    Begun,
}

/// Counters of one queue of a virtio block device, in the shared page. Cumulative over
/// resets of the device and restarts of its process, but for the gauge.
///
/// Only the queue's worker writes them; a reader may see one request half counted.
#[derive(Clone, Debug)]
pub struct VirtioBlkCounters {
    page: Arc<Mapping>,
    base: usize,
}

impl VirtioBlkCounters {
    fn word(&self, word: Word) -> &AtomicU64 {
        self.page.u64(self.base + 8 * word as usize)
    }

    fn bump(&self, word: Word, by: u64) {
        let word = self.word(word);
        word.store(word.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
    }

    /// A read was answered OK; `bytes` were really read, padding not counted.
    pub fn read(&self, bytes: u64) {
        self.bump(Word::ReadsCompleted, 1);
        self.bump(Word::BytesRead, bytes);
    }

    /// A write of `bytes` was answered OK.
    pub fn wrote(&self, bytes: u64) {
        self.bump(Word::WritesCompleted, 1);
        self.bump(Word::BytesWritten, bytes);
    }

    /// A flush was answered OK, were it on a read-only disk.
    pub fn flushed(&self) {
        self.bump(Word::FlushesCompleted, 1);
    }

    /// A request was answered with an I/O error or could not be answered, or the ring
    /// failed in another way than by its available index. Counts events: one bad request
    /// may count twice.
    pub fn failed(&self) {
        self.bump(Word::IoErrors, 1);
    }

    /// The driver made more chains available than the queue has entries.
    pub fn invalid_avail_idx(&self) {
        self.bump(Word::InvalidAvailIdxCount, 1);
    }

    /// A request found too few tokens and was put back. Counts events: a request that
    /// finds too few again counts again.
    pub fn stalled(&self) {
        self.bump(Word::ThrottledCount, 1);
        self.word(Word::CurrentlyThrottledGauge).store(1, Ordering::Relaxed);
    }

    /// No request of the queue waits for tokens: they were taken, or the ring was.
    pub fn flows(&self) {
        self.word(Word::CurrentlyThrottledGauge).store(0, Ordering::Relaxed);
    }

    /// The thread comes round.
    pub fn beat(&self) {
        self.bump(Word::Beats, 1);
    }

    /// It is going to be where it may stay, or is back: in the hands of the image, or
    /// without a ring.
    pub fn excuse(&self, excused: bool) {
        self.word(Word::Excused).store(excused.into(), Ordering::Relaxed);
    }

    /// How its thread is, by plain loads.
    pub fn pulse(&self) -> Beat {
        let load = |word| self.word(word).load(Ordering::Relaxed);
        Beat { count: load(Word::Beats), excused: load(Word::Excused) != 0 }
    }

    /// A request was begun: it was let through by the throttle, or needs no tokens.
    pub fn begin(&self) {
        self.bump(Word::Begun, 1);
    }

    /// So many requests were answered.
    pub(crate) fn answered(&self, requests: u64) {
        let word = self.word(Word::Begun);
        let left = word.load(Ordering::Relaxed).saturating_sub(requests);
        word.store(left, Ordering::Relaxed);
    }

    /// A record of requests in flight says that there are `requests`: how many of them were
    /// begun under this page, which is not a front end's to write, as a record may be.
    pub(crate) fn resume(&self, requests: u64) -> u64 {
        let word = self.word(Word::Begun);
        let begun = word.load(Ordering::Relaxed).min(requests);
        word.store(begun, Ordering::Relaxed);
        begun
    }

    /// Goes on from `state`, of which no request waits.
    pub fn load(&self, state: &VirtioBlkCountersSnapshot) {
        let store = |word, value| self.word(word).store(value, Ordering::Relaxed);
        store(Word::ReadsCompleted, state.reads_completed);
        store(Word::WritesCompleted, state.writes_completed);
        store(Word::FlushesCompleted, state.flushes_completed);
        store(Word::BytesRead, state.bytes_read);
        store(Word::BytesWritten, state.bytes_written);
        store(Word::ThrottledCount, state.throttled_count);
        store(Word::IoErrors, state.io_errors);
        store(Word::CurrentlyThrottledGauge, 0);
        store(Word::InvalidAvailIdxCount, state.invalid_avail_idx_count);
    }

    /// What the counters show now, by plain loads: the page may be hostile, or its writer
    /// gone.
    pub fn snapshot(&self) -> VirtioBlkCountersSnapshot {
        let load = |word| self.word(word).load(Ordering::Relaxed);
        VirtioBlkCountersSnapshot {
            reads_completed: load(Word::ReadsCompleted),
            writes_completed: load(Word::WritesCompleted),
            flushes_completed: load(Word::FlushesCompleted),
            bytes_read: load(Word::BytesRead),
            bytes_written: load(Word::BytesWritten),
            throttled_count: load(Word::ThrottledCount),
            io_errors: load(Word::IoErrors),
            currently_throttled_gauge: load(Word::CurrentlyThrottledGauge).min(1),
            invalid_avail_idx_count: load(Word::InvalidAvailIdxCount),
        }
    }
}

/// A sign of life of a queue's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Another number each time that it comes round: for new requests, for a doorbell.
    pub count: u64,
    /// It need not come round now.
    pub excused: bool,
}

/// Counters of a virtio block device, or of one of its queues, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VirtioBlkCountersSnapshot {
    /// Reads answered OK.
    pub reads_completed: u64,
    /// Writes answered OK.
    pub writes_completed: u64,
    /// Flushes answered OK, those of a read-only disk among them.
    pub flushes_completed: u64,
    /// Bytes really read by the reads counted.
    pub bytes_read: u64,
    /// Bytes written by the writes counted.
    pub bytes_written: u64,
    /// How often a request was put back for want of tokens.
    pub throttled_count: u64,
    /// Requests answered with an I/O error, and failures of the ring.
    pub io_errors: u64,
    /// Queues of which a request waits for tokens now.
    pub currently_throttled_gauge: u64,
    /// How often a driver's available index was more than the queue size ahead.
    pub invalid_avail_idx_count: u64,
}

impl VirtioBlkCountersSnapshot {
    /// The sum of two, which stays at the most a field can say.
    #[must_use]
    pub fn saturating_add(&self, other: &Self) -> Self {
        let add = |field: fn(&Self) -> u64| field(self).saturating_add(field(other));
        Self {
            reads_completed: add(|c| c.reads_completed),
            writes_completed: add(|c| c.writes_completed),
            flushes_completed: add(|c| c.flushes_completed),
            bytes_read: add(|c| c.bytes_read),
            bytes_written: add(|c| c.bytes_written),
            throttled_count: add(|c| c.throttled_count),
            io_errors: add(|c| c.io_errors),
            currently_throttled_gauge: add(|c| c.currently_throttled_gauge),
            invalid_avail_idx_count: add(|c| c.invalid_avail_idx_count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Snapshot = VirtioBlkCountersSnapshot;

    fn page() -> (CountersPage, CountersPage) {
        let fd = new_counters().expect("page");
        let map = |access| CountersPage::map(&fd, access).expect("map");
        (map(Access::ReadWrite), map(Access::ReadOnly))
    }

    #[test]
    fn each_event_moves_its_own_counters() {
        type Event = fn(&VirtioBlkCounters);
        let none = Snapshot::default;
        let rows: [(Event, Snapshot); 7] = [
            (|c| c.read(512), Snapshot { reads_completed: 1, bytes_read: 512, ..none() }),
            (|c| c.wrote(1024), Snapshot { writes_completed: 1, bytes_written: 1024, ..none() }),
            (|c| c.flushed(), Snapshot { flushes_completed: 1, ..none() }),
            (|c| c.failed(), Snapshot { io_errors: 1, ..none() }),
            (|c| c.invalid_avail_idx(), Snapshot { invalid_avail_idx_count: 1, ..none() }),
            (
                |c| c.stalled(),
                Snapshot { throttled_count: 1, currently_throttled_gauge: 1, ..none() },
            ),
            (
                |c| {
                    c.stalled();
                    c.stalled();
                    c.flows();
                },
                Snapshot { throttled_count: 2, ..none() },
            ),
        ];
        for (event, want) in rows {
            let (writer, reader) = page();
            event(&writer.queue(MAX_QUEUES - 1));
            assert_eq!(reader.queue(MAX_QUEUES - 1).snapshot(), want);
            assert_eq!(reader.queue(0).snapshot(), none());
            assert_eq!(reader.queue(MAX_QUEUES - 2).snapshot(), none());
            assert_eq!(reader.throttle(0).load(Ordering::Relaxed), 0);
        }
    }

    #[test]
    fn hostile_values_are_only_figures() {
        let (writer, reader) = page();
        for word in 0..9 {
            writer.0.u64(BLOCK + 8 * word).store(u64::MAX, Ordering::Relaxed);
        }
        let lie = reader.queue(0).snapshot();
        assert_eq!(lie.currently_throttled_gauge, 1);
        let sum = lie.saturating_add(&lie);
        assert_eq!((sum.bytes_read, sum.currently_throttled_gauge), (u64::MAX, 2));
    }

    #[test]
    fn a_page_is_checked_before_it_is_mapped() {
        let small = sealed_memfd("small", 4096).expect("memfd");
        assert!(matches!(
            CountersPage::map(&small, Access::ReadOnly),
            Err(ShmError::TooSmall { .. })
        ));
    }
}
