//! `cellblock pause`.

use clap::Args;

use super::Failure;
use super::control::{Target, duration};
use crate::control::protocol::{Reply, Request};

/// Park every vCPU of a running VM.
///
/// Returns when the last one is parked. Devices keep their state; the guest's
/// memory does not change any more once they have finished what they hold.
#[derive(Debug, Args)]
pub(super) struct Pause {
    #[command(flatten)]
    target: Target,
}

impl Pause {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let mut client = self.target.connect()?;
        self.target.ask(&mut client, Request::Pause, |reply| match reply {
            Reply::Pause { epoch, took_us } => {
                Some(format!("paused in {} (pause {epoch})\n", duration(took_us)))
            }
            _ => None,
        })
    }
}
