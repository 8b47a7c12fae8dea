//! Shells are made, and VMs ended, with what the processors have left: what somebody waits for
//! goes first.
//!
//! A process in the background, with all that it starts, is of the scheduler's idle class: it
//! runs where nobody else would, and gives way at once. That is for a while only ([`MOST`]): on
//! a machine that is busy for ever nothing is put off for ever. It needs the right to come back
//! (`RLIMIT_NICE` or `CAP_SYS_NICE`); without, everything runs as it always would.
#![allow(unsafe_code)] // asking the scheduler

use std::fs;
use std::sync::OnceLock;
use std::time::Duration;

/// How long something is left to what the processors have left.
pub(super) const MOST: Duration = Duration::from_millis(100);

/// A family of processes in the background. Dropped, it stays there.
#[derive(Debug)]
pub(super) struct Background(u32);

impl Background {
    /// Puts a process, and whatever it starts from now on, in the background; nothing where that
    /// could not be taken back.
    pub(super) fn begin(pid: u32) -> Option<Background> {
        let possible = may_return() && children(pid, pid).is_some();
        (possible && change(pid, libc::SCHED_OTHER, libc::SCHED_IDLE)).then_some(Background(pid))
    }

    /// As [`Background::begin`], with all that it has started.
    pub(super) fn begin_all(pid: u32) -> Option<Background> {
        let begun = Background::begin(pid)?;
        for_family(pid, &mut |thread| {
            change(thread, libc::SCHED_OTHER, libc::SCHED_IDLE);
        });
        Some(begun)
    }

    /// Puts all of it that can be seen back among all others: who is being started at that moment
    /// may be seen only the next time.
    pub(super) fn end(&self) {
        for_family(self.0, &mut |thread| {
            change(thread, libc::SCHED_IDLE, libc::SCHED_OTHER);
        });
    }
}

/// Whether a thread of this user gets out of the idle class again, which is tried once.
fn may_return() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        // It ends with whatever it has become.
        let tried = std::thread::Builder::new().name("pool-class".into()).spawn(|| {
            change(0, libc::SCHED_OTHER, libc::SCHED_IDLE)
                && change(0, libc::SCHED_IDLE, libc::SCHED_OTHER)
        });
        tried.is_ok_and(|thread| thread.join().unwrap_or(false))
    })
}

/// Moves a thread from one class to the other. False if it is not there, or of another class.
fn change(thread: u32, from: i32, to: i32) -> bool {
    let Ok(thread) = libc::pid_t::try_from(thread) else { return false };
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: takes a number, and returns one.
    let now = unsafe { libc::sched_getscheduler(thread) };
    // SAFETY: reads `priority`, which outlives the call.
    now == from && unsafe { libc::sched_setscheduler(thread, to, &raw const priority) } == 0
}

/// Calls `act` with every thread of the process and of its descendants, parents first.
fn for_family(pid: u32, act: &mut dyn FnMut(u32)) {
    let mut next = vec![pid];
    while let Some(process) = next.pop() {
        let Ok(entries) = fs::read_dir(format!("/proc/{process}/task")) else { continue };
        let name = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
        for thread in entries.flatten().filter_map(name) {
            act(thread);
            next.extend(children(process, thread).unwrap_or_default());
        }
    }
}

/// Processes that a thread has started; nothing where that cannot be known.
fn children(process: u32, thread: u32) -> Option<Vec<u32>> {
    let text = fs::read_to_string(format!("/proc/{process}/task/{thread}/children")).ok()?;
    Some(text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    fn classes(pid: u32) -> Vec<i32> {
        let mut found = Vec::new();
        for_family(pid, &mut |thread| {
            // SAFETY: takes a number, and returns one.
            found.push(unsafe { libc::sched_getscheduler(thread as libc::pid_t) });
        });
        found
    }

    /// A family of two processes that wait for their end.
    fn family() -> std::process::Child {
        let mut child = Command::new("sh")
            .args(["-c", "exec 3<&0; cat <&3 & echo there; wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh");
        let mut line = String::new();
        let out = child.stdout.take().expect("pipe");
        BufReader::new(out).read_line(&mut line).expect("line");
        assert_eq!(line, "there\n");
        child
    }

    #[test]
    fn a_family_goes_to_the_background_and_comes_back_with_all_its_members() {
        let mut child = family();
        let pid = child.id();
        assert_eq!(classes(pid), [libc::SCHED_OTHER; 2]);
        match Background::begin_all(pid) {
            Some(background) => {
                assert_eq!(classes(pid), [libc::SCHED_IDLE; 2]);
                background.end();
            }
            None => assert!(!may_return(), "it could have been"),
        }
        assert_eq!(classes(pid), [libc::SCHED_OTHER; 2]);
        drop(child.stdin.take());
        assert!(child.wait().expect("its end").success());
        assert!(Background::begin(pid).is_none(), "nobody is there");
    }
}
