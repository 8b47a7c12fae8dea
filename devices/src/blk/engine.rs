//! What carries requests out on the image.
//!
//! A request that passed every check becomes a [`Job`] and goes to an engine, which has
//! done it at once or gives it back later, in any order. The server only knows the trait:
//!
//! | engine | how | for |
//! |---|---|---|
//! | `sync` | one system call a request, on the queue's thread | images in the page cache |
//! | `uring` | io_uring: many at once, a system call a batch | images that have to be waited for |
//!
//! A flush covers every write whose answer was published before the flush was taken. No
//! engine has to order anything for that: such a write has come back from the kernel by
//! then, and what syncs the file syncs all that came back before it began.

mod uring;

use std::collections::VecDeque;
use std::io;

use super::clear::Range;
use super::execute::{Disk, ExecuteError, Executor};
use super::memory::Slice;
use super::request::Operation;
use super::view::View;
pub use uring::UringError;
pub(super) use uring::{Uring, UringEngine};

/// What is needed of a request to answer it.
#[derive(Debug)]
pub(super) struct Job<'m> {
    /// Of its chain.
    pub head: u16,
    /// Where the status byte goes.
    pub status: Slice<'m>,
    /// Bytes the device may write in front of the status byte.
    pub writable: u64,
    /// What to do.
    pub operation: Operation,
    /// Bytes of its data.
    pub bytes: u64,
}

/// A job that is over.
#[derive(Debug)]
pub(super) struct Done<'m> {
    pub job: Job<'m>,
    /// Bytes from the start of its data that were written to, in case of an error too.
    pub filled: u64,
    pub result: Result<(), ExecuteError>,
}

/// An engine that can no longer do its work: the process cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("talking to io_uring")]
pub(super) struct EngineError(#[source] pub io::Error);

impl EngineError {
    /// There is no room, although there has to be.
    fn full() -> EngineError {
        EngineError(io::Error::other("its queue is full"))
    }
}

/// See the module.
pub(super) trait Engine<'m> {
    /// Begins a job: it is over already, or in flight until [`Engine::reap`] returns it.
    /// Only while there is room for one.
    fn begin(
        &mut self,
        job: Job<'m>,
        data: &[Slice<'m>],
        ranges: &[Range],
    ) -> Result<Option<Done<'m>>, EngineError>;

    /// How many of so many jobs to begin before some are reaped.
    fn together(&self, available: u16) -> u16 {
        available
    }

    /// Whether one more job can be begun before some are reaped.
    fn has_room(&self) -> bool;

    /// Jobs begun and not reaped.
    fn in_flight(&self) -> usize;

    /// Hands the kernel what was begun since the last time.
    fn submit(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    /// A job that is over, if there is one.
    fn reap(&mut self) -> Option<Done<'m>>;

    /// Whether [`Engine::reap`] would return one.
    fn has_done(&mut self) -> bool {
        false
    }

    /// Has the end of a job wake a thread that sleeps; true if one is over already.
    fn arm(&mut self) -> bool {
        false
    }

    /// Takes [`Engine::arm`] back: nobody sleeps.
    fn disarm(&mut self) {}

    /// Sleeps until a job in flight is over; returns at once where none is in flight.
    fn wait(&mut self) -> Result<(), EngineError> {
        Ok(())
    }
}

/// Jobs done before the first of them is answered. The driver looks at the used ring while
/// it waits: every answer takes the ring's memory from the driver's CPU and gives it back,
/// so a few go together. Not many, so that the driver has something to do meanwhile.
const TOGETHER: usize = 8;

/// Does each job on the calling thread before the next.
#[derive(Debug)]
pub(super) struct SyncEngine<'d, 'm> {
    disk: &'d Disk,
    memory: &'m View<'m>,
    executor: Executor,
    over: VecDeque<Done<'m>>,
}

impl<'d, 'm> SyncEngine<'d, 'm> {
    pub fn new(disk: &'d Disk, memory: &'m View<'m>, write_through: bool) -> Self {
        let over = VecDeque::with_capacity(TOGETHER);
        SyncEngine { disk, memory, executor: Executor::new(write_through), over }
    }
}

impl<'m> Engine<'m> for SyncEngine<'_, 'm> {
    #[inline]
    fn begin(
        &mut self,
        job: Job<'m>,
        data: &[Slice<'m>],
        ranges: &[Range],
    ) -> Result<Option<Done<'m>>, EngineError> {
        let mut filled = 0;
        let result = self.executor.execute(self.disk, job.operation, data, ranges, &mut filled);
        if job.operation.fills() {
            data.iter().for_each(|slice| self.memory.has_written(slice));
        }
        self.over.push_back(Done { job, filled, result });
        Ok(None)
    }

    #[inline]
    fn together(&self, available: u16) -> u16 {
        // The driver is busy with some answers while the next are made.
        (available / 4).min(TOGETHER as u16)
    }

    #[inline]
    fn has_room(&self) -> bool {
        self.over.len() < TOGETHER
    }

    fn in_flight(&self) -> usize {
        self.over.len()
    }

    #[inline]
    fn reap(&mut self) -> Option<Done<'m>> {
        self.over.pop_front()
    }
}
