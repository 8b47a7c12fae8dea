//! Where the time of a claim goes.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// From the beginning of a claim until something was reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClaimTimes {
    /// A shell was its own.
    pub granted: Duration,
    /// The shell's process heard of it.
    pub heard: Duration,
    /// The guest was told to run.
    pub runs: Duration,
    /// The claim was answered.
    pub answered: Duration,
}

impl ClaimTimes {
    /// Of the same as points in time, and the beginning.
    pub(super) fn since(begun: u64, [granted, heard, runs, answered]: [u64; 4]) -> ClaimTimes {
        let since = |ns: u64| Duration::from_nanos(ns.saturating_sub(begun));
        ClaimTimes {
            granted: since(granted),
            heard: since(heard),
            runs: since(runs),
            answered: since(answered),
        }
    }
}

/// Of a clock that all processes of this host have in common.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
