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
//! in it afterwards is what was moved.
//!
//! Two kinds of reader are special. What is spliced into a **pipe** takes a place for each
//! piece, of which a pipe has few: for one whose reader is behind, small pieces wait until
//! they make a page, or until that reader has caught up. A file opened for **appending**
//! cannot be spliced to. It is written to, and its position tells a successor how much of a
//! write that was announced was done; where others write by that position too (standard
//! output as the shell's `>>`), nothing is believed, and a death within a write can double up
//! to [`PAGE`] bytes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Whence, lseek};

use super::journal::{Journal, OUTPUT};

/// The most that is moved at once.
const CHUNK: usize = 16 * 1024;
/// The most that is written at once to what cannot be spliced to, and a page of a pipe.
const PAGE: usize = 4096;
/// How long a small piece waits at first, and at most, before it is looked whether the
/// reader of a pipe has caught up.
const WAIT: Duration = Duration::from_millis(5);
const WAIT_MOST: Duration = Duration::from_millis(100);

/// What a failed write means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnError {
    /// The file stays what it is: drop what it did not take, go on.
    Drop,
    /// The reader is gone, another may come: keep what it did not take.
    Keep,
}

/// How a reader is given what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By splice.
    Splice,
    /// By splice, into a pipe.
    Pipe,
    /// By write. `own`: nobody else moves the file's position.
    Write { own: bool },
}

/// Where output goes from the start.
pub(super) struct To {
    pub file: Arc<OwnedFd>,
    /// Nobody else has this open file.
    pub own: bool,
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
    forgotten: Condvar,
    event: EventFd,
    on_error: OnError,
    way: Way,
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
    /// Bytes are being written without the pipe: the journal's account is the thread's.
    writing: bool,
    /// Bytes are being dropped; said once until everything is written.
    complained: bool,
    sink: Option<Arc<OwnedFd>>,
    /// A reader that went away, for the main loop to notice.
    lost: Option<Arc<OwnedFd>>,
    /// The main loop wants to know when all is written.
    watched: bool,
    /// The thread waits for work.
    idle: bool,
    /// All that is there is to be given up, by the thread, which has a part of it in hand.
    forgetting: bool,
    closed: bool,
}

impl Output {
    /// Starts the thread. `limit` is in bytes.
    pub(super) fn start(
        limit: usize,
        on_error: OnError,
        kept: Kept,
        to: Option<To>,
    ) -> io::Result<Output> {
        let Kept { journal, pipe, end } = kept;
        let limit = limit as u64;
        let in_pipe = unread(&pipe.0)?;
        let way = match &to {
            Some(to) => find_way(to, &pipe.0, in_pipe)?,
            None => Way::Splice,
        };
        let sink = to.map(|to| to.file);
        let written = sink.as_deref().filter(|_| way == Way::Write { own: true });
        let start = recover(&journal, in_pipe, end, limit, written)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                start,
                end,
                limit,
                writing: false,
                complained: false,
                sink,
                lost: None,
                watched: false,
                idle: false,
                forgetting: false,
                closed: false,
            }),
            work: Condvar::new(),
            forgotten: Condvar::new(),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            on_error,
            way,
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
            if !state.writing {
                self.0.settle(state.start);
            }
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

    /// Takes the reader away; what it has not been given is kept.
    pub(super) fn detach(&self) {
        self.0.lock().sink = None;
    }

    /// The reader that a write found gone, once.
    pub(super) fn lost(&self) -> Option<Arc<OwnedFd>> {
        self.0.lock().lost.take()
    }

    /// Gives up all that is there, with its reader, who has been shut out: waits for no more than
    /// a write that fails.
    pub(super) fn forget(&self) {
        let mut state = self.0.lock();
        state.sink = None;
        state.forgetting = true;
        self.0.work.notify_one();
        while state.forgetting {
            state = self.0.forgotten.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether nothing is left that a reader could still take. If something is, the
    /// event comes when that changes.
    pub(super) fn is_settled(&self) -> bool {
        let mut state = self.0.lock();
        let settled = self.0.is_empty(&state) || state.sink.is_none();
        state.watched = !settled;
        if state.watched {
            self.0.wake(&mut state);
        }
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

/// Before the process is sealed.
fn find_way(to: &To, pipe: &OwnedFd, in_pipe: usize) -> io::Result<Way> {
    let kind = SFlag::from_bits_truncate(fstat(&*to.file)?.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFIFO {
        return Ok(Way::Pipe);
    }
    // An empty pipe has nothing to give, which is said only where it could be taken.
    if in_pipe == 0
        && splice(pipe, None, &*to.file, None, 1, SpliceFFlags::SPLICE_F_NONBLOCK)
            == Err(Errno::EINVAL)
    {
        return Ok(Way::Write { own: to.own && kind == SFlag::S_IFREG });
    }
    Ok(Way::Splice)
}

/// Where the buffer begins after a process that may have died within a move. `written` is
/// the file that it wrote to, if that tells how much.
fn recover(
    journal: &Journal,
    in_pipe: usize,
    end: u64,
    limit: u64,
    written: Option<&OwnedFd>,
) -> io::Result<u64> {
    let mut start = journal.start().load(Ordering::Acquire);
    let announced = journal.moving().load(Ordering::Acquire).wrapping_sub(start);
    if (1..=CHUNK as u64).contains(&announced) {
        let moved = match written {
            None => in_pipe as u64,
            Some(file) => {
                let now = u64::try_from(lseek(file, 0, Whence::SeekCur)?).unwrap_or(0);
                now.saturating_sub(journal.file_position().load(Ordering::Relaxed))
            }
        };
        start = start.saturating_add(announced.min(moved));
    }
    if start > end {
        start = end; // not what a process of ours leaves
    }
    let over = (end - start).saturating_sub(limit.min(OUTPUT as u64));
    if over > 0 {
        start += over;
        let dropped = journal.dropped();
        dropped.store(dropped.load(Ordering::Relaxed).saturating_add(over), Ordering::Relaxed);
    }
    journal.settle(start);
    Ok(start)
}

nix::ioctl_read_bad!(fionread, nix::libc::FIONREAD, nix::libc::c_int);

/// Bytes in a pipe.
#[allow(unsafe_code)] // an ioctl
pub(super) fn unread(pipe: &OwnedFd) -> io::Result<usize> {
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

    fn settle(&self, start: u64) {
        self.journal.settle(start);
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
        while let Some((sink, from)) = self.next(&mut chunk) {
            let error = match from {
                Some(start) => self.write_out(&sink, &chunk, start),
                None => self.empty_pipe(&sink),
            };
            let mut state = self.lock();
            if let Some(error) = error {
                self.failed(&mut state, sink, error, from.is_none(), &mut chunk);
            }
            if from.is_some() {
                state.writing = false;
                self.settle(state.start);
            }
            if self.is_empty(&state) {
                state.complained &= error.is_some();
                if std::mem::take(&mut state.watched) {
                    let _ = self.event.write(1);
                }
            }
        }
    }

    /// The reader did not take what is in the pipe, or in the thread's hands.
    fn failed(
        &self,
        state: &mut State,
        sink: Arc<OwnedFd>,
        error: Errno,
        piped: bool,
        chunk: &mut Vec<u8>,
    ) {
        let left = self.in_pipe.load(Ordering::Relaxed);
        if self.on_error == OnError::Drop {
            self.discard(piped, left, chunk);
            self.drop_bytes(state, left as u64, error.desc());
            return;
        }
        // The next one is to find no more than a reader can be behind.
        let over = (left as u64 + state.end - state.start).saturating_sub(state.limit);
        let over = over.min(left as u64);
        if over > 0 {
            self.discard(piped, over as usize, chunk);
            self.drop_bytes(state, over, "its reader left without reading it");
        }
        if !piped {
            // What it did not take is the oldest again.
            state.start -= self.in_pipe.swap(0, Ordering::Relaxed) as u64;
        }
        if state.sink.as_ref().is_some_and(|now| Arc::ptr_eq(now, &sink)) {
            state.sink = None;
        }
        state.lost = Some(sink);
        let _ = self.event.write(1); // full is readable
    }

    /// Gives the oldest bytes that left the buffer up.
    fn discard(&self, piped: bool, count: usize, chunk: &mut Vec<u8>) {
        if piped {
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
        let mut wait = WAIT;
        loop {
            if state.closed {
                return None;
            }
            let mut behind = false;
            if state.forgetting {
                let left = self.in_pipe.load(Ordering::Relaxed);
                if left > 0 {
                    self.discard(true, left, chunk);
                }
                state.start = state.end;
                self.settle(state.start);
                self.journal.dropped().store(0, Ordering::Relaxed);
                (state.forgetting, state.lost) = (false, None);
                self.forgotten.notify_one();
            }
            if let Some(sink) = state.sink.clone() {
                if self.in_pipe.load(Ordering::Relaxed) == 0 && state.start != state.end {
                    if let Way::Write { own } = self.way {
                        let start = self.take_hand(&mut state, &sink, own, chunk);
                        return Some((sink, Some(start)));
                    }
                    behind = self.is_behind(&state, &sink);
                    if !behind {
                        self.fill_pipe(&mut state, chunk);
                    }
                }
                if self.in_pipe.load(Ordering::Relaxed) > 0 {
                    return Some((sink, None));
                }
            }
            state.idle = true;
            if behind {
                let waited = self.work.wait_timeout(state, wait);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                wait = (wait * 2).min(WAIT_MOST);
            } else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.idle = false;
        }
    }

    /// Whether what there is can wait until it makes a page, because the reader of a pipe
    /// has something to read still.
    fn is_behind(&self, state: &State, sink: &OwnedFd) -> bool {
        self.way == Way::Pipe
            && !state.watched
            && state.end - state.start < PAGE as u64
            && unread(sink).is_ok_and(|count| count > 0)
    }

    fn take_chunk(&self, state: &State, most: usize, chunk: &mut Vec<u8>) {
        let count = (state.end - state.start).min(most as u64);
        chunk.clear();
        chunk.extend((state.start..state.start + count).map(|at| self.journal.output(at)));
    }

    /// Moves the oldest bytes into the empty pipe.
    fn fill_pipe(&self, state: &mut State, chunk: &mut Vec<u8>) {
        self.take_chunk(state, CHUNK, chunk);
        self.journal.moving().store(state.start + chunk.len() as u64, Ordering::Release);
        // It does not wait; where the pipe is smaller than usual it takes a part.
        let moved = nix::unistd::write(&self.pipe.1, chunk).unwrap_or(0);
        state.start += moved as u64;
        self.settle(state.start);
        self.in_pipe.store(moved, Ordering::Relaxed);
    }

    /// Takes the oldest bytes to be written; where in the buffer they are.
    fn take_hand(&self, state: &mut State, sink: &OwnedFd, own: bool, chunk: &mut Vec<u8>) -> u64 {
        self.take_chunk(state, PAGE, chunk);
        let start = state.start;
        state.start += chunk.len() as u64;
        state.writing = true;
        self.in_pipe.store(chunk.len(), Ordering::Relaxed);
        if own {
            // From where a write to a file opened for appending takes its position.
            let position = lseek(sink, 0, Whence::SeekEnd).unwrap_or(0);
            let position = u64::try_from(position).unwrap_or(0);
            self.journal.file_position().store(position, Ordering::Relaxed);
            self.journal.moving().store(state.start, Ordering::Release);
        }
        start
    }

    /// Gives the reader what is in the pipe, waiting for it as long as it takes; or as much
    /// as went before an error.
    fn empty_pipe(&self, sink: &OwnedFd) -> Option<Errno> {
        loop {
            let left = self.in_pipe.load(Ordering::Relaxed);
            if left == 0 {
                return None;
            }
            match splice(&self.pipe.0, None, sink, None, left, SpliceFFlags::empty()) {
                Ok(0) => return Some(Errno::EIO), // it is empty, and should not be
                Ok(count) => {
                    self.in_pipe.store(left.saturating_sub(count), Ordering::Relaxed);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if let Err(error) = wait_for(sink) {
                        return Some(error);
                    }
                }
                Err(error) => return Some(error),
            }
        }
    }

    /// Writes the bytes that are `start` of the buffer, waiting for the reader as long as it
    /// takes; or as much as goes before an error.
    fn write_out(&self, sink: &OwnedFd, bytes: &[u8], start: u64) -> Option<Errno> {
        let mut written = 0;
        while written < bytes.len() {
            match nix::unistd::write(sink, &bytes[written..]) {
                Ok(count) => {
                    written += count;
                    // The file's position tells it where that can be believed.
                    if self.way == (Way::Write { own: false }) {
                        self.settle(start + written as u64);
                    }
                    self.in_pipe.store(bytes.len() - written, Ordering::Relaxed);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if let Err(error) = wait_for(sink) {
                        return Some(error);
                    }
                }
                Err(error) => return Some(error),
            }
        }
        None
    }
}

fn wait_for(fd: &OwnedFd) -> Result<(), Errno> {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error),
    }
}
