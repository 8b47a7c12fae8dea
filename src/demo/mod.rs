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
const PATIENCE: Duration = Duration::from_secs(20);

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
    say("each device: seccomp on, no capabilities, and seven namespaces it shares with nobody");
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

    step("The guest ends, and Cellblock with it");
    vm.say(b"q")?;
    vm.wait_for("guest: goodbye")?;
    vm.finish()?;
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

fn check_jails(processes: &[Process]) -> Result<(), DemoError> {
    let devices: Vec<_> =
        processes.iter().filter(|p| p.role == "blk" || p.role == "serial").collect();
    if devices.len() != 2 {
        return Err(bad(format!("{} device processes where two were asked for", devices.len())));
    }
    for device in devices {
        let wrong = |what: &str| Err(bad(format!("{} {}: {what}", device.role, device.id)));
        if device.seccomp != 2 || device.threads.iter().any(|t| t.seccomp != 2) {
            return wrong("a thread without a seccomp filter");
        }
        if !device.no_new_privs {
            return wrong("an exec could give it privileges");
        }
        if device.cap_eff.0 | device.cap_prm.0 | device.cap_bnd.0 != 0 {
            return wrong("it has capabilities");
        }
        for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
            let Some(inode) = device.namespaces.get(kind) else {
                return wrong("its namespaces cannot be seen");
            };
            let shared = processes
                .iter()
                .any(|p| p.pid != device.pid && p.namespaces.get(kind) == Some(inode));
            if shared {
                return wrong(&format!("it shares its {kind} namespace"));
            }
        }
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

    #[test]
    fn figures_are_found_in_the_guests_lines() {
        let line = "guest: wrote 16 MiB, 4321 cycles a block";
        assert_eq!(number_before(line, " cycles a block"), Some(4321));
        assert_eq!(number_after("guest: ready, ticks=17", "ticks="), Some(17));
        assert_eq!(number_after("guest: ticks=9 cycles=8", "ticks="), Some(9));
        assert_eq!(number_after("guest", "ticks="), None);
    }
}
