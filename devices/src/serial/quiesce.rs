//! Standing still for a snapshot, and going on from one.
//!
//! Every access that was posted is carried out before the answer, and what the guest wrote
//! with them is handed to the thread that delivers it: a restored VM does not print it again.
//! Input stays where it is, in the FIFO or in front of it, and is part of the state.

use std::os::fd::AsFd;

use cellblock_wire::Channel;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use super::marker::Lines;
use super::{Serial, SerialError};
use crate::protocol::FromCell;
use crate::protocol::state::{CellLoad, CellState, SerialState};

impl Serial {
    pub(super) fn is_quiesced(&self) -> bool {
        self.quiesced.is_some()
    }

    /// Carries out what is in the ring, which has an end because every vCPU has parked, and
    /// answers.
    pub(super) fn quiesce(&mut self, epoch: u64, cell: &Channel) -> Result<(), SerialError> {
        while self.take_accesses()? > 0 {}
        self.hand_over();
        self.quiesced = Some(epoch);
        let (registers, fifo, line) = self.uart.state();
        let state = Box::new(CellState::Serial(SerialState {
            registers,
            fifo,
            input: self.input.save(),
            line: line.save(),
            output: self.transmitted,
            received: self.received,
        }));
        self.send(FromCell::Quiesced { epoch, state }, cell)
    }

    pub(super) fn thaw(&mut self, epoch: u64) -> Result<(), SerialError> {
        if self.quiesced == Some(epoch) {
            self.quiesced = None;
        }
        Ok(())
    }

    pub(super) fn load(&mut self, load: CellLoad, cell: &Channel) -> Result<(), SerialError> {
        // What the user has sent to a line that nobody had yet: it comes after what was sent
        // to the one that goes on here. At a reset it was for the guest that is gone.
        let sent = match self.is_quiesced() {
            true => Vec::new(),
            false => [self.uart.state().1, self.input.save()].concat(),
        };
        let loaded = match load {
            CellLoad::Serial(state) if state.is_possible() => {
                let SerialState { registers, fifo, input, line, output, received } = state;
                let loaded = self.uart.load(registers, fifo, Lines::load(&line));
                if loaded {
                    (self.transmitted, self.received) = (output, received);
                    self.input.load(&[input, sent].concat());
                }
                loaded
            }
            _ => false,
        };
        if !self.is_quiesced() {
            self.feed();
        }
        self.commit();
        self.send(FromCell::Loaded(loaded), cell)
    }

    /// Ends with whoever is at the line, before its guest is put back to be another's: what they
    /// have not read is given up, what they sent is dropped by the load that follows.
    pub(super) fn part(&mut self, cell: &Channel) -> Result<(), SerialError> {
        while self.take_accesses()? > 0 {}
        self.hand_over();
        self.endpoint.part();
        if let Some(output) = &self.output {
            output.forget();
        }
        if let Some(None) = self.endpoint.client_news()
            && cell.try_send(&FromCell::Client, &[]).map_err(SerialError::Channel)?
        {
            self.endpoint.news_told();
        }
        self.send(FromCell::Parted, cell)
    }

    /// Waits for the VMM, and for nothing else but the output that is on its way.
    pub(super) fn stand_still(&mut self, cell: &Channel) -> Result<(), SerialError> {
        let to_send = if self.has_sent_all() { PollFlags::empty() } else { PollFlags::POLLOUT };
        let mut fds = vec![PollFd::new(cell.as_fd(), PollFlags::POLLIN | to_send)];
        fds.extend(self.output.iter().map(|out| PollFd::new(out.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, self.drain_time()) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(SerialError::Poll(error)),
        }
        if let Some(output) = &self.output {
            output.acknowledge();
            if let Some(reader) = output.lost() {
                self.endpoint.lost(&reader);
            }
        }
        if let Some((message, _)) = cell.try_recv().map_err(SerialError::Channel)? {
            self.obey(message, cell)?;
        }
        self.send_all(cell)?;
        self.answer_drains(cell)
    }
}
