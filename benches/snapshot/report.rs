//! Median, 95th and 99th percentile, as a table or as JSON.

use serde_json::{Value, json};

/// All rows of a run.
pub struct Report {
    rows: Vec<Row>,
    print: bool,
}

struct Row {
    mib: u64,
    monitor: &'static str,
    what: String,
    /// Sorted, in milliseconds.
    values: Vec<f64>,
}

impl Row {
    /// By nearest rank.
    fn at(&self, part: f64) -> f64 {
        let rank = (self.values.len() as f64 * part).ceil() as usize;
        self.values[rank.clamp(1, self.values.len()) - 1]
    }
}

impl Report {
    /// An empty one; with `print` rows are printed as they come.
    pub fn new(print: bool) -> Report {
        if print {
            println!(
                "{:>5}  {:<10} {:<34} {:>5} {:>9} {:>9} {:>9}",
                "MiB", "monitor", "milliseconds", "n", "median", "95%", "99%"
            );
        }
        Report { rows: Vec::new(), print }
    }

    /// A row of times in milliseconds.
    pub fn add(&mut self, mib: u64, monitor: &'static str, what: &str, mut values: Vec<f64>) {
        assert!(!values.is_empty(), "{monitor}, {what}: nothing was measured");
        values.sort_by(f64::total_cmp);
        let row = Row { mib, monitor, what: what.to_string(), values };
        if self.print {
            println!(
                "{:>5}  {:<10} {:<34} {:>5} {:>9.2} {:>9.2} {:>9.2}",
                mib,
                monitor,
                what,
                row.values.len(),
                row.at(0.5),
                row.at(0.95),
                row.at(0.99)
            );
        }
        self.rows.push(row);
    }

    /// Machines of this size were not measured.
    pub fn left_out(&self, mib: u64) {
        eprintln!("{mib} MiB: left out, this host has too little memory free");
    }

    /// The same as JSON.
    pub fn json(&self) -> Value {
        let row = |row: &Row| {
            json!({
                "mib": row.mib, "monitor": row.monitor, "what": row.what, "n": row.values.len(),
                "median_ms": row.at(0.5), "p95_ms": row.at(0.95), "p99_ms": row.at(0.99),
            })
        };
        json!({ "rows": self.rows.iter().map(row).collect::<Vec<_>>() })
    }
}
