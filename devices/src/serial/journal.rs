//! What of a serial line outlives its process.
//!
//! A sealed memfd made by the VMM, into which the process writes all that its successor
//! needs: the UART, what is typed and not taken, what is transmitted and not written, and
//! how far in the register ring all of that is true. A commit writes a whole state into
//! the copy that does not count and then makes it count, by one store: a death leaves the
//! state before an access or the one after it. An answer to a read is given after the
//! commit, and given again by the successor; an access that was carried out and not
//! committed is carried out again, on the state before it.
//!
//! | offset | | |
//! |---|---|---|
//! | 0 | commits so far; its lowest bit says which copy counts | main thread |
//! | 64 | `start`: output that has left the buffer | `serial-out` |
//! | 72 | `moving`: where `start` will be after the move into the pipe that is under way | `serial-out` |
//! | 80 | bytes dropped | both, one at a time |
//! | 88 | where in its file the write under way begins | `serial-out` |
//! | 96 | the move out of the input's pipe that is under way: its number, how many bytes | main thread |
//! | 104 | marks that the VMM was told | main thread |
//! | 128, 384 | two copies of the state | main thread |
//! | 1024 | marks, a ring | main thread |
//! | 4096 | what came out of the input's pipe | main thread |
//! | 8192 | what was typed, a ring | main thread |
//! | 8192 + 128 KiB | what was transmitted, a ring | main thread |
//!
//! A guest may have owned the process that wrote it: what is found is bounded before it is
//! used, and a journal that makes no sense is begun anew.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cellblock_wire::{Access, Mapping, ShmError};
use nix::errno::Errno;

use super::marker::{LONGEST, Lines};
use crate::protocol::state::FIFO;
use crate::protocol::{JOURNAL_BYTES, OUTPUT_MAX};

const COPIES_AT: usize = 128;
const COPY: usize = 256;
const MARKS_AT: usize = 1024;
/// Marks that can wait to be told.
pub(super) const MARKS: usize = 256;
const RAW_AT: usize = 4096;
/// The most that comes out of the input's pipe at once.
pub(super) const RAW: usize = 4096;
const INPUT_AT: usize = RAW_AT + RAW;
/// Bytes typed that can wait.
pub(super) const INPUT: usize = 128 * 1024;
const OUTPUT_AT: usize = INPUT_AT + INPUT;
/// Bytes transmitted that can wait: those kept for a slow reader, and those that
/// `serial-out` has not been told of.
pub(super) const OUTPUT: usize = OUTPUT_MAX as usize + 2 * BATCH;
/// It is told at the latest after so many.
pub(super) const BATCH: usize = 32 * 1024;

const _: () = assert!(COPIES_AT + 2 * COPY <= MARKS_AT && MARKS_AT + MARKS <= RAW_AT);
const _: () = assert!(OUTPUT_AT + OUTPUT <= JOURNAL_BYTES);

/// The journal, mapped. Shared by the process's threads.
#[derive(Clone, Debug)]
pub(super) struct Journal(Arc<Mapping>);

/// Everything that changes with an access.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct State {
    /// Accesses carried out, as the register ring counts.
    pub position: u32,
    /// As in [`crate::protocol::state::SerialState`].
    pub registers: [u8; 9],
    /// What the receive FIFO holds.
    pub fifo: Vec<u8>,
    pub lines: Lines,
    /// Where the output ends, as the journal counts.
    pub end: u64,
    /// Bytes that the guest transmitted so far.
    pub transmitted: u64,
    /// Bytes that the guest was given so far.
    pub received: u64,
    /// Bytes typed so far, and those of them that the UART has taken.
    pub typed: u64,
    pub taken: u64,
    /// Moves out of the input's pipe that are done.
    pub fetched: u32,
    /// A ctrl-a is to be followed by what it means.
    pub after_ctrl_a: bool,
    /// Marks made so far.
    pub marks: u32,
    /// vCPU, ticket and value of the answer given last.
    pub answer: Option<(u8, u32, u8)>,
}

impl Journal {
    pub fn map(fd: impl AsFd) -> Result<Journal, ShmError> {
        Ok(Journal(Arc::new(Mapping::new(fd, JOURNAL_BYTES, Access::ReadWrite)?)))
    }

    /// Makes `state` the one that counts.
    pub fn commit(&self, state: &State) {
        let commits = self.commits().load(Ordering::Relaxed).wrapping_add(1).max(2);
        let copy = COPIES_AT + COPY * (commits & 1) as usize;
        for (n, word) in pack(state).into_iter().enumerate() {
            self.0.u64(copy + 8 * n).store(word, Ordering::Relaxed);
        }
        self.commits().store(commits, Ordering::Release);
    }

    /// The state that counts; `None` for a line that is new, or whose journal makes no
    /// sense.
    pub fn state(&self) -> Option<State> {
        let commits = self.commits().load(Ordering::Acquire);
        if commits == 0 {
            return None;
        }
        let copy = COPIES_AT + COPY * (commits & 1) as usize;
        let state =
            unpack(&std::array::from_fn(|n| self.0.u64(copy + 8 * n).load(Ordering::Relaxed)));
        if state.is_none() {
            tracing::warn!("the journal of the line makes no sense; it is begun anew");
        }
        state
    }

    fn commits(&self) -> &AtomicU64 {
        self.0.u64(0)
    }

    /// See the table.
    pub fn start(&self) -> &AtomicU64 {
        self.0.u64(64)
    }

    pub fn moving(&self) -> &AtomicU64 {
        self.0.u64(72)
    }

    /// Nothing is being moved, and the buffer of the output begins at `start`. In this order,
    /// so that between the two a move that is done counts once.
    pub fn settle(&self, start: u64) {
        self.moving().store(start, Ordering::Release);
        self.start().store(start, Ordering::Release);
    }

    pub fn dropped(&self) -> &AtomicU64 {
        self.0.u64(80)
    }

    pub fn file_position(&self) -> &AtomicU64 {
        self.0.u64(88)
    }

    pub fn told(&self) -> &AtomicU64 {
        self.0.u64(104)
    }

    pub fn put_mark(&self, at: u32, code: u8) {
        self.0.u8(MARKS_AT + at as usize % MARKS).store(code, Ordering::Relaxed);
    }

    pub fn mark(&self, at: u32) -> u8 {
        self.0.u8(MARKS_AT + at as usize % MARKS).load(Ordering::Relaxed)
    }

    fn fetching(&self) -> &AtomicU64 {
        self.0.u64(96)
    }

    /// Moves `count` bytes, at most [`RAW`], out of `pipe`, which has that many: the move
    /// number `number`. Whoever dies on the way leaves the pipe as it was, or without them.
    pub fn fetch(&self, pipe: impl AsFd, count: usize, number: u32) -> Result<usize, Errno> {
        let count = count.min(RAW);
        let word = u64::from(number) << 32 | count as u64;
        self.fetching().store(word, Ordering::Release);
        self.read_raw(pipe, count)
    }

    /// How many bytes the move number `number` is about, if it is the one under way.
    pub fn fetch_under_way(&self, number: u32) -> Option<usize> {
        let word = self.fetching().load(Ordering::Acquire);
        let count = word as u32 as usize;
        ((word >> 32) as u32 == number && (1..=RAW).contains(&count)).then_some(count)
    }

    #[allow(unsafe_code)] // reading into shared memory
    fn read_raw(&self, pipe: impl AsFd, count: usize) -> Result<usize, Errno> {
        let start = self.0.u8(RAW_AT).as_ptr();
        // SAFETY: the mapping has RAW bytes from RAW_AT on, `count` is not more, and it is
        // only ever accessed by atomics and the kernel.
        let read = unsafe { libc::read(pipe.as_fd().as_raw_fd(), start.cast(), count.min(RAW)) };
        Errno::result(read).map(|read| read as usize)
    }

    /// Byte `at` of what came out of the pipe last.
    pub fn raw(&self, at: usize) -> u8 {
        self.0.u8(RAW_AT + at % RAW).load(Ordering::Relaxed)
    }

    pub fn put_input(&self, at: u64, byte: u8) {
        self.0.u8(INPUT_AT + (at % INPUT as u64) as usize).store(byte, Ordering::Relaxed);
    }

    pub fn input(&self, at: u64) -> u8 {
        self.0.u8(INPUT_AT + (at % INPUT as u64) as usize).load(Ordering::Relaxed)
    }

    pub fn put_output(&self, at: u64, byte: u8) {
        self.0.u8(OUTPUT_AT + (at % OUTPUT as u64) as usize).store(byte, Ordering::Relaxed);
    }

    pub fn output(&self, at: u64) -> u8 {
        self.0.u8(OUTPUT_AT + (at % OUTPUT as u64) as usize).load(Ordering::Relaxed)
    }
}

const WORDS: usize = 22;
const _: () = assert!(8 * WORDS <= COPY && LONGEST <= 24);

fn pack(state: &State) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    words[0] = u64::from(state.position) | u64::from(state.fetched) << 32;
    let [first @ .., scratch] = state.registers;
    words[1] = u64::from_le_bytes(first);
    words[2] =
        u64::from(scratch) | u64::from(state.after_ctrl_a) << 8 | (state.fifo.len() as u64) << 16;
    for (n, byte) in state.fifo.iter().take(FIFO).enumerate() {
        words[3 + n / 8] |= u64::from(*byte) << (8 * (n % 8));
    }
    (words[11], words[12], words[13], words[14], words[15]) =
        (state.end, state.transmitted, state.received, state.typed, state.taken);
    let (line, len) = state.lines.parts();
    for (n, byte) in line.iter().enumerate() {
        words[16 + n / 8] |= u64::from(*byte) << (8 * (n % 8));
    }
    words[19] = len as u64;
    if let Some((vcpu, ticket, value)) = state.answer {
        words[20] = u64::from(ticket) << 16 | u64::from(vcpu) << 8 | u64::from(value) | 1 << 63;
    }
    words[21] = state.marks.into();
    words
}

fn unpack(words: &[u64; WORDS]) -> Option<State> {
    let byte = |word: u64, n: usize| (word >> (8 * n)) as u8;
    let buffered = usize::try_from(words[2] >> 16).ok().filter(|len| *len <= FIFO)?;
    let mut registers = [0; 9];
    registers[..8].copy_from_slice(&words[1].to_le_bytes());
    registers[8] = byte(words[2], 0);
    let (end, typed, taken) = (words[11], words[14], words[15]);
    // Nothing is counted so far, nor does counting on overflow.
    if [end, typed, taken].iter().any(|count| count >> 62 != 0) {
        return None;
    }
    if typed.wrapping_sub(taken) > INPUT as u64 {
        return None;
    }
    let line = std::array::from_fn(|n| byte(words[16 + n / 8], n % 8));
    let lines = Lines::from_parts(line, usize::try_from(words[19]).ok()?);
    let answer = (words[20] >> 63 != 0)
        .then(|| (byte(words[20], 1), (words[20] >> 16) as u32 & 0xff_ffff, byte(words[20], 0)));
    Some(State {
        position: words[0] as u32,
        registers,
        fifo: (0..buffered).map(|n| byte(words[3 + n / 8], n % 8)).collect(),
        lines,
        end,
        transmitted: words[12],
        received: words[13],
        typed,
        taken,
        fetched: (words[0] >> 32) as u32,
        after_ctrl_a: byte(words[2], 1) & 1 != 0,
        marks: words[21] as u32,
        answer,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cellblock_wire::sealed_memfd;
    use proptest::prelude::*;

    fn journal() -> Journal {
        Journal::map(sealed_memfd("journal", JOURNAL_BYTES as u64).expect("memfd")).expect("map")
    }

    fn state() -> State {
        let mut lines = Lines::default();
        b"cellblock:hea".iter().for_each(|byte| assert_eq!(lines.push(*byte), None));
        State {
            position: 0xffff_fffe,
            registers: [12, 0, 5, 0xc1, 3, 0x60, 8, 0xb0, 0xa5],
            fifo: (0..64).collect(),
            lines,
            end: 1 << 40,
            transmitted: u64::MAX,
            received: 77,
            typed: 100,
            taken: 90,
            fetched: u32::MAX,
            after_ctrl_a: true,
            marks: u32::MAX,
            answer: Some((63, 0xab_cdef, 0x5a)),
        }
    }

    #[test]
    fn what_is_committed_is_found() {
        let journal = journal();
        assert_eq!(journal.state(), None);
        for state in [state(), State::default(), state()] {
            journal.commit(&state);
            assert_eq!(journal.state(), Some(state));
        }
    }

    #[test]
    fn a_move_of_input_is_known_until_it_is_committed() {
        let journal = journal();
        let (from, to) = nix::unistd::pipe().expect("pipe");
        assert_eq!(journal.fetch_under_way(1), None);
        nix::unistd::write(&to, b"typed").expect("write");
        assert_eq!(journal.fetch(&from, 5, 1), Ok(5));
        assert_eq!((0..5).map(|at| journal.raw(at)).collect::<Vec<_>>(), b"typed");
        assert_eq!((journal.fetch_under_way(1), journal.fetch_under_way(2)), (Some(5), None));
        journal.fetching().store(1 << 32 | (RAW as u64 + 1), Ordering::Relaxed);
        assert_eq!(journal.fetch_under_way(1), None);
    }

    #[test]
    fn half_a_commit_does_not_count() {
        let journal = journal();
        journal.commit(&state());
        let commits = journal.commits().load(Ordering::Relaxed);
        journal.commit(&State::default());
        journal.commits().store(commits, Ordering::Relaxed);
        assert_eq!(journal.state(), Some(state()));
    }

    proptest! {
        #[test]
        fn a_hostile_journal_is_bounded(
            words in prop::collection::vec(prop_oneof![0u64..70 << 16, any::<u64>()], WORDS),
        ) {
            let journal = journal();
            journal.commits().store(2, Ordering::Relaxed);
            for (n, word) in words.iter().enumerate() {
                journal.0.u64(COPIES_AT + 8 * n).store(*word, Ordering::Relaxed);
            }
            if let Some(state) = journal.state() {
                prop_assert!(state.fifo.len() <= FIFO);
                prop_assert!(state.typed.wrapping_sub(state.taken) <= INPUT as u64);
                journal.commit(&state);
                prop_assert_eq!(journal.state(), Some(state));
            }
        }
    }
}
