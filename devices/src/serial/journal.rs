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
//! | 128, 384 | two copies of the state | main thread |
//! | 4096 | what was typed, a ring | main thread |
//! | 4096 + 128 KiB | what was transmitted, a ring | main thread |
//!
//! A guest may have owned the process that wrote it: what is found is bounded before it is
//! used, and a journal that makes no sense is begun anew.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cellblock_wire::{Access, Mapping, ShmError};
use std::os::fd::AsFd;
use vm_superio::serial::SerialState;

use super::marker::{LONGEST, Lines};
use crate::protocol::{JOURNAL_BYTES, OUTPUT_MAX};

const COPIES_AT: usize = 128;
const COPY: usize = 256;
const INPUT_AT: usize = 4096;
/// Bytes typed that can wait.
pub(super) const INPUT: usize = 128 * 1024;
const OUTPUT_AT: usize = INPUT_AT + INPUT;
/// Bytes transmitted that can wait: those kept for a slow reader, and those that
/// `serial-out` has not been told of.
pub(super) const OUTPUT: usize = OUTPUT_MAX as usize + 2 * BATCH;
/// It is told at the latest after so many.
pub(super) const BATCH: usize = 32 * 1024;
/// Bytes that the UART's receiver holds at most.
const FIFO: usize = 64;

const _: () = assert!(OUTPUT_AT + OUTPUT <= JOURNAL_BYTES);

/// The journal, mapped. Shared by the process's threads.
#[derive(Clone, Debug)]
pub(super) struct Journal(Arc<Mapping>);

/// Everything that changes with an access.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct State {
    /// Accesses carried out, as the register ring counts.
    pub position: u32,
    pub uart: SerialState,
    pub lines: Lines,
    /// Bytes transmitted so far.
    pub end: u64,
    /// Bytes that the guest was given so far.
    pub received: u64,
    /// Bytes typed so far, and those of them that the UART has taken.
    pub typed: u64,
    pub taken: u64,
    /// A ctrl-a is to be followed by what it means.
    pub after_ctrl_a: bool,
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

    pub fn dropped(&self) -> &AtomicU64 {
        self.0.u64(80)
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

const WORDS: usize = 20;
const _: () = assert!(8 * WORDS <= COPY && LONGEST <= 24);

fn pack(state: &State) -> [u64; WORDS] {
    let uart = &state.uart;
    let mut words = [0; WORDS];
    words[0] = u64::from(state.position) | u64::from(state.after_ctrl_a) << 32;
    words[1] = u64::from_le_bytes([
        uart.baud_divisor_low,
        uart.baud_divisor_high,
        uart.interrupt_enable,
        uart.interrupt_identification,
        uart.line_control,
        uart.line_status,
        uart.modem_control,
        uart.modem_status,
    ]);
    words[2] = u64::from(uart.scratch) | (uart.in_buffer.len() as u64) << 8;
    for (n, byte) in uart.in_buffer.iter().take(FIFO).enumerate() {
        words[3 + n / 8] |= u64::from(*byte) << (8 * (n % 8));
    }
    (words[11], words[12], words[13], words[14]) =
        (state.end, state.received, state.typed, state.taken);
    let (line, len) = state.lines.parts();
    for (n, byte) in line.iter().enumerate() {
        words[15 + n / 8] |= u64::from(*byte) << (8 * (n % 8));
    }
    words[18] = len as u64;
    if let Some((vcpu, ticket, value)) = state.answer {
        words[19] = u64::from(ticket) << 16 | u64::from(vcpu) << 8 | u64::from(value) | 1 << 63;
    }
    words
}

fn unpack(words: &[u64; WORDS]) -> Option<State> {
    let byte = |word: u64, n: usize| (word >> (8 * n)) as u8;
    let buffered = usize::try_from(words[2] >> 8).ok().filter(|len| *len <= FIFO)?;
    let [low, high, enable, identification, control, status, modem, modem_status] =
        words[1].to_le_bytes();
    let uart = SerialState {
        baud_divisor_low: low,
        baud_divisor_high: high,
        interrupt_enable: enable,
        interrupt_identification: identification,
        line_control: control,
        line_status: status,
        modem_control: modem,
        modem_status,
        scratch: byte(words[2], 0),
        in_buffer: (0..buffered).map(|n| byte(words[3 + n / 8], n % 8)).collect(),
    };
    let (typed, taken) = (words[13], words[14]);
    // Nothing is counted so far, nor does counting on overflow.
    if [words[11], words[12], typed, taken].iter().any(|count| count >> 62 != 0) {
        return None;
    }
    if typed.wrapping_sub(taken) > INPUT as u64 {
        return None;
    }
    let line = std::array::from_fn(|n| byte(words[15 + n / 8], n % 8));
    let lines = Lines::from_parts(line, usize::try_from(words[18]).ok()?);
    let answer = (words[19] >> 63 != 0)
        .then(|| (byte(words[19], 1), (words[19] >> 16) as u32 & 0xff_ffff, byte(words[19], 0)));
    Some(State {
        position: words[0] as u32,
        uart,
        lines,
        end: words[11],
        received: words[12],
        typed,
        taken,
        after_ctrl_a: words[0] >> 32 & 1 != 0,
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
            uart: SerialState {
                baud_divisor_low: 12,
                interrupt_enable: 5,
                scratch: 0xa5,
                in_buffer: (0..64).collect(),
                ..Default::default()
            },
            lines,
            end: 1 << 40,
            received: 77,
            typed: 100,
            taken: 90,
            after_ctrl_a: true,
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
            words in prop::collection::vec(prop_oneof![0u64..70 << 8, any::<u64>()], WORDS),
        ) {
            let journal = journal();
            journal.commits().store(2, Ordering::Relaxed);
            for (n, word) in words.iter().enumerate() {
                journal.0.u64(COPIES_AT + 8 * n).store(*word, Ordering::Relaxed);
            }
            if let Some(state) = journal.state() {
                prop_assert!(state.uart.in_buffer.len() <= FIFO);
                prop_assert!(state.typed.wrapping_sub(state.taken) <= INPUT as u64);
                journal.commit(&state);
                prop_assert_eq!(journal.state(), Some(state));
            }
        }
    }
}
