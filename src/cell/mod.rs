//! Cells, seen from the VMM: a device process, its jail, and what we hold of it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`launch`] | asking the spawner for a jailed process and waiting until it serves |
//! | [`serial`] | COM1: the VMM's end of a serial cell |
//! | [`blk`] | a virtio disk: the VMM's end of a block cell |
//! | [`counters`] | the page a block cell counts in |
//!
//! Nothing a cell says is trusted: its messages are decoded within bounds, its
//! shared pages are read as hostile memory, and its death or its silence is an
//! event, never a hang.

pub mod blk;
pub mod counters;
pub mod launch;
pub mod serial;

use std::os::fd::OwnedFd;

use std::time::Instant;

use cellblock_devices::protocol::{CellStats, FromCell, LogLevel};
use cellblock_seccomp::spawner::ExitStatus;
use cellblock_seccomp::violation::{self, Violation};
use cellblock_wire::{Channel, ChannelError, Mapping, ShmError};
use counters::BlkCounters;

/// A cell that could not be started, or that broke the protocol.
#[derive(Debug, thiserror::Error)]
pub enum CellError {
    /// Its channel or a shared page could not be made.
    #[error("preparing the {role} process {id}")]
    Channel {
        /// Role.
        role: &'static str,
        /// Device id.
        id: String,
        /// The reason.
        #[source]
        source: ChannelError,
    },
    /// As above.
    #[error("preparing the {role} process {id}")]
    Shm {
        /// Role.
        role: &'static str,
        /// Device id.
        id: String,
        /// The reason.
        #[source]
        source: ShmError,
    },
    /// The spawner could not be asked, or is gone.
    #[error("asking the spawner for the {role} process {id}")]
    Spawner {
        /// Role.
        role: &'static str,
        /// Device id.
        id: String,
        /// The reason.
        #[source]
        source: cellblock_seccomp::spawner::SpawnError,
    },
    /// A jail step or its own preparation failed.
    #[error("starting the {role} process {id}: {step}: {message}")]
    Refused {
        /// Role.
        role: &'static str,
        /// Device id.
        id: String,
        /// What failed.
        step: String,
        /// One line with the reason and the remedy.
        message: String,
    },
    /// It died before it served.
    #[error("starting the {role} process {id}: {how}")]
    Died {
        /// Role.
        role: &'static str,
        /// Device id.
        id: String,
        /// How it ended.
        how: String,
    },
}

/// A device process.
#[derive(Debug)]
pub struct Cell {
    role: &'static str,
    id: String,
    ticket: u32,
    channel: Channel,
    violation: Mapping,
    process: Option<(i32, OwnedFd)>,
    open: bool,
    stats: CellStats,
    counters: Option<BlkCounters>,
}

impl Cell {
    /// `blk` or `serial`.
    pub fn role(&self) -> &'static str {
        self.role
    }

    /// Unique in the VM.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its pid outside, once the spawner told us.
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(|(pid, _)| *pid)
    }

    /// The cell channel.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// False once the channel has ended.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// The next message other than a log line, which is logged here. `None` when
    /// there is no more for now, or for ever: see [`Cell::is_open`].
    pub fn next_message(&mut self) -> Option<FromCell> {
        loop {
            match self.channel.try_recv::<FromCell>() {
                Ok(Some((FromCell::Log { level, message }, _))) => self.log(level, &message),
                Ok(Some((message, _))) => return Some(message),
                Ok(None) => return None,
                Err(ChannelError::Closed) => {
                    self.open = false;
                    return None;
                }
                Err(error) => {
                    tracing::warn!(
                        role = self.role,
                        device = self.id,
                        error = crate::remedy::chain(&error),
                        "cell channel ended"
                    );
                    self.open = false;
                    return None;
                }
            }
        }
    }

    /// Like [`Cell::next_message`], but waits until `end` for one.
    pub fn wait_message(&mut self, end: Instant) -> Option<FromCell> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.channel.recv_timeout::<FromCell>(left) {
                Ok((FromCell::Log { level, message }, _)) => self.log(level, &message),
                Ok((message, _)) => return Some(message),
                Err(ChannelError::TimedOut(_)) => return None,
                Err(_) => {
                    self.open = false;
                    return None;
                }
            }
        }
    }

    /// The counters it last reported.
    pub fn stats(&self) -> &CellStats {
        &self.stats
    }

    /// The page a block cell counts in.
    pub fn counters(&self) -> Option<&BlkCounters> {
        self.counters.as_ref()
    }

    /// Keeps counters it reported.
    pub fn keep_stats(&mut self, stats: CellStats) {
        self.stats = stats;
    }

    /// One line that says how the process ended: by a violation, a signal, a status.
    pub fn obituary(&self, status: ExitStatus) -> String {
        match (self.violation(), status) {
            (Some(violation), _) => format!(
                "seccomp stopped {violation}; if the call is legitimate, find all that are \
                 missing with --seccomp log and report them"
            ),
            (None, status) => status.to_string(),
        }
    }

    /// The system call that seccomp stopped, if one was.
    pub fn violation(&self) -> Option<Violation> {
        violation::read(&self.violation)
    }

    fn log(&self, level: LogLevel, message: &str) {
        // A hostile process may put anything into its text; one line stays one line.
        let text = crate::remedy::printable(&message.chars().take(512).collect::<String>());
        let (role, device) = (self.role, self.id.as_str());
        match level {
            LogLevel::Error => tracing::error!(role, device, "{text}"),
            LogLevel::Warn => tracing::warn!(role, device, "{text}"),
            LogLevel::Info => tracing::info!(role, device, "{text}"),
            LogLevel::Debug => tracing::debug!(role, device, "{text}"),
            LogLevel::Trace => tracing::trace!(role, device, "{text}"),
        }
    }
}
