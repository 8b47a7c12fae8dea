//! What a queue has done, readable at any time from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::protocol::CellStats;

/// Counters of one queue, cumulative over resets of the device.
///
/// Only the queue's worker writes them, so an increment is a plain load and
/// store; a reader may see one request's counters half updated. Aligned so that
/// two workers never share a cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    errors: AtomicU64,
    poisoned: AtomicU64,
}

fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl Counters {
    /// A read of `bytes` was answered OK.
    pub fn read(&self, bytes: u64) {
        bump(&self.reads, 1);
        bump(&self.bytes_read, bytes);
    }

    /// A write of `bytes` was answered OK.
    pub fn wrote(&self, bytes: u64) {
        bump(&self.writes, 1);
        bump(&self.bytes_written, bytes);
    }

    /// A flush was answered OK.
    pub fn flushed(&self) {
        bump(&self.flushes, 1);
    }

    /// A request was answered with an I/O error, or could not be answered.
    pub fn failed(&self) {
        bump(&self.errors, 1);
    }

    /// The driver broke the ring.
    pub fn poisoned(&self) {
        bump(&self.poisoned, 1);
    }

    /// How often the driver broke this ring.
    #[cfg(test)]
    pub fn poisonings(&self) -> u64 {
        self.poisoned.load(Ordering::Relaxed)
    }
}

/// The sum over all queues.
pub(super) fn sum<'a>(queues: impl Iterator<Item = &'a Counters>) -> CellStats {
    let mut total = [0u64; 6];
    for c in queues {
        let fields = [&c.reads, &c.writes, &c.flushes, &c.bytes_read, &c.bytes_written, &c.errors];
        for (sum, field) in total.iter_mut().zip(fields) {
            *sum = sum.wrapping_add(field.load(Ordering::Relaxed));
        }
    }
    let [reads, writes, flushes, bytes_read, bytes_written, errors] = total;
    CellStats::Blk { reads, writes, flushes, bytes_read, bytes_written, errors }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_moves_its_own_counters_and_queues_are_summed() {
        let queues = [Counters::default(), Counters::default()];
        queues[0].read(512);
        queues[0].flushed();
        queues[1].read(1024);
        queues[1].wrote(4096);
        queues[1].failed();
        queues[1].poisoned();
        assert_eq!(
            sum(queues.iter()),
            CellStats::Blk {
                reads: 2,
                writes: 1,
                flushes: 1,
                bytes_read: 1536,
                bytes_written: 4096,
                errors: 1
            }
        );
        assert_eq!((queues[0].poisonings(), queues[1].poisonings()), (0, 1));
    }
}
