//! `cargo bench --bench snapshot`: how long a guest stands still for a snapshot, and how long a
//! restore takes to the guest's first output, with half of the memory in use and two jailed
//! device processes.
//!
//! Medians with the 10th and 90th percentile, and the 99th from 100 values on. `smoke` makes
//! one quick round, to see that it works.

#[path = "side_by_side/stats.rs"]
mod stats;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use cellblock::control::client::{Client, Cut};
use cellblock::control::protocol::SnapshotReport;
use stats::Sample;

/// Memory of the machines, in MiB.
const SIZES: [u64; 3] = [128, 1024, 8192];
const ROUNDS: usize = 30;
const DISK_BYTES: u64 = 64 << 20;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let smoke = words.iter().any(|word| word == "smoke");
    let (sizes, rounds): (&[u64], usize) = if smoke { (&[64], 2) } else { (&SIZES, ROUNDS) };
    // In memory where that is possible, so that no write-back is measured.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let dir = dir.expect("temporary directory");
    for mib in sizes {
        // The guest's half, the copy that is the cut, the snapshot, and the restored guest's.
        if available_mib() < mib * 5 / 2 {
            println!("{mib} MiB: left out, this host has too little memory free");
            continue;
        }
        size(dir.path(), *mib, rounds);
    }
}

fn size(dir: &Path, mib: u64, rounds: usize) {
    println!("{mib} MiB of memory, half of it in use, {rounds} rounds");
    let vm = Machine::run(dir, mib);
    let reports: Vec<SnapshotReport> = (0..rounds).map(|_| vm.cut().report).collect();
    let row = |name: &str, of: fn(&SnapshotReport) -> u64| {
        let values = reports.iter().map(|report| of(report) as f64 / 1e3).collect();
        println!("  {name:<34} {}", Sample::new(values));
    };
    row("guest stands still, ms", |r| r.still_us);
    row("  vCPUs parked", |r| r.pause_us);
    row("  devices at rest", |r| r.drain_us);
    row("  state read", |r| r.capture_us);
    row("  memory copied", |r| r.memory_us);
    row("  everyone goes on", |r| r.thaw_us);

    let snapshot = dir.join(format!("s{mib}"));
    let begun = Instant::now();
    let written = cellblock(&["snapshot"]).arg(&vm.control).arg(&snapshot).arg("--stop").status();
    assert!(written.expect("cellblock snapshot").success());
    println!("  {:<34} {:.0}", "written, in all, ms", begun.elapsed().as_secs_f64() * 1e3);
    drop(vm);
    let times = (0..rounds).map(|_| first_output(&snapshot)).collect();
    println!("  {:<34} {}", "restore, start to first output, ms", Sample::new(times));
    std::fs::remove_dir_all(&snapshot).expect("snapshot");
}

/// From the start of the process to the guest's first whole line.
fn first_output(snapshot: &Path) -> f64 {
    let mut command = cellblock(&["restore", "--die-with-parent"]);
    command.arg(snapshot).args(["--disk", "id=disk0,cow"]);
    let begun = Instant::now();
    let (mut child, mut lines) = start(&mut command);
    line(&mut lines);
    let took = begun.elapsed();
    let _ = child.kill();
    let _ = child.wait();
    took.as_secs_f64() * 1e3
}

/// A machine whose guest works for ever.
struct Machine {
    child: Child,
    control: PathBuf,
}

impl Machine {
    fn run(dir: &Path, mib: u64) -> Machine {
        let (kernel, disk) = (dir.join("guest"), dir.join("disk"));
        let control = dir.join(format!("control{mib}"));
        std::fs::write(&kernel, cellblock::guest::BARE_GUEST).expect("guest");
        let file = std::fs::File::create(&disk).expect("disk");
        file.set_len(DISK_BYTES).expect("disk");
        let mut command = cellblock(&["run", "--die-with-parent", "--kernel"]);
        command
            .arg(kernel)
            .args(["--memory", &format!("{mib}M"), "--disk"])
            .arg(&disk)
            .args(["--cmdline", &format!("mode=pause every=5 touch={}", mib / 2)])
            .arg("--control")
            .arg(&control);
        let (child, mut lines) = start(&mut command);
        while !line(&mut lines).contains("pause: n=") {}
        std::thread::spawn(
            move || while lines.read_until(b'\n', &mut Vec::new()).is_ok_and(|n| n > 0) {},
        );
        Machine { child, control }
    }

    fn cut(&self) -> Cut {
        let mut client = Client::connect(&self.control).expect("control socket");
        let limit = Duration::from_secs(60);
        client.snapshot(false, false, Duration::from_secs(5), "bench", limit).expect("a cut")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cellblock(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    command.args(words);
    command
}

fn start(command: &mut Command) -> (Child, BufReader<ChildStdout>) {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("cellblock");
    let output = child.stdout.take().expect("piped");
    (child, BufReader::new(output))
}

fn line(lines: &mut BufReader<ChildStdout>) -> String {
    let mut line = String::new();
    assert!(lines.read_line(&mut line).expect("console") > 0, "the guest ended");
    line
}

fn available_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}
