//! The process that makes the jailed ones.
//!
//! Seccomp filters are inherited, so a VMM under a tight filter could not build
//! jails later. The spawner is forked before anything else exists: it has no guest
//! memory and no VM fds, takes bounded requests from the VMM over a channel, makes
//! processes, reports their ends, and kills them all when the VMM dies.
//!
//! What a child looks like is fixed here and cannot be asked for otherwise: this
//! very executable, arguments `cellblock @cell ROLE ID`, an empty environment, fds
//! 0 to 2 on /dev/null, the request's fds from 3 on, nothing else, a session of
//! its own; with `sandbox` seven new namespaces and unprivileged ids. A child of the
//! role `plugin` has the fds of the plan that was fixed at the fork behind those of
//! the request, and is refused where there is no plan.

mod child;
mod connect;
mod ids;
mod inspect;
mod messages;
mod server;
mod terminal;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use cellblock_wire::{Channel, ChannelError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::ForkResult;

pub use messages::{ExitStatus, ProcessInfo, Request, ThreadInfo};

use crate::jail::{self, JailError};
use crate::plugin;
use messages::{FromSpawner, ToSpawner};

/// Most fds a child can be given (they become 3, 4, and so on).
pub const MAX_CHILD_FDS: usize = 8;
/// Most children alive at a time.
pub const MAX_CHILDREN: usize = 128;
/// First argument of a child; the role and the id follow.
pub const CELL_ARG: &str = "@cell";

/// How to fork the spawner.
#[derive(Debug, Default)]
pub struct Options {
    /// A terminal whose present mode the spawner restores when the VMM has died and
    /// left it in raw mode (no line editing, no echo, no signal characters).
    pub restore_terminal: Option<RawFd>,
    /// The plugin that may be asked for.
    pub plugin: Option<plugin::Plan>,
    /// Sockets that may be connected to, by their place in this list.
    pub connect: Vec<PathBuf>,
}

/// A failed exchange with the spawner.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The spawner has to be forked before threads are started.
    #[error("forking the spawner")]
    Threads(#[source] JailError),
    /// Something the spawner needs could not be had.
    #[error("preparing the spawner: {what}")]
    Prepare {
        /// What was needed.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: Errno,
    },
    /// The spawner is dead, and with it all children.
    #[error("the spawner process has died")]
    Gone,
    /// No event came in time.
    #[error("no answer from the spawner within {0:?}")]
    TimedOut(Duration),
    /// A request that the spawner would not obey.
    #[error("request to the spawner is not valid: {0}")]
    Request(&'static str),
    /// The channel failed otherwise.
    #[error("talking to the spawner")]
    Channel(#[source] ChannelError),
}

impl From<ChannelError> for SpawnError {
    fn from(error: ChannelError) -> SpawnError {
        match error {
            ChannelError::Closed => SpawnError::Gone,
            ChannelError::TimedOut(limit) => SpawnError::TimedOut(limit),
            other => SpawnError::Channel(other),
        }
    }
}

/// What the spawner reports.
#[derive(Debug)]
pub enum Event {
    /// A child runs its program.
    Started {
        /// Of the request.
        ticket: u32,
        /// Its process id, as seen by the VMM.
        pid: i32,
        /// Becomes readable when it ends.
        pidfd: OwnedFd,
    },
    /// A child could not be started.
    Failed {
        /// Of the request.
        ticket: u32,
        /// The step that failed.
        step: String,
        /// One line: the reason and the remedy.
        message: String,
    },
    /// A child that was started has ended, and with it everything it started.
    Exited {
        /// Its process id.
        pid: i32,
        /// How it ended.
        status: ExitStatus,
    },
    /// Answer to [`Spawner::connect`].
    Connected {
        /// Of the request.
        place: u32,
        /// The socket.
        socket: OwnedFd,
    },
    /// Answer to [`Spawner::connect`] where nobody accepts.
    NotConnected {
        /// Of the request.
        place: u32,
        /// The kernel's reason.
        why: String,
    },
    /// Answer to [`Spawner::inspect`]: the VMM, the spawner, the children.
    Processes(Vec<ProcessInfo>),
}

/// The VMM's handle of the spawner. Dropping it ends the spawner and all children;
/// [`Spawner::shutdown`] also waits for that.
#[derive(Debug)]
pub struct Spawner {
    channel: Channel,
    pid: i32,
    pidfd: OwnedFd,
    next_ticket: u32,
}

/// Forks the spawner. To be called first thing in `main`, while there is one thread.
pub fn fork(options: Options) -> Result<Spawner, SpawnError> {
    jail::single_threaded().map_err(SpawnError::Threads)?;
    let prepare = |what| move |source| SpawnError::Prepare { what, source };
    let vmm = pidfd_of(std::process::id() as i32).map_err(prepare("a pidfd of the VMM"))?;
    // Opened here rather than by name later: the file may be replaced meanwhile.
    let exe = open("/proc/self/exe", libc::O_PATH)
        .map_err(prepare("/proc/self/exe (is /proc mounted?)"))?;
    let null = open("/dev/null", libc::O_RDWR).map_err(prepare("/dev/null"))?;
    let terminal = terminal::Saved::new(options.restore_terminal);
    let (near, far) = Channel::pair().map_err(SpawnError::Channel)?;
    // Until the spawner ignores them, a ctrl-c must not end it.
    let before = block_signals().map_err(prepare("blocked signals"))?;
    let forked = fork_process();
    if !matches!(forked, Ok(ForkResult::Child)) {
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)
            .map_err(prepare("unblocked signals"))?;
    }
    match forked.map_err(prepare("a process (see `ulimit -u`)"))? {
        ForkResult::Child => {
            drop(near);
            let plugin = options.plugin;
            let places = options.connect;
            server::main(server::Inherited {
                channel: far,
                vmm,
                exe,
                null,
                terminal,
                plugin,
                places,
            })
        }
        ForkResult::Parent { child } => {
            let pid = child.as_raw();
            let pidfd = pidfd_of(pid).map_err(prepare("a pidfd of the spawner"))?;
            Ok(Spawner { channel: near, pid, pidfd, next_ticket: 1 })
        }
    }
}

impl Spawner {
    /// Asks for a child with copies of `fds` as its fds 3, 4, and so on.
    ///
    /// Returns the ticket that [`Event::Started`] or [`Event::Failed`] will carry;
    /// does not wait for either, so that several children start side by side.
    pub fn spawn(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<u32, SpawnError> {
        request.check().map_err(SpawnError::Request)?;
        if fds.is_empty() || fds.len() > MAX_CHILD_FDS {
            return Err(SpawnError::Request("a child gets 1 to 8 fds"));
        }
        let ticket = self.next_ticket;
        self.channel.send(&ToSpawner::Spawn { ticket, request: request.clone() }, fds)?;
        self.next_ticket = ticket.wrapping_add(1);
        Ok(ticket)
    }

    /// Waits at most `timeout` for the next event.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Event, SpawnError> {
        let (message, fds) = self.channel.recv_timeout(timeout)?;
        event(message, fds)
    }

    /// The next event, if there is one.
    pub fn try_event(&mut self) -> Result<Option<Event>, SpawnError> {
        match self.channel.try_recv()? {
            Some((message, fds)) => event(message, fds).map(Some),
            None => Ok(None),
        }
    }

    /// Kills a child, with its whole pid namespace if it has one of its own.
    /// [`Event::Exited`] follows. A pid that is not a child's is ignored.
    pub fn kill(&mut self, pid: i32) -> Result<(), SpawnError> {
        Ok(self.channel.send(&ToSpawner::Kill { pid }, &[])?)
    }

    /// Asks for facts about all processes; [`Event::Processes`] follows.
    pub fn inspect(&mut self) -> Result<(), SpawnError> {
        Ok(self.channel.send(&ToSpawner::Inspect, &[])?)
    }

    /// Asks for a connection to a place of [`Options::connect`]; [`Event::Connected`] or
    /// [`Event::NotConnected`] follows.
    pub fn connect(&mut self, place: u32) -> Result<(), SpawnError> {
        Ok(self.channel.send(&ToSpawner::Connect { place }, &[])?)
    }

    /// The spawner's process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Ends all children and the spawner, and waits at most `limit` for it.
    /// Returns whether it has ended.
    pub fn shutdown(self, limit: Duration) -> bool {
        drop(self.channel);
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let ended = poll(&mut fds, timeout) == Ok(1);
        if ended {
            // Reaped, so that no zombie stays while the VMM lives on. Nothing can
            // be done about a failure.
            let _ = waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED);
        }
        ended
    }
}

/// Readable when an event waits, or when the spawner has died.
impl AsFd for Spawner {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl AsRawFd for Spawner {
    fn as_raw_fd(&self) -> RawFd {
        self.channel.as_raw_fd()
    }
}

fn event(message: FromSpawner, fds: Vec<OwnedFd>) -> Result<Event, SpawnError> {
    Ok(match message {
        FromSpawner::Started { ticket, pid } => {
            let pidfd = fds
                .into_iter()
                .next()
                .ok_or(SpawnError::Request("the spawner sent no pidfd with a new process"))?;
            Event::Started { ticket, pid, pidfd }
        }
        FromSpawner::Failed { ticket, step, message } => Event::Failed { ticket, step, message },
        FromSpawner::Exited { pid, status } => Event::Exited { pid, status },
        FromSpawner::Connected { place } => {
            let socket = fds.into_iter().next();
            let socket = socket.ok_or(SpawnError::Request("the spawner sent no connection"))?;
            Event::Connected { place, socket }
        }
        FromSpawner::NotConnected { place, why } => Event::NotConnected { place, why },
        FromSpawner::Processes(list) => Event::Processes(list),
    })
}

fn open(path: &str, flags: libc::c_int) -> Result<OwnedFd, Errno> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.read(true).custom_flags(flags & !libc::O_ACCMODE);
    if flags & libc::O_RDWR != 0 {
        options.write(true);
    }
    // std sets O_CLOEXEC.
    options.open(path).map(OwnedFd::from).map_err(errno)
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

#[allow(unsafe_code)] // pidfd_open has no wrapper
fn pidfd_of(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: no memory is involved; the result is a new fd that nobody else knows.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        Ok(OwnedFd::from_raw_fd(Errno::result(fd)? as RawFd))
    }
}

/// Blocks all signals; returns those that were blocked before.
fn block_signals() -> Result<SigSet, Errno> {
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
    Ok(before)
}

#[allow(unsafe_code)] // fork
fn fork_process() -> Result<ForkResult, Errno> {
    // SAFETY: the process has one thread (checked by the caller), so the child
    // finds every lock free and may do anything the parent could.
    unsafe { nix::unistd::fork() }
}
