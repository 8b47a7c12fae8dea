//! What the device keeps to itself, given to a front end and taken from one: whether its cache is
//! on, and which disk it is of. Everything else a front end knows, or it is in the rings.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostUserProtocolFeatures};
use vhost::vhost_user::{Error, Result};

use super::Backend;
use crate::blk::config::WRITEBACK;

const MAGIC: [u8; 8] = *b"CBBLKST1";
const BYTES: usize = 24;
/// How long a front end may take over its end of the pipe, in milliseconds.
const PATIENCE: u16 = 1000;

impl Backend {
    /// Gives the state over `pipe`, or will take it from there when the front end asks whether all
    /// went well: it writes only once it has the answer to this. Only while no ring runs.
    pub(super) fn transfer(
        &mut self,
        direction: VhostTransferStateDirection,
        pipe: File,
    ) -> Result<()> {
        (self.transferred, self.incoming) = (false, None);
        if !self.protocol.contains(VhostUserProtocolFeatures::DEVICE_STATE) {
            return Err(Error::InvalidOperation("device state was not agreed on"));
        }
        if self.any_running() {
            return Err(Error::InvalidOperation("a ring is running"));
        }
        match direction {
            VhostTransferStateDirection::SAVE => self.save(pipe)?,
            VhostTransferStateDirection::LOAD => {
                self.incoming = Some(pipe);
                return Ok(());
            }
        }
        self.transferred = true;
        Ok(())
    }

    /// Whether the state was transferred, all of it.
    pub(super) fn check_transfer(&mut self) -> Result<()> {
        if let Some(pipe) = self.incoming.take() {
            if self.any_running() {
                return Err(Error::InvalidOperation("a ring is running"));
            }
            self.load(pipe)?;
            self.transferred = true;
        }
        match self.transferred {
            true => Ok(()),
            false => Err(Error::InvalidOperation("no state was transferred")),
        }
    }

    fn encoded(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.disk.size.to_le_bytes());
        bytes[16] = self.disk.read_only.into();
        bytes[17] = self.config[WRITEBACK];
        bytes
    }

    fn save(&self, mut pipe: File) -> Result<()> {
        wait(&pipe, PollFlags::POLLOUT)?;
        pipe.write_all(&self.encoded()).map_err(Error::ReqHandlerError)
    }

    fn load(&mut self, mut pipe: File) -> Result<()> {
        // One byte more, to see that there is none.
        let mut bytes = [0; BYTES + 1];
        let mut len = 0;
        while len < bytes.len() {
            wait(&pipe, PollFlags::POLLIN)?;
            match pipe.read(&mut bytes[len..]).map_err(Error::ReqHandlerError)? {
                0 => break,
                n => len += n,
            }
        }
        let own = self.encoded();
        if len != BYTES || bytes[..17] != own[..17] || bytes[17] > 1 || bytes[18..] != [0; 7] {
            return Err(Error::InvalidOperation("the state is of another disk, or none"));
        }
        self.config[WRITEBACK] = bytes[17];
        // A front end may tell of the driver only after that.
        self.loaded = (self.acked == 0).then_some(bytes[17]);
        Ok(())
    }
}

/// Waits until a pipe of the front end's has or takes something.
fn wait(pipe: &File, wanted: PollFlags) -> Result<()> {
    let mut fds = [PollFd::new(pipe.as_fd(), wanted)];
    match poll(&mut fds, PollTimeout::from(PATIENCE)) {
        Ok(0) => Err(Error::InvalidOperation("the front end does not transfer the state")),
        Ok(_) => Ok(()),
        Err(errno) => Err(Error::ReqHandlerError(errno.into())),
    }
}
