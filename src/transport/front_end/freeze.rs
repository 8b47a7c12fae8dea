//! Rings that come to rest for a snapshot and go on afterwards, or elsewhere.
//!
//! GET_VRING_BASE has the back end finish what it took from a ring, stop it, and say where
//! it stands. Features and memory stay agreed on, so that a thaw is short. A thaw is queued
//! behind the freeze it undoes: it is right also where nobody waited for the freeze to end.

use vhost::VhostBackend;

use super::{Answer, FrontEnd, FrontEndError, Job, QueueSetup, Worker};

impl FrontEnd {
    /// Stops every ring that runs; answers with index and position of each.
    pub fn freeze(&self) -> Answer<Vec<(usize, u16)>> {
        self.post(Job::Freeze)
    }

    /// Has those of `queues` go on that [`FrontEnd::freeze`] stopped, where they stand.
    pub fn thaw(&self, queues: Vec<QueueSetup>) -> Answer<()> {
        self.post(|answer| Job::Thaw(queues, answer))
    }
}

impl Worker {
    pub(super) fn freeze(&mut self) -> Result<Vec<(usize, u16)>, FrontEndError> {
        while let Some(index) = self.live.first().copied() {
            let base = self.frontend.get_vring_base(index);
            let base = self.exchange("stopping a queue", base)?;
            self.live.remove(0);
            // A split ring's position has 16 bits; a back end that says more is none.
            let base = u16::try_from(base)
                .map_err(|_| FrontEndError::Missing { id: self.id.clone(), what: "a position" })?;
            self.frozen.push((index, base));
        }
        Ok(self.frozen.clone())
    }

    pub(super) fn thaw(&mut self, mut queues: Vec<QueueSetup>) -> Result<(), FrontEndError> {
        let frozen = std::mem::take(&mut self.frozen);
        queues.retain_mut(|queue| {
            let stands = frozen.iter().find(|(index, _)| *index == queue.index);
            queue.base = stands.map_or(0, |(_, base)| *base);
            stands.is_some()
        });
        for queue in &queues {
            self.set_up(queue)?;
        }
        self.enable(&queues)
    }
}
