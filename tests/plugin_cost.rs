//! The bench of plugins keeps working: a short run of it, whose figures have to be there.
#![allow(clippy::unwrap_used)] // a failure here is a failed test

#[path = "../benches/plugin.rs"]
#[allow(dead_code)] // the bench's own start
mod bench;

use std::env;
use std::process::Command;

/// The plugin's process, which the other test starts.
#[test]
fn plugin_process() {
    if let Ok(mode) = env::var(bench::CHILD) {
        bench::child(&mode);
    }
}

#[test]
fn every_line_of_the_benchmark_is_measured() {
    let report = bench::smoke(|| {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "plugin_process", "--nocapture", "-q"]);
        command
    });
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["line"].as_str().unwrap()).collect();
    let lines = [
        "floor",
        "spinning",
        "sleeping",
        "pipes",
        "registers",
        "hinted",
        "write",
        "posted",
        "pause",
    ];
    assert_eq!(names, lines);
    for row in rows {
        let cost = row["median_us"].as_f64().unwrap();
        assert!(cost > 0.5 && cost < 1e6, "{row}");
        let has_goal = ["spinning", "sleeping"].contains(&row["line"].as_str().unwrap());
        assert_eq!(
            (row["goal_us"].is_f64(), row["met"].is_boolean()),
            (has_goal, has_goal),
            "{row}"
        );
    }
    let pause = &rows[8];
    assert!(pause["p99_us"].as_f64().unwrap() >= pause["median_us"].as_f64().unwrap(), "{pause}");
    for gain in ["hint_gain", "async_write_gain"] {
        assert!(report[gain].as_f64().unwrap() > 0.0, "{report}");
    }
}
