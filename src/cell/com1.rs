//! How to make COM1's process, and to make it again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cellblock_devices::protocol::{JOURNAL_BYTES, SerialStart, Start};
use cellblock_seccomp::spawner::Spawner;
use cellblock_wire::sealed_memfd;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::launch::{Common, launch};
use super::{Cell, CellError};

/// The id of its device.
pub const ID: &str = "com1";

/// All that a process of COM1 is given. It outlives the process.
#[derive(Debug)]
pub struct Recipe {
    start: SerialStart,
    fds: Vec<OwnedFd>,
}

impl Recipe {
    /// For a register ring with its doorbell and interrupt, and a console.
    pub fn new(
        start: SerialStart,
        ring: [BorrowedFd<'_>; 3],
        console: Vec<OwnedFd>,
    ) -> Result<Recipe, CellError> {
        let keep = |source| CellError::Image { id: ID.into(), source };
        let ring = ring.iter().map(|fd| fd.try_clone_to_owned()).collect::<Result<Vec<_>, _>>();
        let journal = sealed_memfd("cellblock-journal", JOURNAL_BYTES as u64);
        let journal =
            journal.map_err(|source| CellError::Shm { role: "serial", id: ID.into(), source })?;
        let pipe = || pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).map_err(|e| keep(e.into()));
        let (output, input) = (pipe()?, pipe()?);
        let mut fds = ring.map_err(keep)?;
        fds.extend([journal, output.0, output.1, input.0, input.1]);
        fds.extend(console);
        Ok(Recipe { start, fds })
    }

    /// Asks for a process. `client` is whom the one before had on the console's socket.
    pub fn launch(
        &self,
        spawner: &mut Spawner,
        common: Common,
        client: Option<&OwnedFd>,
    ) -> Result<Cell, CellError> {
        let fds: Vec<_> = self.fds.iter().chain(client).map(OwnedFd::as_fd).collect();
        launch(spawner, common, ID, Start::Serial(self.start.clone()), &fds, None)
    }
}
