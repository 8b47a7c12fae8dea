//! `cellblock reset`.

use clap::Args;

use super::Failure;
use super::control::{Target, duration};
use crate::control::protocol::{Reply, Request};

/// Put a restored VM back to its snapshot, in place.
///
/// Memory, vCPUs, devices and what was written to 'cow' disks are as they were; processes,
/// console and control socket stay. A disk that is not 'cow' keeps what was written to it.
/// For VMs of one tenant: the device processes are not made anew.
#[derive(Debug, Args)]
pub(super) struct Reset {
    #[command(flatten)]
    target: Target,
}

impl Reset {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let mut client = self.target.connect()?;
        self.target.ask(&mut client, Request::Reset, |reply| match reply {
            Reply::Reset { took_us, pages, .. } => {
                Some(format!("reset in {} ({pages} pages put back)\n", duration(took_us)))
            }
            _ => None,
        })
    }
}
