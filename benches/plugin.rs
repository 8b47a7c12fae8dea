//! What a plugin costs: `cargo bench --bench plugin [-- --json]`.
//!
//! Every line is measured in turn on the same guest, several times over, so that what else the
//! machine does falls on all of them; what is shown is the median of the turns, and the tenth and
//! ninetieth percentile. With `CELLBLOCK_BENCH_SMOKE` set it is short.

#![allow(clippy::unwrap_used)] // a failure here ends the benchmark

#[path = "../tests/plugin_support/mod.rs"]
mod plugin_support;

use std::env;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

pub use plugin_support::cost::{CHILD, child};
use plugin_support::cost::{LINES, Line};

/// Turns, and how long each line is measured in one.
const FULL: (u32, Duration) = (9, Duration::from_millis(500));
const SMOKE: (u32, Duration) = (1, Duration::from_millis(50));

fn main() {
    if let Ok(mode) = env::var(CHILD) {
        return child(&mode);
    }
    let extent = if env::var_os("CELLBLOCK_BENCH_SMOKE").is_some() { SMOKE } else { FULL };
    let costs = measure(|| Command::new(env::current_exe().unwrap()), extent);
    if env::args().any(|word| word == "--json") {
        println!("{}", costs.json());
    } else {
        costs.print();
    }
}

/// The short run, for the test that keeps this working. `command` makes the plugin.
#[cfg(test)]
pub fn smoke(command: impl Fn() -> Command) -> Value {
    let costs = measure(command, SMOKE);
    costs.print();
    costs.json()
}

/// Sorted figures of each line.
struct Costs(Vec<(Line, Vec<f64>)>);

fn measure(command: impl Fn() -> Command, (turns, window): (u32, Duration)) -> Costs {
    let mut all: Vec<(Line, Vec<f64>)> = LINES.map(|line| (line, Vec::new())).into();
    for _ in 0..turns {
        for (line, figures) in &mut all {
            figures.extend(line.measure(command(), window));
        }
    }
    all.iter_mut().for_each(|(_, figures)| figures.sort_by(f64::total_cmp));
    Costs(all)
}

impl Costs {
    /// The figure that so many percent are not above.
    fn percentile(&self, of: Line, percent: usize) -> f64 {
        let figures = self.0.iter().find(|(line, _)| *line == of).map(|(_, figures)| figures);
        figures.map_or(f64::NAN, |figures| figures[(figures.len() - 1) * percent / 100])
    }

    fn median(&self, of: Line) -> f64 {
        self.percentile(of, 50)
    }

    /// What the line may cost: looking, 1.3 times the floor and 5 us; sleeping, 1.5 times what the
    /// same takes over two pipes.
    fn goal(&self, of: Line) -> Option<f64> {
        let floor = self.median(Line::Floor);
        match of {
            Line::Spinning => Some(1.3 * floor + 5.0),
            Line::Sleeping => Some(1.5 * (floor + self.median(Line::Pipes))),
            _ => None,
        }
    }

    fn print(&self) {
        println!("microseconds: median (10%..90%); real mode, one vCPU, the plugin is a process");
        for line in LINES {
            let [low, median, high] = [10, 50, 90].map(|percent| self.percentile(line, percent));
            print!("  {:<44} {median:8.2} ({low:.2}..{high:.2})", title(line));
            match (line, self.goal(line)) {
                (_, Some(goal)) => println!("  goal {goal:.2}: {}", met(median <= goal)),
                (Line::Hinted, _) => println!("  {}", self.gain(Line::Registers, line)),
                (Line::Posted, _) => println!("  {}", self.gain(Line::Write, line)),
                (Line::Pause, _) => println!("  99% {:.2}", self.percentile(line, 99)),
                _ => println!(),
            }
        }
    }

    fn gain(&self, over: Line, of: Line) -> String {
        format!("{:.2} times as fast", self.median(over) / self.median(of))
    }

    fn json(&self) -> Value {
        let row = |line: Line| {
            let [low, median, high] = [10, 50, 90].map(|percent| self.percentile(line, percent));
            let goal = self.goal(line);
            json!({
                "line": line.name(), "median_us": median, "p10_us": low, "p90_us": high,
                "p99_us": (line == Line::Pause).then(|| self.percentile(line, 99)),
                "goal_us": goal, "met": goal.map(|goal| median <= goal),
            })
        };
        json!({
            "rows": LINES.map(row),
            "hint_gain": self.median(Line::Registers) / self.median(Line::Hinted),
            "async_write_gain": self.median(Line::Write) / self.median(Line::Posted),
        })
    }
}

fn met(met: bool) -> &'static str {
    if met { "met" } else { "not met" }
}

fn title(line: Line) -> &'static str {
    match line {
        Line::Floor => "exit to the VMM and back (the floor)",
        Line::Spinning => "read answered, the plugin looks for it",
        Line::Sleeping => "read answered, the plugin sleeps",
        Line::Pipes => "there and back over two pipes, no VM",
        Line::Registers => "read answered with a look at registers",
        Line::Hinted => "the same with a hint",
        Line::Write => "write",
        Line::Posted => "write that is not waited for",
        Line::Pause => "pause, from request to PAUSED",
    }
}
