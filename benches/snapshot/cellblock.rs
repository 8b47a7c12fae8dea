//! Cellblock's snapshots, restores and resets.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cellblock::control::client::Client;
use cellblock::control::protocol::{Phase, Reply, Request, SnapshotReport};

use super::Extent;
use super::guest::{Files, Guest, cmdline, ms, wait_for_path};
use super::report::Report;

const MONITOR: &str = "cellblock";
/// Long enough for a restore to record what the guest needs first.
const RECORDED: Duration = Duration::from_millis(500);

/// Measures a machine of one size.
pub fn measure(files: &Files, extent: Extent, report: &mut Report) {
    let snapshot = files.path("snapshot");
    take(files, extent, report, &snapshot);
    let mut warm = restore(files, &snapshot, &[]);
    warm.first_output();
    warm.beside(|| std::thread::sleep(RECORDED));
    stop(files, warm);
    restores(files, extent, report, &snapshot);
    touched(files, extent, report, &snapshot);
    resets(files, extent, report, &snapshot);
    std::fs::remove_dir_all(&snapshot).expect("snapshot");
}

/// Snapshots of a running machine, the last of which stays at `target`.
fn take(files: &Files, extent: Extent, report: &mut Report, target: &Path) {
    let control = files.path("control");
    let mut command = program(&["run", "--die-with-parent", "--kernel"]);
    command.arg(files.path("guest")).args(["--memory", &format!("{}M", extent.mib)]);
    command.args(["--cmdline", &cmdline(extent.mib), "--disk"]);
    command.arg(format!("{},cow", files.path("disk").display())).arg("--control").arg(&control);
    let mut guest = Guest::start(&mut command);
    guest.wait_for("snap: ready");
    for (name, live, rounds) in [("stopped", false, extent.stopped), ("live", true, extent.live)] {
        let reports: Vec<SnapshotReport> =
            guest.beside(|| (0..rounds).map(|_| cut(&control, live)).collect());
        let mut row = |what: &str, of: fn(&SnapshotReport) -> u64| {
            let values = reports.iter().map(|report| of(report) as f64 / 1e3).collect();
            report.add(extent.mib, MONITOR, what, values);
        };
        row(&format!("{name}: guest stands still"), |r| r.still_us);
        row("  vCPUs parked", |r| r.pause_us);
        row("  devices at rest", |r| r.drain_us);
        row("  state read", |r| r.capture_us);
        row("  memory copied", |r| r.memory_us);
        row("  everyone goes on", |r| r.thaw_us);
        if live {
            row("  (memory copied before)", |r| r.rounds_us);
        }
    }
    guest.beside(|| {
        let written = program(&["snapshot"]).arg(&control).arg(target).arg("--stop").output();
        let written = written.expect("cellblock snapshot");
        assert!(written.status.success(), "{written:?}");
    });
    guest.end();
}

fn cut(control: &Path, live: bool) -> SnapshotReport {
    let mut client = Client::connect(control).expect("control socket");
    let limit = Duration::from_secs(60);
    let cut = client.snapshot(false, live, Duration::from_secs(5), "bench", limit);
    cut.expect("a cut").report
}

/// From the start of the process to the guest's first output, and what that went into.
fn restores(files: &Files, extent: Extent, report: &mut Report, snapshot: &Path) {
    let (mut all, mut parts): (Vec<f64>, Vec<(String, Vec<f64>)>) = Default::default();
    for _ in 0..extent.restores {
        let mut guest = restore(files, snapshot, &[]);
        let took = ms(guest.first_output());
        all.push(took);
        let mut before = 0.0;
        for Phase { phase, done_us } in guest.beside(|| phases(&files.path("control"))) {
            let done = done_us as f64 / 1e3;
            add(&mut parts, &phase, done - before);
            before = done;
        }
        add(&mut parts, "process start, and the guest", took - before);
        stop(files, guest);
    }
    report.add(extent.mib, MONITOR, "restore: first output", all);
    for (name, values) in parts {
        report.add(extent.mib, MONITOR, &format!("  {name}"), values);
    }
}

fn add(parts: &mut Vec<(String, Vec<f64>)>, name: &str, value: f64) {
    match parts.iter_mut().find(|(known, _)| known == name) {
        Some((_, values)) => values.push(value),
        None => parts.push((name.to_string(), vec![value])),
    }
}

fn phases(control: &Path) -> Vec<Phase> {
    match ask(control, Request::Stats) {
        Reply::Stats(stats) => stats.phases,
        other => panic!("stats were answered with {other:?}"),
    }
}

/// From the start of the process until the guest has written to every page of 64 MiB.
fn touched(files: &Files, extent: Extent, report: &mut Report, snapshot: &Path) {
    let mut all = Vec::new();
    for _ in 0..extent.touched {
        let mut guest = restore(files, snapshot, &[]);
        all.push(ms(guest.touched()));
        stop(files, guest);
    }
    report.add(extent.mib, MONITOR, "restore: 64 MiB touched", all);
}

/// Resets in place, each after the guest has written to 256 pages here and there.
fn resets(files: &Files, extent: Extent, report: &mut Report, snapshot: &Path) {
    let control = files.path("control");
    let mut guest = restore(files, snapshot, &["--track"]);
    guest.first_output();
    let mut all = Vec::new();
    // The first time the pages that are put back have to be read.
    for _ in 0..=extent.resets {
        guest.say("w");
        guest.wait_for("wrote");
        match ask(&control, Request::Reset) {
            Reply::Reset { took_us, .. } => all.push(took_us as f64 / 1e3),
            other => panic!("a reset was answered with {other:?}"),
        }
    }
    stop(files, guest);
    report.add(extent.mib, MONITOR, "reset in place: the first", all.drain(..1).collect());
    report.add(extent.mib, MONITOR, "reset in place: the others", all);
}

fn restore(files: &Files, snapshot: &Path, more: &[&str]) -> Guest {
    let mut command = program(&["restore", "--die-with-parent"]);
    command.arg(snapshot).arg("--control").arg(files.path("control")).args(more);
    Guest::start(&mut command)
}

/// Ends it in good order, so that the next has the machine for itself.
fn stop(files: &Files, mut guest: Guest) {
    let control = files.path("control");
    guest.beside(|| {
        ask(&control, Request::Stop);
    });
    guest.end();
}

fn ask(control: &Path, request: Request) -> Reply {
    wait_for_path(control);
    let mut client = Client::connect(control).expect("control socket");
    client.ask(request).expect("an answer").0
}

fn program(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    command.args(words);
    command
}
