//! Snapshots of the VMs of tests, by the command.

use std::path::Path;
use std::process::{Command, Output};

use super::Vm;

/// The program, run to its end.
pub fn cellblock(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cellblock")).args(args).output().unwrap()
}

impl Vm {
    /// Tries to take a snapshot.
    pub fn try_snapshot(&self, to: &Path, options: &[&str]) -> Output {
        let control = self.path("control");
        let words = ["snapshot", control.to_str().unwrap(), to.to_str().unwrap()];
        cellblock(&[&words, options].concat())
    }

    /// Takes a snapshot; what was said about it.
    #[track_caller]
    pub fn snapshot(&mut self, to: &Path, options: &[&str]) -> String {
        let ended = self.try_snapshot(to, options);
        if !ended.status.success() {
            self.fail(&format!("snapshot: {ended:?}"));
        }
        String::from_utf8(ended.stdout).unwrap()
    }
}

/// One line that says why, and what to do.
#[track_caller]
pub fn refused_restore(from: &Path, options: &[&str]) -> String {
    let words = ["restore", from.to_str().unwrap(), "--serial", "null"];
    let ended = cellblock(&[&words, options].concat());
    let line = String::from_utf8(ended.stderr).unwrap();
    assert_eq!((ended.status.code(), line.lines().count()), (Some(1), 1), "{line}");
    line
}
