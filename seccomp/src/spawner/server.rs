//! The spawner's side: one thread, one loop.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cellblock_wire::{Channel, ChannelError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::getppid;

use super::child::{self, IGNORED_SIGNALS, Made, Template};
use super::connect::Places;
use super::ids;
use super::messages::{ExitStatus, FromSpawner, Request, ToSpawner};
use super::terminal::Saved;
use super::{MAX_CHILD_FDS, MAX_CHILDREN, inspect};
use crate::jail::{self, JailError, Kept};
use crate::plugin::{self, Plan};

/// Most messages kept for a VMM that does not read; then it is taken for dead.
const MAX_OUTBOX: usize = 4096;
/// How long killed children may take to be gone before the spawner leaves.
const REAP_LIMIT: Duration = Duration::from_secs(5);

/// What the spawner got from the VMM by being forked from it.
pub(super) struct Inherited {
    pub(super) channel: Channel,
    pub(super) vmm: OwnedFd,
    pub(super) exe: OwnedFd,
    pub(super) null: OwnedFd,
    pub(super) terminal: Option<Saved>,
    pub(super) plugin: Option<Plan>,
    pub(super) places: Vec<PathBuf>,
}

struct Child {
    request: Request,
    ticket: u32,
    pid: i32,
    pidfd: OwnedFd,
    /// There until the program runs.
    sync: Option<OwnedFd>,
}

struct Server {
    channel: Channel,
    vmm: OwnedFd,
    vmm_pid: i32,
    template: Template,
    terminal: Option<Saved>,
    places: Places,
    children: Vec<Child>,
    outbox: VecDeque<(FromSpawner, Option<OwnedFd>)>,
}

/// Why the loop ended.
enum End {
    /// The VMM is dead or has let go of the spawner.
    VmmGone,
    /// The VMM behaves as it never should; it may be in somebody else's hands.
    Misbehaviour(String),
}

/// Serves until the VMM is gone, then ends all children. Never returns.
pub(super) fn main(inherited: Inherited) -> ! {
    // Nothing of the VMM may run in this process, not even by a panic's unwinding.
    let status = match catch_unwind(AssertUnwindSafe(|| serve(inherited))) {
        Ok(Ok(())) => 0,
        Ok(Err(message)) => {
            complain(&message);
            1
        }
        Err(_) => 101,
    };
    exit(status)
}

fn serve(inherited: Inherited) -> Result<(), String> {
    let vmm_pid = getppid().as_raw();
    let mut server = prepare(inherited, vmm_pid).map_err(|e| e.to_string())?;
    let result = match server.run() {
        End::VmmGone => Ok(()),
        End::Misbehaviour(what) => {
            kill(&server.vmm);
            Err(format!("spawner: {what}; the VM is ended"))
        }
    };
    server.end_children();
    result
}

fn prepare(inherited: Inherited, vmm_pid: i32) -> Result<Server, JailError> {
    // Handlers that the VMM's parent made the VMM ignore, and any of the VMM's own,
    // are gone; children start from here.
    for which in Signal::iterator() {
        child::set_signal(which, SigHandler::SigDfl);
    }
    for which in IGNORED_SIGNALS {
        child::set_signal(which, SigHandler::SigIgn);
    }
    // Blocked by `fork` until here. Cannot fail with these arguments.
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
    // A name for `ps`; nothing depends on it.
    let _ = prctl::set_name(c"cb-spawner");
    let high = |fd| {
        child::above_children(fd).map_err(JailError::new(
            "arrange the spawner's fds",
            "raise the limit on open files (`ulimit -n`)",
        ))
    };
    let channel = Channel::from_fd(high(inherited.channel.into_fd())?);
    let vmm = high(inherited.vmm)?;
    let exe = high(inherited.exe)?;
    let null = high(inherited.null)?;
    stdio_to_null(&null);
    let mut keep =
        vec![0, 1, 2, channel.as_raw_fd(), vmm.as_raw_fd(), exe.as_raw_fd(), null.as_raw_fd()];
    keep.extend(inherited.terminal.as_ref().map(|t| t.as_fd().as_raw_fd()));
    let plugin = match inherited.plugin {
        Some(Plan { fds, gid_maps }) => {
            Some(Plan { fds: fds.into_iter().map(high).collect::<Result<_, _>>()?, gid_maps })
        }
        None => None,
    };
    keep.extend(plugin.iter().flat_map(|plan| &plan.fds).map(AsRawFd::as_raw_fd));
    jail::close_others(&keep)?;
    let plan = ids::Plan::new();
    jail::restrict(Kept::SetIds)?;
    // Not gained by exec either. Children keep what their user namespace gives
    // them, which is not gained.
    prctl::set_no_new_privs()
        .map_err(JailError::new("set no_new_privs", "a kernel of at least 3.5 is needed"))?;
    Ok(Server {
        channel,
        vmm,
        vmm_pid,
        template: Template { exe, null, plan, plugin },
        terminal: inherited.terminal,
        places: Places(inherited.places),
        children: Vec::new(),
        outbox: VecDeque::new(),
    })
}

impl Server {
    fn run(&mut self) -> End {
        loop {
            match self.turn() {
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    /// One round: waits, then handles everything that is ready.
    fn turn(&mut self) -> Result<(), End> {
        let ready = self.wait()?;
        if ready.vmm {
            return Err(End::VmmGone);
        }
        for pid in ready.execs {
            self.settle(pid);
        }
        for pid in ready.exits {
            self.reap(pid);
        }
        if ready.requests {
            self.requests()?;
        }
        self.flush()
    }

    fn wait(&self) -> Result<Ready, End> {
        let mut wanted = PollFlags::POLLIN;
        if !self.outbox.is_empty() {
            wanted |= PollFlags::POLLOUT;
        }
        let mut fds = vec![
            PollFd::new(self.channel.as_fd(), wanted),
            PollFd::new(self.vmm.as_fd(), PollFlags::POLLIN),
        ];
        for child in &self.children {
            fds.push(PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN));
        }
        let starting: Vec<&Child> = self.children.iter().filter(|c| c.sync.is_some()).collect();
        for sync in starting.iter().filter_map(|c| c.sync.as_ref()) {
            fds.push(PollFd::new(sync.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(End::Misbehaviour(format!("waiting failed: {e}"))),
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        let (head, rest) = fds.split_at(2);
        let (exits, execs) = rest.split_at(self.children.len());
        let pids = |list: &[PollFd<'_>], children: &mut dyn Iterator<Item = i32>| {
            children.zip(list).filter(|(_, fd)| ready(fd)).map(|(pid, _)| pid).collect()
        };
        Ok(Ready {
            requests: ready(&head[0]),
            vmm: ready(&head[1]),
            exits: pids(exits, &mut self.children.iter().map(|c| c.pid)),
            execs: pids(execs, &mut starting.iter().map(|c| c.pid)),
        })
    }

    fn requests(&mut self) -> Result<(), End> {
        loop {
            match self.channel.try_recv::<ToSpawner>() {
                Ok(Some((message, fds))) => self.obey(message, fds)?,
                Ok(None) => return Ok(()),
                Err(ChannelError::Closed) => return Err(End::VmmGone),
                Err(e) => return Err(End::Misbehaviour(format!("bad request: {e}"))),
            }
        }
    }

    fn obey(&mut self, message: ToSpawner, fds: Vec<OwnedFd>) -> Result<(), End> {
        match message {
            ToSpawner::Spawn { ticket, request } => {
                if let Err(e) = request.check() {
                    return Err(End::Misbehaviour(format!("bad request: {e}")));
                }
                if fds.is_empty() || fds.len() > MAX_CHILD_FDS {
                    return Err(End::Misbehaviour(format!("bad request: {} fds", fds.len())));
                }
                if request.role == plugin::ROLE
                    && (self.template.plugin.is_none() || fds.len() != plugin::REQUEST_FDS)
                {
                    return Err(End::Misbehaviour("bad request: no such plugin".into()));
                }
                self.spawn(ticket, request, fds);
            }
            ToSpawner::Kill { pid } => {
                if let Some(child) = self.children.iter().find(|c| c.pid == pid) {
                    kill(&child.pidfd);
                }
            }
            ToSpawner::Inspect => self.inspect(),
            ToSpawner::Connect { place } => match self.places.connect(place) {
                None => return Err(End::Misbehaviour("bad request: no such socket".into())),
                Some(Ok(socket)) => {
                    let message = FromSpawner::Connected { place };
                    self.outbox.push_back((message, Some(socket)));
                }
                Some(Err(errno)) => {
                    let why = errno.desc().to_string();
                    self.post(FromSpawner::NotConnected { place, why });
                }
            },
        }
        Ok(())
    }

    fn spawn(&mut self, ticket: u32, request: Request, fds: Vec<OwnedFd>) {
        if self.children.len() >= MAX_CHILDREN {
            self.post(FromSpawner::Failed {
                ticket,
                step: "count processes".into(),
                message: format!("a VM may have {MAX_CHILDREN} device processes; use fewer"),
            });
            return;
        }
        match self.template.start(&request, &fds) {
            Ok(Made { pid, pidfd, sync }) => {
                self.children.push(Child { request, ticket, pid, pidfd, sync: Some(sync) });
            }
            Err(failure) => self.post_failure(ticket, failure),
        }
    }

    /// The child's socket has a report, or was closed by its exec or its death.
    fn settle(&mut self, pid: i32) {
        let Some(index) = self.children.iter().position(|c| c.pid == pid) else { return };
        let Some(sync) = self.children[index].sync.take() else { return };
        match child::outcome(sync) {
            Ok(()) => {
                let child = &self.children[index];
                let message = FromSpawner::Started { ticket: child.ticket, pid };
                match child.pidfd.try_clone() {
                    Ok(pidfd) => self.outbox.push_back((message, Some(pidfd))),
                    Err(e) => {
                        kill(&child.pidfd);
                        let errno = super::errno(e);
                        self.post_failure(self.children[index].ticket, (child::Step::Fds, errno));
                    }
                }
            }
            Err(failure) => {
                let child = self.children.swap_remove(index);
                // It exits by itself after its report.
                let _ = waitid(Id::PIDFd(child.pidfd.as_fd()), WaitPidFlag::WEXITED);
                self.post_failure(child.ticket, failure);
            }
        }
    }

    fn reap(&mut self, pid: i32) {
        // It may have started and ended between two rounds.
        self.settle(pid);
        let Some(index) = self.children.iter().position(|c| c.pid == pid) else { return };
        let pidfd = self.children[index].pidfd.as_fd();
        let status = match waitid(Id::PIDFd(pidfd), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            Ok(WaitStatus::Exited(_, code)) => ExitStatus::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => ExitStatus::Signal(signal as i32),
            Ok(_) | Err(_) => return,
        };
        self.children.swap_remove(index);
        self.post(FromSpawner::Exited { pid, status });
    }

    fn inspect(&mut self) {
        let own = std::process::id() as i32;
        let mut list: Vec<_> = [("vmm", self.vmm_pid), ("spawner", own)]
            .into_iter()
            .filter_map(|(role, pid)| inspect::process(role, "", pid))
            .collect();
        for child in &self.children {
            list.extend(inspect::process(&child.request.role, &child.request.id, child.pid));
        }
        // Many processes: main threads only, so that the answer fits a message.
        if list.iter().map(|p| p.threads.len()).sum::<usize>() > 512 {
            list.iter_mut().for_each(|p| p.threads.truncate(1));
        }
        self.post(FromSpawner::Processes(list));
    }

    fn post(&mut self, message: FromSpawner) {
        self.outbox.push_back((message, None));
    }

    fn post_failure(&mut self, ticket: u32, (step, errno): child::Failure) {
        let name = step.name();
        let message = format!("jail step `{name}` failed: {errno}; {}", step.remedy(errno));
        self.post(FromSpawner::Failed { ticket, step: name.into(), message });
    }

    fn flush(&mut self) -> Result<(), End> {
        while let Some((message, fd)) = self.outbox.front() {
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            match self.channel.try_send(message, &fds) {
                Ok(true) => {
                    self.outbox.pop_front();
                }
                Ok(false) if self.outbox.len() > MAX_OUTBOX => {
                    return Err(End::Misbehaviour("events are not taken".into()));
                }
                Ok(false) => return Ok(()),
                Err(ChannelError::Closed) => return Err(End::VmmGone),
                Err(e) => return Err(End::Misbehaviour(format!("sending an event: {e}"))),
            }
        }
        Ok(())
    }

    fn end_children(&mut self) {
        for child in &self.children {
            kill(&child.pidfd);
        }
        if let Some(terminal) = &self.terminal {
            terminal.restore();
        }
        let end = Instant::now() + REAP_LIMIT;
        for child in &self.children {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            // One that hangs in the kernel dies when it can; it has its signal.
            let _ = poll(&mut [PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN)], timeout);
        }
    }
}

struct Ready {
    requests: bool,
    vmm: bool,
    exits: Vec<i32>,
    execs: Vec<i32>,
}

/// SIGKILL by pidfd. The only possible failure is that the process has ended.
#[allow(unsafe_code)] // pidfd_send_signal has no wrapper
fn kill(pidfd: &OwnedFd) {
    // SAFETY: no memory is involved (siginfo is null).
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
}

/// Lets go of the VMM's input and output, so that whoever reads it sees its end
/// when the VMM ends. Standard error stays, for [`complain`].
#[allow(unsafe_code)] // replacing standard fds by number
fn stdio_to_null(null: &OwnedFd) {
    for target in [0, 1] {
        // SAFETY: the spawner uses neither; both numbers stay open.
        unsafe { libc::dup2(null.as_raw_fd(), target) };
    }
}

fn complain(message: &str) {
    // With standard error gone there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "cellblock: {message}");
}

#[allow(unsafe_code)] // _exit
fn exit(status: i32) -> ! {
    // SAFETY: ends the process without running exit handlers that the VMM installed.
    unsafe { libc::_exit(status) }
}
