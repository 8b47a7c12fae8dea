//! How long a worker looks at its ring before it sleeps.
//!
//! Looking pays where the next request comes within the window: nobody has to be woken for
//! it. Where the driver itself sleeps until it is interrupted, it hardly ever does, and
//! every look is CPU time taken from the guest. So a worker whose looks were in vain a few
//! times in a row leaves them out for a while, which doubles until one pays again.

use std::time::Duration;

/// Vain looks in a row after which some are left out.
const VAIN: u32 = 4;
/// Looks left out at first, and at most.
const PAUSE: (u32, u32) = (8, 256);

/// A window that is open where it pays.
#[derive(Clone, Copy, Debug)]
pub(super) struct PollWindow {
    limit: Duration,
    vain: u32,
    /// Looks to leave out before the next.
    skip: u32,
    /// Looks to leave out when it is in vain again.
    pause: u32,
}

impl PollWindow {
    /// A window that is open at first; `limit` zero means never to poll.
    pub fn new(limit: Duration) -> PollWindow {
        PollWindow { limit, vain: 0, skip: 0, pause: PAUSE.0 }
    }

    /// How long to poll now.
    pub fn length(&self) -> Duration {
        if self.skip > 0 { Duration::ZERO } else { self.limit }
    }

    /// Learns whether a request came within the window.
    pub fn observe(&mut self, came: bool) {
        if self.skip > 0 {
            self.skip -= 1;
        } else if came {
            *self = PollWindow::new(self.limit);
        } else {
            self.vain += 1;
            if self.vain >= VAIN {
                self.skip = self.pause;
                self.pause = (self.pause * 2).min(PAUSE.1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(32);

    /// How often it looks, of so many waits that end in or after the window.
    fn looks(window: &mut PollWindow, waits: u32, came: bool) -> u32 {
        let look = |_| {
            let looked = !window.length().is_zero();
            window.observe(came && looked);
            u32::from(looked)
        };
        (0..waits).map(look).sum()
    }

    #[test]
    fn it_looks_as_long_as_that_pays() {
        let mut window = PollWindow::new(LIMIT);
        assert_eq!(looks(&mut window, 1000, true), 1000);
        // A few that come late do not close it.
        for _ in 0..100 {
            assert_eq!(looks(&mut window, VAIN - 1, false), VAIN - 1);
            assert_eq!(looks(&mut window, 1, true), 1);
        }
    }

    #[test]
    fn in_vain_it_looks_less_and_less_and_never_gives_up() {
        let mut window = PollWindow::new(LIMIT);
        assert_eq!(looks(&mut window, 20, false), VAIN + 1);
        looks(&mut window, 2000, false);
        let seldom = looks(&mut window, 2570, false);
        assert_eq!(seldom, 10, "one look in 257");
        // It is open again as soon as one pays.
        let waits = (0..).take_while(|_| looks(&mut window, 1, true) == 0).count();
        assert!(waits <= 256, "{waits}");
        assert_eq!(looks(&mut window, 100, true), 100);
    }

    #[test]
    fn no_limit_no_polling() {
        let mut window = PollWindow::new(Duration::ZERO);
        assert_eq!(looks(&mut window, 100, true), 0);
    }
}
