//! Other disks for a shell that is claimed.
//!
//! Its block process has the image in its jail, and can have no other. So the process is ended,
//! and what comes after it is made for the other image, as after any death: a driver that asks
//! before it is there waits for it. The guest runs only when the old process is no more, so that
//! nothing of the old image is seen. Where the snapshot had requests that waited, the old process
//! has carried them out by then, on the old image: such a disk cannot be exchanged. The pool has
//! opened the image: the shell is confined.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::Epoll;

use crate::cell::blk::Recipe;
use crate::cell::overlay::{Overlay, OverlayError};
use crate::cell::{Cell, CellError};
use crate::pool::protocol::OtherDisk;
use crate::snapshot::state::StateError;
use crate::spec::OpenedDisk;
use crate::vmm::event_loop::{Flow, ImageFacts, Vm};
use crate::vmm::supervise::Kind;

/// How long the old processes may take to end.
const LIMIT: Duration = Duration::from_secs(5);

/// Disks that a shell cannot have.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum DisksError {
    #[error("the machine has no disk '{0}'")]
    None(String),
    #[error("disk '{0}' is of another size or kind than that of the machine")]
    Other(String),
    #[error("the process of disk '{0}' is being replaced")]
    Busy(String),
    #[error(
        "the guest had asked for something of disk '{0}' when the snapshot was taken, and has had it of the disk there was; give the other one to 'pool serve', or restore it"
    )]
    Used(String),
    #[error("reading the snapshot's state of disk '{0}'")]
    State(String, #[source] StateError),
    #[error("the image of disk '{0}' did not come along")]
    Files(String),
    #[error("disk '{0}'")]
    Overlay(String, #[source] OverlayError),
    #[error(transparent)]
    Cell(#[from] CellError),
    #[error("waiting for the end of a block process")]
    Wait(#[source] Errno),
    #[error("ending the process of disk '{0}'")]
    End(String, #[source] cellblock_seccomp::spawner::SpawnError),
    #[error("a block process did not end within {} s", LIMIT.as_secs())]
    Late,
}

impl Vm {
    /// Puts other images behind disks; the guest has not run.
    pub(super) fn exchange_disks(
        &mut self,
        others: Vec<OtherDisk>,
        fds: Vec<OwnedFd>,
        epoll: &Epoll,
    ) -> Result<(), DisksError> {
        let mut fds = fds.into_iter();
        let ids: Vec<String> = others.iter().map(|other| other.spec.id().to_string()).collect();
        for other in others {
            self.exchange_disk(other, &mut fds)?;
        }
        self.await_exchange(epoll)?;
        ids.iter().try_for_each(|id| self.check_unused(id))
    }

    fn await_exchange(&mut self, epoll: &Epoll) -> Result<(), DisksError> {
        let end = Instant::now() + LIMIT;
        while self.supervisor.watched.iter().any(|watched| watched.is_exchanged()) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(DisksError::Late);
            }
            let mut ready = [PollFd::new(self.spawner.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(DisksError::Wait(errno)),
            }
            if let Flow::Break(_) = self.spawner_events(epoll) {
                return Err(DisksError::Late); // the main loop finds the same
            }
        }
        Ok(())
    }

    fn exchange_disk(
        &mut self,
        other: OtherDisk,
        fds: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<(), DisksError> {
        let OtherDisk { spec, size, cow } = other;
        let id = spec.id().to_string();
        let mut next = || fds.next().ok_or_else(|| DisksError::Files(id.clone()));
        let fd = next()?;
        let wrap = |error| DisksError::Overlay(id.clone(), error);
        let overlay = match cow {
            true => Some(Overlay::from_parts(File::from(next()?), next()?, size).map_err(wrap)?),
            false => None,
        };
        let read_only = spec.read_only;
        let serial = spec.serial.clone().unwrap_or_else(|| id.clone());
        let w = self.supervisor.find(&id).ok_or_else(|| DisksError::None(id.clone()))?;
        let Kind::Blk { recipe: place, .. } = &self.supervisor.watched[w].kind else {
            return Err(DisksError::Other(id));
        };
        // What the old process has under way is waited for like that of any that has died.
        let held = place.held();
        let opened = OpenedDisk { fd, size, read_only, overlay, serial, held };
        let facts = self.disks.iter_mut().find(|disk| disk.id == id);
        let facts = facts.ok_or_else(|| DisksError::None(id.clone()))?;
        let image = facts.image.as_mut().ok_or_else(|| DisksError::Other(id.clone()))?;
        if (facts.size, facts.read_only) != (size, read_only) {
            return Err(DisksError::Other(id));
        }
        let written = self.origin.iter().flat_map(|origin| &origin.written);
        let mut written = written.filter(|(of, ..)| *of == id);
        if let (Some(overlay), Some((_, extents, data))) = (&opened.overlay, written.next()) {
            overlay.load(data, extents).map_err(wrap)?;
        }
        let recipe = Recipe::new(&spec, &opened, image.queues)?;
        *image = ImageFacts {
            fd: opened.fd,
            path: spec.path.clone(),
            serial: opened.serial,
            poll_us: image.poll_us,
            queues: image.queues,
            direct: spec.direct,
            engine: image.engine,
            overlay: opened.overlay.zip(spec.cow.clone()),
        };
        let watched = &mut self.supervisor.watched[w];
        if let Kind::Blk { recipe: place, .. } = &mut watched.kind {
            **place = recipe;
        }
        watched.exchange();
        let pid = self.cells.iter().find(|cell| cell.id() == id).and_then(|cell| cell.pid());
        match pid {
            Some(pid) => self.spawner.kill(pid).map_err(|error| DisksError::End(id, error)),
            // It is being made again at this moment, of the old image: another shell will do.
            None => Err(DisksError::Busy(id)),
        }
    }

    /// Whether the process of a disk, which is no more, had done nothing since the snapshot.
    fn check_unused(&self, id: &str) -> Result<(), DisksError> {
        let states = self.origin.iter().flat_map(|origin| &origin.state.device_states);
        let mut states = states.filter(|device| device.id == id);
        let saved = states.next().map(|device| device.as_disk()).transpose();
        let saved = saved.map_err(|error| DisksError::State(id.to_string(), error))?.flatten();
        let mut counted = saved.map(|disk| disk.counters).unwrap_or_default();
        counted.iter_mut().for_each(|queue| queue.currently_throttled_gauge = 0);
        let cell = self.cells.iter().find(|cell| cell.id() == id);
        let mut now = cell.map(Cell::queues).unwrap_or_default();
        now.iter_mut().for_each(|queue| queue.currently_throttled_gauge = 0);
        if now == counted { Ok(()) } else { Err(DisksError::Used(id.to_string())) }
    }
}
