//! The benchmark of plugins works: a short run of it.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod plugin_support;

use std::env;
use std::process::Command;
use std::time::Duration;

use plugin_support::cost::{CHILD, Costs, child, measure};

/// The plugin's process, which the other test starts.
#[test]
fn plugin_process() {
    if let Ok(mode) = env::var(CHILD) {
        child(&mode);
    }
}

#[test]
fn every_line_of_the_benchmark_is_measured() {
    let costs = measure(
        || {
            let mut command = Command::new(env::current_exe().unwrap());
            command.args(["--exact", "plugin_process", "--nocapture", "-q"]);
            command
        },
        Duration::from_millis(50),
    );
    println!("{costs:?}");
    let Costs { floor, spinning, sleeping, pipes, registers, hinted, write, posted, pause } = costs;
    for cost in [floor, spinning, sleeping, pipes, registers, hinted, write, posted, pause.0] {
        assert!(cost > 0.5 && cost < 1e6, "{costs:?}");
    }
    assert!(pause.1 >= pause.0);
}
