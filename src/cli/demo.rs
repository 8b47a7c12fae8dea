//! `cellblock demo`.

use clap::Args;

use super::Failure;

/// A one-minute tour on the built-in guest and a temporary disk.
///
/// Shows the VM's processes and their jails, the guest reading and writing its disk,
/// a pause and a resume, and ends with a table of what it measured. Needs /dev/kvm and
/// nothing else. Exit status 1 if any step failed.
#[derive(Debug, Args)]
pub(super) struct Demo {}

impl Demo {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        crate::demo::run().map_err(Failure::error)
    }
}
