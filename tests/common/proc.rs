//! Processes as /proc shows them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

/// A process, told from a later one with the same number by when it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Its name when it was looked at.
    pub name: String,
    began: u64,
}

struct Stat {
    name: String,
    state: char,
    parent: i32,
    began: u64,
}

/// `/proc/PID/stat`; `None` where there is no such process.
fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, tail) = text.rsplit_once(')')?;
    let fields: Vec<&str> = tail.split_whitespace().collect();
    Some(Stat {
        name: head.split_once('(')?.1.into(),
        state: fields[0].chars().next()?,
        parent: fields[1].parse().ok()?,
        began: fields[19].parse().ok()?,
    })
}

impl Identity {
    /// The process that has `pid` now.
    pub fn of(pid: i32) -> Option<Identity> {
        let stat = stat(pid)?;
        Some(Identity { pid, name: stat.name, began: stat.began })
    }

    /// False once it has ended, whether or not somebody has asked for its status.
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|now| now.began == self.began && !matches!(now.state, 'Z' | 'X'))
    }

    /// The letter `ps` shows: R, S, T...
    pub fn state(&self) -> Option<char> {
        stat(self.pid).filter(|now| now.began == self.began).map(|now| now.state)
    }
}

/// `pid` and its descendants, alive now.
pub fn family(pid: i32) -> Vec<Identity> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok())
            && let Some(stat) = stat(pid)
        {
            parents.insert(pid, stat.parent);
        }
    }
    let mut found = BTreeSet::from([pid]);
    loop {
        let more: Vec<i32> = parents
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    found.into_iter().filter_map(Identity::of).filter(Identity::is_alive).collect()
}

/// Waits until all of `processes` have ended.
///
/// # Errors
/// Those that have not within `limit`.
pub fn wait_gone(processes: &[Identity], limit: Duration) -> Result<(), Vec<Identity>> {
    let left = || processes.iter().filter(|p| p.is_alive()).cloned().collect::<Vec<_>>();
    super::poll(limit, || left().is_empty().then_some(())).ok_or_else(left)
}

/// Thread ids of a process.
pub fn threads(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// `/proc/PID/task/TID/status` by field.
pub fn status(pid: i32, tid: i32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap();
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(key, value)| (key.to_string(), value.trim().to_string())).collect()
}

/// Inode of the namespace `kind` that `pid` is in.
pub fn namespace(pid: i32, kind: &str) -> u64 {
    fs::metadata(format!("/proc/{pid}/ns/{kind}")).unwrap().ino()
}

/// What `/proc/PID/fd` says of each open file.
pub fn files(pid: i32) -> BTreeMap<i32, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_else(|_| PathBuf::from("?"));
        let number = entry.file_name().to_str().unwrap().parse().unwrap();
        found.insert(number, target.to_string_lossy().into_owned());
    }
    found
}

/// The thread of `pid` that is called `name`.
pub fn thread(pid: i32, name: &str) -> Option<i32> {
    let is_it = |tid: &i32| {
        fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).is_ok_and(|c| c.trim() == name)
    };
    threads(pid).into_iter().find(is_it)
}

/// Number of the system call that a thread sleeps in; `None` while it runs.
pub fn sleeps_in(pid: i32, tid: i32) -> Option<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    text.split(' ').next()?.parse().ok()
}
