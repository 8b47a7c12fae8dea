//! `cargo bench --bench blk`: disks of Cellblock beside those of QEMU and of
//! `qemu-storage-daemon`, on the same bare-metal guest and the same page-cached file, in
//! the same run; and the same requests by a process of the host, which is the floor.
//!
//! Each round runs every machine once, with a guest that polls for its answers and with one
//! that sleeps until it is interrupted; medians over the rounds. Compare within a run only.
//!
//! ```text
//! cargo bench --bench blk                   everything, about five minutes
//! cargo bench --bench blk -- --smoke        does it work at all, a few seconds
//! cargo bench --bench blk -- --json         JSON instead of the table
//! cargo bench --bench blk -- --dir DIR      the file in DIR instead of in memory
//! cargo bench --bench blk -- --rounds N
//! cargo bench --bench blk -- --only WORD    only machines whose name has this in it
//! cargo bench --bench blk -- read 'depth 1,'   only rows whose name has one of these
//! ```

mod cpu;
mod floor;
mod machines;
mod plan;
mod report;

use std::path::PathBuf;

use floor::Floor;
use machines::{Files, MACHINES, Machine};
use plan::{ALL, Measured, Workload};
use report::{Rate, Report, Row};

#[path = "../side_by_side/family.rs"]
mod family;

/// How much is done.
struct Extent {
    disk_bytes: u64,
    rounds: usize,
    /// Of each measurement.
    seconds: f64,
    queues: &'static [u32],
    machines: Vec<Machine>,
    work: Vec<Workload>,
    /// Of each limit; none where it is zero.
    limit_seconds: f64,
}

const GUESTS: [(&str, &str); 2] = [("polling", ""), ("sleeping", " irq")];
const LIMITS: [(&str, &str, f64, Workload); 2] = [
    ("iops=5000", ",iops=5000", 5000.0, Workload { op: "read", bytes: 4096, depth: 32 }),
    ("bw=100M", ",bw=100M", 104_857_600.0, Workload { op: "read", bytes: 131_072, depth: 8 }),
];

#[cfg_attr(test, allow(dead_code))] // the test that keeps this working has its own start
fn main() {
    let (mut smoke, mut json, mut dir, mut rounds, mut words) = (false, false, None, None, vec![]);
    let mut only = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => {} // from cargo
            "--smoke" => smoke = true,
            "--json" => json = true,
            "--dir" => dir = args.next().map(PathBuf::from),
            "--rounds" => rounds = args.next().and_then(|n| n.parse().ok()),
            "--only" => only = args.next(),
            other if other.starts_with('-') => panic!("unknown option {other}"),
            _ => words.push(arg),
        }
    }
    let mut extent = if smoke { Extent::smoke() } else { Extent::full() };
    extent.rounds = rounds.unwrap_or(extent.rounds);
    extent
        .work
        .retain(|w| words.is_empty() || words.iter().any(|word| (w.name() + ",").contains(word)));
    if let Some(only) = only {
        extent.machines.retain(|machine| machine.name().contains(&only));
        extent.limit_seconds = 0.0;
    }
    let frequency = cpu::frequency();
    let report = run(&extent, dir, frequency, !json);
    if json {
        println!("{}", report.json(frequency));
    } else {
        report.print(frequency);
    }
}

/// The short run, for the test that keeps this working.
#[cfg(test)]
pub fn smoke() -> serde_json::Value {
    let frequency = cpu::frequency();
    let report = run(&Extent::smoke(), None, frequency, false);
    report.print(frequency);
    report.json(frequency)
}

impl Extent {
    #[cfg_attr(test, allow(dead_code))]
    fn full() -> Extent {
        Extent {
            disk_bytes: 256 << 20,
            rounds: 7,
            seconds: 0.08,
            queues: &[1, 2],
            machines: MACHINES.to_vec(),
            work: ALL.to_vec(),
            limit_seconds: 5.0,
        }
    }

    fn smoke() -> Extent {
        let machines = [0, 1, 4, 6].map(|n| MACHINES[n]);
        Extent {
            disk_bytes: 16 << 20,
            rounds: 1,
            seconds: 0.01,
            queues: &[1],
            machines: machines.to_vec(),
            work: vec![ALL[0], ALL[6], ALL[9]],
            limit_seconds: 0.0,
        }
    }
}

fn run(extent: &Extent, dir: Option<PathBuf>, frequency: f64, chatty: bool) -> Report {
    let files = Files::prepare(dir.as_deref(), extent.disk_bytes);
    let (there, missing): (Vec<Machine>, Vec<Machine>) =
        extent.machines.iter().partition(|machine| machine.is_available());
    for machine in missing {
        eprintln!(
            "{} is missing: install the Debian packages qemu-system-x86 and qemu-system-common",
            machine.name()
        );
    }
    let mut report = Report::default();
    let time = (extent.seconds * frequency) as u64;
    for round in 0..extent.rounds {
        for &queues in extent.queues {
            for &machine in &there {
                if chatty {
                    eprint!("\rround {} of {}: {:<40}", round + 1, extent.rounds, machine.name());
                }
                for (guest, irq) in GUESTS {
                    for (work, measured) in
                        guest_runs(&files, machine, queues, irq, &extent.work, time)
                    {
                        report.add(Row { queues, work, guest, name: machine.name() }, measured);
                    }
                }
            }
        }
        for &work in &extent.work {
            for &floor in Floor::of(work) {
                let measured = floor.measure(work, &files.disk, time);
                let name = floor.name().to_string();
                report.add(Row { queues: 1, work, guest: "none", name }, measured);
            }
        }
    }
    if extent.limit_seconds > 0.0 {
        for (limit, spec, allowed, work) in LIMITS {
            for queues in [1, 2] {
                if chatty {
                    eprint!("\rlimit {limit}, {queues} queue(s){:<40}", "");
                }
                let machine = Machine::Cellblock("limited", spec);
                let time = (extent.limit_seconds * frequency) as u64;
                for (_, measured) in guest_runs(&files, machine, queues, "", &[work], time) {
                    let unit = if limit.starts_with("bw") { work.bytes as f64 } else { 1.0 };
                    let seen = frequency / measured.cycles * unit;
                    report.add_rate(Rate { limit, queues, work, allowed, seen });
                }
            }
        }
    }
    if chatty {
        eprintln!("\r{:<72}\r", "");
    }
    report
}

/// One guest that goes through `work`.
fn guest_runs(
    files: &Files,
    machine: Machine,
    queues: u32,
    irq: &str,
    work: &[Workload],
    time: u64,
) -> Vec<(Workload, Measured)> {
    let plan: Vec<String> = work.iter().map(|work| work.word()).collect();
    let depth = work.iter().map(|work| work.depth).max().unwrap_or(1);
    let sectors = work.iter().map(|work| work.bytes / 512).max().unwrap_or(1);
    let cmdline = format!(
        "mode=bench-plan plan={} cycles={time} qd={depth} sectors={sectors} queues={queues} indirect event-idx{irq}",
        plan.join(",")
    );
    let mut guest = files.start(machine, queues, &cmdline);
    let mut runs = Vec::new();
    for &work in work {
        guest.wait_for("plan: warm");
        let family = family::of(&guest.roots());
        let before = cpu::of(&family);
        guest.wait_for("plan: measured");
        let used = cpu::of(&family) - before;
        let line = guest.wait_for("plan: end");
        let measured = Measured::from_line(&line, used);
        runs.push((work, measured.unwrap_or_else(|| panic!("no figures in {line:?}"))));
    }
    guest.end();
    runs
}
