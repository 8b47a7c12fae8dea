//! `cellblock snapshot merge`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::Failure;
use super::output::{self, Progress};
use crate::snapshot::format::{self, Chain};

/// `snapshot merge` is a command of its own: `snapshot` itself begins with a control socket.
pub(super) fn one_word(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    if let [_, snapshot, merge, ..] = args.as_slice()
        && (snapshot == "snapshot" && merge == "merge")
    {
        args.splice(1..3, [OsString::from("snapshot-merge")]);
    }
    args
}

/// Make a snapshot and all it is a diff to one snapshot that needs no other.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  cellblock snapshot merge /snapshots/tuesday /snapshots/full")]
pub(super) struct Merge {
    /// The snapshot, a diff or not; it stays as it is
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Where to put the result; there must be nothing yet
    #[arg(value_name = "TARGET")]
    target: PathBuf,
}

impl Merge {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let chain = Chain::open(&self.dir).map_err(Failure::error)?;
        let mut progress = Progress::new("merging");
        let show = |done, total| progress.show(done, total);
        let cancel = Arc::default();
        super::cancel_on_signals(&cancel)?;
        let merged = format::merge(&chain, &self.target, cancel, show);
        progress.end();
        let manifest = merged.map_err(Failure::error)?;
        output::print_line(&format!("snapshot {} is at {}", manifest.id, self.target.display()))
    }
}
