//! What a back end keeps to itself, taken from it or given to it: a vhost-user back end of another
//! program has state that no message names, and transfers it over a pipe (`SET_DEVICE_STATE_FD`,
//! `CHECK_DEVICE_STATE`) while its rings are stopped.

use std::fs::File;
use std::io::{self, Read, Write, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};

use super::worker::Worker;
use super::{Answer, FrontEnd, FrontEndError, Job};

/// Most bytes of a back end's state.
pub const MAX_STATE: usize = 1 << 20;
/// What a pipe takes without waiting once it takes anything.
const STEP: usize = 4096;

/// A state that could not be transferred.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The messages.
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    /// The pipe.
    #[error("transferring its state")]
    Pipe(#[source] io::Error),
    /// It goes on and on.
    #[error("its state has more than {MAX_STATE} bytes")]
    TooLarge,
    /// It did not transfer it in time.
    #[error("it did not transfer its state within {:.3} s", .0.as_secs_f64())]
    Late(Duration),
}

impl FrontEnd {
    /// The state of a back end whose rings are stopped.
    pub fn save_state(&self, limit: Duration) -> Result<Vec<u8>, TransferError> {
        let end = Instant::now() + limit;
        let (reader, writer) = pipe().map_err(TransferError::Pipe)?;
        let own = self.transfer(VhostTransferStateDirection::SAVE, writer.into())?;
        let mut from = own.unwrap_or_else(|| File::from(OwnedFd::from(reader)));
        let mut state = Vec::new();
        let mut bytes = [0; STEP];
        loop {
            wait(&from, PollFlags::POLLIN, limit, end)?;
            match from.read(&mut bytes).map_err(TransferError::Pipe)? {
                0 => break,
                n if state.len() + n > MAX_STATE => return Err(TransferError::TooLarge),
                n => state.extend_from_slice(&bytes[..n]),
            }
        }
        self.wait(&self.post(Job::CheckState))?;
        Ok(state)
    }

    /// Gives a back end that has not run the state it is to go on from.
    pub fn load_state(&self, state: &[u8], limit: Duration) -> Result<(), TransferError> {
        let end = Instant::now() + limit;
        let (reader, writer) = pipe().map_err(TransferError::Pipe)?;
        let own = self.transfer(VhostTransferStateDirection::LOAD, reader.into())?;
        let mut to = own.unwrap_or_else(|| File::from(OwnedFd::from(writer)));
        for bytes in state.chunks(STEP) {
            wait(&to, PollFlags::POLLOUT, limit, end)?;
            to.write_all(bytes).map_err(TransferError::Pipe)?;
        }
        drop(to);
        Ok(self.wait(&self.post(Job::CheckState))?)
    }

    /// The pipe to use, where that is one of the back end's.
    fn transfer(
        &self,
        direction: VhostTransferStateDirection,
        fd: OwnedFd,
    ) -> Result<Option<File>, FrontEndError> {
        self.wait(&self.post(|answer| Job::Transfer(direction, fd, answer)))
    }
}

/// Waits until `file` has or takes something.
fn wait(
    file: &File,
    wanted: PollFlags,
    limit: Duration,
    end: Instant,
) -> Result<(), TransferError> {
    let left = end.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(file.as_fd(), wanted)], timeout) {
        Ok(0) => Err(TransferError::Late(limit)),
        Ok(_) => Ok(()),
        Err(errno) => Err(TransferError::Pipe(errno.into())),
    }
}

impl Worker {
    pub(super) fn transfer(
        &self,
        direction: VhostTransferStateDirection,
        fd: OwnedFd,
        answer: &Answer<Option<File>>,
    ) {
        let phase = VhostTransferStatePhase::STOPPED;
        let result = self.frontend.set_device_state_fd(direction, phase, fd);
        answer.complete(self.exchange("transferring the state", result));
    }

    pub(super) fn check_state(&self, answer: &Answer<()>) {
        let result = self.frontend.check_device_state();
        answer.complete(self.exchange("checking the transferred state", result));
    }
}
