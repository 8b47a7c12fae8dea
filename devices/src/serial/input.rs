//! From the user to the guest: the queue in front of the UART, the escape
//! sequence, and the thread that reads where a read may block.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::journal::{INPUT, Journal};
use super::uart::FIFO;

const CTRL_A: u8 = 1;
/// What a terminal may type ahead of a guest that does not read.
const TYPED_AHEAD: u64 = 64 * 1024;
const _: () = assert!(TYPED_AHEAD <= INPUT as u64);

/// Input that the guest has not taken yet: the bytes from `taken` to `typed` of the
/// journal.
///
/// Without the escape sequence nothing is read from the endpoint while something
/// waits here, so nothing is ever lost. With it, a terminal is read all the time
/// (a hung guest is exactly when one wants to quit), and what goes beyond
/// [`TYPED_AHEAD`] bytes is dropped.
pub(super) struct Input {
    journal: Journal,
    pub typed: u64,
    pub taken: u64,
    escape: bool,
    pub after_ctrl_a: bool,
}

impl Input {
    pub(super) fn new(escape: bool, journal: Journal) -> Input {
        Input { journal, typed: 0, taken: 0, escape, after_ctrl_a: false }
    }

    /// Whether the endpoint may be read.
    pub(super) fn wants(&self) -> bool {
        self.escape || self.typed == self.taken
    }

    /// Takes what was read. True: the user wants to quit.
    pub(super) fn push(&mut self, bytes: &[u8]) -> bool {
        if !self.escape {
            self.keep(bytes);
            return false;
        }
        for &byte in bytes {
            match (std::mem::take(&mut self.after_ctrl_a), byte) {
                (false, CTRL_A) => self.after_ctrl_a = true,
                (true, b'x') => return true,
                (true, CTRL_A) | (false, _) => self.keep(&[byte]),
                (true, _) => self.keep(&[CTRL_A, byte]),
            }
        }
        false
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.typed - self.taken + bytes.len() as u64 <= TYPED_AHEAD {
            for &byte in bytes {
                self.journal.put_input(self.typed, byte);
                self.typed += 1;
            }
        }
    }

    /// What waits, first part.
    pub(super) fn front(&self, bytes: &mut [u8; FIFO]) -> usize {
        let count = (self.typed - self.taken).min(FIFO as u64);
        for (at, byte) in (self.taken..self.taken + count).zip(bytes) {
            *byte = self.journal.input(at);
        }
        count as usize
    }

    /// The guest took `count` bytes.
    pub(super) fn take(&mut self, count: usize) {
        self.taken += count as u64;
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
}

#[derive(Default)]
struct State {
    read: Vec<u8>,
    wanted: bool,
    over: bool,
}

impl Reader {
    pub(super) fn start(fd: OwnedFd) -> io::Result<Reader> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), event });
        let own = Arc::clone(&shared);
        super::start_thread("serial-in", move || own.run(&fd))?;
        Ok(Reader(shared))
    }

    /// Asks for one more read.
    pub(super) fn want(&self) {
        let mut state = self.0.lock();
        if !state.wanted && !state.over {
            state.wanted = true;
            self.0.work.notify_one();
        }
    }

    /// What was read since the last call. [`Reader`] as an fd says when to call.
    pub(super) fn take(&self) -> Vec<u8> {
        let _ = self.0.event.read(); // was readable, or is not: both are fine
        std::mem::take(&mut self.0.lock().read)
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
        let mut buffer = [0; 4096];
        loop {
            let mut state = self.lock();
            while !state.wanted && !state.over {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.over {
                return;
            }
            drop(state);
            let read = read(fd, &mut buffer);
            let mut state = self.lock();
            match read {
                Ok(count) => {
                    state.over |= count == 0;
                    state.read.extend_from_slice(&buffer[..count]);
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
}

/// Reads, and waits also where somebody else made the file non-blocking.
fn read(fd: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    loop {
        match nix::unistd::read(fd, buffer) {
            Err(Errno::EINTR) => {}
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::JOURNAL_BYTES;

    fn input(escape: bool) -> Input {
        let memfd = cellblock_wire::sealed_memfd("journal", JOURNAL_BYTES as u64).expect("memfd");
        Input::new(escape, Journal::map(memfd).expect("map"))
    }

    fn typed(escape: bool, parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut input = input(escape);
        let quit = parts.iter().any(|part| input.push(part));
        let mut bytes = [0; FIFO];
        let count = input.front(&mut bytes);
        (bytes[..count].to_vec(), quit)
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
        let mut input = input(true);
        [b'a'; TYPED_AHEAD as usize + 10].chunks(1).for_each(|key| assert!(!input.push(key)));
        assert_eq!(input.typed, TYPED_AHEAD);
        assert!(input.wants());
        assert!(input.push(b"\x01x"));
        let mut other = self::input(false);
        other.push(b"a");
        assert!(!other.wants());
    }
}
