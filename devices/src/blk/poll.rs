//! How long a worker looks at its ring before it sleeps.

use std::time::Duration;

/// What a sleep and a wake-up by another process cost, so that a driver that
/// answers at once is seen to have been worth waiting for.
const WAKE_UP: Duration = Duration::from_micros(50);
/// Where a window that had been closed starts again.
const FIRST: Duration = Duration::from_micros(4);

/// An adaptive window between nothing and a limit: it grows while requests come
/// soon after the last one, and shrinks when they do not.
#[derive(Clone, Copy, Debug)]
pub(super) struct PollWindow {
    limit: Duration,
    now: Duration,
}

impl PollWindow {
    /// A window that is fully open at first; `limit` zero means never to poll.
    pub fn new(limit: Duration) -> PollWindow {
        PollWindow { limit, now: limit }
    }

    /// How long to poll now.
    pub fn length(&self) -> Duration {
        self.now
    }

    /// Learns that the next request came `idle` after the last one was done.
    pub fn observe(&mut self, idle: Duration) {
        if idle <= self.now {
            return;
        }
        self.now = if idle <= self.limit + WAKE_UP {
            (self.now * 2).clamp(FIRST, self.limit.max(FIRST)).min(self.limit)
        } else if self.now <= FIRST {
            Duration::ZERO
        } else {
            self.now / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(32);

    #[test]
    fn a_slow_driver_closes_the_window_and_a_fast_one_opens_it() {
        let mut window = PollWindow::new(LIMIT);
        assert_eq!(window.length(), LIMIT);
        window.observe(Duration::from_micros(20));
        assert_eq!(window.length(), LIMIT);
        window.observe(Duration::from_millis(5));
        assert_eq!(window.length(), LIMIT / 2);
        for _ in 0..8 {
            window.observe(Duration::from_millis(5));
        }
        assert_eq!(window.length(), Duration::ZERO);
        // Just missed: it came while the worker was falling asleep.
        for _ in 0..8 {
            window.observe(Duration::from_micros(60));
        }
        assert_eq!(window.length(), LIMIT);
    }

    #[test]
    fn no_limit_no_polling() {
        let mut window = PollWindow::new(Duration::ZERO);
        window.observe(Duration::from_nanos(1));
        assert_eq!(window.length(), Duration::ZERO);
        // A limit below the first step holds too.
        let mut window = PollWindow::new(Duration::from_micros(1));
        window.observe(Duration::from_millis(1));
        window.observe(Duration::from_micros(2));
        assert_eq!(window.length(), Duration::from_micros(1));
    }
}
