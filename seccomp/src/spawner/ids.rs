//! Which ids a jailed process has.
//!
//! Inside its user namespace it is 0, for as long as it needs capabilities there.
//! Outside it is, when we are root, an id that nothing else on the host has, a
//! different one for every live jail; when we are an ordinary user, that user.

use std::fmt::Write as _;
use std::fs;

use nix::errno::Errno;
use nix::unistd::{getegid, geteuid};

use super::errno;
use crate::plugin::GidMap;

/// Start of the host ids given to jails; the process id is added. 0x7000_0000 and
/// up is assigned to nobody by systemd's table of ids (1879048192..2147483647).
const BASE: u32 = 0x7000_0000;
/// Upper bound of process ids (PID_MAX_LIMIT).
const PIDS: u32 = 1 << 22;
/// `nobody`, where our own user namespace has no ids as high as [`BASE`].
const NOBODY: u32 = 65534;

/// How jails get their ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Host id [`BASE`] + pid; supplementary groups can be cleared.
    Unique,
    /// Host id [`NOBODY`]; supplementary groups can be cleared.
    Nobody,
    /// Our own ids, the only ones an ordinary user may map; setgroups is denied,
    /// which the kernel requires then.
    Own,
}

impl Plan {
    /// Chooses by our privileges and by what our own namespace maps.
    pub(super) fn new() -> Plan {
        let read = |name: &str| fs::read_to_string(format!("/proc/self/{name}"));
        let set_ids = read("status").is_ok_and(|s| can_set_ids(&s));
        match (set_ids, read("uid_map"), read("gid_map")) {
            (true, Ok(uids), Ok(gids)) => Plan::choose(&uids, &gids),
            _ => Plan::Own,
        }
    }

    fn choose(uids: &str, gids: &str) -> Plan {
        let both = |first, count| covers(uids, first, count) && covers(gids, first, count);
        if both(BASE, PIDS) {
            Plan::Unique
        } else if both(NOBODY, 1) {
            Plan::Nobody
        } else {
            Plan::Own
        }
    }

    /// Whether the child may call setgroups.
    pub(super) fn clears_groups(self) -> bool {
        self != Plan::Own
    }

    /// Writes the maps of child `pid`, which waits for it. `gids` are more groups that it
    /// has, which only a privileged user can give.
    pub(super) fn write(self, pid: i32, gids: &[GidMap]) -> Result<(), Errno> {
        let (uid, gid) = match self {
            Plan::Unique => {
                let id = BASE + u32::try_from(pid).map_err(|_| Errno::EINVAL)?;
                (id, id)
            }
            Plan::Nobody => (NOBODY, NOBODY),
            Plan::Own => (geteuid().as_raw(), getegid().as_raw()),
        };
        let put = |name: &str, text: String| {
            fs::write(format!("/proc/{pid}/{name}"), text).map_err(errno)
        };
        if self == Plan::Own {
            put("setgroups", "deny".into())?;
        }
        let mut map = format!("0 {gid} 1");
        for GidMap { inside, outside, count } in gids {
            let _ = write!(map, "\n{inside} {outside} {count}"); // to a String
        }
        put("gid_map", map)?;
        put("uid_map", format!("0 {uid} 1"))
    }
}

/// Whether the effective capabilities in a `status` file have CAP_SETUID and CAP_SETGID.
fn can_set_ids(status: &str) -> bool {
    const SETGID_AND_SETUID: u64 = 1 << 6 | 1 << 7;
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|bits| bits & SETGID_AND_SETUID == SETGID_AND_SETUID)
}

/// Whether one line of an id map has all of `count` ids from `first`.
fn covers(map: &str, first: u32, count: u32) -> bool {
    map.lines().any(|line| {
        let mut fields = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(inside)), Some(Ok(_)), Some(Ok(length))) =
            (fields.next(), fields.next(), fields.next())
        else {
            return false;
        };
        u64::from(first) >= inside
            && u64::from(first) + u64::from(count) <= inside.saturating_add(length)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_plan_that_the_maps_allow() {
        let all = "         0          0 4294967295\n";
        let container = "0 100000 65536\n";
        let alone = "0 1000 1\n";
        assert_eq!(Plan::choose(all, all), Plan::Unique);
        assert_eq!(Plan::choose(container, all), Plan::Nobody);
        assert_eq!(Plan::choose(container, container), Plan::Nobody);
        assert_eq!(Plan::choose(alone, container), Plan::Own);
        assert_eq!(Plan::choose("", ""), Plan::Own);
        assert_eq!(Plan::choose("nonsense", all), Plan::Own);
    }

    #[test]
    fn both_capabilities_are_needed() {
        assert!(can_set_ids("CapEff:\t00000000000000c0\n"));
        assert!(!can_set_ids("CapEff:\t0000000000000080\n"));
        assert!(!can_set_ids("CapPrm:\t00000000000000c0\n"));
    }
}
