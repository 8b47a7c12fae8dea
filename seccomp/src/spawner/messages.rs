//! What the VMM and the spawner say to each other.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Longest role, in bytes.
const MAX_ROLE: usize = 16;
/// Longest id, in bytes.
const MAX_ID: usize = 64;

/// A process to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// What it will be: `blk`, `serial`. Lower-case letters, digits and `-`, at
    /// most 16 bytes.
    pub role: String,
    /// Which one: `disk0`. Printable ASCII without spaces, at most 64 bytes.
    pub id: String,
    /// False only with `--disable-sandbox`: no namespaces, no change of ids.
    pub sandbox: bool,
}

impl Request {
    /// Says what is wrong with the request, if anything is. Both sides check.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let role = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if self.role.is_empty() || self.role.len() > MAX_ROLE || !self.role.bytes().all(role) {
            return Err("a role is 1 to 16 lower-case letters, digits and dashes");
        }
        if self.id.is_empty()
            || self.id.len() > MAX_ID
            || !self.id.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err("an id is 1 to 64 printable ASCII characters without spaces");
        }
        Ok(())
    }
}

/// VMM to spawner.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToSpawner {
    /// With the child's fds.
    Spawn {
        ticket: u32,
        request: Request,
    },
    Kill {
        pid: i32,
    },
    Inspect,
    Connect {
        place: u32,
    },
}

/// Spawner to VMM.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromSpawner {
    /// With the child's pidfd.
    Started {
        ticket: u32,
        pid: i32,
    },
    Failed {
        ticket: u32,
        step: String,
        message: String,
    },
    Exited {
        pid: i32,
        status: ExitStatus,
    },
    /// With the socket.
    Connected {
        place: u32,
    },
    NotConnected {
        place: u32,
        why: String,
    },
    Processes(Vec<ProcessInfo>),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this status.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitStatus::Code(code) => write!(f, "exit status {code}"),
            ExitStatus::Signal(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "signal {number} ({signal})"),
                Err(_) => write!(f, "signal {number}"),
            },
        }
    }
}

/// Facts about one process of the VM, from /proc.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// `vmm`, `spawner`, or the role it was made for.
    pub role: String,
    /// The id it was made for; empty for the VMM and the spawner.
    pub id: String,
    /// Process id, as seen by the VMM.
    pub pid: i32,
    /// Real user id, as seen by the spawner.
    pub uid: u32,
    /// Seccomp mode of the main thread: 0 none, 2 filter.
    pub seccomp: u8,
    /// Whether no exec can give it privileges.
    pub no_new_privs: bool,
    /// Effective capabilities, a bit each.
    pub cap_eff: u64,
    /// Permitted capabilities.
    pub cap_prm: u64,
    /// Bounding set.
    pub cap_bnd: u64,
    /// Inode number of each namespace by its name in /proc/PID/ns; what may not be
    /// read is missing.
    pub namespaces: BTreeMap<String, u64>,
    /// Resident memory in KiB, pages shared with others counted in full.
    pub rss_kib: u64,
    /// Proportional set size in KiB: shared pages divided by the number of sharers.
    /// Zero where it may not be read.
    pub pss_kib: u64,
    /// Its threads, at most 64 of them.
    pub threads: Vec<ThreadInfo>,
}

/// Facts about one thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadInfo {
    /// Its name.
    pub name: String,
    /// Its id, as seen by the spawner.
    pub tid: i32,
    /// Seccomp mode: 0 none, 2 filter.
    pub seccomp: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(role: &str, id: &str) -> Request {
        Request { role: role.into(), id: id.into(), sandbox: true }
    }

    #[test]
    fn requests_are_bounded() {
        assert_eq!(request("blk", "disk0").check(), Ok(()));
        for (role, id) in [
            ("", "x"),
            ("Blk", "x"),
            ("a b", "x"),
            ("blk\0", "x"),
            ("aaaaaaaaaaaaaaaaa", "x"),
            ("blk", ""),
            ("blk", "a b"),
            ("blk", "a\n"),
            ("blk", "\u{e4}"),
        ] {
            assert!(request(role, id).check().is_err(), "{role:?} {id:?}");
        }
        assert!(request("blk", &"x".repeat(65)).check().is_err());
    }
}
