//! How far a start or a restore was at which time, for who wants it faster.

use std::time::{Duration, Instant};

use crate::control::protocol::Phase;

/// The phases of one start.
#[derive(Debug)]
pub(super) struct Phases {
    started: Instant,
    marks: Vec<(&'static str, Duration)>,
}

impl Phases {
    /// The start begins.
    pub(super) fn begin() -> Phases {
        Phases { started: Instant::now(), marks: Vec::with_capacity(8) }
    }

    /// Phase `name` has ended.
    pub(super) fn end(&mut self, name: &'static str) {
        self.marks.push((name, self.started.elapsed()));
    }

    /// Since the start began.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// What the control socket tells of them.
    pub(super) fn report(&self) -> Vec<Phase> {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let phase = |(name, at): &(&str, Duration)| Phase {
            phase: (*name).to_string(),
            done_us: micros(*at),
        };
        self.marks.iter().map(phase).collect()
    }
}
