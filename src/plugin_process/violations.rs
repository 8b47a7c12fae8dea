//! System calls of a plugin that its policy refuses, named.
//!
//! The plugin runs a program of its own, in which no handler of ours could report anything.
//! Its filter asks us instead: the thread that made the call stands still until the process
//! is killed, or, with `--seccomp log`, until we have said that it may go on.
#![allow(unsafe_code)] // the ioctls have no safe wrappers

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use cellblock_seccomp::violation::Violation;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// struct seccomp_notif.
#[repr(C)]
#[derive(Default)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    syscall: i32,
    arch: u32,
    instruction: u64,
    arguments: [u64; 6],
}

/// struct seccomp_notif_resp.
#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

const RECEIVE: libc::c_ulong = 0xc050_2100;
const SEND: libc::c_ulong = 0xc018_2101;
const CONTINUE: u32 = 1;

const _: () = assert!(size_of::<Notification>() == 80 && size_of::<Answer>() == 24);

/// The filter's questions.
#[derive(Debug)]
pub(super) struct Violations {
    listener: OwnedFd,
    goes_on: bool,
}

impl Violations {
    /// With `goes_on` calls are let through once they have been named.
    pub(super) fn new(listener: OwnedFd, goes_on: bool) -> Violations {
        Violations { listener, goes_on }
    }

    /// The next refused call, if there is one: named, and let through if that is the mode.
    pub(super) fn next(&self) -> Option<Violation> {
        let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).ok()?;
        if !fds[0].revents()?.contains(PollFlags::POLLIN) {
            return None;
        }
        let mut asked = Notification::default();
        // SAFETY: the kernel writes one struct seccomp_notif, which this is; it is zero, as
        // the kernel wants it.
        let received = unsafe { libc::ioctl(self.listener.as_raw_fd(), RECEIVE, &raw mut asked) };
        // Whoever asked may have died meanwhile.
        Errno::result(received).ok()?;
        if self.goes_on {
            let answer = Answer { id: asked.id, value: 0, error: 0, flags: CONTINUE };
            // SAFETY: the kernel reads one struct seccomp_notif_resp, which this is. Should
            // the thread have died, there is nobody to answer.
            unsafe { libc::ioctl(self.listener.as_raw_fd(), SEND, &raw const answer) };
        }
        let (tid, thread) = (asked.pid as i32, "plugin".to_string());
        Some(Violation { syscall: asked.syscall.into(), arch: asked.arch, tid, thread })
    }

    pub(super) fn goes_on(&self) -> bool {
        self.goes_on
    }
}

impl AsFd for Violations {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}
