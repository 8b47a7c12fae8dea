//! Facts about processes, from /proc.

use std::collections::BTreeMap;
use std::fs;

use super::messages::{ProcessInfo, ThreadInfo};

/// Most threads reported per process.
const MAX_THREADS: usize = 64;

/// Looks at process `pid`; none when it has ended.
pub(super) fn process(role: &str, id: &str, pid: i32) -> Option<ProcessInfo> {
    let status = text(&format!("/proc/{pid}/status"))?;
    // Where the fine-grained numbers may not be read, the coarse one stands in.
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let rss = kib(&rollup, "Rss:").or_else(|| kib(&status, "VmRSS:")).unwrap_or(0);
    let hex =
        |key| field(&status, key).and_then(|v| u64::from_str_radix(v.trim(), 16).ok()).unwrap_or(0);
    Some(ProcessInfo {
        role: role.into(),
        id: id.into(),
        pid,
        uid: field(&status, "Uid:")
            .and_then(|v| v.split_whitespace().next()?.parse().ok())
            .unwrap_or(u32::MAX),
        seccomp: seccomp(&status),
        no_new_privs: field(&status, "NoNewPrivs:").is_some_and(|v| v.trim() == "1"),
        cap_eff: hex("CapEff:"),
        cap_prm: hex("CapPrm:"),
        cap_bnd: hex("CapBnd:"),
        namespaces: namespaces(pid),
        rss_kib: rss,
        pss_kib: kib(&rollup, "Pss:").unwrap_or(0),
        threads: threads(pid),
    })
}

/// A file of /proc. Names in it are what a process says, and need not be text: one
/// with a name that is not must not get out of sight by it.
fn text(path: &str) -> Option<String> {
    fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn threads(pid: i32) -> Vec<ThreadInfo> {
    let Ok(folder) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let mut threads: Vec<ThreadInfo> = folder
        .filter_map(|entry| {
            let tid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let status = text(&format!("/proc/{pid}/task/{tid}/status"))?;
            let name = field(&status, "Name:")?.trim().chars().take(16).collect();
            Some(ThreadInfo { name, tid, seccomp: seccomp(&status) })
        })
        .take(MAX_THREADS)
        .collect();
    threads.sort_by_key(|t| t.tid);
    threads
}

fn namespaces(pid: i32) -> BTreeMap<String, u64> {
    ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"]
        .into_iter()
        .filter_map(|name| {
            // "net:[4026531840]"
            let link = fs::read_link(format!("/proc/{pid}/ns/{name}")).ok()?;
            let inode = link.to_str()?.split_once('[')?.1.strip_suffix(']')?.parse().ok()?;
            Some((name.to_string(), inode))
        })
        .collect()
}

fn seccomp(status: &str) -> u8 {
    field(status, "Seccomp:").and_then(|v| v.trim().parse().ok()).unwrap_or(0)
}

fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key))
}

fn kib(text: &str, key: &str) -> Option<u64> {
    field(text, key)?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_described() {
        let own = process("vmm", "", std::process::id() as i32).expect("alive");
        assert_eq!(own.namespaces.len(), 7);
        assert!(own.rss_kib > 0 && own.pss_kib > 0 && own.pss_kib <= own.rss_kib);
        assert!(own.threads.iter().any(|t| t.tid == own.pid));
        assert_eq!(own.uid, nix::unistd::getuid().as_raw());
    }

    #[test]
    fn a_name_that_is_no_text_hides_nobody() {
        let (named, wait) = std::sync::mpsc::channel();
        let (_end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            nix::sys::prctl::set_name(c"\xff\nSeccomp:\t2").expect("named");
            named.send(nix::unistd::gettid().as_raw()).expect("sent");
            let _ = ended.recv();
        });
        let tid = wait.recv().expect("running");
        let found = threads(std::process::id() as i32);
        let found = found.iter().find(|t| t.tid == tid).expect("it is listed");
        assert!(found.name.starts_with('\u{fffd}'), "{found:?}");
        assert_eq!(found.seccomp, 0);
        assert!(process("blk", "x", tid).is_some());
        drop(_end);
        thread.join().expect("ended");
    }

    #[test]
    fn a_process_that_is_not_there_has_no_description() {
        assert_eq!(process("blk", "x", i32::MAX), None);
    }
}
