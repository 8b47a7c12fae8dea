//! Messages to the VMM: sent at once where there is room, kept where there is not.

use std::collections::VecDeque;

use cellblock_wire::{Channel, ChannelError};

use crate::protocol::FromCell;

/// Markers are the guest's to send, so there is an end to how many are kept.
const KEPT: usize = 256;

#[derive(Default)]
pub(super) struct Outbox {
    waiting: VecDeque<FromCell>,
}

impl Outbox {
    pub(super) fn send(&mut self, message: FromCell, cell: &Channel) -> Result<(), ChannelError> {
        if matches!(message, FromCell::Marker(_)) && self.waiting.len() >= KEPT {
            return Ok(()); // a guest that floods us with markers has made its point
        }
        self.waiting.push_back(message);
        self.flush(cell)
    }

    pub(super) fn flush(&mut self, cell: &Channel) -> Result<(), ChannelError> {
        while let Some(message) = self.waiting.front() {
            if !cell.try_send(message, &[])? {
                break;
            }
            self.waiting.pop_front();
        }
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
