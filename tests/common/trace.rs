//! A thread of a device process, held where it asks the kernel for something. For root.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{LIMIT, poll, proc, send};

/// A system call that a thread is at: its number, and its arguments.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub number: i64,
    pub args: [u64; 6],
    /// It is about to be made; else it is over.
    pub entered: bool,
}

/// Whoever holds a thread of a test that failed lets it go: nobody could wait for its end.
impl Drop for Traced {
    fn drop(&mut self) {
        let _ = ptrace::detach(self.thread, None); // it is gone, as a rule
    }
}

/// A thread that stands still, except in [`Traced::run_until`].
pub struct Traced {
    process: i32,
    thread: Pid,
}

impl Traced {
    /// Takes hold of the thread of that name, wherever it is.
    pub fn hold(process: i32, name: &str) -> Traced {
        let thread = poll(LIMIT, || proc::thread(process, name)).unwrap();
        let traced = Traced { process, thread: Pid::from_raw(thread) };
        ptrace::seize(traced.thread, Options::PTRACE_O_TRACESYSGOOD).unwrap();
        ptrace::interrupt(traced.thread).unwrap();
        traced.wait();
        traced
    }

    /// Lets it run until it is at such a call, going in or coming out.
    #[track_caller]
    pub fn run_until(&self, wanted: impl Fn(Call) -> bool) -> Call {
        let end = Instant::now() + LIMIT;
        let mut signal = None;
        while Instant::now() < end {
            ptrace::syscall(self.thread, signal.take()).unwrap();
            match self.wait() {
                WaitStatus::PtraceSyscall(_) => {
                    let call = self.call();
                    if wanted(call) {
                        return call;
                    }
                }
                WaitStatus::Stopped(_, by) => signal = Some(by),
                _ => {}
            }
        }
        panic!("the thread does not come to that within {LIMIT:?}");
    }

    /// As [`Traced::run_until`], for as long as `done` is false; then it stands still too.
    pub fn run_until_or(
        &self,
        mut wanted: impl FnMut(Call) -> bool,
        mut done: impl FnMut() -> bool,
    ) -> Option<Call> {
        let mut signal = None;
        loop {
            ptrace::syscall(self.thread, signal.take()).unwrap();
            let stopped = loop {
                match waitpid(self.thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::StillAlive) if done() => {
                        ptrace::interrupt(self.thread).unwrap();
                        self.wait();
                        return None;
                    }
                    Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_micros(50)),
                    other => break other.unwrap(),
                }
            };
            match stopped {
                WaitStatus::PtraceSyscall(_) => {
                    let call = self.call();
                    if wanted(call) {
                        return Some(call);
                    }
                }
                WaitStatus::Stopped(_, by) => signal = Some(by),
                _ => {}
            }
        }
    }

    /// Has the call that it is about to make do nothing, and fail.
    pub fn fail(&self, errno: Errno) {
        let mut regs = ptrace::getregs(self.thread).unwrap();
        // Some call that every filter lets through.
        let harmless = libc::user_regs_struct {
            orig_rax: libc::SYS_close as u64,
            rdi: u64::from(u32::MAX),
            ..regs
        };
        ptrace::setregs(self.thread, harmless).unwrap();
        ptrace::syscall(self.thread, None).unwrap();
        assert!(matches!(self.wait(), WaitStatus::PtraceSyscall(_)));
        regs.rax = -(errno as i64) as u64;
        ptrace::setregs(self.thread, regs).unwrap();
    }

    fn call(&self) -> Call {
        let regs = ptrace::getregs(self.thread).unwrap();
        Call {
            number: regs.orig_rax as i64,
            args: [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9],
            // What it holds on the way in, and no call that is looked for here returns.
            entered: regs.rax as i64 == -i64::from(libc::ENOSYS),
        }
    }

    /// Lets it go.
    pub fn release(self) {
        ptrace::detach(self.thread, None).unwrap();
    }

    /// Kills the process, with the thread where it stands.
    pub fn kill(self) {
        send(self.process, Signal::SIGKILL);
        self.bury();
    }

    /// Waits until the process is killed by somebody else: whoever holds a thread has to see
    /// its end.
    pub fn bury(self) {
        while !matches!(self.wait(), WaitStatus::Exited(..) | WaitStatus::Signaled(..)) {}
    }

    fn wait(&self) -> WaitStatus {
        let end = Instant::now() + LIMIT;
        loop {
            match waitpid(self.thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_micros(100));
                }
                Ok(WaitStatus::StillAlive) => panic!("nothing of the thread for {LIMIT:?}"),
                Ok(status) => return status,
                Err(Errno::ECHILD) => return WaitStatus::Exited(self.thread, 0),
                Err(error) => panic!("waiting for a thread: {error}"),
            }
        }
    }
}
