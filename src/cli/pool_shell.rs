//! `cellblock pool-shell`: a VM that waits in a pool, which starts it and says what to be.

use std::os::fd::{AsFd, OwnedFd};

use cellblock_wire::Channel;
use clap::Args;
use nix::unistd::dup2_stdin;

use super::Failure;
use super::run::die_with_parent;
use crate::vmm::shell;

/// Wait for a pool's orders on standard input.
#[derive(Debug, Args)]
pub(super) struct PoolShell {}

impl PoolShell {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        die_with_parent()?;
        let failed = |what: &str| {
            let what = what.to_string();
            move |error: std::io::Error| Failure::Error(format!("{what}: {error}"))
        };
        let channel = std::io::stdin().as_fd().try_clone_to_owned();
        let channel = channel.map_err(failed("taking the pool's socket over"))?;
        // Closed with this process's own: nobody else is to have it.
        let null = std::fs::File::open("/dev/null").map_err(failed("opening /dev/null"))?;
        dup2_stdin(OwnedFd::from(null))
            .map_err(|errno| failed("replacing standard input")(errno.into()))?;
        shell::run(Channel::from_fd(channel)).map_err(Failure::error)
    }
}
