//! What a block cell counts, read from a page shared with it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cellblock_devices::protocol::counters::{
    Beat, CountersPage, MAX_QUEUES, VirtioBlkCountersSnapshot, new_counters,
};
use cellblock_wire::{Access, ShmError};

/// The VMM's view of a disk's counters: figures of a process that may lie, readable
/// whether it serves, is stuck or is dead. The page outlives the process.
#[derive(Debug)]
pub struct BlkCounters {
    fd: OwnedFd,
    page: CountersPage,
    queues: u16,
}

impl BlkCounters {
    /// Makes the page of a disk with so many queues, at most [`MAX_QUEUES`].
    pub fn new(queues: u16) -> Result<BlkCounters, ShmError> {
        let fd = new_counters()?;
        let page = CountersPage::map(&fd, Access::ReadOnly)?;
        Ok(BlkCounters { fd, page, queues: queues.min(MAX_QUEUES) })
    }

    /// For the process that counts.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// How the thread of each queue is.
    pub fn beats(&self) -> Vec<Beat> {
        (0..self.queues).map(|queue| self.page.queue(queue).pulse()).collect()
    }

    /// What each queue shows now.
    pub fn queues(&self) -> Vec<VirtioBlkCountersSnapshot> {
        (0..self.queues).map(|queue| self.page.queue(queue).snapshot()).collect()
    }
}

/// The counters of a disk: the sum over its queues.
pub fn total(queues: &[VirtioBlkCountersSnapshot]) -> VirtioBlkCountersSnapshot {
    let zero = VirtioBlkCountersSnapshot::default();
    queues.iter().fold(zero, |sum, queue| sum.saturating_add(queue))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_shows_the_sum_of_its_queues() {
        let counters = BlkCounters::new(2).expect("page");
        let process = CountersPage::map(counters.fd(), Access::ReadWrite).expect("map");
        process.queue(0).read(512);
        process.queue(1).read(1024);
        process.queue(1).stalled();
        process.queue(2).wrote(4096); // no queue of this disk
        let queues = counters.queues();
        assert_eq!(queues.iter().map(|q| q.bytes_read).collect::<Vec<_>>(), [512, 1024]);
        let want = VirtioBlkCountersSnapshot {
            reads_completed: 2,
            bytes_read: 1536,
            throttled_count: 1,
            currently_throttled_gauge: 1,
            ..Default::default()
        };
        assert_eq!(total(&queues), want);
    }
}
