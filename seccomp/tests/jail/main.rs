//! Real jails, made by a real spawner, examined from outside through /proc and
//! from inside by system calls.
//!
//! The spawner runs /proc/self/exe, which here is this test: started as
//! `cellblock @cell ROLE ID` it is the jailed program ([`cell`]), otherwise it
//! runs the tests one after the other (forking needs a single thread).
#![allow(unsafe_code)] // fork, raw system calls

mod cell;
mod filters;
mod host;
mod jails;
mod lifetime;
mod plugin;
mod steps;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

/// Name and body of a test.
type Test = (&'static str, fn());

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("@cell") if args[1] == "plugin" => cellblock_seccomp::plugin::stub::main(),
        Some("@cell") => cell::main(),
        Some("@spawn-once") => return steps::spawn_once(),
        Some("@measure") => {
            jails::measure();
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    if nix::unistd::geteuid().as_raw() != 0 {
        // The ordinary user's tests change from root to one.
        eprintln!("these tests need root");
        return ExitCode::FAILURE;
    }
    let filter = args.iter().find(|a| !a.starts_with('-'));
    let tests =
        [jails::TESTS, filters::TESTS, lifetime::TESTS, steps::TESTS, plugin::TESTS].concat();
    let mut failed = Vec::new();
    let mut count = 0;
    for (name, body) in tests {
        if filter.is_some_and(|f| !name.contains(f.as_str())) {
            continue;
        }
        count += 1;
        print!("test {name} ... ");
        let _ = std::io::stdout().flush();
        if catch_unwind(AssertUnwindSafe(body)).is_ok() {
            println!("ok");
        } else {
            println!("FAILED");
            failed.push(name);
        }
    }
    println!("\n{count} tests, {} failed {failed:?}", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
