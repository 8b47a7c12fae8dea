//! What a plugin costs: `cargo bench --bench plugin`.
//!
//! Every line is measured in the same run on the same guest, so that they can be compared; with
//! `CELLBLOCK_BENCH_SMOKE` set it is short.

#![allow(clippy::unwrap_used)] // a failure here ends the benchmark

#[path = "../tests/plugin_support/mod.rs"]
mod plugin_support;

use std::env;
use std::process::Command;
use std::time::Duration;

use plugin_support::cost::{CHILD, child, measure};

fn main() {
    if let Ok(mode) = env::var(CHILD) {
        return child(&mode);
    }
    let smoke = env::var_os("CELLBLOCK_BENCH_SMOKE").is_some();
    let window = Duration::from_millis(if smoke { 50 } else { 1500 });
    let costs = measure(|| Command::new(env::current_exe().unwrap()), window);
    let goal = 1.3 * costs.floor + 5.0;
    let pipes = costs.floor + costs.pipes;
    println!("microseconds, guest in real mode, one vCPU, the plugin a process of its own");
    println!("  exit to the VMM and back (the floor)   {:8.2}", costs.floor);
    println!("  read answered, plugin looks for it     {:8.2}  goal {goal:.2}", costs.spinning);
    println!(
        "  read answered, plugin sleeps           {:8.2}  goal {:.2}",
        costs.sleeping,
        1.5 * pipes
    );
    println!("  the floor and two pipes                {pipes:8.2}  the pipes {:.2}", costs.pipes);
    println!("  read answered with a look at registers {:8.2}", costs.registers);
    println!("  the same with a hint                   {:8.2}", costs.hinted);
    println!("  write                                  {:8.2}", costs.write);
    println!("  write that is not waited for           {:8.2}", costs.posted);
    let (median, p99) = costs.pause;
    println!("  pause, request to PAUSED               {median:8.2}  99% {p99:.2}");
}
