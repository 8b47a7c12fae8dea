//! `cellblock throttle`.

use clap::Args;

use super::Failure;
use super::control::Target;
use super::stats::bytes;
use crate::control::protocol::{Limits, Reply, Request};
use crate::remedy::printable;
use crate::spec::Throttle as Change;

/// Change how much a disk of a running VM may do.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  cellblock throttle /tmp/vm disk0 bw=100M iops=5000")]
pub(super) struct Throttle {
    #[command(flatten)]
    target: Target,
    /// The disk's id
    #[arg(value_name = "ID")]
    id: String,
    /// bw, bw-burst (bytes a second, bytes at once), iops, iops-burst (requests); what is
    /// not given stays, 0 is no limit
    #[arg(value_name = "KEY=VALUE", required = true)]
    limits: Vec<String>,
}

impl Throttle {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let Change { bw, bw_burst, iops, iops_burst } = self.change().map_err(Failure::Usage)?;
        let id = self.id.clone();
        let request = Request::Throttle { id, bw, bw_burst, iops, iops_burst };
        let mut client = self.target.connect()?;
        self.target.ask(&mut client, request, |reply| match reply {
            Reply::Throttle { id, limits } => Some(text(&id, &limits)),
            _ => None,
        })
    }

    fn change(&self) -> Result<Change, String> {
        let mut change = Change::default();
        for limit in &self.limits {
            let (key, value) = limit.split_once('=').unwrap_or((limit, ""));
            change
                .set(key, value)
                .map_err(|why| printable(&format!("'{limit}' is not a limit: {why}")))?;
        }
        Ok(change)
    }
}

fn text(id: &str, limits: &Limits) -> String {
    let limit = |rate: Option<String>, burst: Option<String>| match (rate, burst) {
        (Some(rate), Some(burst)) => format!("{rate} a second, {burst} at once"),
        _ => "no limit".to_string(),
    };
    let requests = |n: Option<u64>| n.map(|n| n.to_string());
    format!(
        "{}\nbytes     {}\nrequests  {}\n",
        printable(id),
        limit(limits.bw.map(bytes), limits.bw_burst.map(bytes)),
        limit(requests(limits.iops), requests(limits.iops_burst)),
    )
}
