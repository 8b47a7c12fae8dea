//! `cellblock pool`: VMs from a snapshot, on demand.

mod claim;
mod serve;

use std::path::{Path, PathBuf};

use cellblock_devices::protocol::LogLevel;
use clap::{Args, Subcommand};

use super::control::duration;
use super::{Failure, output};
use crate::pool::service::client::PoolClient;
use crate::pool::service::protocol::{Answer, Request};
use crate::pool::stats::PoolStats;

/// Hand out VMs that go on from a snapshot, each within a millisecond or two.
///
/// 'serve' keeps VMs ready, with their device processes in their jails, and lets one go when it is
/// claimed. A VM belongs to whoever claimed it until they go.
#[derive(Debug, Args)]
pub(super) struct Pool {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Serve),
    Claim(claim::Claim),
    Stats(Stats),
    Drain(Drain),
}

impl Pool {
    pub(super) fn execute(self, level: LogLevel) -> Result<(), Failure> {
        match self.command {
            Command::Serve(serve) => serve.execute(level),
            Command::Claim(claim) => claim.execute(),
            Command::Stats(stats) => stats.execute(),
            Command::Drain(drain) => drain.execute(),
        }
    }
}

/// Show how a pool is.
#[derive(Debug, Args)]
struct Stats {
    /// The pool's socket, as given to 'cellblock pool serve --control'
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Print the pool's answer as JSON, in its stable form (see README.md)
    #[arg(long, conflicts_with = "prometheus")]
    json: bool,
    /// Print it in Prometheus's text format
    #[arg(long)]
    prometheus: bool,
}

impl Stats {
    fn execute(self) -> Result<(), Failure> {
        let (answer, line) = ask(&self.path, &Request::Stats)?;
        match answer {
            _ if self.json => output::print_line(&line),
            Answer::Stats(stats) if self.prometheus => output::print(&stats.prometheus()),
            Answer::Stats(stats) => output::print(&table(&stats)),
            _ => Err(Failure::Error("the pool answered another question".into())),
        }
    }
}

fn table(stats: &PoolStats) -> String {
    let mut table = output::Table::new(&["WHAT", "NOW", "MOST", "EVER"]);
    let mut row = |what: &str, now: Option<u64>, most: Option<u64>, ever: u64| {
        let text = |value: Option<u64>| value.map_or("-".into(), |value| value.to_string());
        table.row(vec![what.into(), text(now), text(most), ever.to_string()]);
    };
    row("idle shells", Some(stats.idle), Some(stats.max_size), stats.made);
    row("VMs in use", Some(stats.in_use), Some(stats.max_live), stats.hits + stats.misses);
    row("claims", Some(stats.waiting), None, stats.claims);
    row("  found a shell", None, None, stats.hits);
    row("  waited for one", None, None, stats.misses);
    row("  waited in vain", None, None, stats.timeouts);
    row("shells not made", None, None, stats.make_failures);
    row("shells that died", None, None, stats.lost);
    row("VMs not restored", None, None, stats.restore_failures);
    let mut text = table.render();
    let times = &stats.claim_us;
    text.push_str(&format!(
        "claims took {} in half of all cases, {} in 95%, {} in 99%\n",
        duration(times.p50),
        duration(times.p95),
        duration(times.p99)
    ));
    let mib = |bytes: u64| bytes >> 20;
    text.push_str(&format!(
        "{} of {} MiB of memory are spoken for\n",
        mib(stats.memory),
        mib(stats.max_memory)
    ));
    if stats.draining {
        text.push_str("no more claims are taken\n");
    }
    if let (Some(error), Some(_)) = (&stats.last_error, stats.pause_us) {
        let error = crate::remedy::printable(error);
        text.push_str(&format!("shells cannot be made: {error}\n"));
    }
    text
}

/// Take no more claims, end idle shells, and end the pool with its last VM.
#[derive(Debug, Args)]
struct Drain {
    /// The pool's socket, as given to 'cellblock pool serve --control'
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Print the pool's answer as JSON
    #[arg(long)]
    json: bool,
}

impl Drain {
    fn execute(self) -> Result<(), Failure> {
        let (answer, line) = ask(&self.path, &Request::Drain)?;
        match answer {
            _ if self.json => output::print_line(&line),
            Answer::Drain { in_use: 0 } => output::print_line("drained; the pool ends"),
            Answer::Drain { in_use } => {
                let line = format!("drained; the pool ends with the {in_use} VMs that are in use");
                output::print_line(&line)
            }
            _ => Err(Failure::Error("the pool answered another question".into())),
        }
    }
}

fn ask(path: &Path, request: &Request) -> Result<(Answer, String), Failure> {
    let mut client = PoolClient::connect(path).map_err(Failure::error)?;
    client.ask(request).map_err(Failure::error)
}
