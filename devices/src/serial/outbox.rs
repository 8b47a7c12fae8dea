//! Messages to the VMM: sent at once where there is room, kept where there is not.

use std::collections::VecDeque;

use cellblock_wire::{Channel, ChannelError};

use crate::protocol::FromCell;

#[derive(Default)]
pub(super) struct Outbox {
    waiting: VecDeque<FromCell>,
}

impl Outbox {
    pub(super) fn put(&mut self, message: FromCell) {
        self.waiting.push_back(message);
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
