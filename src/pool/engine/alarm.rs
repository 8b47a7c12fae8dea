//! A time at which somebody is woken, set without waking anybody.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// One that rings once after each time it was set.
#[derive(Debug)]
pub(super) struct Alarm(TimerFd);

impl Alarm {
    pub(super) fn new() -> io::Result<Alarm> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Alarm(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?))
    }

    /// Rings in `time`, which is not zero, and not when it would have rung.
    pub(super) fn set(&self, time: Duration) {
        let once = Expiration::OneShot(TimeSpec::from_duration(time));
        if let Err(error) = self.0.set(once, TimerSetTimeFlags::empty()) {
            tracing::error!(%error, "setting the alarm of a pool");
        }
    }

    /// Waits until it rings, for `limit` at most; whether it did.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        // Read only when it rings: reading does not wait.
        matches!(poll(&mut fds, limit), Ok(1)) && self.0.wait().is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn it_rings_once_when_it_was_set_last() {
        let alarm = Alarm::new().unwrap();
        assert!(!alarm.wait(Duration::from_millis(5)));
        let begun = Instant::now();
        alarm.set(Duration::from_millis(1));
        alarm.set(Duration::from_millis(30));
        assert!(alarm.wait(Duration::from_secs(20)));
        assert!(begun.elapsed() >= Duration::from_millis(30));
        assert!(!alarm.wait(Duration::from_millis(5)));
    }
}
