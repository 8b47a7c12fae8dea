//! Looking for a while before sleeping, as long as that has paid off lately.

use std::time::{Duration, Instant};

/// How long one side looks for the other's answer before it sleeps.
///
/// Where answers come in time, it looks for the whole limit; each time in vain halves that, down
/// to a look of a microsecond, and an answer found brings it back.
#[derive(Clone, Copy, Debug)]
pub struct Spin {
    limit: Duration,
    now: Duration,
}

const LEAST: Duration = Duration::from_micros(1);

impl Spin {
    /// Looks for `limit` at most. Zero never looks.
    pub const fn new(limit: Duration) -> Spin {
        Spin { limit, now: limit }
    }

    /// Whether `ready` came true.
    #[inline]
    pub fn look(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        if ready() {
            return true;
        }
        if self.limit.is_zero() {
            return false;
        }
        let begin = Instant::now();
        loop {
            for _ in 0..64 {
                if ready() {
                    self.now = self.limit;
                    return true;
                }
                std::hint::spin_loop();
            }
            if begin.elapsed() >= self.now {
                self.now = (self.now / 2).max(LEAST);
                return false;
            }
        }
    }

    /// Tells how long an answer took that was slept for: one that would have been found by looking
    /// makes the next time look in full again.
    pub fn slept(&mut self, took: Duration) {
        if took < self.limit {
            self.now = self.limit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_in_vain_is_given_up_and_taken_up_again() {
        let limit = Duration::from_micros(64);
        let mut spin = Spin::new(limit);
        for _ in 0..8 {
            assert!(!spin.look(|| false));
        }
        assert_eq!(spin.now, LEAST);
        spin.slept(limit);
        assert_eq!(spin.now, LEAST);
        spin.slept(limit / 2);
        assert_eq!(spin.now, limit);
        assert!(spin.look(|| true));
    }
}
