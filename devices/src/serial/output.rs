//! From the guest to the user: a bounded buffer and the thread that empties it.
//!
//! The thread may block in a write for as long as the reader likes. When the buffer
//! is full meanwhile, its **oldest** bytes are dropped and counted: what a user
//! wants to see of a guest that printed too much is how it ended. What the thread
//! has in hand, up to [`CHUNK`] bytes, comes on top of the bound.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// The most that one write is given.
const CHUNK: usize = 16 * 1024;

/// What a failed write means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnError {
    /// The file stays what it is: drop what it did not take, go on.
    Drop,
    /// The reader is gone, another may come: keep what it did not take.
    Keep,
}

/// The bounded buffer, and its thread `serial-out`.
pub(super) struct Output(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    event: EventFd,
    on_error: OnError,
    /// Of the bytes in the hands of the thread, those that its reader has.
    written: AtomicUsize,
}

struct State {
    queue: VecDeque<u8>,
    limit: usize,
    /// Bytes in the hands of the thread, beyond `limit`.
    taken: usize,
    dropped: u64,
    /// Bytes are being dropped; said once until everything is written.
    complained: bool,
    sink: Option<Arc<OwnedFd>>,
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
    pub(super) fn start(limit: usize, on_error: OnError) -> io::Result<Output> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                queue: VecDeque::new(),
                limit,
                taken: 0,
                dropped: 0,
                complained: false,
                sink: None,
                lost: None,
                watched: false,
                idle: false,
                closed: false,
            }),
            work: Condvar::new(),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            on_error,
            written: AtomicUsize::new(0),
        });
        let own = Arc::clone(&shared);
        super::start_thread("serial-out", move || own.run())?;
        Ok(Output(shared))
    }

    /// Appends `bytes`; never blocks, drops the oldest where there is no room.
    pub(super) fn push(&self, mut bytes: &[u8]) {
        let mut state = self.0.lock();
        let over = (state.queue.len() + bytes.len()).saturating_sub(state.limit);
        if over > 0 {
            let old = over.min(state.queue.len());
            state.queue.drain(..old);
            bytes = &bytes[over - old..];
            state.drop_bytes(over, "its reader does not keep up");
        }
        state.queue.extend(bytes);
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

    /// Whether nothing is left that a reader could still take. If something is, the
    /// event comes when that changes.
    pub(super) fn is_settled(&self) -> bool {
        let mut state = self.0.lock();
        let settled = state.is_empty() || state.sink.is_none();
        state.watched = !settled;
        settled
    }

    /// Bytes dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.0.lock().dropped
    }

    /// Bytes that the reader has not taken yet.
    pub(super) fn unread(&self) -> u64 {
        let state = self.0.lock();
        let in_hand = state.taken.saturating_sub(self.0.written.load(Ordering::Relaxed));
        (state.queue.len() + in_hand) as u64
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

impl State {
    fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.taken == 0
    }

    /// Puts the oldest bytes back in front, as far as there is room.
    fn put_back(&mut self, bytes: &[u8]) {
        let room = self.limit.saturating_sub(self.queue.len()).min(bytes.len());
        let (old, kept) = bytes.split_at(bytes.len() - room);
        kept.iter().rev().for_each(|&byte| self.queue.push_front(byte));
        if !old.is_empty() {
            self.drop_bytes(old.len(), "its reader left without reading it");
        }
    }

    fn drop_bytes(&mut self, count: usize, why: &str) {
        self.dropped += count as u64;
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!("console output is being dropped: {why}");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, state: &mut State) {
        // Every notify is a system call, so only where somebody hears it.
        if state.idle && state.sink.is_some() && !state.queue.is_empty() {
            state.idle = false;
            self.work.notify_one();
        }
    }

    fn run(&self) {
        let mut chunk = Vec::with_capacity(CHUNK);
        while let Some(sink) = self.next_chunk(&mut chunk) {
            let (written, error) = write_all(&sink, &chunk, &self.written);
            let mut state = self.lock();
            state.taken = 0;
            if let Some(error) = error {
                let rest = &chunk[written..];
                match self.on_error {
                    OnError::Drop => state.drop_bytes(rest.len(), error.desc()),
                    OnError::Keep => {
                        state.put_back(rest);
                        if state.sink.as_ref().is_some_and(|now| Arc::ptr_eq(now, &sink)) {
                            state.sink = None;
                        }
                        state.lost = Some(sink);
                        let _ = self.event.write(1); // full is readable
                    }
                }
            }
            if state.is_empty() {
                state.complained &= error.is_some();
                if std::mem::take(&mut state.watched) {
                    let _ = self.event.write(1);
                }
            }
        }
    }

    /// Waits for something to write and for somebody to write it to.
    fn next_chunk(&self, chunk: &mut Vec<u8>) -> Option<Arc<OwnedFd>> {
        chunk.clear();
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(sink) = &state.sink
                && !state.queue.is_empty()
            {
                let sink = Arc::clone(sink);
                let count = state.queue.len().min(CHUNK);
                chunk.extend(state.queue.drain(..count));
                state.taken = count;
                self.written.store(0, Ordering::Relaxed);
                return Some(sink);
            }
            state.idle = true;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle = false;
        }
    }
}

/// Writes everything, waiting for the reader as long as it takes; or as much as
/// went before an error. `progress` says meanwhile how much that is.
fn write_all(fd: &OwnedFd, bytes: &[u8], progress: &AtomicUsize) -> (usize, Option<Errno>) {
    let mut written = 0;
    while written < bytes.len() {
        match nix::unistd::write(fd, &bytes[written..]) {
            Ok(count) => {
                written += count;
                progress.store(written, Ordering::Relaxed);
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
                match poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(error) => return (written, Some(error)),
                }
            }
            Err(error) => return (written, Some(error)),
        }
    }
    (written, None)
}
