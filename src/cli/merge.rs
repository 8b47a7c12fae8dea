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
    // What is said of all commands may come before.
    let mut at = 1;
    while let Some(word) = args.get(at).and_then(|word| word.to_str())
        && word.starts_with("--log")
    {
        at += if word == "--log" { 2 } else { 1 };
    }
    if let Some([snapshot, merge, ..]) = args.get(at..)
        && (snapshot == "snapshot" && merge == "merge")
    {
        args.splice(at..at + 2, [OsString::from("snapshot-merge")]);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_all_commands_may_come_first() {
        let words = |text: &str| {
            let words = one_word(text.split(' ').map(OsString::from));
            words.join(&OsString::from(" ")).into_string().expect("text")
        };
        for options in ["", "--log info ", "--log=info "] {
            let found = words(&format!("cellblock {options}snapshot merge a b"));
            assert_eq!(found, format!("cellblock {options}snapshot-merge a b"));
        }
        for same in
            ["cellblock", "cellblock --log", "cellblock snapshot ./merge a", "cellblock stop merge"]
        {
            assert_eq!(words(same), same);
        }
    }
}
