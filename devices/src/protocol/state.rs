//! What a device process keeps across a snapshot: given at a quiesce, handed back at a restore.
//!
//! What the VMM can see for itself (counters, rings, the transport's registers) is not in here.

use serde::{Deserialize, Serialize};

use super::counters::VirtioBlkCountersSnapshot;

/// Most bytes of input that a serial process holds for its guest, so that its state fits a
/// message.
pub const INPUT_MAX: usize = 32 * 1024;
/// Bytes of a 16550's receive FIFO.
pub const FIFO: usize = 64;

/// What a quiesced process answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CellState {
    /// A block process. Its rings were stopped through its front end before.
    Blk {
        /// Rings that run all the same.
        running: u16,
        /// Tokens the throttle has: of bytes, of requests; `i64::MAX` without a limit.
        balance: [i64; 2],
    },
    /// A serial process: everything in the ring is carried out, output is on its way.
    Serial(SerialState),
}

/// What a process that has served nothing yet is to go on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CellLoad {
    /// A block process.
    Blk {
        /// What each queue has counted.
        counters: Vec<VirtioBlkCountersSnapshot>,
        /// Tokens the throttle had.
        balance: [i64; 2],
    },
    /// A serial process.
    Serial(SerialState),
}

/// A serial line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// DLL, DLM, IER, IIR, LCR, LSR, MCR, MSR, SCR.
    pub registers: [u8; 9],
    /// What the receive FIFO holds.
    pub fifo: Vec<u8>,
    /// What the user sent and the FIFO has not taken.
    pub input: Vec<u8>,
    /// The line that the guest has begun, as far as a marker may be in it.
    pub line: Vec<u8>,
    /// Bytes the guest wrote so far.
    pub output: u64,
    /// Bytes the guest was given so far.
    pub received: u64,
}

impl SerialState {
    /// Whether it is within the bounds of a serial process.
    pub fn is_possible(&self) -> bool {
        self.fifo.len() <= FIFO && self.input.len() <= INPUT_MAX && self.line.len() <= FIFO
    }
}
