//! From the guest to the user: a bounded buffer and the thread that empties it.
//!
//! The thread may block in a write for as long as the reader likes. When the buffer
//! is full meanwhile, its **oldest** bytes are dropped and counted: what a user
//! wants to see of a guest that printed too much is how it ended. What has left the
//! buffer, up to [`CHUNK`] bytes, comes on top of the bound.
//!
//! The buffer is in the journal, and what leaves it goes through a **pipe** that outlives
//! the process: from there the kernel moves it to the reader (splice), so that no byte is
//! both written and still there, or neither, whenever the process dies. A move from the
//! buffer into the pipe is announced before: the pipe was empty then, so that what it has
//! in it afterwards is what was moved. A reader that is a pipe itself is written to instead,
//! for what is spliced into a pipe takes a place for each line, of which a pipe has few; and
//! so is a file opened for appending, which cannot be spliced to. A death within such a
//! write loses nothing and can double up to [`CHUNK`] bytes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::{SFlag, fstat};

use super::journal::{Journal, OUTPUT};

/// The most that is moved at once.
const CHUNK: usize = 16 * 1024;

/// What a failed write means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnError {
    /// The file stays what it is: drop what it did not take, go on.
    Drop,
    /// The reader is gone, another may come: keep what it did not take.
    Keep,
}

/// What of the output outlives the process.
pub(super) struct Kept {
    pub journal: Journal,
    /// The pipe's ends, to read and to write.
    pub pipe: (OwnedFd, OwnedFd),
    /// Bytes transmitted, as the journal has it.
    pub end: u64,
}

/// The bounded buffer, and its thread `serial-out`.
pub(super) struct Output(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    event: EventFd,
    on_error: OnError,
    journal: Journal,
    pipe: (OwnedFd, OwnedFd),
    /// Bytes in the pipe; without it, those in the hands of the thread.
    in_pipe: AtomicUsize,
}

/// The buffer holds the bytes from `start` to `end`.
struct State {
    start: u64,
    end: u64,
    limit: u64,
    /// Bytes are being dropped; said once until everything is written.
    complained: bool,
    sink: Option<Arc<OwnedFd>>,
    /// It is written to.
    direct: bool,
    /// A reader that went away, for the main loop to notice.
    lost: Option<Arc<OwnedFd>>,
    /// The main loop wants to know when all is written.
    watched: bool,
    /// The thread waits for work.
    idle: bool,
    closed: bool,
}

impl Output {
    /// Starts the thread, with no reader yet. `limit` is in bytes.
    pub(super) fn start(limit: usize, on_error: OnError, kept: Kept) -> io::Result<Output> {
        let Kept { journal, pipe, end } = kept;
        let (start, in_pipe) = recover(&journal, &pipe.0, end)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                start,
                end,
                limit: limit as u64,
                complained: false,
                sink: None,
                direct: false,
                lost: None,
                watched: false,
                idle: false,
                closed: false,
            }),
            work: Condvar::new(),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            on_error,
            journal,
            pipe,
            in_pipe: AtomicUsize::new(in_pipe),
        });
        let own = Arc::clone(&shared);
        super::start_thread("serial-out", move || own.run())?;
        Ok(Output(shared))
    }

    /// The bytes go up to `end` now; the oldest are dropped where that is too many.
    pub(super) fn advance(&self, end: u64) {
        let mut state = self.0.lock();
        state.end = end;
        let over = (end - state.start).saturating_sub(state.limit);
        if over > 0 {
            state.start += over;
            self.0.settle(state.start);
            self.0.drop_bytes(&mut state, over, "its reader does not keep up");
        }
        self.0.wake(&mut state);
    }

    /// Gives the thread a reader to write to.
    pub(super) fn attach(&self, reader: Arc<OwnedFd>) {
        let mut state = self.0.lock();
        state.sink = Some(reader);
        self.0.wake(&mut state);
    }

    /// As [`Output::attach`], before the process is sealed, with any file.
    pub(super) fn attach_file(&self, reader: OwnedFd) -> Result<(), Errno> {
        let kind = SFlag::from_bits_truncate(fstat(&reader)?.st_mode) & SFlag::S_IFMT;
        // What another process left in ours goes first.
        let direct = kind == SFlag::S_IFIFO && self.0.in_pipe.load(Ordering::Relaxed) == 0;
        self.0.lock().direct = direct;
        self.attach(Arc::new(reader));
        Ok(())
    }

    /// Takes the reader away; what it has not been given is kept.
    pub(super) fn detach(&self) {
        self.0.lock().sink = None;
    }

    /// The reader that a write found gone, once.
    pub(super) fn lost(&self) -> Option<Arc<OwnedFd>> {
        self.0.lock().lost.take()
    }

    /// Whether nothing is left that a reader could still take. If something is, the
    /// event comes when that changes.
    pub(super) fn is_settled(&self) -> bool {
        let mut state = self.0.lock();
        let settled = self.0.is_empty(&state) || state.sink.is_none();
        state.watched = !settled;
        settled
    }

    /// Bytes that the reader has not taken yet.
    pub(super) fn unread(&self) -> u64 {
        let state = self.0.lock();
        state.end - state.start + self.0.in_pipe.load(Ordering::Relaxed) as u64
    }

    /// Takes the event back; look at [`Output::lost`] and [`Output::is_settled`] then.
    pub(super) fn acknowledge(&self) {
        let _ = self.0.event.read(); // not readable is fine
    }
}

/// The event.
impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        self.0.work.notify_one();
    }
}

/// Where the buffer begins, and how much is in the pipe, after a process that may have
/// died within a move.
fn recover(journal: &Journal, pipe: &OwnedFd, end: u64) -> io::Result<(u64, usize)> {
    let in_pipe = unread(pipe)?;
    let mut start = journal.start().load(Ordering::Acquire);
    let moving = journal.moving().load(Ordering::Relaxed);
    if moving.wrapping_sub(start) <= CHUNK as u64 {
        start += (moving - start).min(in_pipe as u64);
    }
    if start > end || end - start > OUTPUT as u64 {
        start = end; // not what a process of ours leaves
    }
    journal.moving().store(start, Ordering::Relaxed);
    journal.start().store(start, Ordering::Release);
    Ok((start, in_pipe))
}

nix::ioctl_read_bad!(fionread, nix::libc::FIONREAD, nix::libc::c_int);

#[allow(unsafe_code)] // an ioctl
fn unread(pipe: &OwnedFd) -> io::Result<usize> {
    let mut count = 0;
    // SAFETY: writes one int, which outlives the call.
    unsafe { fionread(pipe.as_raw_fd(), &mut count) }?;
    Ok(usize::try_from(count).unwrap_or(0))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_empty(&self, state: &State) -> bool {
        state.start == state.end && self.in_pipe.load(Ordering::Relaxed) == 0
    }

    /// Nothing is being moved, and the buffer begins at `start`.
    fn settle(&self, start: u64) {
        self.journal.start().store(start, Ordering::Release);
        self.journal.moving().store(start, Ordering::Release);
    }

    fn drop_bytes(&self, state: &mut State, count: u64, why: &str) {
        let dropped = self.journal.dropped();
        dropped.store(dropped.load(Ordering::Relaxed).saturating_add(count), Ordering::Relaxed);
        if !std::mem::replace(&mut state.complained, true) {
            tracing::warn!("console output is being dropped: {why}");
        }
    }

    fn wake(&self, state: &mut State) {
        // Every notify is a system call, so only where somebody hears it.
        if state.idle && state.sink.is_some() && !self.is_empty(state) {
            state.idle = false;
            self.work.notify_one();
        }
    }

    fn run(&self) {
        let mut chunk = Vec::with_capacity(CHUNK);
        while let Some((sink, direct)) = self.next(&mut chunk) {
            let error = match direct {
                Some(start) => self.write_out(&sink, &chunk, start),
                None => self.empty_pipe(&sink, &mut chunk),
            };
            let mut state = self.lock();
            if let Some(error) = error {
                match self.on_error {
                    OnError::Drop => {
                        let rest = self.in_pipe.load(Ordering::Relaxed);
                        self.discard(direct.is_none(), rest, &mut chunk);
                        self.settle(state.start);
                        self.drop_bytes(&mut state, rest as u64, error.desc());
                    }
                    OnError::Keep => {
                        // The next one is to find no more than a reader can be behind.
                        let left = self.in_pipe.load(Ordering::Relaxed);
                        let over = (left as u64 + state.end - state.start)
                            .saturating_sub(state.limit)
                            .min(left as u64);
                        if over > 0 {
                            self.discard(true, over as usize, &mut chunk);
                            let why = "its reader left without reading it";
                            self.drop_bytes(&mut state, over, why);
                        }
                        if state.sink.as_ref().is_some_and(|now| Arc::ptr_eq(now, &sink)) {
                            state.sink = None;
                        }
                        state.lost = Some(sink);
                        let _ = self.event.write(1); // full is readable
                    }
                }
            }
            if self.is_empty(&state) {
                state.complained &= error.is_some();
                if std::mem::take(&mut state.watched) {
                    let _ = self.event.write(1);
                }
            }
        }
    }

    /// Gives the oldest bytes that left the buffer up.
    fn discard(&self, from_pipe: bool, count: usize, chunk: &mut Vec<u8>) {
        if from_pipe {
            chunk.resize(count, 0);
            // There is as much, and nobody else takes it.
            let _ = nix::unistd::read(&self.pipe.0, chunk);
        }
        self.in_pipe.fetch_sub(count, Ordering::Relaxed);
    }

    /// Waits for something to write and for somebody to write it to; it is in the pipe
    /// then, or in `chunk`, and comes from where in the buffer.
    fn next(&self, chunk: &mut Vec<u8>) -> Option<(Arc<OwnedFd>, Option<u64>)> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(sink) = state.sink.clone() {
                if state.direct && state.start != state.end {
                    let start = state.start;
                    self.take_chunk(&mut state, chunk);
                    state.start += chunk.len() as u64;
                    self.in_pipe.store(chunk.len(), Ordering::Relaxed);
                    return Some((sink, Some(start)));
                }
                if self.in_pipe.load(Ordering::Relaxed) == 0 && state.start != state.end {
                    self.fill_pipe(&mut state, chunk);
                }
                if self.in_pipe.load(Ordering::Relaxed) > 0 {
                    return Some((sink, None));
                }
            }
            state.idle = true;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle = false;
        }
    }

    fn take_chunk(&self, state: &mut State, chunk: &mut Vec<u8>) {
        let count = (state.end - state.start).min(CHUNK as u64);
        chunk.clear();
        chunk.extend((state.start..state.start + count).map(|at| self.journal.output(at)));
    }

    /// Moves the oldest bytes into the empty pipe.
    fn fill_pipe(&self, state: &mut State, chunk: &mut Vec<u8>) {
        self.take_chunk(state, chunk);
        self.journal.moving().store(state.start + chunk.len() as u64, Ordering::Release);
        // It does not wait; where the pipe is smaller than usual it takes a part.
        let moved = nix::unistd::write(&self.pipe.1, chunk).unwrap_or(0);
        state.start += moved as u64;
        self.settle(state.start);
        self.in_pipe.store(moved, Ordering::Relaxed);
    }

    /// Gives the reader what is in the pipe, waiting for it as long as it takes; or as much
    /// as went before an error.
    fn empty_pipe(&self, sink: &OwnedFd, chunk: &mut Vec<u8>) -> Option<Errno> {
        loop {
            let left = self.in_pipe.load(Ordering::Relaxed);
            if left == 0 {
                return None;
            }
            match splice(&self.pipe.0, None, sink, None, left, SpliceFFlags::empty()) {
                Ok(count) => {
                    self.in_pipe.store(left.saturating_sub(count.max(1)), Ordering::Relaxed);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if let Err(error) = wait_for(sink) {
                        return Some(error);
                    }
                }
                Err(Errno::EINVAL) => {
                    chunk.resize(left, 0);
                    let count = nix::unistd::read(&self.pipe.0, chunk).unwrap_or(0);
                    self.in_pipe.store(0, Ordering::Relaxed);
                    if let Some(error) = write_all(sink, &chunk[..count], |_| {}) {
                        return Some(error);
                    }
                }
                Err(error) => return Some(error),
            }
        }
    }
}

impl Shared {
    /// Writes the bytes that are `start` of the buffer.
    fn write_out(&self, sink: &OwnedFd, bytes: &[u8], start: u64) -> Option<Errno> {
        write_all(sink, bytes, |written| {
            self.settle(start + written as u64);
            self.in_pipe.store(bytes.len() - written, Ordering::Relaxed);
        })
    }
}

fn wait_for(fd: &OwnedFd) -> Result<(), Errno> {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Writes everything, or as much as goes before an error; tells how much that is.
fn write_all(fd: &OwnedFd, bytes: &[u8], mut progress: impl FnMut(usize)) -> Option<Errno> {
    let mut written = 0;
    while written < bytes.len() {
        match nix::unistd::write(fd, &bytes[written..]) {
            Ok(count) => {
                written += count;
                progress(written);
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                if let Err(error) = wait_for(fd) {
                    return Some(error);
                }
            }
            Err(error) => return Some(error),
        }
    }
    None
}
