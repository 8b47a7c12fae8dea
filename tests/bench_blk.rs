//! The bench of disks keeps working: a short run of it, whose figures have to be there.
#![allow(clippy::unwrap_used)] // a test fails by panicking

#[path = "../benches/blk/main.rs"]
#[allow(dead_code)] // the bench's own start
mod bench;

#[test]
fn the_bench_measures_every_machine() {
    let report = bench::smoke();
    let rows = report["rows"].as_array().unwrap();
    for disk in [
        "cellblock",
        "cellblock engine=io_uring",
        "qemu virtio-blk aio=io_uring",
        "qemu + storage daemon",
    ] {
        for guest in ["polling", "sleeping"] {
            let of = rows.iter().filter(|row| row["disk"] == disk && row["guest"] == guest);
            assert_eq!(of.count(), 3, "{disk}, {guest}");
        }
    }
    // Two ways to ask for each, and what one of them is made of.
    assert_eq!(rows.iter().filter(|row| row["guest"] == "none").count(), 3 * 3 + 3);
    for row in rows {
        for figure in
            [&row["cycles"]["median"], &row["requests_per_second"], &row["latency_p99_us"]]
        {
            assert!(figure.as_f64().unwrap() > 0.0, "{row}");
        }
    }
}
