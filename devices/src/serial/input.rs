//! From the user to the guest: the pipe that input comes by, the queue in front of the
//! UART, the escape sequence, and the thread that reads where a read may block.
//!
//! Input is in the journal from when it was taken from the user. The kernel moves it from
//! the endpoint into a **pipe** that outlives the process (splice), and the process moves it
//! from there into the journal: the pipe tells a successor whether it did. So nothing is lost
//! or taken twice, whenever the process dies. From an endpoint that knows no splice it is
//! read and written to the pipe; there a death between the two can lose what was read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::journal::{INPUT, Journal, RAW, State as Kept};
use crate::protocol::state::{FIFO, INPUT_MAX};

const CTRL_A: u8 = 1;
/// What a terminal may type ahead of a guest that does not read.
const TYPED_AHEAD: usize = INPUT_MAX;
const _: () = assert!(TYPED_AHEAD + 2 * RAW + FIFO <= INPUT);

/// Input that the guest has not taken yet: the bytes from `taken` to `typed` of the
/// journal.
///
/// Without the escape sequence nothing is read from the endpoint while something
/// waits here, so nothing is ever lost. With it, a terminal is read all the time
/// (a hung guest is exactly when one wants to quit), and what goes beyond
/// [`TYPED_AHEAD`] bytes is dropped.
pub(super) struct Input {
    journal: Journal,
    pipe: Arc<Pipe>,
    typed: u64,
    taken: u64,
    fetched: u32,
    escape: bool,
    after_ctrl_a: bool,
}

impl Input {
    pub(super) fn new(escape: bool, journal: Journal, pipe: Arc<Pipe>) -> Input {
        Input { journal, pipe, typed: 0, taken: 0, fetched: 0, escape, after_ctrl_a: false }
    }

    /// Goes on where another process was. `left` bytes are in the pipe. True: the user wants
    /// to quit.
    pub(super) fn resume(&mut self, state: &Kept, left: usize) -> bool {
        (self.typed, self.taken) = (state.typed, state.taken);
        (self.fetched, self.after_ctrl_a) = (state.fetched, state.after_ctrl_a);
        let next = self.fetched.wrapping_add(1);
        match self.journal.fetch_under_way(next) {
            // It was moved, and that was not committed.
            Some(count) if left == 0 => {
                self.fetched = next;
                self.digest(count)
            }
            _ => false,
        }
    }

    /// What of the input a successor has to know.
    pub(super) fn keep(&self, state: &mut Kept) {
        (state.typed, state.taken) = (self.typed, self.taken);
        (state.fetched, state.after_ctrl_a) = (self.fetched, self.after_ctrl_a);
    }

    /// Whether the endpoint may be read.
    pub(super) fn wants(&self) -> bool {
        self.escape || self.typed == self.taken
    }

    /// Takes `count` bytes out of the pipe, some of those that are in it; they count once
    /// that is committed. True: the user wants to quit.
    pub(super) fn fetch(&mut self, count: usize) -> bool {
        let number = self.fetched.wrapping_add(1);
        match self.journal.fetch(&self.pipe.from, count, number) {
            Ok(0) | Err(_) => false, // there is less than was said
            Ok(count) => {
                self.fetched = number;
                self.digest(count)
            }
        }
    }

    /// Takes what was moved. True: the user wants to quit.
    fn digest(&mut self, count: usize) -> bool {
        for at in 0..count {
            let byte = self.journal.raw(at);
            if !self.escape {
                self.push(&[byte], INPUT);
                continue;
            }
            match (std::mem::take(&mut self.after_ctrl_a), byte) {
                (false, CTRL_A) => self.after_ctrl_a = true,
                (true, b'x') => return true,
                (true, CTRL_A) | (false, _) => self.push(&[byte], TYPED_AHEAD),
                (true, _) => self.push(&[CTRL_A, byte], TYPED_AHEAD),
            }
        }
        false
    }

    fn push(&mut self, bytes: &[u8], most: usize) {
        if self.waiting() + bytes.len() <= most {
            for &byte in bytes {
                self.journal.put_input(self.typed, byte);
                self.typed += 1;
            }
        }
    }

    fn waiting(&self) -> usize {
        (self.typed - self.taken) as usize // at most INPUT
    }

    /// What waits, first part; how much that is.
    pub(super) fn front(&self, bytes: &mut [u8; FIFO]) -> usize {
        let count = self.waiting().min(FIFO);
        for (at, byte) in (self.taken..).zip(&mut bytes[..count]) {
            *byte = self.journal.input(at);
        }
        count
    }

    /// All that waits.
    pub(super) fn save(&self) -> Vec<u8> {
        (self.taken..self.typed).map(|at| self.journal.input(at)).collect()
    }

    /// Has `bytes` wait in the place of what did.
    pub(super) fn load(&mut self, bytes: &[u8]) {
        // Behind what waited, which counts until this is committed.
        let taken = self.typed;
        let room = INPUT - self.waiting();
        for &byte in &bytes[..bytes.len().min(room)] {
            self.journal.put_input(self.typed, byte);
            self.typed += 1;
        }
        self.taken = taken;
    }

    /// The guest took `count` bytes.
    pub(super) fn take(&mut self, count: usize) {
        self.taken += count as u64;
    }
}

/// What outlives the process: input between the endpoint and the journal.
pub(super) struct Pipe {
    from: OwnedFd,
    to: OwnedFd,
}

impl Pipe {
    pub(super) fn new(from: OwnedFd, to: OwnedFd) -> Pipe {
        Pipe { from, to }
    }

    /// Bytes in it, as a process before this one left it.
    pub(super) fn left(&self) -> io::Result<usize> {
        super::output::unread(&self.from)
    }

    /// Moves what waits at `endpoint` into the pipe, which is empty; how much, 0 at the end.
    pub(super) fn draw(&self, endpoint: impl AsFd) -> Result<usize, Errno> {
        loop {
            match splice(&endpoint, None, &self.to, None, RAW, SpliceFFlags::empty()) {
                Err(Errno::EINTR) => {}
                Err(Errno::EINVAL) => return self.copy(&endpoint),
                result => return result,
            }
        }
    }

    fn copy(&self, endpoint: impl AsFd) -> Result<usize, Errno> {
        let mut bytes = [0; RAW];
        loop {
            match nix::unistd::read(&endpoint, &mut bytes) {
                Err(Errno::EINTR) => {}
                Ok(0) => return Ok(0),
                // It is empty, and a pipe holds more than this.
                Ok(count) => return nix::unistd::write(&self.to, &bytes[..count]),
                Err(error) => return Err(error),
            }
        }
    }
}

/// A thread `serial-in` that reads an fd whose reads may block: stdin cannot be
/// made non-blocking, because the shell has the same open file, and what `poll`
/// announced another reader may have taken. It reads only when asked.
pub(super) struct Reader(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    event: EventFd,
    pipe: Arc<Pipe>,
}

#[derive(Default)]
struct State {
    /// Bytes moved into the pipe and not taken.
    drawn: usize,
    wanted: bool,
    over: bool,
}

impl Reader {
    pub(super) fn start(fd: OwnedFd, pipe: Arc<Pipe>) -> io::Result<Reader> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Shared { state: Mutex::default(), work: Condvar::new(), event, pipe };
        let shared = Arc::new(shared);
        let own = Arc::clone(&shared);
        super::start_thread("serial-in", move || own.run(&fd))?;
        Ok(Reader(shared))
    }

    /// Asks for one more read.
    pub(super) fn want(&self) {
        let mut state = self.0.lock();
        if !state.wanted && !state.over && state.drawn == 0 {
            state.wanted = true;
            self.0.work.notify_one();
        }
    }

    /// How much is in the pipe since the last call; to be taken out before the next one.
    /// [`Reader`] as an fd says when to call.
    pub(super) fn take(&self) -> usize {
        let _ = self.0.event.read(); // was readable, or is not: both are fine
        std::mem::take(&mut self.0.lock().drawn)
    }
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.work.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, fd: &OwnedFd) {
        loop {
            let mut state = self.lock();
            while !state.wanted && !state.over {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.over {
                return;
            }
            drop(state);
            let drawn = self.draw(fd);
            let mut state = self.lock();
            match drawn {
                Ok(count) => {
                    state.over |= count == 0;
                    state.drawn = count;
                }
                Err(error) => {
                    tracing::warn!("no more console input: {error}");
                    state.over = true;
                }
            }
            state.wanted = false;
            let _ = self.event.write(1); // full is readable
        }
    }

    /// Waits also where somebody else made the file non-blocking.
    fn draw(&self, fd: &OwnedFd) -> Result<usize, Errno> {
        loop {
            match self.pipe.draw(fd) {
                Err(Errno::EAGAIN) => {
                    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
                    match poll(&mut fds, PollTimeout::NONE) {
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(error) => return Err(error),
                    }
                }
                result => return result,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::JOURNAL_BYTES;
    use cellblock_wire::sealed_memfd;

    fn input(escape: bool) -> Input {
        let memory = sealed_memfd("journal", JOURNAL_BYTES as u64).expect("memfd");
        let (from, to) = nix::unistd::pipe().expect("pipe");
        let pipe = Arc::new(Pipe::new(from, to));
        Input::new(escape, Journal::map(memory).expect("map"), pipe)
    }

    fn put(input: &mut Input, bytes: &[u8]) -> bool {
        bytes.chunks(RAW).any(|bytes| {
            nix::unistd::write(&input.pipe.to, bytes).expect("write");
            input.fetch(bytes.len())
        })
    }

    fn typed(escape: bool, parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut input = input(escape);
        let quit = parts.iter().any(|part| put(&mut input, part));
        (input.save(), quit)
    }

    #[test]
    fn the_escape_sequence_quits_also_when_split() {
        assert_eq!(typed(true, &[b"ab\x01xcd"]), (b"ab".to_vec(), true));
        assert_eq!(typed(true, &[b"ab\x01", b"x"]), (b"ab".to_vec(), true));
    }

    #[test]
    fn ctrl_a_twice_is_one_and_before_other_keys_itself() {
        assert_eq!(typed(true, &[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(typed(true, &[b"\x01b"]), (b"\x01b".to_vec(), false));
    }

    #[test]
    fn without_escape_every_byte_is_input() {
        assert_eq!(typed(false, &[b"\x01x\x01\x01"]), (b"\x01x\x01\x01".to_vec(), false));
    }

    #[test]
    fn a_terminal_is_read_on_behind_a_full_queue() {
        let mut own = input(true);
        put(&mut own, &[b'a'; TYPED_AHEAD + 10]);
        assert_eq!(own.waiting(), TYPED_AHEAD);
        assert!(own.wants());
        assert!(put(&mut own, b"\x01x"));
        let mut other = input(false);
        put(&mut other, b"a");
        assert!(!other.wants());
    }

    /// A process that died just before, and just after, the pipe gave its bytes.
    #[test]
    fn a_move_that_was_not_committed_happened_if_the_pipe_is_empty() {
        let mut own = input(true);
        put(&mut own, b"ab");
        let mut kept = Kept::default();
        own.keep(&mut kept);
        put(&mut own, b"c\x01");
        let mut next = Input::new(true, own.journal.clone(), own.pipe.clone());
        assert!(!next.resume(&kept, own.pipe.left().expect("left")));
        assert_eq!((next.save(), next.after_ctrl_a), (b"abc".to_vec(), true));

        next.keep(&mut kept);
        nix::unistd::write(&own.pipe.to, b"x").expect("write");
        let mut last = Input::new(true, own.journal.clone(), own.pipe.clone());
        assert!(!last.resume(&kept, own.pipe.left().expect("left")));
        assert_eq!(last.save(), b"abc");
        assert!(last.fetch(1));
    }
}
