//! A VM that somebody has.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::engine::Lease;
use super::shell::{Recipe, Shell};
use super::times::ClaimTimes;
use crate::control::client::{Client, ClientError};
use crate::snapshot::format::SnapshotId;

/// A VM out of a pool. Dropped, it is given back, which ends it or resets it, as the pool says.
#[derive(Debug)]
pub struct PooledRestoreVm {
    lease: Lease<Recipe>,
    times: ClaimTimes,
}

impl PooledRestoreVm {
    pub(super) fn new(lease: Lease<Recipe>, times: ClaimTimes) -> PooledRestoreVm {
        PooledRestoreVm { lease, times }
    }

    /// Where the time of its claim went.
    pub fn times(&self) -> ClaimTimes {
        self.times
    }

    fn shell(&self) -> &Shell {
        // It goes with the lease, which goes with this.
        self.lease.get().unwrap_or_else(|| unreachable!("a VM without its shell"))
    }

    /// Its id, which its guest finds in its metadata.
    pub fn id(&self) -> SnapshotId {
        self.shell().id()
    }

    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.shell().pid()
    }

    /// Where its control socket is.
    pub fn control_path(&self) -> &Path {
        self.shell().control()
    }

    /// Where its console's socket is.
    pub fn console_path(&self) -> &Path {
        self.shell().console()
    }

    /// Connects to its control socket.
    pub fn control(&self) -> Result<Client, ClientError> {
        Client::connect(self.control_path())
    }

    /// Connects to its console, which has one client at a time. What the guest has said before is
    /// kept for the first one.
    pub fn console(&self) -> io::Result<UnixStream> {
        UnixStream::connect(self.console_path())
    }

    /// Waits for the VM to end by itself, for `limit` at most. Whether it has.
    pub fn wait_ended(&self, limit: Duration) -> bool {
        self.shell().ends_within(limit)
    }
}

/// Hangs up when the VM has ended; there is nothing to read.
impl AsFd for PooledRestoreVm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shell().as_fd()
    }
}
