//! What the commands that talk to a running VM share.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, output};
use crate::control::client::Client;
use crate::control::protocol::{Reply, Request};

/// Which VM, and how to answer.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// The VM's control socket, as given to 'cellblock run --control'
    #[arg(value_name = "CONTROL")]
    pub(super) control: PathBuf,
    /// Print the VM's answer as JSON, in its stable form (see README.md)
    #[arg(long)]
    pub(super) json: bool,
}

impl Target {
    pub(super) fn connect(&self) -> Result<Client, Failure> {
        Client::connect(&self.control).map_err(Failure::error)
    }

    /// Asks one thing and prints the answer: as it came, or as `show` puts it.
    pub(super) fn ask(
        &self,
        client: &mut Client,
        request: Request,
        show: impl FnOnce(Reply) -> Option<String>,
    ) -> Result<(), Failure> {
        let (reply, line) = client.ask(request).map_err(Failure::error)?;
        let Some(text) = show(reply) else {
            return Err(Failure::Error("the VM answered another question".into()));
        };
        if self.json { output::print_line(&line) } else { output::print(&text) }
    }
}

/// Microseconds for people: in milliseconds, or in seconds when there are many.
pub(super) fn duration(us: u64) -> String {
    match us {
        0..1_000_000 => format!("{:.3} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}
