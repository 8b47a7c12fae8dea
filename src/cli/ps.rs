//! `cellblock ps`.

use clap::Args;

use super::Failure;
use super::control::Target;
use super::output::Table;
use crate::control::protocol::{Process, Reply, Request};

/// Capabilities by number (linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// List a VM's processes, and what the kernel says about the jail of each.
///
/// NAMESPACES names those that are not the VMM's own. PSS is resident memory with
/// shared pages (guest memory among them) divided among those who share them.
#[derive(Debug, Args)]
pub(super) struct Ps {
    #[command(flatten)]
    target: Target,
}

impl Ps {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let mut client = self.target.connect()?;
        self.target.ask(&mut client, Request::Ps, |reply| match reply {
            Reply::Ps { processes } => Some(text(&processes)),
            _ => None,
        })
    }
}

fn text(processes: &[Process]) -> String {
    let mut table = Table::new(&[
        "ROLE",
        "ID",
        "PID",
        "UID",
        "SECCOMP",
        "NO_NEW_PRIVS",
        "CAPS",
        "NAMESPACES",
        "RSS_KIB",
        "PSS_KIB",
        "THREADS",
    ]);
    let vmm = processes.iter().find(|p| p.role == "vmm");
    for process in processes {
        table.row(vec![
            process.role.clone(),
            if process.id.is_empty() { "-".into() } else { process.id.clone() },
            process.pid.to_string(),
            process.uid.to_string(),
            seccomp(process),
            if process.no_new_privs { "yes" } else { "no" }.into(),
            capabilities(process.cap_eff.0 | process.cap_prm.0),
            namespaces(process, vmm),
            process.rss_kib.to_string(),
            process.pss_kib.to_string(),
            process.threads.len().to_string(),
        ]);
    }
    table.render()
}

/// `filter` when every thread has one; otherwise how many have.
fn seccomp(process: &Process) -> String {
    let filtered = process.threads.iter().filter(|t| t.seccomp == 2).count();
    match filtered {
        0 if process.seccomp != 2 => "none".into(),
        n if n == process.threads.len() => "filter".into(),
        n => format!("filter on {n} of {}", process.threads.len()),
    }
}

/// The names of a set of capabilities, without their prefix.
fn capabilities(set: u64) -> String {
    let all = (1 << CAPABILITIES.len()) - 1;
    match set {
        0 => "none".into(),
        set if set & all == all => "all".into(),
        set => (0..u64::BITS as usize)
            .filter(|bit| set >> bit & 1 == 1)
            .map(|bit| CAPABILITIES.get(bit).map_or_else(|| bit.to_string(), |n| n.to_string()))
            .collect::<Vec<_>>()
            .join(","),
    }
}

/// The kinds of namespace that are not the VMM's.
fn namespaces(process: &Process, vmm: Option<&Process>) -> String {
    let Some(vmm) = vmm else { return "-".into() };
    let own: Vec<&str> = process
        .namespaces
        .iter()
        .filter(|(kind, inode)| vmm.namespaces.get(*kind).is_some_and(|theirs| theirs != *inode))
        .map(|(kind, _)| kind.as_str())
        .collect();
    match own.len() {
        0 => "-".into(),
        _ => own.join(","),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::{CapSet, Thread};

    fn process(role: &str, inode: u64, seccomp: &[u8]) -> Process {
        Process {
            role: role.into(),
            id: String::new(),
            pid: 7,
            uid: 0,
            seccomp: seccomp[0],
            no_new_privs: true,
            cap_eff: CapSet(0),
            cap_prm: CapSet(0),
            cap_bnd: CapSet(0),
            namespaces: [("net".to_owned(), inode), ("user".to_owned(), 1)].into(),
            rss_kib: 1,
            pss_kib: 1,
            threads: seccomp
                .iter()
                .map(|mode| Thread { name: "t".into(), tid: 7, seccomp: *mode })
                .collect(),
        }
    }

    #[test]
    fn jails_are_told_from_the_vmm() {
        let vmm = process("vmm", 1, &[2, 2]);
        let blk = process("blk", 2, &[2, 0]);
        assert_eq!(namespaces(&vmm, Some(&vmm)), "-");
        assert_eq!(namespaces(&blk, Some(&vmm)), "net");
        assert_eq!(seccomp(&vmm), "filter");
        assert_eq!(seccomp(&blk), "filter on 1 of 2");
        assert_eq!(seccomp(&process("spawner", 1, &[0])), "none");
        assert_eq!(text(&[vmm, blk]).lines().count(), 3);
        assert_eq!(capabilities(0), "none");
        assert_eq!(capabilities(0xc0), "setgid,setuid");
        assert_eq!(capabilities(0x1ff_ffff_ffff), "all");
        assert_eq!(capabilities(1 << 60), "60");
    }
}
