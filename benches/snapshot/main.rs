//! `cargo bench --bench snapshot`: how long a guest stands still for a snapshot, how long a
//! restore takes, and how long a reset in place, with half of the memory in use and two jailed
//! device processes; beside them QEMU's migration to and from a file, of the same guest.
//!
//! Everything is in memory where that is possible, so that no write-back is measured. The first
//! restore of a snapshot records what the guest needs first; those that are measured come after it.
//!
//! ```text
//! cargo bench --bench snapshot                  everything, about five minutes
//! cargo bench --bench snapshot -- --smoke       does it work at all, a few seconds
//! cargo bench --bench snapshot -- --json        JSON instead of the table
//! cargo bench --bench snapshot -- --mib 1024    machines of this size only
//! ```

mod cellblock;
mod guest;
mod qemu;
mod report;

use report::Report;

/// How often what is measured.
#[derive(Clone, Copy)]
struct Extent {
    /// Of the machine, half of it in use.
    mib: u64,
    /// Snapshots with the guest standing still all the time, and mostly running.
    stopped: usize,
    live: usize,
    /// Restores to the first output.
    restores: usize,
    /// Restores until 64 MiB are touched.
    touched: usize,
    resets: usize,
    /// Migrations to a file of each kind, and from it.
    qemu: usize,
}

const FULL: [Extent; 3] = [
    Extent { mib: 128, stopped: 60, live: 60, restores: 150, touched: 40, resets: 300, qemu: 10 },
    Extent { mib: 1024, stopped: 20, live: 40, restores: 150, touched: 40, resets: 300, qemu: 6 },
    Extent { mib: 8192, stopped: 3, live: 8, restores: 50, touched: 10, resets: 100, qemu: 2 },
];
const SMOKE: [Extent; 1] =
    [Extent { mib: 160, stopped: 1, live: 1, restores: 2, touched: 1, resets: 2, qemu: 1 }];

#[cfg_attr(test, allow(dead_code))] // the test that keeps this working has its own start
fn main() {
    let (mut smoke, mut json, mut only) = (false, false, None);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => {} // from cargo
            "--smoke" => smoke = true,
            "--json" => json = true,
            "--mib" => only = args.next().and_then(|mib| mib.parse::<u64>().ok()),
            other => panic!("unknown option {other}"),
        }
    }
    let extents: Vec<Extent> = if smoke { SMOKE.to_vec() } else { FULL.to_vec() };
    let wanted = extents.into_iter().filter(|extent| only.is_none_or(|mib| mib == extent.mib));
    let report = run(wanted, !json);
    if json {
        println!("{}", report.json());
    }
}

/// The short run, for the test that keeps this working.
#[cfg(test)]
pub fn smoke() -> serde_json::Value {
    run(SMOKE.into_iter(), true).json()
}

fn run(extents: impl Iterator<Item = Extent>, print: bool) -> Report {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let files = guest::Files::prepare(dir.expect("temporary directory"));
    let mut report = Report::new(print);
    for extent in extents {
        // The guest's half, the copy that is the cut, and the snapshot.
        if available_mib() < extent.mib * 2 {
            report.left_out(extent.mib);
            continue;
        }
        cellblock::measure(&files, extent, &mut report);
        if qemu::is_available() {
            qemu::measure(&files, extent, &mut report);
        }
    }
    report
}

fn available_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}
