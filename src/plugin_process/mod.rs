//! The plugin of `cellblock run --plugin`: its process, from the command line to its end.
//!
//! | module | what it holds |
//! |---|---|
//! | `config` | what the command line says about it |
//! | `start` | the plan before the spawner is forked, then the process |
//! | `output` | its standard error, line by line |
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

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use cellblock_seccomp::spawner::ExitStatus;

pub use config::{PluginConfig, TapConfig, gid_map, gid_map_file, mac, mount, mount_file, overlap};
pub use start::{PluginError, plan, start};
pub use tap::{Tap, TapError};

use output::Output;

/// How long a plugin may take to exit once the VM has ended.
pub const GRACE: Duration = Duration::from_millis(1000);

/// A plugin that runs.
#[derive(Debug)]
pub struct PluginProcess {
    pid: i32,
    program: String,
    sandbox: bool,
    output: Output,
    open: bool,
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
            ExitStatus::Signal(libc::SIGSYS) if self.sandbox => {
                Err(PluginError::Violation { program })
            }
            status => Err(PluginError::Ended { program, status }),
        }
    }
}

/// Its standard error: readable when there is something to log.
impl AsFd for PluginProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }
}
