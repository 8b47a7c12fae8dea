//! The record of requests in flight, as a process that a guest owned may have left it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use cellblock_wire::sealed_memfd;
use vhost::vhost_user::message::VhostUserInflight;

use super::Input;
use crate::blk::config::QUEUE_SIZE;
use crate::blk::inflight::{Records, record_bytes};

/// Most changes that one step makes.
const CHANGES: u8 = 16;

/// A record for so many queues, in a file of its own.
pub struct Damaged {
    pub file: File,
    queues: u16,
}

impl Damaged {
    pub fn new(queues: u16) -> Damaged {
        let bytes = record_bytes(queues, QUEUE_SIZE) as u64;
        Damaged { file: sealed_memfd("record", bytes).expect("memfd").into(), queues }
    }

    /// What is said of it where nobody lies.
    pub fn shape(&self) -> VhostUserInflight {
        let bytes = record_bytes(self.queues, QUEUE_SIZE) as u64;
        VhostUserInflight::new(bytes, 0, self.queues, QUEUE_SIZE)
    }

    pub fn map(&self) -> Records {
        Records::map(&self.shape(), &self.file, self.queues).expect("the record is good")
    }

    /// Writes into it what the program says, under headers and marks that can be.
    pub fn damage(&self, input: &mut Input<'_>) -> Option<()> {
        for _ in 0..input.u8()? % CHANGES {
            let (place, what) = (input.u16()?, input.u16()?);
            let queue = u64::from(place >> 15) % u64::from(self.queues);
            let base = queue * record_bytes(1, QUEUE_SIZE) as u64;
            let entry = 16 * (1 + u64::from(place & 0xff));
            let what = u64::from(what);
            let (at, word) = match place >> 8 & 7 {
                // A header: its version and entries are right, or nearly.
                0 | 1 => {
                    let entries = u64::from(QUEUE_SIZE);
                    (8, 1 | entries << 16 | (what & 0x1ff) << 32 | (what >> 9) << 48)
                }
                2 => (8, what | u64::from(place & 0xff) << 16),
                // A mark, with the one before in its batch.
                3 | 4 => (entry, 1 | what << 48),
                5 => (entry, what),
                6 => (entry + 8, what),
                _ => (entry + 8, u64::MAX - what),
            };
            self.file.write_at(&word.to_le_bytes(), base + at).expect("within the record");
        }
        Some(())
    }
}
