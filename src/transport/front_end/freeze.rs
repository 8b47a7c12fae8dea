//! Rings that come to rest for a snapshot and go on afterwards, or elsewhere.
//!
//! GET_VRING_BASE has the back end finish what it took from a ring, stop it, and say where
//! it stands. Features, memory and the record stay agreed on, so that a thaw is short. A thaw
//! is queued behind the freeze it undoes: it is right also where nobody waited for the freeze
//! to end. A connection that is lost in between has everything set up anew, and running.

use std::time::Duration;

use vhost::VhostBackend;

use super::worker::Worker;
use super::{Answer, DEADLINE, FrontEnd, FrontEndError, Job, Waited};

/// How long the thread takes at most to see that its connection was given up.
const GIVEN_UP: Duration = Duration::from_secs(1);

impl FrontEnd {
    /// Stops every ring that runs; answers with index and position of each.
    pub fn freeze(&self) -> Answer<Vec<(usize, u16)>> {
        self.post(Job::Freeze)
    }

    /// Has the rings go on that [`FrontEnd::freeze`] stopped, where they stand.
    pub fn thaw(&self) -> Answer<()> {
        self.post(Job::Thaw)
    }

    /// Waits until they do. A back end that is silent for too long is given up, which is no
    /// failure of the thaw where somebody watches: over the next connection they run.
    pub fn wait_thawed(&self, answer: &Answer<()>) -> Result<(), FrontEndError> {
        let error = match self.wait(answer) {
            Err(error @ FrontEndError::Silent { .. }) => error,
            result => return result,
        };
        match answer.wait(DEADLINE + GIVEN_UP) {
            Waited::Done(result) => result,
            Waited::Kicked | Waited::TimedOut => Err(error),
        }
    }
}

impl Worker {
    pub(super) fn freeze(&mut self) -> Result<Vec<(usize, u16)>, FrontEndError> {
        while let Some(index) = self.active.as_ref().and_then(|active| active.live.first().copied())
        {
            let base = self.frontend.get_vring_base(index);
            let base = self.exchange("stopping a queue", base)?;
            // A split ring's position has 16 bits; a back end that says more is none.
            let what = "a position within a ring";
            let id = || self.id().to_string();
            let base =
                u16::try_from(base).map_err(|_| FrontEndError::Missing { id: id(), what })?;
            if let Some(active) = &mut self.active {
                active.live.remove(0);
                // Where it goes on over another connection, too.
                let queue = active.activation.queues.iter_mut().find(|queue| queue.index == index);
                queue.into_iter().for_each(|queue| queue.base = base);
            }
            self.frozen.push((index, base));
        }
        Ok(self.frozen.clone())
    }

    pub(super) fn thaw(&mut self) -> Result<(), FrontEndError> {
        let frozen = std::mem::take(&mut self.frozen);
        let Some(mut active) = self.active.take() else { return Ok(()) };
        let stopped: Vec<usize> = frozen.into_iter().map(|(index, _)| index).collect();
        let result = self.set_queues_up(&mut active, &stopped);
        self.active = Some(active);
        result
    }
}
