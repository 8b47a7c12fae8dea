//! How long a worker looks at its ring before it sleeps.
//!
//! Looking pays where the next request comes within the window: nobody has to be woken for
//! it. Where the driver itself sleeps until it is interrupted, it hardly ever does, and
//! every look is CPU time taken from the guest. So a worker whose looks were in vain a few
//! times in a row leaves them out for a while, which doubles until one pays again.
//!
//! Nor does looking pay where there are fewer CPUs than threads that want one: then it is the
//! driver that waits for the CPU. A thread that was made to give its CPU up too often while it
//! looked leaves looks out in the same way.

use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};

/// Vain looks in a row after which some are left out.
const VAIN: u32 = 4;
/// Looks left out at first, and at most.
const PAUSE: (u32, u32) = (8, 256);
/// Looks after which it is asked how often the CPU had to be given up.
const ROUND: u32 = 32;
/// How often it may have been, in a round.
const CROWDED: u64 = 4;
/// Looks left out then, at first and at most.
const CROWD_PAUSE: (u32, u32) = (64, 4096);

/// A window that is open where it pays.
#[derive(Clone, Copy, Debug)]
pub(super) struct PollWindow {
    limit: Duration,
    vain: u32,
    /// Looks to leave out before the next.
    skip: u32,
    /// Looks to leave out when it is in vain again.
    pause: u32,
    /// Looks of this round.
    looks: u32,
    /// How often the CPU had been given up at its begin.
    given_up: Option<u64>,
    /// Looks to leave out when it was too often.
    crowd_pause: u32,
}

impl PollWindow {
    /// A window that is open at first; `limit` zero means never to poll.
    pub fn new(limit: Duration) -> PollWindow {
        let (vain, skip, looks) = (0, 0, 0);
        let (pause, crowd_pause) = (PAUSE.0, CROWD_PAUSE.0);
        PollWindow { limit, vain, skip, pause, looks, given_up: None, crowd_pause }
    }

    /// How long to poll now.
    pub fn length(&self) -> Duration {
        if self.skip > 0 { Duration::ZERO } else { self.limit }
    }

    /// Learns whether a request came within the window. `given_up` says how often this thread
    /// had to give its CPU up, ever.
    pub fn observe(&mut self, came: bool, given_up: impl FnOnce() -> u64) {
        if self.skip > 0 {
            self.skip -= 1;
            return;
        }
        if came {
            (self.vain, self.pause) = (0, PAUSE.0);
        } else {
            self.vain += 1;
            if self.vain >= VAIN {
                self.skip = self.pause;
                self.pause = (self.pause * 2).min(PAUSE.1);
            }
        }
        self.looks += 1;
        if self.looks >= ROUND {
            self.end_round(given_up());
        }
    }

    fn end_round(&mut self, given_up: u64) {
        self.looks = 0;
        let Some(before) = self.given_up.replace(given_up) else { return };
        if given_up.saturating_sub(before) < CROWDED {
            self.crowd_pause = CROWD_PAUSE.0;
            return;
        }
        self.skip = self.skip.max(self.crowd_pause);
        self.crowd_pause = (self.crowd_pause * 2).min(CROWD_PAUSE.1);
        self.given_up = None;
    }
}

/// How often the calling thread had to give its CPU up.
pub(super) fn given_up() -> u64 {
    let usage = getrusage(UsageWho::RUSAGE_THREAD);
    usage.map_or(0, |usage| usage.involuntary_context_switches().unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(32);

    /// How often it looks, of so many waits that end in or after the window.
    fn looks(window: &mut PollWindow, waits: u32, came: bool) -> u32 {
        let look = |_| {
            let looked = !window.length().is_zero();
            window.observe(came && looked, || 0);
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
    fn where_cpus_are_short_it_looks_less_and_only_there() {
        let mut window = PollWindow::new(LIMIT);
        let (mut given_up, mut looked) = (0, [0, 0]);
        for (phase, crowd) in [(0, 1), (1, 0)] {
            for _ in 0..20_000 {
                let looks = !window.length().is_zero();
                looked[phase] += u32::from(looks);
                given_up += crowd * u64::from(looks);
                window.observe(looks, || given_up);
            }
        }
        assert!(looked[0] < 2_000 && looked[0] > 0, "{looked:?}");
        assert!(looked[1] > 15_000, "{looked:?}");
    }

    #[test]
    fn no_limit_no_polling() {
        let mut window = PollWindow::new(Duration::ZERO);
        assert_eq!(looks(&mut window, 100, true), 0);
    }
}
