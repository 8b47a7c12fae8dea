//! `cellblock resume`.

use clap::Args;

use super::Failure;
use super::control::{Target, duration};
use crate::control::protocol::{Reply, Request};

/// Let the vCPUs of a paused VM go on.
#[derive(Debug, Args)]
pub(super) struct Resume {
    #[command(flatten)]
    target: Target,
}

impl Resume {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let mut client = self.target.connect()?;
        self.target.ask(&mut client, Request::Resume, |reply| match reply {
            Reply::Resume { epoch, took_us } => {
                Some(format!("resumed in {} (pause {epoch})\n", duration(took_us)))
            }
            _ => None,
        })
    }
}
