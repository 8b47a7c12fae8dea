//! Shells are made, and VMs ended, with what the processors have left: what somebody waits for
//! goes first.
//!
//! A process in the background has a lower priority than the pool, with all that it starts. That
//! is for a while only ([`MOST`]), and for as long as nobody waits for it. To come back it needs
//! the right to do so (`RLIMIT_NICE` or `CAP_SYS_NICE`); without, everything runs as it always
//! would.
//!
//! Priorities are changed for whole process groups, which takes one call. To look for the threads
//! of a process in `/proc` makes its end slow: the kernel has to forget all that was looked at,
//! milliseconds of work for each shell.
#![allow(unsafe_code)] // setting priorities

use std::sync::OnceLock;
use std::time::Duration;

/// How long something is left to what the processors have left.
pub(super) const MOST: Duration = Duration::from_millis(100);

/// How much lower the priority is then: a tenth of the processors is left on a machine where
/// everybody else is busy too.
const LOWER: i32 = 10;
/// The lowest priority that there is.
const LOWEST: i32 = 19;

/// A group of processes in the background. Dropped, it stays there.
#[derive(Debug)]
pub(super) struct Background(u32);

impl Background {
    /// Puts a process group, and whatever its members start from now on, in the background;
    /// nothing where that could not be taken back.
    pub(super) fn begin(group: u32) -> Option<Background> {
        let usual = usual()?;
        set(group, (usual + LOWER).min(LOWEST)).then_some(Background(group))
    }

    /// Takes the group back.
    pub(super) fn end(&self) {
        come_forward(self.0);
    }
}

/// Takes a process group out of the background.
pub(super) fn come_forward(group: u32) {
    if let Some(usual) = usual() {
        set(group, usual);
    }
}

/// The priority of this process, if one that is lower can be raised to it again, which is tried
/// once.
fn usual() -> Option<i32> {
    static USUAL: OnceLock<Option<i32>> = OnceLock::new();
    *USUAL.get_or_init(|| {
        // It ends with whatever it has become.
        let tried = std::thread::Builder::new().name("pool-priority".into()).spawn(|| {
            // SAFETY: takes numbers, and returns one, which is -1 for that priority as well.
            let own = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
            // SAFETY: takes numbers, and returns one. Of the calling thread alone.
            let set = |nice| unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } == 0;
            (own < LOWEST && set(LOWEST) && set(own)).then_some(own)
        });
        tried.ok()?.join().unwrap_or(None)
    })
}

fn set(group: u32, nice: i32) -> bool {
    // SAFETY: takes numbers, and returns one.
    unsafe { libc::setpriority(libc::PRIO_PGRP, group, nice) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};

    fn priority(pid: u32) -> i32 {
        // SAFETY: takes numbers, and returns one.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, pid) }
    }

    /// A group of two processes that wait for their end.
    fn family() -> (Child, u32) {
        let mut child = Command::new("sh")
            .args(["-c", "exec 3<&0; cat <&3 & echo $!; wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("sh");
        let mut line = String::new();
        let out = child.stdout.take().expect("pipe");
        BufReader::new(out).read_line(&mut line).expect("line");
        (child, line.trim().parse().expect("a process id"))
    }

    #[test]
    fn a_group_goes_to_the_background_and_comes_back_with_all_its_members() {
        let (mut child, grandchild) = family();
        let members = [child.id(), grandchild];
        // SAFETY: takes numbers, and returns one.
        let own = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        assert_eq!(members.map(priority), [own; 2]);
        match Background::begin(child.id()) {
            Some(background) => {
                assert_eq!(members.map(priority), [(own + LOWER).min(LOWEST); 2]);
                background.end();
            }
            None => assert_eq!(usual(), None, "it could have been"),
        }
        assert_eq!(members.map(priority), [own; 2]);
        drop(child.stdin.take());
        assert!(child.wait().expect("its end").success());
        assert!(Background::begin(child.id()).is_none(), "nobody is there");
    }
}
