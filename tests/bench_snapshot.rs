//! The bench of snapshots keeps working: a short run of it, whose figures have to be there.
#![allow(clippy::unwrap_used)] // a test fails by panicking

#[path = "../benches/snapshot/main.rs"]
#[allow(dead_code)] // the bench's own start
mod bench;

#[test]
fn the_bench_measures_every_monitor() {
    let report = bench::smoke();
    let rows = report["rows"].as_array().unwrap();
    let both = [
        "stopped: guest stands still",
        "live: guest stands still",
        "restore: first output",
        "restore: 64 MiB touched",
    ];
    let own = ["reset in place: the others", "  open", "  jails", "  state"];
    let wanted = both.iter().flat_map(|what| [("cellblock", what), ("qemu", what)]);
    for (monitor, what) in wanted.chain(own.iter().map(|what| ("cellblock", what))) {
        let row = rows.iter().find(|row| row["monitor"] == monitor && row["what"] == *what);
        let row = row.unwrap_or_else(|| panic!("{monitor}: no row '{what}'"));
        for figure in ["median_ms", "p95_ms", "p99_ms"] {
            // QEMU counts its downtime in whole milliseconds, and may need less than one.
            assert!(row[figure].as_f64().unwrap() >= 0.0, "{row}");
        }
    }
}
