//! `cargo bench --bench pool`: how long it takes from a claim to the guest's first output, how many
//! claims a second two CPUs sustain, and what a shell and a clone cost in memory.
//!
//! Each VM has two jailed device processes, a console and a `cow` disk. Half of the guest's memory
//! is in use in the snapshot. `--smoke` makes a few claims, to see that it works; `--json` prints
//! one line of JSON; `--claims N` makes so many with 128 MiB only, for a first look.

mod measure;

use std::time::Duration;

const FULL: measure::Plan = measure::Plan {
    sizes: &[128, 1024],
    claims: 1000,
    ready: 4,
    cold: 200,
    batch: 10,
    sustained: Duration::from_secs(8),
};

fn main() {
    let has = |word: &str| std::env::args().any(|argument| argument == word);
    let claims = std::env::args().skip_while(|word| word != "--claims").nth(1);
    let report = match claims.map(|text| text.parse().expect("a number of claims")) {
        Some(claims) => measure::run(&measure::Plan {
            sizes: &[128],
            claims,
            cold: 20,
            sustained: Duration::from_secs(3),
            ..FULL
        }),
        None => measure::run(if has("--smoke") { &measure::SMOKE } else { &FULL }),
    };
    match has("--json") {
        true => println!("{}", report.json()),
        false => print!("{}", report.text()),
    }
}
