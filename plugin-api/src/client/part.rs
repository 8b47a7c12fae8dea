//! A plugin's part in snapshots of its VM.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cellblock_wire::Channel;
use nix::errno::Errno;

use super::vm::STRANGE;
use crate::error::{Error, refused};
use crate::wire::Payload;
use crate::wire::part::{FromPart, MAX_STATE, ToPart};

/// By this a plugin hears of snapshots, and gives its state to be kept in them.
///
/// It is best served by a thread of its own: until the plugin has answered a
/// [`Moment::Quiesce`], the whole VM stands still, and if it does not, the snapshot fails.
#[derive(Debug)]
pub struct Part {
    channel: Channel,
    restored: Option<Vec<u8>>,
}

/// What a plugin has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moment {
    /// No vCPU runs and no event is open: come to rest, and call [`Part::quiesced`] with this
    /// number.
    Quiesce(u64),
    /// The VM is reset in place. Everybody is at rest: go back to this state, which is the one of
    /// the snapshot that the VM was restored from, and call [`Part::restored`] with this number.
    Restore(u64, Vec<u8>),
    /// Go on.
    Thaw,
}

impl Part {
    pub(super) fn new(channel: OwnedFd, restored: Option<Vec<u8>>) -> Part {
        Part { channel: Channel::from_fd(channel), restored }
    }

    /// The state to go on from, where the VM was restored from a snapshot; once.
    pub fn take_restored(&mut self) -> Option<Vec<u8>> {
        self.restored.take()
    }

    /// Waits for the next moment.
    ///
    /// # Errors
    /// [`Error::Closed`] when the VMM has ended.
    pub fn wait(&self) -> Result<Moment, Error> {
        let (message, fds) = self.channel.recv::<ToPart>()?;
        Ok(match message {
            ToPart::Quiesce { epoch } => Moment::Quiesce(epoch),
            ToPart::Restore { epoch, state } => {
                let state = state.take(fds.last().map(|fd| fd.as_fd()));
                Moment::Restore(epoch, state.map_err(|_| STRANGE)?)
            }
            ToPart::Thaw { .. } => Moment::Thaw,
        })
    }

    /// This plugin is at rest, and its state is `state`.
    ///
    /// # Errors
    /// EFBIG for more than [`MAX_STATE`] bytes; the VMM has been told then.
    pub fn quiesced(&self, epoch: u64, state: Vec<u8>) -> Result<(), Error> {
        const WHAT: &str = "giving a state to a snapshot";
        if state.len() > MAX_STATE {
            self.failed(epoch, Errno::EFBIG as i32)?;
            return Err(refused(WHAT)(Errno::EFBIG));
        }
        let (state, fd) = Payload::new(state).map_err(|_| refused(WHAT)(Errno::ENOMEM))?;
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        Ok(self.channel.send(&FromPart::Quiesced { epoch, state }, &fds)?)
    }

    /// This plugin is what the state of [`Moment::Restore`] says.
    ///
    /// # Errors
    /// When the VMM has ended.
    pub fn restored(&self, epoch: u64) -> Result<(), Error> {
        Ok(self.channel.send(&FromPart::Restored { epoch }, &[])?)
    }

    /// This plugin cannot take part this time. A reset that it cannot follow ends the VM.
    ///
    /// # Errors
    /// When the VMM has ended.
    pub fn failed(&self, epoch: u64, errno: i32) -> Result<(), Error> {
        Ok(self.channel.send(&FromPart::Failed { epoch, errno }, &[])?)
    }
}

impl AsFd for Part {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
