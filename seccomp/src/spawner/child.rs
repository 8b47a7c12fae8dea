//! Making one child: clone3 with everything new, and what the child does until exec.
#![allow(unsafe_code)] // clone3, execveat and raw fd arrangement

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid, setsid};

use super::ids::Plan;
use super::messages::Request;
use super::{CELL_ARG, MAX_CHILD_FDS};
use crate::jail;
use crate::plugin;

/// First fd number of a child that the request's fds get.
const FIRST_FD: RawFd = 3;
/// Above everything a child keeps: fds are parked here while they are arranged.
const PARKING: RawFd = FIRST_FD + (MAX_CHILD_FDS + plugin::MAX_PLAN_FDS) as RawFd;

/// Signals of the terminal and of `kill` are for the VMM; the spawner ends when the
/// VMM has. SIGTTOU, because the terminal is restored from the background.
pub(super) const IGNORED_SIGNALS: [Signal; 10] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGPIPE,
];

/// Six of the seven new namespaces. The network one takes longer than all others
/// together: the child makes it, so that several children do so side by side.
const NAMESPACES: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

/// Steps that can fail, in order. The child sends the number of its step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Step {
    Socket,
    Clone,
    IdMaps,
    Network,
    Session,
    ParentDeath,
    Groups,
    Ids,
    Fds,
    Exec,
}

const CHILD_STEPS: [Step; 7] = [
    Step::Network,
    Step::Session,
    Step::ParentDeath,
    Step::Groups,
    Step::Ids,
    Step::Fds,
    Step::Exec,
];

impl Step {
    pub(super) fn name(self) -> &'static str {
        match self {
            Step::Socket => "create socket to the child",
            Step::Clone => "create process and namespaces",
            Step::IdMaps => "write id maps",
            Step::Network => "create network namespace",
            Step::Session => "start a session",
            Step::ParentDeath => "set parent-death signal",
            Step::Groups => "clear groups",
            Step::Ids => "change ids",
            Step::Fds => "arrange fds",
            Step::Exec => "execute cellblock",
        }
    }

    /// What to do about a failure of this step.
    pub(super) fn remedy(self, errno: Errno) -> &'static str {
        match (self, errno) {
            (Step::Clone | Step::Network, Errno::ENOSPC | Errno::EUSERS) => {
                "raise the sysctls user.max_*_namespaces"
            }
            (Step::Clone, Errno::EPERM) => {
                "allow unprivileged user namespaces (sysctls kernel.unprivileged_userns_clone=1, \
                 kernel.apparmor_restrict_unprivileged_userns=0), leave the chroot, or run as root"
            }
            (Step::Clone, Errno::EAGAIN) => "raise the limit on processes (`ulimit -u`)",
            (Step::Clone | Step::Network, Errno::ENOSYS | Errno::EINVAL) => {
                "the kernel needs clone3 and all namespaces (5.9 or newer, CONFIG_USER_NS, \
                 CONFIG_PID_NS, CONFIG_NET_NS, CONFIG_IPC_NS, CONFIG_UTS_NS, CONFIG_CGROUPS)"
            }
            (Step::Socket | Step::Fds, Errno::EMFILE | Errno::ENFILE) => {
                "raise the limit on open files (`ulimit -n`)"
            }
            (Step::IdMaps, Errno::ENOENT) => "mount /proc",
            (Step::IdMaps, Errno::EINVAL) => "check the ids and the ranges of --plugin-gid-map",
            (Step::IdMaps, _) => {
                "run as an ordinary user or as root with CAP_SETUID and CAP_SETGID"
            }
            (Step::Exec, Errno::EACCES) => {
                "let everyone execute the cellblock program (chmod o+rx), on a file system \
                 without `noexec`, and search the root directory"
            }
            (Step::Exec, Errno::ENOENT) => "install the program's dynamic loader",
            (_, Errno::ENOMEM) => "free some memory",
            _ => "--disable-sandbox runs without jails",
        }
    }
}

/// A failed step.
pub(super) type Failure = (Step, Errno);

/// A child on its way to exec.
pub(super) struct Made {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    /// Closed by exec; before that a [`Failure`] may come.
    pub(super) sync: OwnedFd,
}

/// What all children have in common.
pub(super) struct Template {
    pub(super) exe: OwnedFd,
    pub(super) null: OwnedFd,
    pub(super) plan: Plan,
    /// For children of its role.
    pub(super) plugin: Option<plugin::Plan>,
}

impl Template {
    /// Makes a child with `fds` as its 3, 4, and so on, and returns without
    /// waiting for its exec.
    pub(super) fn start(&self, request: &Request, fds: &[OwnedFd]) -> Result<Made, Failure> {
        // Prepared before the clone: the child only makes system calls.
        let arguments = arguments(request).map_err(|e| (Step::Exec, e))?;
        let (near, far) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .and_then(|(near, far)| Ok((near, above_children(far)?)))
                .map_err(|e| (Step::Socket, e))?;
        let flags = if request.sandbox { NAMESPACES } else { 0 };
        let Some((pid, pidfd)) = clone(flags).map_err(|e| (Step::Clone, e))? else {
            drop(near);
            self.child(request, fds, far, &arguments)
        };
        drop(far);
        let gid_maps = self.plugin_of(request).map_or(&[][..], |plan| &plan.gid_maps);
        if request.sandbox
            && let Err(e) = self.plan.write(pid, gid_maps)
        {
            // Seeing the end of file, the child exits at once.
            drop(near);
            let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
            return Err((Step::IdMaps, e));
        }
        let mut socket = File::from(near);
        // A child that died meanwhile is noticed by its pidfd.
        let _ = socket.write(&[0]);
        Ok(Made { pid, pidfd, sync: OwnedFd::from(socket) })
    }

    fn plugin_of(&self, request: &Request) -> Option<&plugin::Plan> {
        self.plugin.as_ref().filter(|_| request.role == plugin::ROLE)
    }

    fn child(
        &self,
        request: &Request,
        fds: &[OwnedFd],
        sync: OwnedFd,
        arguments: &[CString; 4],
    ) -> ! {
        let mut socket = File::from(sync);
        let Err((step, errno)) = self.become_cell(request, fds, &socket, arguments);
        let mut report = [step as u8, 0, 0, 0, 0];
        report[1..].copy_from_slice(&(errno as i32).to_ne_bytes());
        let _ = socket.write(&report);
        exit();
    }

    fn become_cell(
        &self,
        request: &Request,
        fds: &[OwnedFd],
        mut sync: &File,
        arguments: &[CString; 4],
    ) -> Result<std::convert::Infallible, Failure> {
        if request.sandbox {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|e| (Step::Network, e))?;
        }
        // The id maps are there now, or the spawner has given up.
        if !matches!(sync.read(&mut [0]), Ok(1)) {
            exit();
        }
        // Out of the terminal's reach: no ctrl-c, no stop by background access.
        setsid().map_err(|e| (Step::Session, e))?;
        default_signals();
        if request.sandbox {
            if self.plan.clears_groups() {
                let maps = self.plugin_of(request).map_or(&[][..], |plan| &plan.gid_maps);
                let groups: Vec<_> = maps.iter().map(|map| Gid::from_raw(map.inside)).collect();
                setgroups(&groups).map_err(|e| (Step::Groups, e))?;
            }
            let (gid, uid) = (Gid::from_raw(0), Uid::from_raw(0));
            setresgid(gid, gid, gid).map_err(|e| (Step::Ids, e))?;
            setresuid(uid, uid, uid).map_err(|e| (Step::Ids, e))?;
        }
        // After the change of ids, which clears it. Should the spawner have died
        // before, no signal comes; its end of the socket tells.
        jail::die_with_parent().map_err(|e| (Step::ParentDeath, e.errno))?;
        if orphaned(sync) {
            exit();
        }
        let more = self.plugin_of(request).map_or(&[][..], |plan| &plan.fds);
        let exe = arrange(fds, more, &self.null, &self.exe).map_err(|e| (Step::Fds, e))?;
        Err((Step::Exec, execute(&exe, arguments)))
    }
}

fn orphaned(sync: &File) -> bool {
    let mut fds = [PollFd::new(sync.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO) != Ok(0)
}

/// Reads what a child reported: nothing (it runs its program now, or is dead), or
/// the step it failed at.
pub(super) fn outcome(sync: OwnedFd) -> Result<(), Failure> {
    let mut report = [0; 5];
    match File::from(sync).read(&mut report) {
        Ok(5) => {
            let step = CHILD_STEPS.into_iter().find(|s| *s as u8 == report[0]);
            let number = i32::from_ne_bytes([report[1], report[2], report[3], report[4]]);
            Err((step.unwrap_or(Step::Exec), Errno::from_raw(number)))
        }
        _ => Ok(()),
    }
}

fn arguments(request: &Request) -> Result<[CString; 4], Errno> {
    let text = |s: &str| CString::new(s).map_err(|_| Errno::EINVAL);
    Ok([text("cellblock")?, text(CELL_ARG)?, text(&request.role)?, text(&request.id)?])
}

/// clone3: pid and pidfd in the parent, nothing in the child.
fn clone(namespaces: i32) -> Result<Option<(i32, OwnedFd)>, Errno> {
    let mut pidfd: RawFd = -1;
    let arguments = libc::clone_args {
        flags: (namespaces | libc::CLONE_PIDFD) as u32 as u64,
        pidfd: (&raw mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    // SAFETY: no CLONE_VM, so the child runs on a copy of this single-threaded
    // process's memory and shares nothing; `pidfd` outlives the call.
    let pid = Errno::result(unsafe {
        libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments))
    })?;
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel stored a new fd that nobody else knows.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Some((pid as i32, pidfd)))
}

/// Puts back what the spawner ignores: ignored signals survive exec.
fn default_signals() {
    for which in IGNORED_SIGNALS {
        set_signal(which, SigHandler::SigDfl);
    }
    // Cannot fail with these arguments.
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

/// Sets a signal to one of the actions that run no code.
pub(super) fn set_signal(which: Signal, action: SigHandler) {
    debug_assert!(matches!(action, SigHandler::SigDfl | SigHandler::SigIgn));
    // SAFETY: no handler runs. SIGKILL and SIGSTOP refuse, rightly.
    let _ = unsafe { signal(which, action) };
}

/// /dev/null as 0, 1, 2, then `fds` and `more` from 3 on; everything else goes at exec, the
/// socket to the spawner (which is above [`PARKING`]) included. Returns the program.
fn arrange(
    fds: &[OwnedFd],
    more: &[OwnedFd],
    null: &OwnedFd,
    exe: &OwnedFd,
) -> Result<OwnedFd, Errno> {
    // First out of the way of the targets, then into place.
    let all = fds.iter().chain(more);
    let parked = all.map(|fd| park(fd.as_fd())).collect::<Result<Vec<_>, _>>()?;
    let exe = park(exe.as_fd())?;
    let null = park(null.as_fd())?;
    for target in 0..FIRST_FD {
        place(null.as_fd(), target)?;
    }
    for (target, fd) in (FIRST_FD..).zip(&parked) {
        place(fd.as_fd(), target)?;
    }
    let first_unused = FIRST_FD as u32 + parked.len() as u32;
    // SAFETY: marks fds close-on-exec; no memory is involved.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_close_range, first_unused, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
    })?;
    Ok(exe)
}

/// A close-on-exec duplicate with a number of at least [`PARKING`].
fn park(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let number = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(PARKING))?;
    // SAFETY: a new fd that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes `target` a duplicate of `fd` that survives exec.
fn place(fd: BorrowedFd<'_>, target: RawFd) -> Result<(), Errno> {
    // SAFETY: whatever owned `target` in this process never runs again: the next
    // thing is exec or exit.
    let new = Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), target) })?;
    debug_assert_eq!(new, target);
    Ok(())
}

/// Runs the program with an empty environment. Returns only on failure.
fn execute(exe: &OwnedFd, arguments: &[CString; 4]) -> Errno {
    let argv: [*const libc::c_char; 5] = [
        arguments[0].as_ptr(),
        arguments[1].as_ptr(),
        arguments[2].as_ptr(),
        arguments[3].as_ptr(),
        ptr::null(),
    ];
    let envp: [*const libc::c_char; 1] = [ptr::null()];
    // SAFETY: both arrays end with null and outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            exe.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Errno::last()
}

fn exit() -> ! {
    // SAFETY: ends the process without running destructors meant for the spawner.
    unsafe { libc::_exit(1) }
}

/// Moves a fd of the spawner above everything a child keeps.
pub(super) fn above_children(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    if fd.as_raw_fd() >= PARKING { Ok(fd) } else { park(fd.as_fd()) }
}
