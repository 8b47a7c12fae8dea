//! What is measured.

/// Requests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// `read`, `write`, `seqread` or `seqwrite`.
    pub op: &'static str,
    /// Bytes of a request.
    pub bytes: u64,
    /// Requests in flight.
    pub depth: u32,
}

const fn work(op: &'static str, kib: u64, depth: u32) -> Workload {
    Workload { op, bytes: kib << 10, depth }
}

/// Everything.
pub const ALL: [Workload; 10] = [
    work("read", 4, 1),
    work("read", 4, 4),
    work("read", 4, 32),
    work("read", 4, 128),
    work("write", 4, 1),
    work("write", 4, 4),
    work("write", 4, 32),
    work("write", 4, 128),
    work("seqread", 128, 8),
    work("seqwrite", 128, 8),
];

impl Workload {
    /// Whether it writes.
    pub fn is_write(self) -> bool {
        self.op.ends_with("write")
    }

    /// Whether one request follows the other on the disk.
    pub fn is_sequential(self) -> bool {
        self.op.starts_with("seq")
    }

    /// For the table.
    pub fn name(self) -> String {
        let order = if self.is_sequential() { "sequential" } else { "random" };
        let what = if self.is_write() { "write" } else { "read" };
        format!("{order} {what} of {} KiB, depth {}", self.bytes >> 10, self.depth)
    }

    /// For the guest's command line.
    pub fn word(self) -> String {
        format!("{}:{}:{}", self.op, self.bytes / 512, self.depth)
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Cycles of the time stamp counter a request.
    pub cycles: f64,
    /// CPU seconds of all processes a million requests.
    pub cpu: f64,
    /// Cycles that one request in a hundred takes longer than.
    pub p99: f64,
}

impl Measured {
    /// Of requests with these latencies, which took so long in all.
    pub fn new(mut latencies: Vec<u64>, cycles: u64, cpu: f64) -> Measured {
        latencies.sort_unstable();
        let n = latencies.len() as f64;
        let p99 = latencies[(latencies.len() - 1) * 99 / 100] as f64;
        Measured { cycles: cycles as f64 / n, cpu: cpu / n * 1e6, p99 }
    }

    /// From the line that the guest prints, and the CPU seconds used meanwhile.
    pub fn from_line(line: &str, cpu: f64) -> Option<Measured> {
        let number = |name: &str| -> Option<f64> {
            let word = |w: &str| w.strip_prefix(name)?.strip_prefix('=').map(str::to_owned);
            line.split_whitespace().find_map(word)?.parse().ok()
        };
        let n = number("n")?;
        Some(Measured {
            cycles: number("cycles")? / n,
            cpu: cpu / n * 1e6,
            p99: number("lat_p99")?,
        })
    }
}
