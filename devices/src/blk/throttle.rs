//! How much a disk may do: two token buckets, of bytes and of requests.
//!
//! A request takes what it costs from both, or from neither and is tried again when it
//! can be had. Nobody sleeps here: who is refused is told how long to wait. The buckets
//! are the disk's, shared by its queues, and their balance is in the page shared with the
//! VMM: neither a reset by the guest nor a restart of the process refills them.
//!
//! Queues whose request waits stand in a line, and who comes later leaves what those before
//! it wait for: else small requests of one queue would take it away, each time, from a large
//! one of another.

mod bucket;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::protocol::counters::CountersPage;
use crate::protocol::{Rate, ThrottleLimits};
use bucket::{Bucket, Cost};

/// Words of the page: when the balances were struck (nanoseconds of the monotonic clock;
/// zero for never), then the balances.
const STAMP: usize = 0;
const BYTES: usize = 1;
const REQUESTS: usize = 2;

/// What a disk may do. Shared by its workers.
#[derive(Debug)]
pub(super) struct Throttle {
    limited: AtomicBool,
    /// How often the limits were changed.
    changes: AtomicU64,
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    page: CountersPage,
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
    /// The queues whose request waits, and of how many bytes it is.
    line: Vec<(u16, u64)>,
}

/// A request that has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stall {
    /// How long, if nobody else takes tokens.
    pub wait: Duration,
    /// When that is over, in nanoseconds of [`now`].
    pub until: u64,
    changes: u64,
}

/// Nanoseconds of the monotonic clock, which all processes of the VM share.
pub(super) fn now() -> u64 {
    // It cannot fail for this clock; a clock that stands still would only refill nothing.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

impl Throttle {
    /// A throttle whose buckets go on from the balance in `page`, or start full.
    pub fn new(limits: &ThrottleLimits, page: CountersPage, now: u64) -> Throttle {
        let stamp = page.throttle(STAMP).load(Ordering::Relaxed);
        let kept = |word| page.throttle(word).load(Ordering::Relaxed) as i64;
        // A stamp of the future is none of this host's, since it last started.
        let known = (1..=now).contains(&stamp);
        let restore = |rate: Option<Rate>, word| {
            rate.map(|rate| match known {
                true => Bucket::restore(rate, kept(word), stamp),
                false => Bucket::full(rate, now),
            })
        };
        let bytes = restore(limits.bytes, BYTES);
        let requests = restore(limits.requests, REQUESTS);
        let limited = AtomicBool::new(bytes.is_some() || requests.is_some());
        let buckets = Mutex::new(Buckets { page, bytes, requests, line: Vec::new() });
        Throttle { limited, changes: AtomicU64::new(0), buckets }
    }

    /// Changes the limits. What was taken stays taken; a bucket that is new starts full.
    pub fn set(&self, limits: &ThrottleLimits, now: u64) {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let change = |bucket: Option<Bucket>, rate: Option<Rate>| {
            rate.map(|rate| match bucket {
                Some(bucket) => bucket.changed(rate, now),
                None => Bucket::full(rate, now),
            })
        };
        buckets.bytes = change(buckets.bytes.take(), limits.bytes);
        buckets.requests = change(buckets.requests.take(), limits.requests);
        buckets.keep(now);
        // Everybody tries again, and there may be nothing left to wait for.
        buckets.line.clear();
        let limited = buckets.bytes.is_some() || buckets.requests.is_some();
        self.limited.store(limited, Ordering::Relaxed);
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Tokens there are: of bytes, of requests; `i64::MAX` without a limit.
    pub fn balance(&self, now: u64) -> [i64; 2] {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets { bytes, requests, .. } = &mut *buckets;
        [bytes, requests].map(|bucket| {
            bucket.as_mut().map_or(i64::MAX, |bucket| {
                bucket.refill(now);
                bucket.balance()
            })
        })
    }

    /// Has so many tokens from now on, but no more than fit.
    pub fn set_balance(&self, balance: [i64; 2], now: u64) {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets { bytes, requests, .. } = &mut *buckets;
        for (bucket, tokens) in [bytes, requests].into_iter().zip(balance) {
            if let Some(bucket) = bucket {
                *bucket = Bucket::restore(bucket.rate(), tokens, now);
            }
        }
        buckets.keep(now);
    }

    /// Whether there is a limit at all. One load.
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// Takes the tokens of one request of a queue, which moves so many bytes.
    pub fn take(&self, queue: u16, bytes: u64, now: u64) -> Result<(), Stall> {
        let changes = self.changes.load(Ordering::Acquire);
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = buckets.take_in_turn(queue, bytes, now);
        if wait.is_zero() {
            buckets.keep(now);
            return Ok(());
        }
        let until = now.saturating_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX));
        Err(Stall { wait, until, changes })
    }

    /// No request of the queue waits any longer: those behind it are not held up.
    pub fn leave(&self, queue: u16) {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.line.retain(|(waits, _)| *waits != queue);
    }

    /// Whether a request that was refused has a reason to be tried again.
    pub fn is_over(&self, stall: &Stall, now: u64) -> bool {
        now >= stall.until || self.changes.load(Ordering::Acquire) != stall.changes
    }
}

impl Buckets {
    /// Takes from both buckets what those before this queue leave. Where the answer is not
    /// zero, nothing was taken, and the queue stands in line from now on.
    fn take_in_turn(&mut self, queue: u16, bytes: u64, now: u64) -> Duration {
        let place = self.line.iter().position(|(waits, _)| *waits == queue);
        let before = &self.line[..place.unwrap_or(self.line.len())];
        let sum = before.iter().fold(0u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        let wait = self.take(sum, before.len() as u64, bytes, now);
        match place {
            Some(place) if wait.is_zero() => {
                self.line.remove(place);
            }
            Some(place) => self.line[place].1 = bytes,
            None if wait.is_zero() => {}
            None => self.line.push((queue, bytes)),
        }
        wait
    }

    /// Takes from both or, where the answer is not zero, from neither. What so many others
    /// before it, of so many bytes in all, wait for is not touched.
    fn take(&mut self, sum: u64, others: u64, bytes: u64, now: u64) -> Duration {
        let mut wait = Duration::ZERO;
        let costs = [(&mut self.bytes, sum, Cost(bytes)), (&mut self.requests, others, Cost(1))];
        for (bucket, before, cost) in costs {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait = wait.max(bucket.wait_behind(before, cost));
            }
        }
        if wait.is_zero() {
            let costs = [(&mut self.bytes, Cost(bytes)), (&mut self.requests, Cost(1))];
            for (bucket, cost) in costs {
                if let Some(bucket) = bucket {
                    bucket.take(cost);
                }
            }
        }
        wait
    }

    /// Writes the balances down for a process that comes after this one.
    fn keep(&self, now: u64) {
        let store = |word, value| self.page.throttle(word).store(value, Ordering::Relaxed);
        let balance =
            |bucket: &Option<Bucket>| bucket.as_ref().map_or(i64::MAX, Bucket::balance) as u64;
        // First: a balance with an older stamp would be refilled twice.
        store(STAMP, now);
        store(BYTES, balance(&self.bytes));
        store(REQUESTS, balance(&self.requests));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::counters::new_counters;
    use cellblock_wire::Access;

    const SECOND: u64 = 1_000_000_000;
    const START: u64 = 77 * SECOND;

    fn page() -> CountersPage {
        CountersPage::map(new_counters().expect("page"), Access::ReadWrite).expect("map")
    }

    fn limits(bytes: Option<u64>, requests: Option<u64>) -> ThrottleLimits {
        let rate = |n: Option<u64>| n.map(|n| Rate { per_second: n, burst: n });
        ThrottleLimits { bytes: rate(bytes), requests: rate(requests) }
    }

    /// How many requests of `bytes` pass at once.
    fn passes(throttle: &Throttle, bytes: u64, now: u64) -> usize {
        let count = (0..10_000).take_while(|_| throttle.take(0, bytes, now).is_ok()).count();
        throttle.leave(0);
        count
    }

    #[test]
    fn a_request_takes_from_both_buckets_or_from_none() {
        let throttle = Throttle::new(&limits(Some(10_000), Some(4)), page(), START);
        assert_eq!(passes(&throttle, 4000, START), 2);
        // The requests' bucket has its two: the refusals by bytes took none of them.
        assert_eq!(passes(&throttle, 0, START), 2);
        assert_eq!(throttle.take(0, 0, START).unwrap_err().wait, Duration::from_millis(250));
        assert_eq!(throttle.take(0, 4000, START).unwrap_err().wait, Duration::from_millis(250));
        assert_eq!(throttle.take(0, 6000, START).unwrap_err().wait, Duration::from_millis(400));
        // Refused for want of a request token, it leaves the bytes alone.
        assert_eq!(throttle.take(0, 2000, START).unwrap_err().wait, Duration::from_millis(250));
        assert_eq!(throttle.take(0, 2000, START + SECOND / 4), Ok(()));
    }

    #[test]
    fn without_limits_everything_passes() {
        let throttle = Throttle::new(&limits(None, None), page(), START);
        assert!(!throttle.is_limited());
        assert_eq!(throttle.take(0, u64::MAX, START), Ok(()));
    }

    #[test]
    fn a_change_is_news_to_who_waits_and_no_gift() {
        let throttle = Throttle::new(&limits(None, Some(10)), page(), START);
        assert_eq!(passes(&throttle, 0, START), 10);
        let stall = throttle.take(0, 0, START).unwrap_err();
        assert!(!throttle.is_over(&stall, START) && throttle.is_over(&stall, stall.until));
        throttle.set(&limits(None, Some(100)), START);
        assert!(throttle.is_over(&stall, START));
        assert_eq!(throttle.take(0, 0, START).unwrap_err().wait, Duration::from_millis(10));
        throttle.set(&limits(Some(100), Some(100)), START);
        assert_eq!(throttle.take(0, 100, START + SECOND / 100), Ok(()), "new, so full");
        throttle.set(&limits(None, None), START);
        assert!(!throttle.is_limited());
        assert_eq!(throttle.take(0, 1 << 40, START), Ok(()));
    }

    #[test]
    fn a_balance_is_handed_on_whatever_the_clock_says() {
        let limits = limits(Some(1000), Some(10));
        let first = Throttle::new(&limits, page(), START);
        assert_eq!(first.take(0, 900, START), Ok(()));
        let balance = first.balance(START + SECOND / 100);
        assert_eq!(balance, [110, 9]);
        let second = Throttle::new(&limits, page(), 3 * SECOND);
        second.set_balance(balance, 3 * SECOND);
        assert_eq!(second.balance(3 * SECOND), [110, 9]);
        second.set_balance([i64::MAX, i64::MIN], 4 * SECOND);
        assert_eq!(second.balance(4 * SECOND), [1000, i64::MIN], "no more than fits");
        let none = Throttle::new(&ThrottleLimits::default(), page(), START);
        assert_eq!(none.balance(START), [i64::MAX; 2]);
    }

    #[test]
    fn a_process_that_comes_after_goes_on_with_the_balance() {
        let page = page();
        let limits = limits(Some(1000), Some(10));
        let first = Throttle::new(&limits, page.clone(), START);
        assert_eq!(first.take(0, 5000, START), Ok(()), "larger than the bucket: a debt");
        assert_eq!(passes(&first, 0, START), 9);
        let second = Throttle::new(&limits, page.clone(), START + SECOND / 10);
        assert_eq!(passes(&second, 0, START + SECOND / 10), 1);
        let wait = second.take(0, 1, START + SECOND / 10).unwrap_err().wait;
        assert_eq!(wait, Duration::from_millis(3901));
        // What is written there may be anything.
        for word in [STAMP, BYTES, REQUESTS] {
            page.throttle(word).store(u64::MAX, Ordering::Relaxed);
        }
        assert_eq!(passes(&Throttle::new(&limits, page, START), 0, START), 10);
    }

    /// 5,000 requests and 100 MB a second, each within a hundredth over 5 s after the burst,
    /// of large requests too, with several queues whose timers are late. The clock is the
    /// test's.
    #[test]
    fn the_rate_is_held_however_late_who_waits_is_woken() {
        let bytes = limits(Some(100_000_000), None);
        for (limits, bytes, per_second) in [
            (limits(None, Some(5000)), 4096, 5000.0),
            (bytes, 4096, 100e6 / 4096.0),
            (bytes, 131_072, 100e6 / 131_072.0),
        ] {
            for queues in [1, 2, 7] {
                let throttle = Throttle::new(&limits, page(), START);
                let mut wakes = vec![START; queues];
                let (mut served, mut late) = (0u64, 1u64);
                let begin = START + 2 * SECOND;
                let end = begin + 5 * SECOND;
                while let Some(queue) = (0..queues).min_by_key(|n| wakes[*n])
                    && wakes[queue] < end
                {
                    let now = wakes[queue];
                    wakes[queue] = match throttle.take(queue as u16, bytes, now) {
                        Ok(()) => {
                            served += u64::from(now >= begin);
                            now + 2000 // what a request takes
                        }
                        Err(stall) => {
                            late = late.wrapping_mul(6364136223846793005).wrapping_add(1);
                            stall.until + (late >> 33) % 300_000
                        }
                    };
                }
                let error = served as f64 / (5.0 * per_second) - 1.0;
                assert!(error.abs() < 0.01, "{queues} queues of {bytes}: {error:+.4}");
            }
        }
    }

    /// A queue of small requests that never rests, and one of large ones: each gets its turn.
    #[test]
    fn small_requests_do_not_keep_large_ones_out() {
        const RATE: u64 = 100_000_000;
        let limits = ThrottleLimits {
            bytes: Some(Rate { per_second: RATE, burst: RATE }),
            ..ThrottleLimits::default()
        };
        let throttle = Throttle::new(&limits, page(), START);
        assert_eq!(throttle.take(0, RATE, START), Ok(()), "the burst is gone");
        let sizes = [4096, 1 << 20];
        let (mut wakes, mut served) = ([START; 2], [0u64; 2]);
        while let Some(queue) = (0..2).min_by_key(|queue| wakes[*queue])
            && wakes[queue] < START + 10 * SECOND
        {
            let now = wakes[queue];
            wakes[queue] = match throttle.take(queue as u16, sizes[queue], now) {
                Ok(()) => {
                    served[queue] += 1;
                    now + 2000
                }
                Err(stall) => stall.until + 75_000, // as late as timers are
            };
        }
        // The large ones have next to all of it, and the small ones are not shut out either.
        assert!(served[1] > 900 && served[0] >= served[1], "{served:?}");
        let bytes = served[0] * sizes[0] + served[1] * sizes[1];
        let error = bytes as f64 / (10.0 * RATE as f64) - 1.0;
        assert!(error.abs() < 0.01, "{error:+.4}");
    }

    #[test]
    fn who_leaves_the_line_holds_nobody_up() {
        let throttle = Throttle::new(&limits(None, Some(10)), page(), START);
        assert_eq!(passes(&throttle, 0, START), 10);
        let first = throttle.take(1, 0, START).unwrap_err();
        assert_eq!(first.wait, Duration::from_millis(100));
        let second = throttle.take(2, 0, START).unwrap_err();
        assert_eq!(second.wait, Duration::from_millis(200));
        let later = START + SECOND / 10;
        assert_eq!(throttle.take(2, 0, later).unwrap_err().wait, Duration::from_millis(100));
        throttle.leave(1);
        assert_eq!(throttle.take(2, 0, later), Ok(()));
        assert!(throttle.take(1, 0, later).is_err(), "and it took what there was");
    }
}
