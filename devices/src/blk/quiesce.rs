//! What a block process says at a snapshot, and takes over at a restore.
//!
//! Its rings are stopped and started by its front end, with GET_VRING_BASE and what sets a
//! ring up: everything that was taken is answered by then.

use super::{Blk, throttle};
use crate::protocol::FromCell;
use crate::protocol::state::{CellLoad, CellState};

impl Blk {
    pub(super) fn quiesced(&self, epoch: u64) -> FromCell {
        let (_, running) = self.backend().rings();
        let balance = self.throttle.balance(throttle::now());
        let running = u16::try_from(running).unwrap_or(u16::MAX);
        FromCell::Quiesced { epoch, state: Box::new(CellState::Blk { running, balance }) }
    }

    /// Goes on from where a disk once stood. False where this one serves already, or the
    /// state is another device's.
    pub(super) fn load(&self, load: CellLoad) -> bool {
        let (rings, running) = self.backend().rings();
        match load {
            CellLoad::Blk { counters, balance } if running == 0 && counters.len() == rings => {
                for (queue, state) in (0..).zip(&counters) {
                    self.counters.queue(queue).load(state);
                }
                self.throttle.set_balance(balance, throttle::now());
                true
            }
            _ => false,
        }
    }
}
