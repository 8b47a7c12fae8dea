//! The pool's end of its shells: a process each, and the socket that is its life.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use cellblock_wire::{Channel, ChannelError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::background::{self, Background, come_forward};
use super::claimers::Claimers;
use super::engine::Factory;
use super::protocol::{Claim, FromShell, Preparation, Stage, ToShell};
use super::scratch::Scratch;
use crate::control::socket;
use crate::remedy::{Remedy, printable};
use crate::snapshot::format::SnapshotId;

/// The subcommand that is a shell.
pub(crate) const COMMAND: &str = "pool-shell";
/// How long a shell may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long a claim or a reset may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// How often a maker looks whether somebody waits by now.
const LOOK: Duration = Duration::from_millis(3);
/// How long one may take to end by itself.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How long one that was killed may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(1);
/// How often it is looked whether a claim that is not answered yet is still wanted.
const WANTED: Duration = Duration::from_millis(50);

/// How long a claim waits for a shell's answer.
#[derive(Clone, Copy)]
pub(super) struct Answer<'a> {
    pub(super) limit: Duration,
    /// Whether somebody still wants it.
    pub(super) wanted: Option<&'a dyn Fn() -> bool>,
}

/// A shell that is none, or did not become a VM.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum ShellError {
    #[error("making the id of a VM")]
    Id(#[source] io::Error),
    #[error("starting {}", .0.display())]
    Start(PathBuf, #[source] io::Error),
    #[error("renaming {}", .0.display())]
    Rename(PathBuf, #[source] io::Error),
    #[error("talking to a shell")]
    Channel(#[source] ChannelError),
    /// The shell is gone: whatever was asked of it was none of its business.
    #[error("the shell has died{}", how(.0))]
    Died(Option<ExitStatus>),
    #[error("the shell does not answer")]
    Silent,
    #[error("{message}")]
    Refused { message: String, remedy: Option<String> },
}

fn how(status: &Option<ExitStatus>) -> String {
    status.map_or(String::new(), |status| format!(": {status}"))
}

impl Remedy for ShellError {
    fn remedy(&self) -> Option<String> {
        match self {
            ShellError::Refused { remedy, .. } => remedy.clone(),
            ShellError::Died(_) => Some("its standard error, which is the pool's, says why".into()),
            _ => None,
        }
    }
}

/// Of the cow disks of the VM `id`: 20 characters are what a disk's serial number can have.
pub(crate) fn serial_of(id: SnapshotId) -> String {
    id.to_string().chars().take(20).collect()
}

/// What all shells of a pool have in common.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    /// The `cellblock` program.
    pub(super) program: PathBuf,
    /// Where their sockets are.
    pub(super) directory: PathBuf,
    pub(super) stage: Stage,
    pub(super) sandbox: bool,
    pub(super) seccomp: SeccompMode,
    pub(super) log: LogLevel,
    /// Who has claimed of them just now.
    pub(super) claimers: Arc<Claimers>,
    /// The directory, if it is to go with the last of them.
    pub(super) _keep: Option<Arc<Scratch>>,
}

/// A shell, or the VM it became. Dropped, it is ended, and nothing of it is left.
#[derive(Debug)]
pub struct Shell {
    id: SnapshotId,
    child: Child,
    channel: Channel,
    control: PathBuf,
    console: PathBuf,
}

impl Recipe {
    /// Makes one, in the background as long as nobody waits for it. To be called on a thread that
    /// outlives it: the kernel ends a shell with the thread that started it.
    pub(super) fn make(
        &self,
        stage: &Stage,
        waits: &dyn Fn() -> bool,
    ) -> Result<Shell, ShellError> {
        let id = SnapshotId::random().map_err(ShellError::Id)?;
        let (control, console) = self.places(id);
        let (near, far) = Channel::pair().map_err(ShellError::Channel)?;
        let child = Command::new(&self.program)
            .arg(COMMAND)
            .stdin(Stdio::from(far.into_fd()))
            .stdout(Stdio::null())
            // The terminal's signals are for the pool.
            .process_group(0)
            .spawn()
            .map_err(|error| ShellError::Start(self.program.clone(), error))?;
        // From here on the drop of it ends the process.
        let mut shell = Shell { id, child, channel: near, control, console };
        let preparation = Preparation {
            id: id.0,
            control: shell.control.clone(),
            console: shell.console.clone(),
            stage: stage.clone(),
            sandbox: self.sandbox,
            seccomp: self.seccomp,
            log: self.log,
        };
        let background = if waits() { None } else { Background::begin(shell.pid()) };
        let in_background = background.is_some();
        shell.say(&ToShell::Prepare(Box::new(preparation)), &[])?;
        if let Some(background) = background {
            shell.await_word(background::MOST, waits);
            background.end();
        }
        match shell.hear(READY_LIMIT)? {
            FromShell::Ready { cells } => {
                if in_background {
                    cells.into_iter().for_each(come_forward);
                }
                Ok(shell)
            }
            _ => Err(ShellError::Silent),
        }
    }

    /// Where the sockets of the VM `id` are.
    fn places(&self, id: SnapshotId) -> (PathBuf, PathBuf) {
        let name: String = id.to_string().chars().take(16).collect();
        (self.directory.join(&name), self.directory.join(format!("{name}.console")))
    }
}

impl Factory for Recipe {
    type Shell = Shell;
    type Error = ShellError;

    fn make(&self, _id: u64, waits: &dyn Fn() -> bool) -> Result<Shell, ShellError> {
        self.make(&self.stage, waits)
    }

    fn is_alive(&self, shell: &mut Shell) -> bool {
        shell.is_idle()
    }

    fn reset(&self, shell: &mut Shell) -> Result<(), ShellError> {
        // First: whoever had it knows the names there were, and comes too late from here on. All who
        // came before are sent away.
        let id = SnapshotId::random().map_err(ShellError::Id)?;
        shell.rename(id, self.places(id))?;
        shell.say(&ToShell::Reset { id: id.0 }, &[])?;
        match shell.hear(ANSWER_LIMIT)? {
            FromShell::Ready { .. } => Ok(()),
            _ => Err(ShellError::Silent),
        }
    }

    fn look_after(&self) {
        self.claimers.look_after();
    }

    fn dismiss(&self, shell: &mut Shell) {
        shell.dismiss();
    }

    fn destroy(&self, shell: Shell) {
        drop(shell);
    }
}

impl Shell {
    /// Becomes a VM that runs; returns when it heard of that, and when it ran.
    pub(super) fn claim(
        &mut self,
        claim: Claim,
        fds: &[BorrowedFd<'_>],
        answer: Answer<'_>,
    ) -> Result<(u64, u64), ShellError> {
        let end = Instant::now() + answer.limit.min(ANSWER_LIMIT);
        self.say(&ToShell::Claim(Box::new(claim)), fds)?;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.hear(left.min(WANTED)) {
                Ok(FromShell::Claimed { heard_ns, runs_ns }) => return Ok((heard_ns, runs_ns)),
                Ok(_) => return Err(ShellError::Silent),
                Err(ShellError::Silent)
                    if left > WANTED && answer.wanted.is_none_or(|wanted| wanted()) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends it without asking. Whether it is gone, and with it its guest.
    pub(super) fn kill(&mut self) -> bool {
        let _ = self.child.kill(); // it fails only where it is gone
        self.wait(KILL_LIMIT).is_some()
    }

    fn say(&mut self, message: &ToShell, fds: &[BorrowedFd<'_>]) -> Result<(), ShellError> {
        match self.channel.try_send(message, fds) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ShellError::Silent),
            Err(ChannelError::Closed) => Err(self.died()),
            Err(error) => Err(ShellError::Channel(error)),
        }
    }

    fn hear(&mut self, limit: Duration) -> Result<FromShell, ShellError> {
        match self.channel.recv_timeout::<FromShell>(limit) {
            Ok((FromShell::Failed { message, remedy }, _)) => {
                // It is ours, but who knows by now.
                let (message, remedy) = (printable(&message), remedy.map(|text| printable(&text)));
                Err(ShellError::Refused { message, remedy })
            }
            Ok((answer, _)) => Ok(answer),
            Err(ChannelError::Closed) => Err(self.died()),
            Err(ChannelError::TimedOut(_)) => Err(ShellError::Silent),
            Err(error) => Err(ShellError::Channel(error)),
        }
    }

    /// Waits until it has something to say, for so long at most and while nobody `waits`.
    fn await_word(&self, most: Duration, waits: &dyn Fn() -> bool) {
        let end = Instant::now() + most;
        while !waits() && Instant::now() < end {
            if self.hangs_up(LOOK, PollFlags::POLLIN) != Some(false) {
                return;
            }
        }
    }

    /// Has it end.
    fn dismiss(&self) {
        let _ = self.channel.try_send(&ToShell::End, &[]); // it may have ended, or been told before
    }

    /// Its end of the channel is closed, which nothing but its end does.
    fn died(&mut self) -> ShellError {
        ShellError::Died(self.wait(END_LIMIT))
    }

    /// It is another VM from now on, whose sockets are elsewhere.
    fn rename(
        &mut self,
        id: SnapshotId,
        (control, console): (PathBuf, PathBuf),
    ) -> Result<(), ShellError> {
        for (path, to) in [(&mut self.control, control), (&mut self.console, console)] {
            std::fs::rename(&*path, &to)
                .map_err(|error| ShellError::Rename(path.clone(), error))?;
            *path = to;
        }
        self.id = id;
        Ok(())
    }

    /// Names the VM.
    pub(super) fn id(&self) -> SnapshotId {
        self.id
    }

    /// The VMM's process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn control(&self) -> &Path {
        &self.control
    }

    pub(super) fn console(&self) -> &Path {
        &self.console
    }

    /// One that waits says nothing, so that whatever there is to hear is its end.
    fn is_idle(&self) -> bool {
        self.hangs_up(Duration::ZERO, PollFlags::POLLIN) == Some(false)
    }

    /// Whether its end comes within `limit`.
    pub(super) fn ends_within(&self, limit: Duration) -> bool {
        self.hangs_up(limit, PollFlags::empty()) == Some(true)
    }

    fn hangs_up(&self, limit: Duration, also: PollFlags) -> Option<bool> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let time = PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000) as u64);
            let mut fds = [PollFd::new(self.channel.as_fd(), also)];
            match poll(&mut fds, time.unwrap_or(PollTimeout::MAX)) {
                Ok(0) if left.is_zero() => return Some(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Some(true),
                Err(_) => return None,
            }
        }
    }

    fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        // The socket closes a moment before the process can be waited for.
        let end = Instant::now() + limit;
        self.ends_within(limit);
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_micros(100)),
                _ => return None,
            }
        }
    }
}

impl AsFd for Shell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.dismiss();
        if self.wait(END_LIMIT).is_none() {
            tracing::warn!(pid = self.child.id(), "a VM does not end, and is killed");
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        // It removes them itself if it can.
        socket::clear(&self.control, self.child.id());
        socket::clear(&self.console, self.child.id());
    }
}
