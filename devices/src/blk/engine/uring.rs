//! The engine on io_uring.
//!
//! A queue's thread makes its ring before the process is sealed, with the image as its
//! only file, and has the kernel refuse everything but reads, writes and syncs of that
//! file for as long as the ring lives. Afterwards `io_uring_enter` is all it needs.
#![allow(unsafe_code)] // the kernel is handed raw addresses of guest memory

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use libc::iovec;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Done, Engine, EngineError, Job};
use crate::blk::clear::Range;
use crate::blk::config::QUEUE_SIZE;
use crate::blk::execute::{Disk, ExecuteError, Executor, MAX_IOVECS, fill_iovecs};
use crate::blk::memory::Slice;
use crate::blk::request::Operation;
use crate::blk::turns::Turns;
use crate::blk::view::View;

/// Jobs in flight, at most: a full queue.
const SLOTS: usize = QUEUE_SIZE as usize;
/// The image: of the ring's files, the one that is worked with.
const IMAGE: Fixed = Fixed(0);
/// All that a ring can be asked to do.
const OPERATIONS: [u8; 5] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
];

/// A ring that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum UringError {
    /// The host does not let this process have one.
    #[error(
        "the host's kernel has no io_uring for this process; leave engine=io_uring away, or enable it (sysctl kernel.io_uring_disabled=0, Linux 5.10 or newer)"
    )]
    Unavailable(#[source] io::Error),
    /// It could not be bound to the image and to what it may do.
    #[error("{0}")]
    Register(&'static str, #[source] io::Error),
}

/// A ring, and the event that says that a job is over. Belongs to one thread.
pub(in crate::blk) struct Uring {
    ring: IoUring,
    event: EventFd,
}

impl Uring {
    /// Makes a ring for `disk`, and closes it to everything else.
    ///
    /// The kernel can have requests in flight on a ring whose process is dead: nobody but
    /// it knows when they are over. It lets go of a ring's files after that, so `hold`, the
    /// writing end of a pipe, is one of them: who has the other end sees it close.
    pub fn new(disk: &Disk, hold: Option<&OwnedFd>) -> Result<Uring, UringError> {
        let unavailable = |error: io::Error| match error.raw_os_error() {
            Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => UringError::Unavailable(error),
            _ => UringError::Register("making an io_uring", error),
        };
        let register = |what| move |error| UringError::Register(what, error);
        let ring =
            IoUring::builder().setup_r_disabled().build(SLOTS as u32).map_err(unavailable)?;
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| register("making the event of an io_uring")(e.into()))?;
        let submitter = ring.submitter();
        let files = [Some(disk.file.as_raw_fd()), hold.map(AsRawFd::as_raw_fd)];
        submitter
            .register_files(&files.into_iter().flatten().collect::<Vec<_>>())
            .map_err(register("giving the image to an io_uring"))?;
        submitter
            .register_eventfd(event.as_fd().as_raw_fd())
            .map_err(register("giving an event to an io_uring"))?;
        let fixed = Flags::FIXED_FILE.bits();
        let mut allowed = Vec::from(OPERATIONS.map(Restriction::sqe_op));
        allowed.push(Restriction::sqe_flags_allowed(fixed));
        allowed.push(Restriction::sqe_flags_required(fixed));
        submitter
            .register_restrictions(&mut allowed)
            .map_err(register("restricting an io_uring"))?;
        submitter.register_enable_rings().map_err(register("enabling an io_uring"))?;
        Ok(Uring { ring, event })
    }
}

impl AsFd for Uring {
    /// What becomes readable when a job is over.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").finish_non_exhaustive()
    }
}

/// What the kernel works on.
#[derive(Debug, Default)]
struct Slot<'m> {
    /// None while the slot is free.
    job: Option<Job<'m>>,
    /// Not touched while the job is in flight.
    iovecs: Vec<iovec>,
    /// A share of the disk's turns comes with it.
    has_share: bool,
}

/// Keeps jobs in flight through a [`Uring`]. Dropping it waits for them.
#[derive(Debug)]
pub(in crate::blk) struct UringEngine<'s, 'm> {
    uring: &'s mut Uring,
    disk: &'s Disk,
    memory: &'m View<'m>,
    write_through: bool,
    slots: Vec<Slot<'m>>,
    free: Vec<u16>,
    /// Shares that jobs in flight have.
    shares: usize,
    /// What was over while another job waited for its turn.
    over: VecDeque<Done<'m>>,
    /// For what is not worth a ring, or goes on behind a short transfer.
    executor: Executor,
}

impl<'s, 'm> UringEngine<'s, 'm> {
    pub fn new(
        uring: &'s mut Uring,
        disk: &'s Disk,
        memory: &'m View<'m>,
        write_through: bool,
    ) -> Self {
        let slots = (0..SLOTS).map(|_| Slot::default()).collect();
        let free = (0..QUEUE_SIZE).rev().collect();
        let executor = Executor::new(write_through);
        uring.ring.completion().disable_eventfd();
        UringEngine {
            uring,
            disk,
            memory,
            write_through,
            slots,
            free,
            shares: 0,
            over: VecDeque::new(),
            executor,
        }
    }

    /// The kernel's work for `operation`, over the iovecs of a slot.
    fn entry(&self, operation: Operation, iovecs: &[iovec]) -> Entry {
        let dsync = if self.write_through { libc::RWF_DSYNC } else { 0 };
        let count = iovecs.len() as u32;
        match (operation, iovecs) {
            // One buffer is the common case, and its iovec need not be read again.
            (Operation::Read(at), [one]) => {
                opcode::Read::new(IMAGE, one.iov_base.cast(), one.iov_len as u32).offset(at).build()
            }
            (Operation::Write(at), [one]) => {
                opcode::Write::new(IMAGE, one.iov_base.cast(), one.iov_len as u32)
                    .offset(at)
                    .rw_flags(dsync)
                    .build()
            }
            (Operation::Read(at), _) => {
                opcode::Readv::new(IMAGE, iovecs.as_ptr(), count).offset(at).build()
            }
            (Operation::Write(at), _) => opcode::Writev::new(IMAGE, iovecs.as_ptr(), count)
                .offset(at)
                .rw_flags(dsync)
                .build(),
            // The other operations are for calls.
            _ => opcode::Fsync::new(IMAGE).flags(FsyncFlags::DATASYNC).build(),
        }
    }

    /// Whether a job is done by system calls, here and now: what io_uring has no operation
    /// for, or what has to go over a bounce buffer.
    fn is_for_calls(&self, job: &Job<'m>, data: &[Slice<'m>]) -> bool {
        match job.operation {
            _ if self.disk.overlay.is_some() => true,
            Operation::Read(offset) | Operation::Write(offset) => {
                let direct = self.disk.direct.as_ref();
                data.len() > MAX_IOVECS || direct.is_some_and(|direct| !direct.fits(offset, data))
            }
            Operation::Flush => !self.disk.is_durable(),
            Operation::GetId | Operation::Clear(_) => true,
        }
    }

    /// Takes the share of the disk's turns that a write of whole blocks needs.
    fn share(&mut self, turns: &Turns) -> Result<(), EngineError> {
        if !turns.try_share() {
            self.drain()?;
            turns.share();
        }
        self.shares += 1;
        Ok(())
    }

    /// Waits for all that is in flight. Who waits for a turn must not have one: the other
    /// may be waiting for it.
    fn drain(&mut self) -> Result<(), EngineError> {
        while self.in_kernel() > 0 {
            self.enter(1)?;
            while let Some(done) = self.next_done() {
                self.over.push_back(done);
            }
        }
        Ok(())
    }

    fn in_kernel(&self) -> usize {
        SLOTS - self.free.len()
    }

    fn next_done(&mut self) -> Option<Done<'m>> {
        let entry = self.uring.ring.completion().next()?;
        self.finish(usize::try_from(entry.user_data()).ok()?, entry.result())
    }

    fn at_once(&mut self, job: Job<'m>, data: &[Slice<'m>], ranges: &[Range]) -> Done<'m> {
        let mut filled = 0;
        let result = self.executor.execute(self.disk, job.operation, data, ranges, &mut filled);
        if job.operation.fills() {
            data.iter().for_each(|slice| self.memory.has_written(slice));
        }
        Done { job, filled, result }
    }

    /// What came of a job. The rest of a transfer that was cut short, or not begun, is
    /// done here and now.
    fn finish(&mut self, number: usize, result: i32) -> Option<Done<'m>> {
        let slot = self.slots.get_mut(number)?;
        let job = slot.job.take()?;
        self.free.push(number as u16);
        let has_share = std::mem::take(&mut slot.has_share);
        let moved = u64::try_from(result).unwrap_or(0);
        let is_transfer = job.operation != Operation::Flush;
        // All of it, whatever came of it. What is done of it here is noted where it is done.
        if job.operation.fills() {
            slot.iovecs.iter().for_each(|iovec| self.memory.has_written_to(iovec));
        }
        let (moved, result) = match -result {
            ..=0 if moved >= job.bytes || !is_transfer => (moved, Ok(())),
            ..=0 | libc::EAGAIN | libc::EINTR => {
                let whole = slot.iovecs.clone();
                // SAFETY: the slot's iovecs name slices of 'm, and there are at most
                // MAX_IOVECS.
                let gone_on = unsafe {
                    let file = &self.disk.file;
                    self.executor.go_on(file, job.operation, &mut slot.iovecs, moved)
                };
                if job.operation.fills() {
                    whole.iter().for_each(|iovec| self.memory.has_written_to(iovec));
                }
                gone_on
            }
            errno => (0, Err(ExecuteError::Io(io::Error::from_raw_os_error(errno)))),
        };
        if has_share && let Some(turns) = self.disk.turns() {
            self.shares -= 1;
            turns.leave();
        }
        let filled = if matches!(job.operation, Operation::Read(_)) { moved } else { 0 };
        Some(Done { job, filled, result })
    }

    fn enter(&mut self, wait_for: usize) -> Result<(), EngineError> {
        loop {
            match self.uring.ring.submit_and_wait(wait_for) {
                Ok(_) if self.uring.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Short of memory, or of room for answers: those there are go first.
                    Some(libc::EAGAIN | libc::EBUSY) => return Ok(()),
                    _ => return Err(EngineError(error)),
                },
            }
        }
    }
}

impl<'m> Engine<'m> for UringEngine<'_, 'm> {
    fn begin(
        &mut self,
        job: Job<'m>,
        data: &[Slice<'m>],
        ranges: &[Range],
    ) -> Result<Option<Done<'m>>, EngineError> {
        if self.is_for_calls(&job, data) {
            if self.shares > 0 {
                self.drain()?;
            }
            return Ok(Some(self.at_once(job, data, ranges)));
        }
        let is_write = matches!(job.operation, Operation::Write(_));
        let turns = self.disk.turns().filter(|_| is_write);
        if let Some(turns) = turns {
            self.share(turns)?;
        }
        let Some(number) = self.free.pop() else { return Err(EngineError::full()) };
        let index = usize::from(number);
        fill_iovecs(&mut self.slots[index].iovecs, data);
        let entry = self.entry(job.operation, &self.slots[index].iovecs).user_data(number.into());
        self.slots[index].has_share = turns.is_some();
        // SAFETY: the iovecs name slices of mapped guest memory, which is borrowed for 'm
        // and shared with the guest, so that no Rust reference is invalidated by what the
        // kernel stores there. They and the list of them stay as they are until the job is
        // reaped: a slot is not touched meanwhile, and dropping `self` waits for it. The
        // file is the ring's.
        let pushed = unsafe { self.uring.ring.submission().push(&entry) };
        // As many entries as slots, so that there is room.
        pushed.map_err(|_| EngineError::full())?;
        self.slots[index].job = Some(job);
        Ok(None)
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    fn in_flight(&self) -> usize {
        self.in_kernel() + self.over.len()
    }

    fn submit(&mut self) -> Result<(), EngineError> {
        if self.uring.ring.submission().is_empty() { Ok(()) } else { self.enter(0) }
    }

    fn reap(&mut self) -> Option<Done<'m>> {
        if let Some(done) = self.over.pop_front() {
            return Some(done);
        }
        if self.in_kernel() > 0 { self.next_done() } else { None }
    }

    fn has_done(&mut self) -> bool {
        !self.over.is_empty() || !self.uring.ring.completion().is_empty()
    }

    fn arm(&mut self) -> bool {
        if self.in_flight() == 0 {
            return false;
        }
        let completions = self.uring.ring.completion();
        completions.enable_eventfd();
        // The kernel puts an answer there and then looks whether to signal.
        fence(Ordering::SeqCst);
        drop(completions);
        // What the kernel did not take yet ends no sleep.
        self.has_done() || !self.uring.ring.submission().is_empty()
    }

    fn disarm(&mut self) {
        let completions = self.uring.ring.completion();
        if !completions.eventfd_disabled() {
            completions.disable_eventfd();
        }
    }

    fn wait(&mut self) -> Result<(), EngineError> {
        if self.in_kernel() == 0 || self.has_done() { Ok(()) } else { self.enter(1) }
    }
}

impl Drop for UringEngine<'_, '_> {
    /// The kernel must not be left with guest memory that may be unmapped now.
    fn drop(&mut self) {
        if self.drain().is_err() {
            // It still has the memory, and nothing else can be done about that.
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::types::Fd;
    use std::fs::File;

    fn disk(file: &File) -> Disk {
        let file = file.try_clone().expect("duplicate");
        let (read_only, id, direct, overlay) = (false, Default::default(), None, None);
        Disk { file, size: 4096, block_size: 512, read_only, id, direct, overlay }
    }

    /// What the kernel says of one entry.
    fn result(uring: &mut Uring, entry: &Entry) -> i32 {
        // SAFETY: the buffers of the entries below are statics or outlive this call, which
        // waits for the end.
        unsafe { uring.ring.submission().push(entry) }.expect("room");
        uring.ring.submit_and_wait(1).expect("submit");
        uring.ring.completion().next().expect("an answer").result()
    }

    /// A process that is not its own master any more has nothing but the image through it.
    #[test]
    fn a_ring_refuses_what_is_not_the_images() {
        let image = tempfile::tempfile().expect("image");
        image.set_len(4096).expect("size");
        let other = tempfile::NamedTempFile::new().expect("another file");
        other.as_file().set_len(4096).expect("size");
        let mut uring = Uring::new(&disk(&image), None).expect("ring");
        let mut bytes = [0u8; 16];
        let at = bytes.as_mut_ptr();
        let read = |file: Fixed| opcode::Read::new(file, at, 16).build();
        assert_eq!(result(&mut uring, &read(IMAGE)), 16, "the image can be read");
        assert!(result(&mut uring, &read(Fixed(1))) < 0, "there is no second file");
        let fd = Fd(other.as_raw_fd());
        let denied = -libc::EACCES;
        for (what, entry) in [
            ("a file by its number", opcode::Read::new(fd, at, 16).build()),
            ("a write to one", opcode::Write::new(fd, at, 16).build()),
            ("opening", opcode::OpenAt::new(Fd(libc::AT_FDCWD), c"/".as_ptr()).build()),
            ("closing", opcode::Close::new(fd).build()),
            ("nothing at all", opcode::Nop::new().build()),
            ("truncating", opcode::Ftruncate::new(IMAGE, 0).build()),
            ("a hole", opcode::Fallocate::new(IMAGE, 4096).build()),
            ("a link", opcode::UnlinkAt::new(fd, c"x".as_ptr()).build()),
        ] {
            assert_eq!(result(&mut uring, &entry), denied, "{what}");
        }
        let files = uring.ring.submitter().register_files_update(0, &[fd.0]);
        assert!(files.is_err(), "another file in the image's place");
    }
}
