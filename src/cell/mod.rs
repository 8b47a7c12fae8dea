//! Cells, seen from the VMM: a device process, its jail, and what we hold of it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`launch`] | asking the spawner for a jailed process and waiting until it serves |
//! | [`com1`] | what its process is made of, and made again |
//! | [`serial`] | COM1: the VMM's end of a serial cell |
//! | [`blk`] | a virtio disk: the VMM's end of a block cell |
//! | [`counters`] | the page a block cell counts in |
//! | [`overlay`] | what a `cow` disk's guest has written |
//!
//! Nothing a cell says is trusted: its messages are decoded within bounds, its
//! shared pages are read as hostile memory, and its death or its silence is an
//! event, never a hang.

pub mod blk;
pub mod com1;
pub mod counters;
pub mod launch;
pub mod overlay;
pub mod serial;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use std::time::Instant;

use blk::Held;
use cellblock_devices::protocol::counters::{Beat, VirtioBlkCountersSnapshot};
use cellblock_devices::protocol::{CellStats, FromCell, LogLevel, ToCell};
use cellblock_seccomp::spawner::ExitStatus;
use cellblock_seccomp::violation::{self, Violation};
use cellblock_wire::{Channel, ChannelError, Mapping, ShmError, closer};
use counters::BlkCounters;
use nix::sys::stat::{SFlag, fstat};

use crate::throttle::Throttle;

/// The most log lines, and the most messages, taken from one cell before others
/// have their turn.
pub const ROUND: usize = 32;

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
    /// A descriptor could not be kept for another process, or a pipe not be made.
    #[error("keeping what the process of {id} is given")]
    Image {
        /// Device id.
        id: String,
        /// The reason.
        #[source]
        source: std::io::Error,
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
    owes_stats: bool,
    owes_answer: bool,
    lines: Throttle,
    counters: Option<BlkCounters>,
    /// Tells when the kernel has nothing of the process in flight any more.
    held: Option<Arc<Held>>,
    /// The client that a console's process has on its socket, for the next one.
    client: Option<OwnedFd>,
    /// Number of the marker line told last, by it or by a process before it.
    last_mark: Option<u32>,
}

impl Cell {
    /// Of the request that it was asked for by.
    pub fn ticket(&self) -> u32 {
        self.ticket
    }

    /// The spawner told us its pid.
    pub fn started(&mut self, pid: i32, pidfd: OwnedFd) {
        self.process = Some((pid, pidfd));
    }

    /// Becomes the process that `launch` asks for, which goes on counting where this one
    /// stopped. Unchanged where that fails.
    pub fn succeed<E>(&mut self, launch: impl FnOnce(&Cell) -> Result<Cell, E>) -> Result<(), E> {
        let next = launch(self)?;
        let before = std::mem::replace(self, next);
        self.counters = before.counters;
        self.stats = before.stats;
        self.lines = before.lines;
        self.client = before.client;
        self.last_mark = before.last_mark;
        Ok(())
    }

    /// `blk` or `serial`.
    pub fn role(&self) -> &'static str {
        self.role
    }

    /// Unique in the VM.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What tells when the kernel has nothing of the process in flight any more.
    pub fn take_held(&mut self) -> Option<Arc<Held>> {
        self.held.take()
    }

    /// Its pid outside, once the spawner told us.
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(|(pid, _)| *pid)
    }

    /// The cell channel.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// It was found that the channel has ended.
    pub fn close(&mut self) {
        self.open = false;
    }

    /// False once the channel has ended.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// The process is dead, or has closed its channel: also where that was not heard of yet.
    pub fn has_ended(&self) -> bool {
        !self.open || self.channel.is_closed()
    }

    /// The next message other than a log line, which is logged here. `None` when
    /// there is no more for now, or for ever: see [`Cell::is_open`]. A process that
    /// sends without end gets `None` after [`ROUND`] lines: others have their turn.
    pub fn next_message(&mut self) -> Option<FromCell> {
        for _ in 0..ROUND {
            match self.channel.try_recv::<FromCell>() {
                Ok(Some((message, fds))) => {
                    if let Some(message) = self.keep(message, fds) {
                        return Some(message);
                    }
                }
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
        None
    }

    /// Like [`Cell::next_message`], but waits until `end` for one, and gives none
    /// afterwards, however many there are.
    pub fn wait_message(&mut self, end: Instant) -> Option<FromCell> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            match self.channel.recv_timeout::<FromCell>(left) {
                Ok((message, fds)) => {
                    if let Some(message) = self.keep(message, fds) {
                        return Some(message);
                    }
                }
                Err(ChannelError::TimedOut(_)) => return None,
                Err(_) => {
                    self.open = false;
                    return None;
                }
            }
        }
    }

    /// Does what concerns nobody else; gives the rest.
    fn keep(&mut self, message: FromCell, mut fds: Vec<OwnedFd>) -> Option<FromCell> {
        let is_client = matches!(message, FromCell::Client) && self.role == "serial";
        let client = (is_client && !fds.is_empty()).then(|| fds.swap_remove(0));
        // Nothing else comes with a message of a process that means well.
        closer::close_all(fds);
        match message {
            FromCell::Log { level, message } => self.log(level, &message),
            // It is only ever given to a process of the same device.
            FromCell::Client if self.role == "serial" => {
                self.client = client.filter(is_socket);
            }
            FromCell::Alive => self.owes_answer = false,
            // One that died may have been the first to tell.
            FromCell::Marker { number, .. } if self.last_mark.replace(number) == Some(number) => {}
            other => return Some(other),
        }
        None
    }

    /// The counters it last reported.
    pub fn stats(&self) -> &CellStats {
        &self.stats
    }

    /// What each queue of a block cell has counted. No request waits in one that is gone.
    pub fn queues(&self) -> Vec<VirtioBlkCountersSnapshot> {
        let mut queues = self.counters.as_ref().map(BlkCounters::queues).unwrap_or_default();
        if !self.open {
            queues.iter_mut().for_each(|queue| queue.currently_throttled_gauge = 0);
        }
        queues
    }

    /// The page a block cell counts in.
    pub fn counters(&self) -> Option<&BlkCounters> {
        self.counters.as_ref()
    }

    /// The client on its console's socket.
    pub fn client(&self) -> Option<&OwnedFd> {
        self.client.as_ref()
    }

    /// Keeps counters it reported.
    pub fn keep_stats(&mut self, stats: CellStats) {
        self.stats = stats;
        self.owes_stats = false;
    }

    /// Asks for a sign of life, unless the last one is still owed: then it is false.
    pub fn ping(&mut self) -> bool {
        let answers = !self.owes_answer;
        if answers {
            // One that reads nothing, so that there is no room, owes it as well.
            let _ = self.channel.try_send(&ToCell::Ping, &[]);
            self.owes_answer = true;
        }
        answers
    }

    /// How the thread of each queue of a block cell is.
    pub fn beats(&self) -> Vec<Beat> {
        self.counters.as_ref().map(BlkCounters::beats).unwrap_or_default()
    }

    /// Asks for its counters. False where there is nothing to wait for: it is gone, or
    /// has not answered the last time yet, as a process that hangs does not.
    pub fn ask_stats(&mut self) -> bool {
        let asks = self.open
            && !self.owes_stats
            && matches!(self.channel.try_send(&ToCell::Stats, &[]), Ok(true));
        self.owes_stats |= asks;
        asks
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

    /// It could not start, and says why.
    pub fn refused(&mut self, step: &str, message: &str) {
        self.log(LogLevel::Error, &format!("{step}: {message}"));
    }

    fn log(&mut self, level: LogLevel, message: &str) {
        // What is more detailed is only shown to those who asked for all of it.
        if level <= LogLevel::Info {
            match self.lines.take() {
                Some(0) => {}
                Some(unsaid) => tracing::warn!(
                    role = self.role,
                    device = self.id,
                    "{unsaid} log lines were left out: there were too many"
                ),
                None => return,
            }
        }
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

fn is_socket(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| {
        SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFSOCK
    })
}
