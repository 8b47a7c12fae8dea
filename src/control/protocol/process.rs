//! The processes of a VM, and their jails.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// One process of the VM, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// `vmm`, `spawner`, `blk`, `serial`.
    pub role: String,
    /// Id of the device it serves; empty for the VMM and the spawner.
    pub id: String,
    /// Host process id.
    pub pid: i32,
    /// Real user id, as the host sees it.
    pub uid: u32,
    /// Seccomp mode of the main thread: 0 none, 2 filter.
    pub seccomp: u8,
    /// Whether no_new_privs is set.
    pub no_new_privs: bool,
    /// Effective capabilities.
    pub cap_eff: CapSet,
    /// Permitted capabilities.
    pub cap_prm: CapSet,
    /// Bounding set.
    pub cap_bnd: CapSet,
    /// Namespace inode by kind: `user`, `mnt`, `pid`, `net`, `ipc`, `uts`, `cgroup`.
    pub namespaces: BTreeMap<String, u64>,
    /// Resident memory in KiB, shared pages counted in full.
    pub rss_kib: u64,
    /// Proportional set size in KiB: shared pages divided among their users.
    pub pss_kib: u64,
    /// Its threads.
    pub threads: Vec<Thread>,
}

/// One thread of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Its name.
    pub name: String,
    /// Host thread id.
    pub tid: i32,
    /// Its seccomp mode: 0 none, 2 filter.
    pub seccomp: u8,
}

/// A set of capabilities; 16 hexadecimal digits in JSON, as in `/proc/PID/status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct CapSet(pub u64);

impl fmt::Display for CapSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<CapSet> for String {
    fn from(set: CapSet) -> String {
        set.to_string()
    }
}

impl TryFrom<String> for CapSet {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<CapSet, Self::Error> {
        u64::from_str_radix(&text, 16).map(CapSet)
    }
}
