//! The plugin of `cellblock run --plugin`: its process, from the command line to its end.
//!
//! | module | what it holds |
//! |---|---|
//! | `config` | what the command line says about it |
//! | `start` | the plan before the spawner is forked, then the process |
//! | `output` | its standard error, line by line |
//! | `violations` | system calls its policy refuses |
//! | `tap` | the TAP devices it is given |
//!
//! | end of the plugin | is for the VM |
//! |---|---|
//! | exit status 0, at any time | its end, well |
//! | any other status, or a signal | an error that names it |
//! | none within [`GRACE`] of the VM's own end | an error: it is killed |
//!
//! Standard input and output are the VMM's own, passed through: a console, for example.
//! Standard error is logged, since it is the plugin's text on the user's terminal.

mod config;
mod output;
mod start;
mod tap;
mod violations;

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use cellblock_seccomp::spawner::ExitStatus;

pub use config::{PluginConfig, TapConfig, gid_map, gid_map_file, mac, mount, mount_file, overlap};
pub use start::{PluginError, plan, start};
pub use tap::{Tap, TapError};

use cellblock_seccomp::violation::Violation;

use output::Output;
use violations::Violations;

use crate::throttle::Throttle;

/// How long a plugin may take to exit once the VM has ended.
pub const GRACE: Duration = Duration::from_millis(1000);

/// Most refused calls that are handled before others have their turn.
const ROUND: usize = 32;

/// A plugin that runs.
#[derive(Debug)]
pub struct PluginProcess {
    pid: i32,
    program: String,
    output: Output,
    open: bool,
    violations: Option<Violations>,
    /// The call that is its end.
    refused: Option<String>,
    lines: Throttle,
    deadline: Option<Instant>,
}

impl PluginProcess {
    /// Its pid outside.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Logs what it has written to standard error.
    pub fn log(&mut self) {
        self.open = self.open && self.output.log();
    }

    /// False once nobody can write to its standard error any more.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Readable when its filter has a question, if it asks.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.violations.as_ref().map(AsFd::as_fd)
    }

    /// The calls outside its policy that it has made since: to be told. Where they are its
    /// end, [`PluginProcess::must_end`] says so.
    pub fn take_violations(&mut self) -> Vec<Violation> {
        let Some(violations) = &self.violations else { return Vec::new() };
        let found: Vec<_> = std::iter::from_fn(|| violations.next()).take(ROUND).collect();
        for violation in &found {
            let call = violation.call();
            if !violations.goes_on() {
                self.refused.get_or_insert(call);
            } else if self.lines.take().is_some() {
                tracing::warn!(role = "plugin", "system call {call} is not in its seccomp policy");
            }
        }
        found
    }

    /// Whether it has made a call that is its end.
    pub fn must_end(&self) -> bool {
        self.refused.is_some()
    }

    /// The VM has ended, or is to end: from now on it has [`GRACE`].
    pub fn begin_grace(&mut self) {
        self.deadline.get_or_insert_with(|| Instant::now() + GRACE);
    }

    /// What is left of its grace, if that has begun.
    pub fn grace_left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// What its end means: nothing where all is well.
    pub fn ended(&mut self, status: ExitStatus) -> Result<(), PluginError> {
        self.output.finish();
        let program = self.program.clone();
        match status {
            ExitStatus::Code(0) => Ok(()),
            status => Err(match self.refused.take() {
                Some(call) => PluginError::Violation { program, call },
                None => PluginError::Ended { program, status },
            }),
        }
    }
}

/// Its standard error: readable when there is something to log.
impl AsFd for PluginProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }
}
