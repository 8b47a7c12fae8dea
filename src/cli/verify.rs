//! `cellblock verify`.

use std::path::PathBuf;

use clap::Args;

use super::Failure;
use super::output::{self, Progress};
use crate::snapshot::format::Chain;

/// Check every byte of a snapshot, and of those it is a diff to.
#[derive(Debug, Args)]
pub(super) struct Verify {
    /// The snapshot's directory
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Verify {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let chain = Chain::open(&self.dir).map_err(Failure::error)?;
        let mut progress = Progress::new("verifying");
        let verified = chain.verify_all(|done, total| progress.show(done, total));
        progress.end();
        verified.map_err(Failure::error)?;
        let manifest = chain.manifest();
        let parents = match chain.links().len() - 1 {
            0 => String::new(),
            n => format!(", with what it builds on ({n})"),
        };
        output::print_line(&format!("snapshot {} is whole{parents}", manifest.id))
    }
}
