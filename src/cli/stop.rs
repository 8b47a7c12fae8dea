//! `cellblock stop`.

use std::time::Duration;

use clap::Args;

use super::Failure;
use super::control::Target;
use crate::control::protocol::{Reply, Request};

/// Longest wait for the VM to end.
const END: Duration = Duration::from_secs(30);

/// End a VM, running or paused, as if its power were cut.
///
/// The guest is not asked. What it wrote to its console is delivered first. Returns
/// when the VM has ended.
#[derive(Debug, Args)]
pub(super) struct Stop {
    #[command(flatten)]
    target: Target,
}

impl Stop {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let mut client = self.target.connect()?;
        self.target.ask(&mut client, Request::Stop, |reply| match reply {
            Reply::Stop => Some("stopping\n".into()),
            _ => None,
        })?;
        if client.wait_closed(END) {
            Ok(())
        } else {
            Err(Failure::Error(format!(
                "the VM did not end within {} s; kill its VMM process, which ends all others too",
                END.as_secs()
            )))
        }
    }
}
