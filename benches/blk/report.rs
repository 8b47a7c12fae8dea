//! Medians and spread, as a table or as JSON.

use serde_json::{Value, json};

use super::plan::{Measured, Workload};

/// What one line of the table is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Queues of the disk.
    pub queues: u32,
    pub work: Workload,
    /// How the guest waits: `polling`, `sleeping`, or `none` for a process of the host.
    pub guest: &'static str,
    pub name: String,
}

/// All measurements of a run.
#[derive(Default)]
pub struct Report {
    rows: Vec<(Row, Vec<Measured>)>,
    rates: Vec<Rate>,
}

/// A limit and the rate that was held under it.
pub struct Rate {
    /// The limit, as in a SPEC.
    pub limit: &'static str,
    pub queues: u32,
    pub work: Workload,
    /// Units a second allowed, and seen.
    pub allowed: f64,
    pub seen: f64,
}

/// Median, and the values that a tenth of all are below and above.
struct Spread {
    median: f64,
    low: f64,
    high: f64,
}

impl Spread {
    fn of(runs: &[Measured], value: impl Fn(&Measured) -> f64) -> Spread {
        let mut values: Vec<f64> = runs.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        let at = |part: f64| values[((values.len() - 1) as f64 * part).round() as usize];
        Spread { median: at(0.5), low: at(0.1), high: at(0.9) }
    }
}

impl Report {
    /// Adds a run of a row.
    pub fn add(&mut self, row: Row, measured: Measured) {
        match self.rows.iter_mut().find(|(known, _)| *known == row) {
            Some((_, runs)) => runs.push(measured),
            None => self.rows.push((row, vec![measured])),
        }
    }

    /// Adds a rate.
    pub fn add_rate(&mut self, rate: Rate) {
        self.rates.push(rate);
    }

    /// Prints everything, of a host whose time stamp counter has this frequency.
    pub fn print(&self, frequency: f64) {
        let mut heads: Vec<(u32, Workload)> = Vec::new();
        for (row, _) in &self.rows {
            if !heads.contains(&(row.queues, row.work)) {
                heads.push((row.queues, row.work));
            }
        }
        heads.sort_by_key(|(queues, _)| *queues);
        for (queues, work) in heads {
            let plural = if queues == 1 { "queue" } else { "queues" };
            println!("\n{}, {queues} {plural}", work.name());
            println!(
                "  {:<9} {:<28} {:>9} {:>19} {:>11} {:>8} {:>9}",
                "guest", "disk", "cycles", "(10%..90%)", "requests/s", "CPU s/M", "p99 us"
            );
            for guest in ["polling", "sleeping", "none"] {
                let of = |row: &Row| (row.queues, row.work, row.guest) == (queues, work, guest);
                for (row, runs) in self.rows.iter().filter(|(row, _)| of(row)) {
                    let cycles = Spread::of(runs, |run| run.cycles);
                    let cpu = Spread::of(runs, |run| run.cpu).median;
                    let p99 = Spread::of(runs, |run| run.p99).median / frequency * 1e6;
                    let spread = format!("({:.0}..{:.0})", cycles.low, cycles.high);
                    println!(
                        "  {:<9} {:<28} {:>9.0} {:>19} {:>11.0} {:>8.2} {:>9.1}",
                        if guest == "none" { "-" } else { guest },
                        row.name,
                        cycles.median,
                        spread,
                        frequency / cycles.median,
                        cpu,
                        p99
                    );
                }
            }
        }
        if !self.rates.is_empty() {
            println!("\nlimits, over 5 s after the burst");
        }
        for rate in &self.rates {
            println!(
                "  {:<12} {} queue(s), {:<40} {:>12.0} a second, {:+.2}%",
                rate.limit,
                rate.queues,
                rate.work.name(),
                rate.seen,
                (rate.seen / rate.allowed - 1.0) * 100.0
            );
        }
    }

    /// The same as JSON.
    pub fn json(&self, frequency: f64) -> Value {
        let rows: Vec<Value> =
            self.rows.iter().map(|(row, runs)| json_row(row, runs, frequency)).collect();
        let rate = |rate: &Rate| {
            json!({
                "limit": rate.limit, "queues": rate.queues, "op": rate.work.op,
                "bytes": rate.work.bytes, "depth": rate.work.depth,
                "allowed": rate.allowed, "seen": rate.seen,
            })
        };
        let rates: Vec<Value> = self.rates.iter().map(rate).collect();
        json!({ "cycles_per_second": frequency, "rows": rows, "rates": rates })
    }
}

fn json_row(row: &Row, runs: &[Measured], frequency: f64) -> Value {
    let cycles = Spread::of(runs, |run| run.cycles);
    json!({
        "queues": row.queues,
        "op": row.work.op,
        "bytes": row.work.bytes,
        "depth": row.work.depth,
        "guest": row.guest,
        "disk": row.name,
        "runs": runs.len(),
        "cycles": { "median": cycles.median, "p10": cycles.low, "p90": cycles.high },
        "requests_per_second": frequency / cycles.median,
        "cpu_seconds_per_million": Spread::of(runs, |run| run.cpu).median,
        "latency_p99_us": Spread::of(runs, |run| run.p99).median / frequency * 1e6,
    })
}
