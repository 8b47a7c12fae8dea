//! A disk of another program's back end, when that goes away and comes back.
//!
//! Under its filter the VMM cannot connect: the spawner does, to the path that it was forked
//! with. While there is no connection requests stay in their rings, and what the driver asks
//! of the device waits, up to the deadline that it always has. A back end that keeps a record
//! of requests in flight gets it back and goes on; with any other the driver has to reset the
//! device, for nobody knows what was left unfinished.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::epoll::Epoll;

use super::event_loop::Vm;
use super::supervise::{Kind, Phase, START_LIMIT};
use crate::control::protocol::EventKind;
use crate::transport::front_end::Link;

/// How often a back end is tried that is not there.
const RETRY: Duration = Duration::from_millis(200);
/// How often one is tried that was there and did not do.
const REST: Duration = Duration::from_secs(1);

impl Vm {
    /// Back end `place` closed its connection.
    pub(super) fn back_end_gone(&mut self, place: usize) {
        let id = self.back_ends[place].id.clone();
        if let Some(w) = self.supervisor.find(&id) {
            self.back_end_lost(w, place, RETRY);
        }
    }

    fn back_end_lost(&mut self, w: usize, place: usize, rest: Duration) {
        let watched = &mut self.supervisor.watched[w];
        let Kind::BackEnd { device, .. } = watched.kind else { return };
        if matches!(watched.phase, Phase::Resting(_)) {
            return;
        }
        watched.phase = Phase::Resting(Instant::now() + rest);
        self.devices[device].1.disconnect();
        if std::mem::replace(&mut self.back_ends[place].gone, true) {
            return;
        }
        let id = self.back_ends[place].id.clone();
        tracing::error!(device = id, "the vhost-user back end is gone; its disk waits for it");
        self.event(EventKind::BackEndGone { id });
    }

    /// Asks for another connection.
    pub(super) fn ask_back_end(&mut self, w: usize, place: usize) {
        // Should no answer come, it is asked again.
        self.supervisor.watched[w].phase = Phase::Resting(Instant::now() + START_LIMIT);
        if let Err(error) = self.spawner.connect(place as u32) {
            tracing::error!(error = crate::remedy::chain(&error), "connecting to a back end");
        }
    }

    /// Whether a connection is waited for. A spawner that was slow was asked more than once, and
    /// another answer has come before.
    fn is_asked_for(&self, w: usize) -> bool {
        matches!(self.supervisor.watched[w].phase, Phase::Resting(_))
    }

    /// The spawner could not connect.
    pub(super) fn back_end_absent(&mut self, place: u32, why: &str) {
        let Some(back_end) = self.back_ends.get(place as usize) else { return };
        tracing::debug!(device = back_end.id, why, "the back end is not there yet");
        if let Some(w) = self.supervisor.find(&back_end.id)
            && self.is_asked_for(w)
        {
            self.supervisor.watched[w].phase = Phase::Resting(Instant::now() + RETRY);
        }
    }

    /// The spawner has connected.
    pub(super) fn back_end_there(&mut self, epoll: &Epoll, place: u32, socket: OwnedFd) {
        let place = place as usize;
        let Some(id) = self.back_ends.get(place).map(|back_end| back_end.id.clone()) else {
            return;
        };
        let Some(w) = self.supervisor.find(&id).filter(|w| self.is_asked_for(*w)) else { return };
        let Kind::BackEnd { device, .. } = self.supervisor.watched[w].kind else { return };
        let socket = UnixStream::from(socket);
        let number = socket.try_clone().map_err(|error| error.to_string()).and_then(|copy| {
            let link = self.devices[device].1.reconnect(socket);
            self.back_ends[place].socket = copy;
            link.map_err(|error| crate::remedy::chain(&error))
        });
        match number {
            Ok(number) => {
                let watched = &mut self.supervisor.watched[w];
                let until = Instant::now() + START_LIMIT;
                watched.link = number;
                watched.phase = Phase::Starting { until, ready: true, linked: false };
                self.watch_back_end(epoll, place);
            }
            Err(error) => {
                tracing::error!(device = id, error, "connecting to a back end");
                self.supervisor.watched[w].phase = Phase::Resting(Instant::now() + REST);
            }
        }
    }

    /// The front end has news of back end `place`.
    pub(super) fn back_end_news(&mut self, w: usize, place: usize, link: Link) {
        let resumed = match link {
            Link::Lost(_) => return self.back_end_lost(w, place, REST),
            Link::Restored(_) => true,
            Link::Fresh(_) => false,
        };
        let watched = &mut self.supervisor.watched[w];
        if !matches!(watched.phase, Phase::Starting { .. }) {
            return;
        }
        watched.phase = Phase::Serving;
        watched.restarts += 1;
        if let Kind::BackEnd { device, .. } = watched.kind
            && !resumed
        {
            self.devices[device].1.must_reset();
        }
        self.back_ends[place].gone = false;
        let id = self.back_ends[place].id.clone();
        tracing::warn!(device = id, resumed, "the vhost-user back end is back");
        self.event(EventKind::BackEndBack { id, resumed });
    }
}
