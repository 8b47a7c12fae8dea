//! One token bucket: arithmetic on a clock that the caller reads.

use std::time::Duration;

use crate::protocol::Rate;

/// Tokens are counted in billionths, so that nanoseconds times tokens a second are exact.
const TOKEN: i128 = 1_000_000_000;

/// Tokens a request costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cost(pub u64);

/// Tokens that come at a steady rate, up to a burst.
///
/// A request that costs more than the burst could never be paid for: it passes when the
/// balance is not negative and leaves a debt, which those after it wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bucket {
    /// Tokens a second, at least one.
    rate: u64,
    /// Most tokens, at least `rate`.
    burst: u64,
    /// In billionths of a token; negative for a debt.
    balance: i128,
    /// When the balance was struck, in nanoseconds.
    struck: u64,
}

impl Bucket {
    /// A bucket that may be emptied at once.
    pub fn full(rate: Rate, now: u64) -> Bucket {
        let per_second = rate.per_second.max(1);
        let burst = rate.burst.max(per_second);
        let balance = i128::from(burst) * TOKEN;
        Bucket { rate: per_second, burst, balance, struck: now }
    }

    /// A bucket that had so many tokens at `struck`.
    pub fn restore(rate: Rate, tokens: i64, struck: u64) -> Bucket {
        let full = Bucket::full(rate, struck);
        Bucket { balance: full.balance.min(i128::from(tokens) * TOKEN), ..full }
    }

    /// The same bucket at another rate.
    pub fn changed(mut self, rate: Rate, now: u64) -> Bucket {
        self.refill(now);
        let full = Bucket::full(rate, self.struck);
        Bucket { balance: full.balance.min(self.balance), ..full }
    }

    /// Adds what has come since the last time. A clock that went back adds nothing.
    pub fn refill(&mut self, now: u64) {
        let come = i128::from(now.saturating_sub(self.struck)).saturating_mul(self.rate.into());
        let most = i128::from(self.burst) * TOKEN;
        self.balance = self.balance.saturating_add(come).min(most);
        self.struck = self.struck.max(now);
    }

    /// How long a request of this cost has to wait, which leaves so many tokens for those
    /// before it; zero if it may pass now.
    pub fn wait_behind(&self, before: u64, cost: Cost) -> Duration {
        if cost.0 == 0 {
            return Duration::ZERO;
        }
        let needed = if cost.0 <= self.burst { i128::from(cost.0) * TOKEN } else { 0 };
        let needed = needed.saturating_add(i128::from(before) * TOKEN);
        let missing = needed.saturating_sub(self.balance).max(0) as u128;
        let nanos = missing.div_ceil(self.rate.into());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes the cost of a request that may pass.
    pub fn take(&mut self, cost: Cost) {
        self.balance = self.balance.saturating_sub(i128::from(cost.0) * TOKEN);
    }

    /// How it fills.
    pub fn rate(&self) -> Rate {
        Rate { per_second: self.rate, burst: self.burst }
    }

    /// Whole tokens there are, rounded down.
    pub fn balance(&self) -> i64 {
        self.balance.div_euclid(TOKEN).clamp(i64::MIN.into(), i64::MAX.into()) as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn rate(per_second: u64, burst: u64) -> Rate {
        Rate { per_second, burst }
    }

    #[test]
    fn the_burst_passes_at_once_and_the_rest_at_the_rate() {
        let mut bucket = Bucket::full(rate(100, 300), 5);
        for _ in 0..300 {
            assert_eq!(bucket.wait_behind(0, Cost(1)), Duration::ZERO);
            bucket.take(Cost(1));
        }
        assert_eq!(bucket.wait_behind(0, Cost(1)), Duration::from_millis(10));
        bucket.refill(5 + SECOND / 100);
        assert_eq!(bucket.wait_behind(0, Cost(1)), Duration::ZERO);
        bucket.refill(1000 * SECOND);
        assert_eq!(bucket.balance(), 300, "no more than the burst is saved up");
    }

    #[test]
    fn a_burst_is_at_least_the_rate() {
        assert_eq!(Bucket::full(rate(100, 1), 0).balance(), 100);
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_on_credit() {
        let mut bucket = Bucket::full(rate(100, 100), 0);
        bucket.take(Cost(60));
        assert_eq!(bucket.wait_behind(0, Cost(250)), Duration::ZERO);
        bucket.take(Cost(250));
        assert_eq!(bucket.balance(), -210);
        assert_eq!(
            bucket.wait_behind(0, Cost(250)),
            Duration::from_millis(2100),
            "when the debt is paid"
        );
        assert_eq!(bucket.wait_behind(0, Cost(1)), Duration::from_millis(2110));
        assert_eq!(bucket.wait_behind(0, Cost(0)), Duration::ZERO, "a flush moves no bytes");
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing_twice() {
        let mut bucket = Bucket::full(rate(10, 10), 100 * SECOND);
        bucket.take(Cost(10));
        bucket.refill(99 * SECOND);
        assert_eq!(bucket.balance(), 0);
        bucket.refill(100 * SECOND);
        assert_eq!(bucket.balance(), 0);
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let mut bucket = Bucket::restore(rate(u64::MAX, u64::MAX), i64::MIN, 0);
        bucket.refill(u64::MAX);
        bucket.take(Cost(u64::MAX));
        let _ = (bucket.wait_behind(0, Cost(u64::MAX)), bucket.balance());
        let mut slow = Bucket::full(rate(1, 1), 0);
        slow.take(Cost(u64::MAX));
        assert_eq!(slow.wait_behind(0, Cost(1)), Duration::from_nanos(u64::MAX));
    }

    proptest! {
        /// Over any time, no more passes than the burst, what came, and one request on
        /// credit; and who waits as long as told passes.
        #[test]
        fn the_rate_holds(
            per_second in 1u64..1_000_000_000,
            extra in 0u64..1_000_000,
            steps in prop::collection::vec((0u64..2_000_000_000, 1u64..5_000_000), 1..200),
        ) {
            let mut bucket = Bucket::full(rate(per_second, per_second + extra), 0);
            let (mut now, mut passed, mut largest) = (0u64, 0u128, 0u64);
            for (pause, cost) in steps {
                now += pause;
                bucket.refill(now);
                let wait = bucket.wait_behind(0, Cost(cost));
                if !wait.is_zero() {
                    now += wait.as_nanos() as u64 - 1;
                    bucket.refill(now);
                    prop_assert_eq!(bucket.wait_behind(0, Cost(cost)), Duration::from_nanos(1));
                    now += 1;
                    bucket.refill(now);
                    prop_assert_eq!(bucket.wait_behind(0, Cost(cost)), Duration::ZERO);
                }
                bucket.take(Cost(cost));
                passed += u128::from(cost);
                largest = largest.max(cost);
                let came = u128::from(now) * u128::from(per_second) / u128::from(SECOND);
                let most = u128::from(per_second + extra) + came + u128::from(largest) + 1;
                prop_assert!(passed <= most, "{passed} > {most}");
            }
        }
    }
}
