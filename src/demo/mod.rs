//! `cellblock demo`: the main job on the built-in guest, step by step, in under a minute.
//!
//! The demo is a user of the program: it starts `cellblock run` as anyone would,
//! talks to the guest over its console and to the VM over its control socket, and
//! checks what it shows. A step that does not hold makes it fail.

mod show;
mod vm;

use std::time::{Duration, Instant};

use crate::control::protocol::{Process, Reply, Request};
use crate::remedy::Remedy;
use show::{Row, bad, say, step, table};
use vm::DemoVm;

const MEMORY_MIB: u64 = 128;
const DISK_MIB: u64 = 64;
const WORK_MIB: u64 = 16;
const PAUSES: usize = 200;
/// How long a paused guest is watched to see that it stands still.
const STILL: Duration = Duration::from_millis(300);
/// How long any single answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A step of the demo that did not hold.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The system did not let us.
    #[error("{what}")]
    System {
        /// What was being done.
        what: &'static str,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The control socket.
    #[error("asking the VM over its control socket")]
    Control(#[from] crate::control::client::ClientError),
    /// Something was not as it has to be.
    #[error("{0}")]
    Wrong(String),
}

impl Remedy for DemoError {
    fn remedy(&self) -> Option<String> {
        match self {
            DemoError::Control(error) => error.remedy(),
            DemoError::System { .. } | DemoError::Wrong(_) => None,
        }
    }
}

/// Runs the demo, printing as it goes.
pub fn run() -> Result<(), DemoError> {
    let begin = Instant::now();
    let mut rows = Vec::new();

    step("A guest boots; its disk and its console are processes of their own");
    let mut vm = DemoVm::start(MEMORY_MIB, DISK_MIB, WORK_MIB)?;
    let (_, first) = vm.wait_for("cellblock guest")?;
    rows.push(Row::new("start to first guest output", ms(first.duration_since(vm.started))));
    let (ready, _) = vm.wait_for("guest: ready")?;

    step("Every device process is in a jail of its own");
    let processes = match vm.ask(Request::Ps)? {
        Reply::Ps { processes } => processes,
        other => return Err(unexpected(&other)),
    };
    show::processes(&processes);
    check_jails(&processes)?;
    say("each device: seccomp on, no capabilities, and seven namespaces it shares with nobody;");
    say("the VMM: seccomp on every vCPU thread, no capabilities");
    let beyond: u64 = processes.iter().map(|p| p.pss_kib).sum();
    let guest = vm.resident_ram_kib(&processes)?;
    rows.push(Row::new(
        "memory of all processes beyond guest RAM",
        format!("{:.1} MiB", beyond.saturating_sub(guest) as f64 / 1024.0),
    ));

    step("The guest wrote its disk, read it back and checked every block");
    for (what, label) in [("wrote", "guest write"), ("read and checked", "guest read")] {
        let line = vm.seen(what).ok_or_else(|| bad(format!("the guest never {what} its disk")))?;
        let cycles = number_before(&line, " cycles a block")
            .ok_or_else(|| bad(format!("no figure in {line:?}")))?;
        rows.push(Row::new(label, format!("{cycles} cycles a 4 KiB block")));
    }
    vm.check_disk(WORK_MIB)?;
    say(&format!("and the image on the host holds what it wrote ({WORK_MIB} MiB)"));

    step("The vCPUs are paused from outside, and resumed");
    pause_and_resume(&mut vm, &ready)?;
    let mut times = Vec::with_capacity(PAUSES);
    for _ in 0..PAUSES {
        times.push(pause(&mut vm)?);
        resume(&mut vm)?;
    }
    times.sort_unstable();
    let (median, p99) = (times[PAUSES / 2], times[PAUSES * 99 / 100]);
    rows.push(Row::new(
        "pause, request to all vCPUs parked",
        format!("median {median} us, 99% {p99} us ({PAUSES} times)"),
    ));
    vm.say(b"w")?;
    vm.wait_for("guest: read and checked")?;

    step("A snapshot is taken while it runs: one cut through all processes");
    let still = vm.snapshot()?;
    rows.push(Row::new("the guest stood still for a snapshot", ms(still)));
    vm.say(b"t")?;
    vm.wait_for("guest: ticks=")?;
    say("the guest goes on");

    step("The snapshot is restored beside it, in processes and jails of its own");
    let mut clone = vm.restore()?;
    clone.say(b"t")?;
    let (line, at) = clone.wait_for("guest: ticks=")?;
    if number_after(&line, "ticks=") < number_after(&ready, "ticks=") {
        return Err(bad(format!("the clone's clock stepped back: {ready:?}, then {line:?}")));
    }
    rows.push(Row::new(
        "restore, start to first guest output",
        ms(at.duration_since(clone.started)),
    ));
    let clones = match clone.ask(Request::Ps)? {
        Reply::Ps { processes } => processes,
        other => return Err(unexpected(&other)),
    };
    check_jails(&clones)?;
    clone.say(b"w")?;
    clone.wait_for("guest: read and checked")?;
    say("it reads and writes its own copy of the disk");
    clone.say(b"q")?;
    clone.wait_for("guest: goodbye")?;
    clone.finish(&clones)?;

    step("The guest ends, and Cellblock with it");
    vm.say(b"q")?;
    vm.wait_for("guest: goodbye")?;
    vm.finish(&processes)?;
    say("status 0, and no process is left behind");

    println!();
    table(&rows);
    println!("\nall steps held; the demo took {:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}

fn pause_and_resume(vm: &mut DemoVm, ready: &str) -> Result<(), DemoError> {
    let took = pause(vm)?;
    say(&format!("parked after {took} us"));
    vm.say(b"t")?;
    if let Some(line) = vm.quiet_for(STILL) {
        return Err(bad(format!("the paused guest went on: {line:?}")));
    }
    say(&format!("asked for the time, the paused guest is silent for {} ms", STILL.as_millis()));
    resume(vm)?;
    let (line, _) = vm.wait_for("guest: ticks=")?;
    let ticks = |line: &str| number_after(line, "ticks=");
    if ticks(&line) < ticks(ready) || ticks(&line).is_none() {
        return Err(bad(format!("the guest's clock stepped back: {ready:?}, then {line:?}")));
    }
    say("resumed, it answers");
    Ok(())
}

fn pause(vm: &mut DemoVm) -> Result<u64, DemoError> {
    match vm.ask(Request::Pause)? {
        Reply::Pause { took_us, .. } => Ok(took_us),
        other => Err(unexpected(&other)),
    }
}

fn resume(vm: &mut DemoVm) -> Result<(), DemoError> {
    match vm.ask(Request::Resume)? {
        Reply::Resume { .. } => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// What `ps` has to say of a VM with one disk and one console.
fn check_jails(processes: &[Process]) -> Result<(), DemoError> {
    let wrong = |p: &Process, what: &str| Err(bad(format!("{} {}: {what}", p.role, p.id)));
    let devices: Vec<_> =
        processes.iter().filter(|p| p.role == "blk" || p.role == "serial").collect();
    if devices.len() != 2 {
        return Err(bad(format!("{} device processes where two were asked for", devices.len())));
    }
    for device in devices {
        if device.seccomp != 2 || device.threads.iter().any(|t| t.seccomp != 2) {
            return wrong(device, "a thread without a seccomp filter");
        }
        if !device.no_new_privs {
            return wrong(device, "an exec could give it privileges");
        }
        if device.cap_eff.0 | device.cap_prm.0 | device.cap_bnd.0 != 0 {
            return wrong(device, "it has capabilities");
        }
        for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
            let Some(inode) = device.namespaces.get(kind) else {
                return wrong(device, "its namespaces cannot be seen");
            };
            let shared = processes
                .iter()
                .any(|p| p.pid != device.pid && p.namespaces.get(kind) == Some(inode));
            if shared {
                return wrong(device, &format!("it shares its {kind} namespace"));
            }
        }
    }
    let Some(vmm) = processes.iter().find(|p| p.role == "vmm") else {
        return Err(bad("the VMM is not among its processes".to_string()));
    };
    let mut vcpus = vmm.threads.iter().filter(|t| t.name.starts_with("vcpu")).peekable();
    if vmm.seccomp != 2 || vcpus.peek().is_none() || vcpus.any(|t| t.seccomp != 2) {
        return wrong(vmm, "a vCPU thread without a seccomp filter");
    }
    if vmm.cap_eff.0 | vmm.cap_prm.0 != 0 {
        return wrong(vmm, "it has capabilities");
    }
    Ok(())
}

fn unexpected(reply: &Reply) -> DemoError {
    match reply {
        Reply::Error { message, .. } => bad(message.clone()),
        other => bad(format!("unexpected answer {other:?}")),
    }
}

fn ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

fn number_before(line: &str, text: &str) -> Option<u64> {
    line.split_once(text)?.0.rsplit(' ').next()?.parse().ok()
}

fn number_after(line: &str, text: &str) -> Option<u64> {
    let digits = line.split_once(text)?.1;
    digits[..digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len())].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::{CapSet, Thread};

    #[test]
    fn figures_are_found_in_the_guests_lines() {
        let line = "guest: wrote 16 MiB, 4321 cycles a block";
        assert_eq!(number_before(line, " cycles a block"), Some(4321));
        assert_eq!(number_after("guest: ready, ticks=17", "ticks="), Some(17));
        assert_eq!(number_after("guest: ticks=9 cycles=8", "ticks="), Some(9));
        assert_eq!(number_after("guest", "ticks="), None);
    }

    fn process(role: &str, pid: i32, thread: &str) -> Process {
        let kinds = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];
        Process {
            role: role.into(),
            id: String::new(),
            pid,
            uid: 1000,
            seccomp: 2,
            no_new_privs: true,
            cap_eff: CapSet(0),
            cap_prm: CapSet(0),
            cap_bnd: CapSet(0),
            namespaces: kinds.map(|kind| (kind.to_string(), pid as u64)).into(),
            rss_kib: 1,
            pss_kib: 1,
            threads: vec![Thread { name: thread.into(), tid: pid, seccomp: 2 }],
        }
    }

    fn vm() -> [Process; 3] {
        [process("vmm", 1, "vcpu0"), process("serial", 2, "serial"), process("blk", 3, "blk")]
    }

    #[test]
    fn every_hole_in_a_jail_fails_the_demo() {
        check_jails(&vm()).expect("a VM as it should be");
        type Hole = fn(&mut [Process; 3]);
        let holes: [(&str, Hole); 12] = [
            ("no block process", |vm| vm[2].role = "other".into()),
            ("a device without seccomp", |vm| vm[1].seccomp = 0),
            ("one thread of it", |vm| vm[2].threads[0].seccomp = 0),
            ("no no_new_privs", |vm| vm[1].no_new_privs = false),
            ("an effective capability", |vm| vm[1].cap_eff = CapSet(1)),
            ("a permitted one", |vm| vm[1].cap_prm = CapSet(1)),
            ("one in the bounding set", |vm| vm[2].cap_bnd = CapSet(1 << 40)),
            ("a namespace that is the VMM's", |vm| vm[2].namespaces = vm[0].namespaces.clone()),
            ("one nobody can see", |vm| vm[2].namespaces.retain(|kind, _| kind != "net")),
            ("a vCPU thread without seccomp", |vm| vm[0].threads[0].seccomp = 0),
            ("no vCPU thread at all", |vm| vm[0].threads.clear()),
            ("a VMM with capabilities", |vm| vm[0].cap_prm = CapSet(1)),
        ];
        for (what, make) in holes {
            let mut vm = vm();
            make(&mut vm);
            assert!(check_jails(&vm).is_err(), "{what}");
        }
    }
}
