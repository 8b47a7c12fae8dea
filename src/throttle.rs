//! A bound on how often something is said: what a guest or a device process can cause
//! at will must not fill a log, or slow down who writes it.

use std::time::{Duration, Instant};

/// Lines that may come at once.
const BURST: u32 = 50;
/// After that, one in this time.
const EVERY: Duration = Duration::from_millis(100);

/// Lets a burst through, then a few a second.
#[derive(Debug)]
pub struct Throttle {
    left: u32,
    since: Instant,
    unsaid: u64,
}

impl Default for Throttle {
    fn default() -> Throttle {
        Throttle { left: BURST, since: Instant::now(), unsaid: 0 }
    }
}

impl Throttle {
    /// Whether one more may be said: then the number of those that were not since the
    /// last one that was.
    pub fn take(&mut self) -> Option<u64> {
        self.take_at(Instant::now())
    }

    /// The number of those that were not said since the last one that was, when no more come.
    pub fn end(&mut self) -> u64 {
        std::mem::take(&mut self.unsaid)
    }

    fn take_at(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.since).as_nanos() / EVERY.as_nanos();
        if earned > 0 {
            self.left = BURST.min(self.left.saturating_add(earned.try_into().unwrap_or(BURST)));
            self.since = now;
        }
        if self.left == 0 {
            self.unsaid += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted_and_calm_is_forgiven() {
        let mut throttle = Throttle::default();
        let start = throttle.since;
        let said = (0..1000).filter(|_| throttle.take_at(start).is_some()).count();
        assert_eq!(said, BURST as usize);
        let later = start + EVERY;
        assert_eq!(throttle.take_at(later), Some(1000 - u64::from(BURST)));
        assert_eq!(throttle.take_at(later), None);
        let calm = later + EVERY * 10_000;
        assert_eq!(throttle.take_at(calm), Some(1));
        assert_eq!((1..1000).filter(|_| throttle.take_at(calm).is_some()).count(), 49);
        assert_eq!((throttle.end(), throttle.end()), (950, 0));
    }
}
