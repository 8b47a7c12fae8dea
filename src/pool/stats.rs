//! How a pool is: for programs, as JSON and for Prometheus.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::config::PoolConfig;
use super::engine::EngineStats;

/// All there is to know of a pool. Fields are added, never renamed, removed or given another
/// meaning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStats {
    /// Shells and VMs that exist.
    pub alive: u64,
    /// Shells that wait for a claim.
    pub idle: u64,
    /// VMs that somebody has, or that are being ended after that.
    pub in_use: u64,
    /// Of `in_use`: given back, and not gone yet.
    pub releasing: u64,
    /// Shells in the making.
    pub making: u64,
    /// Claims that wait.
    pub waiting: u64,
    /// Idle shells that are kept.
    pub min_size: u64,
    /// Most of them.
    pub max_size: u64,
    /// Most VMs in use.
    pub max_live: u64,
    /// Bytes that everything counts as.
    pub memory: u64,
    /// Most of them.
    pub max_memory: u64,
    /// No more claims are taken.
    pub draining: bool,
    /// Claims so far.
    pub claims: u64,
    /// Shells that were asked for anew, by claims that had got one that was dead: each is a hit or a
    /// miss more.
    #[serde(default)]
    pub retries: u64,
    /// Those that found a shell.
    pub hits: u64,
    /// Those that had to wait for one, and got it.
    pub misses: u64,
    /// Those that waited too long.
    pub timeouts: u64,
    /// Those whose claimer went away.
    pub abandoned: u64,
    /// Those for which no shell could be made, or that came to a pool that drains.
    pub refused: u64,
    /// Shells that were made.
    pub made: u64,
    /// Shells that could not be made.
    pub make_failures: u64,
    /// Shells that did not become a VM.
    pub restore_failures: u64,
    /// Idle shells that died.
    pub lost: u64,
    /// VMs that are gone.
    pub returned: u64,
    /// VMs that were reset, and are shells again.
    pub resets: u64,
    /// VMs that could not be.
    pub reset_failures: u64,
    /// Why the last shell that failed could not be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// For so long the pool makes no shells in advance, after one that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// What the last claims, 1024 at most, took in all.
    pub claim_us: Percentiles,
    /// What all claims took that were carried out.
    #[serde(default)]
    pub claim_us_sum: u64,
    /// How many they are.
    #[serde(default)]
    pub claim_us_count: u64,
    /// How often the pool's own books did not add up: never, or there is a fault in it.
    pub violations: u64,
    /// The last time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_violation: Option<String>,
}

/// Of how many, and so many percent took no longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the names say it
pub struct Percentiles {
    pub count: u64,
    pub p50: u64,
    pub p95: u64,
    pub p99: u64,
    pub max: u64,
}

impl Percentiles {
    /// Of values that are sorted.
    pub fn of(sorted: &[u64]) -> Percentiles {
        let at = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied().unwrap_or(0)
        };
        let max = sorted.last().copied().unwrap_or(0);
        Percentiles { count: sorted.len() as u64, p50: at(50), p95: at(95), p99: at(99), max }
    }
}

impl PoolStats {
    pub(super) fn new(
        engine: &EngineStats,
        config: &PoolConfig,
        max_memory: u64,
        charge: u64,
    ) -> PoolStats {
        let books = &engine.books;
        let n = |count: usize| count as u64;
        PoolStats {
            alive: n(books.idle + books.live + books.ending),
            idle: n(books.idle),
            in_use: n(books.live),
            releasing: n(books.releasing),
            making: n(books.making),
            waiting: n(books.waiting),
            min_size: n(config.min_size),
            max_size: n(config.max_size),
            max_live: n(config.max_live),
            memory: n(books.existing()).saturating_mul(charge),
            max_memory,
            draining: engine.draining,
            claims: books.claims,
            retries: books.retries,
            hits: books.hits,
            misses: books.misses,
            timeouts: books.timeouts,
            abandoned: books.abandoned,
            refused: books.refused,
            made: books.made,
            make_failures: books.make_failures,
            restore_failures: books.restore_failures,
            lost: books.lost,
            returned: books.returned,
            resets: books.resets,
            reset_failures: books.reset_failures,
            last_error: engine.last_error.clone(),
            pause_us: engine.pause.map(|pause| pause.as_micros() as u64),
            claim_us: Percentiles::of(&engine.durations),
            claim_us_sum: 0,
            claim_us_count: 0,
            violations: engine.violations,
            last_violation: engine.last_violation.clone(),
        }
    }

    /// In Prometheus's text format.
    pub fn prometheus(&self) -> String {
        let mut text = String::new();
        let mut metric = |kind: &str, name: &str, help: &str, value: u64| {
            // Writing to a string cannot fail.
            let _ = write!(
                text,
                "# HELP cellblock_pool_{name} {help}\n# TYPE cellblock_pool_{name} {kind}\n\
                 cellblock_pool_{name} {value}\n"
            );
        };
        let gauges = [
            ("alive", "Shells and VMs that exist.", self.alive),
            ("idle", "Shells that wait for a claim.", self.idle),
            ("in_use", "VMs that somebody has.", self.in_use),
            ("releasing", "Of those: given back, and not gone yet.", self.releasing),
            ("making", "Shells in the making.", self.making),
            ("waiting", "Claims that wait.", self.waiting),
            ("min_size", "Idle shells that are kept.", self.min_size),
            ("max_size", "Most idle shells.", self.max_size),
            ("max_live", "Most VMs in use.", self.max_live),
            ("pause_microseconds", "No shells are made for so long.", self.pause_us.unwrap_or(0)),
            ("memory_bytes", "Guest memory that everything counts as.", self.memory),
            ("memory_limit_bytes", "Most of that.", self.max_memory),
            ("draining", "1 if no more claims are taken.", self.draining.into()),
        ];
        for (name, help, value) in gauges {
            metric("gauge", name, help, value);
        }
        let counters = [
            ("claims_total", "Claims.", self.claims),
            ("retries_total", "Shells asked for anew after one that was dead.", self.retries),
            ("hits_total", "Claims that found a shell.", self.hits),
            ("misses_total", "Claims that had to wait for one.", self.misses),
            ("timeouts_total", "Claims that waited too long.", self.timeouts),
            ("abandoned_total", "Claims whose claimer went away.", self.abandoned),
            ("refused_total", "Claims for which no shell could be made.", self.refused),
            ("made_total", "Shells made.", self.made),
            ("make_failures_total", "Shells that could not be made.", self.make_failures),
            ("restore_failures_total", "Shells that became no VM.", self.restore_failures),
            ("lost_total", "Idle shells that died.", self.lost),
            ("returned_total", "VMs that were given back and are gone.", self.returned),
            ("resets_total", "VMs that were reset.", self.resets),
            ("reset_failures_total", "VMs that could not be reset.", self.reset_failures),
            ("violations_total", "Faults found in the pool's own books.", self.violations),
        ];
        for (name, help, value) in counters {
            metric("counter", name, help, value);
        }
        let _ = write!(
            text,
            "# HELP cellblock_pool_claim_seconds What claims took; the quantiles are of the last ones.\n\
             # TYPE cellblock_pool_claim_seconds summary\n"
        );
        let times = &self.claim_us;
        for (quantile, us) in [("0.5", times.p50), ("0.95", times.p95), ("0.99", times.p99)] {
            let seconds = us as f64 / 1e6;
            let _ =
                writeln!(text, "cellblock_pool_claim_seconds{{quantile=\"{quantile}\"}} {seconds}");
        }
        let (sum, count) = (self.claim_us_sum as f64 / 1e6, self.claim_us_count);
        let _ = write!(
            text,
            "cellblock_pool_claim_seconds_sum {sum}\ncellblock_pool_claim_seconds_count {count}\n"
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_there() {
        assert_eq!(Percentiles::of(&[]), Percentiles::default());
        let one = Percentiles::of(&[7]);
        assert_eq!((one.p50, one.p95, one.p99, one.max), (7, 7, 7, 7));
        let many: Vec<u64> = (1..=200).collect();
        let many = Percentiles::of(&many);
        assert_eq!((many.count, many.p50, many.p95, many.p99, many.max), (200, 100, 190, 198, 200));
    }

    #[test]
    fn prometheus_gets_every_metric_once_with_its_type() {
        let stats = PoolStats {
            hits: 3,
            min_size: 2,
            claim_us_sum: 1500,
            claim_us_count: 3,
            ..PoolStats::default()
        };
        let text = stats.prometheus();
        assert!(
            text.contains(
                "# TYPE cellblock_pool_hits_total counter\ncellblock_pool_hits_total 3\n"
            )
        );
        assert!(text.contains("cellblock_pool_claim_seconds{quantile=\"0.99\"} 0\n"));
        for line in [
            "\ncellblock_pool_claim_seconds_sum 0.0015\n",
            "\ncellblock_pool_claim_seconds_count 3\n",
            "\ncellblock_pool_min_size 2\n",
            "\ncellblock_pool_releasing 0\n",
            "\ncellblock_pool_pause_microseconds 0\n",
        ] {
            assert!(text.contains(line), "{line}");
        }
        let mut types: Vec<&str> = text.lines().filter(|l| l.starts_with("# TYPE")).collect();
        let count = types.len();
        types.sort_unstable();
        types.dedup();
        assert_eq!(types.len(), count);
        assert!(text.lines().all(|line| !line.trim().is_empty()));
    }
}
