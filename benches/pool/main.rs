//! `cargo bench --bench pool`: how long it takes from a claim to the guest's first output, how many
//! claims a second two CPUs sustain, and what a shell and a clone cost in memory.
//!
//! Each VM has two jailed device processes, a console and a `cow` disk. Half of the guest's memory
//! is in use in the snapshot. `--smoke` makes a few claims, to see that it works; `--json` prints
//! one line of JSON.

mod measure;

use std::time::Duration;

const FULL: measure::Plan = measure::Plan {
    sizes: &[128, 1024],
    claims: 1000,
    cold: 200,
    batch: 10,
    sustained: Duration::from_secs(8),
};

fn main() {
    let has = |word: &str| std::env::args().any(|argument| argument == word);
    let report = measure::run(if has("--smoke") { &measure::SMOKE } else { &FULL });
    match has("--json") {
        true => println!("{}", report.json()),
        false => print!("{}", report.text()),
    }
}
