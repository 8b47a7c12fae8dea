//! Device processes that die, and what comes after them.
//!
//! ```text
//!            its connection ended            the spawner reports its end
//!  Serving ───────────────────────► Ending ─────────────────────────────┐
//!     ▲   └──────────────────────── its end ──────────────────────────┐ │ (killed when late)
//!     │                                                               ▼ ▼
//!     └── ready, and its device is as it was ─── Starting ◄── another is asked for
//!                                                   └ late: killed, which is one more death
//! ```
//!
//! A successor is asked for only when the spawner has reaped the process: then every
//! thread of it has ended, and with it the system call that it was in. It gets what does
//! not die with a process: image (and its lock), counters, the throttle's balance, ring
//! and record. The front end sets the rings up again ([`crate::transport::front_end`]); to
//! the driver it is a delay. Nothing here waits: it is called for every event that may
//! matter, and when [`Vm::supervision_due`] says.
//!
//! A device whose process dies too often **fails**. Then a process without the image
//! answers every request with an I/O error, so that no guest hangs; COM1 reads as an empty
//! socket. The VM lives.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_devices::protocol::ThrottleLimits;
use crossbeam_channel::{Receiver, Sender, unbounded};
use nix::sys::epoll::{Epoll, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::event_loop::Vm;
use crate::cell::blk::Recipe;
use crate::cell::launch::Common;
use crate::cell::{CellError, com1};
use crate::control::protocol::EventKind;
use crate::transport::front_end::{FrontEndError, Link, Watcher};

/// Within this time a device may lose so many processes less one.
const WINDOW: Duration = Duration::from_secs(10);
/// What a process gets to end by itself when its connection has ended.
const GRACE: Duration = Duration::from_millis(200);
/// The longest a successor may take until its device is as it was.
pub(super) const START_LIMIT: Duration = Duration::from_secs(5);
/// How often a failed device gets another process.
const REST: Duration = Duration::from_secs(1);
/// How long until it is looked again whether a cut still holds the VM.
const HELD: Duration = Duration::from_millis(20);
/// How often it is looked whether requests of a process that has ended are over.
const DRAINING: Duration = Duration::from_millis(2);

/// What front ends report of their connections, to the main thread.
#[derive(Debug)]
pub(super) struct Links {
    sender: Sender<(usize, Link)>,
    receiver: Receiver<(usize, Link)>,
    event: Arc<EventFd>,
}

impl Links {
    pub(super) fn new() -> nix::Result<Links> {
        let (sender, receiver) = unbounded();
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Links { sender, receiver, event: Arc::new(event) })
    }

    /// For the front end of device `n`.
    fn watcher(&self, n: usize) -> Watcher {
        let (sender, event) = (self.sender.clone(), self.event.clone());
        Box::new(move |link| {
            let _ = sender.send((n, link)); // nobody listens at the end of the VM
            let _ = event.write(1);
        })
    }

    fn take(&self) -> Vec<(usize, Link)> {
        let _ = self.event.read(); // empty is fine: the queue decides
        self.receiver.try_iter().collect()
    }
}

impl AsFd for Links {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// How to make the process of a device again.
pub(super) enum Kind {
    /// Behind device `n` of the machine.
    Blk { device: usize, recipe: Box<Recipe> },
    /// COM1.
    Serial { recipe: com1::Recipe },
    /// The other program's back end number so many, behind device `n` of the machine.
    BackEnd { device: usize, place: usize },
}

/// What is known of a device's processes.
pub(super) struct Watched {
    id: String,
    pub(super) kind: Kind,
    pub(super) phase: Phase,
    deaths: VecDeque<Instant>,
    /// Successors that took over.
    pub(super) restarts: u64,
    failed: bool,
    exchange: Exchange,
    /// Number of the connection there is.
    pub(super) link: u64,
    died: Instant,
}

/// A process that goes by our will, for one that is made otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exchange {
    None,
    /// The old one is there still.
    Ending,
    /// The new one is not there yet.
    Starting,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Serving,
    /// Killed at this time.
    Ending(Instant),
    /// Killed at this time.
    Starting {
        until: Instant,
        ready: bool,
        linked: bool,
    },
    /// Another one is asked for at this time.
    Resting(Instant),
}

/// Everything that supervision keeps.
pub(super) struct Supervisor {
    pub(super) common: Common,
    /// Deaths within [`WINDOW`] by which a device fails.
    pub(super) most_deaths: usize,
    pub(super) links: Links,
    pub(super) watched: Vec<Watched>,
}

impl Supervisor {
    pub(super) fn new(common: Common, most_deaths: usize) -> nix::Result<Supervisor> {
        Ok(Supervisor { common, most_deaths, links: Links::new()?, watched: Vec::new() })
    }

    /// Looks after the process of a device from now on. Cells and devices keep their places.
    pub(super) fn add(&mut self, id: &str, kind: Kind) {
        self.watched.push(Watched {
            id: id.to_string(),
            kind,
            phase: Phase::Serving,
            deaths: VecDeque::new(),
            restarts: 0,
            failed: false,
            exchange: Exchange::None,
            link: 0,
            died: Instant::now(),
        });
    }

    pub(super) fn find(&self, id: &str) -> Option<usize> {
        self.watched.iter().position(|watched| watched.id == id)
    }

    /// Successors that took over from a process of this device, and whether it failed.
    pub(super) fn history(&self, id: &str) -> (u64, bool) {
        self.find(id).map_or((0, false), |n| (self.watched[n].restarts, self.watched[n].failed))
    }

    /// Whether a process that is gone has yet to be reaped.
    pub(super) fn awaits_end(&self, w: usize) -> bool {
        !matches!(self.watched[w].phase, Phase::Resting(_))
    }

    /// Whether the process of this device is to go, and that is no news.
    pub(super) fn exchanges(&self, id: &str) -> bool {
        self.find(id).is_some_and(|n| self.watched[n].is_exchanged())
    }

    /// A device that has failed, if there is one.
    pub(super) fn failed(&self) -> Option<&str> {
        self.watched.iter().find(|watched| watched.failed).map(|watched| watched.id.as_str())
    }

    /// From here on it is somebody else's VM, and what died before counts no longer. Errs with the
    /// device that is without its process, or has failed: nobody is to be given that.
    pub(super) fn begin_anew(&mut self) -> Result<(), &str> {
        let serves = |watched: &Watched| !watched.failed && watched.phase == Phase::Serving;
        if let Some(n) = self.watched.iter().position(|watched| !serves(watched)) {
            return Err(&self.watched[n].id);
        }
        for watched in &mut self.watched {
            watched.deaths.clear();
            watched.restarts = 0;
        }
        Ok(())
    }

    /// Whether a process that is gone gets a successor that does what this one did.
    pub(super) fn replaces(&self, id: &str) -> bool {
        self.find(id).is_some_and(|n| !self.watched[n].failed)
    }
}

impl Watched {
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The process is to be ended, which is no death that counts.
    pub(super) fn exchange(&mut self) {
        self.exchange = Exchange::Ending;
    }

    /// Whether that process is still there.
    pub(super) fn is_exchanged(&self) -> bool {
        self.exchange == Exchange::Ending
    }

    /// Counts a death; true when it is one too many.
    fn died(&mut self, now: Instant, most: usize) -> bool {
        self.died = now;
        self.deaths.push_back(now);
        while self.deaths.front().is_some_and(|first| now - *first > WINDOW) {
            self.deaths.pop_front();
        }
        self.deaths.len() >= most
    }

    /// When something has to be done though nothing happens.
    fn due(&self) -> Option<Instant> {
        match self.phase {
            Phase::Ending(at) | Phase::Resting(at) | Phase::Starting { until: at, .. } => Some(at),
            Phase::Serving => None,
        }
    }
}

impl Vm {
    /// Has every front end report to us.
    pub(super) fn watch_links(&self) {
        for (n, (id, device)) in self.devices.iter().enumerate() {
            if self.supervisor.find(id).is_some() {
                device.watch(self.supervisor.links.watcher(n));
            }
        }
    }

    /// How long the main loop may sleep.
    pub(super) fn supervision_due(&self) -> EpollTimeout {
        let due = self.supervisor.watched.iter().filter_map(Watched::due);
        let due = due.chain(self.watchdog.due()).min();
        due.map_or(EpollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
        })
    }

    /// Does what is due.
    pub(super) fn supervise(&mut self, epoll: &Epoll) {
        let now = Instant::now();
        self.look_for_life(now);
        for w in 0..self.supervisor.watched.len() {
            let watched = &self.supervisor.watched[w];
            if watched.due().is_none_or(|at| at > now) {
                continue;
            }
            if let Kind::BackEnd { device, .. } = watched.kind
                && !matches!(watched.phase, Phase::Resting(_))
            {
                tracing::warn!(device = watched.id, "its back end does not answer");
                self.supervisor.watched[w].phase = Phase::Ending(now + START_LIMIT);
                self.devices[device].1.disconnect(); // which the front end then tells
                continue;
            }
            match watched.phase {
                Phase::Resting(_) => self.start_successor(epoll, w),
                Phase::Ending(_) | Phase::Starting { .. } => {
                    tracing::warn!(device = watched.id, "its process is ended: it is too slow");
                    self.supervisor.watched[w].phase = Phase::Ending(now + START_LIMIT);
                    self.kill_process(w);
                }
                Phase::Serving => {}
            }
        }
    }

    /// The process of cell `n` has ended, with all it did.
    pub(super) fn process_over(&mut self, epoll: &Epoll, n: usize) {
        let id = self.cells[n].id().to_string();
        let Some(w) = self.supervisor.find(&id) else { return };
        self.bury(epoll, w);
    }

    /// A process of a device is no more, or never was.
    fn bury(&mut self, epoll: &Epoll, w: usize) {
        let (now, most) = (Instant::now(), self.supervisor.most_deaths);
        let watched = &mut self.supervisor.watched[w];
        if watched.exchange == Exchange::Ending {
            watched.exchange = Exchange::Starting;
            return self.start_successor(epoll, w);
        }
        watched.exchange = Exchange::None;
        let too_often = watched.died(now, most);
        if watched.failed {
            watched.phase = Phase::Resting(now + REST);
            return;
        }
        if too_often {
            watched.failed = true;
            let (id, deaths) = (watched.id.clone(), watched.deaths.len());
            let role = watched.role().to_string();
            tracing::error!(
                role,
                device = id,
                "its process died {deaths} times in {WINDOW:?}: the device has failed"
            );
            self.event(EventKind::DeviceFailed { role, id, deaths: deaths as u64 });
            self.discard_unclaimed();
        }
        self.start_successor(epoll, w);
    }

    /// Asks for a process in the place of one that has ended.
    fn start_successor(&mut self, epoll: &Epoll, w: usize) {
        let wait = match &self.supervisor.watched[w].kind {
            // Its rings would go on, under whoever copies memory and disks.
            Kind::Blk { .. } | Kind::BackEnd { .. } if self.is_held() => Some(HELD),
            // What the kernel still does for the one before may write to guest memory. Nothing is
            // answered until that is over, were it with errors.
            Kind::Blk { recipe, .. } if recipe.is_held() => Some(DRAINING),
            _ => None,
        };
        if let Some(wait) = wait {
            self.supervisor.watched[w].phase = Phase::Resting(Instant::now() + wait);
            return;
        }
        let watched = &self.supervisor.watched[w];
        let (id, failed) = (watched.id.clone(), watched.failed);
        let result = match &watched.kind {
            Kind::Blk { device, .. } => self.start_blk(w, *device, failed),
            Kind::Serial { .. } => self.start_serial(w, failed),
            Kind::BackEnd { place, .. } => {
                let place = *place;
                return self.ask_back_end(w, place);
            }
        };
        let now = Instant::now();
        match result {
            // COM1 has failed; it needs no process for that.
            Ok(false) => self.supervisor.watched[w].phase = Phase::Serving,
            Ok(true) => {
                let until = now + START_LIMIT;
                let linked = matches!(self.supervisor.watched[w].kind, Kind::Serial { .. });
                self.supervisor.watched[w].phase = Phase::Starting { until, ready: false, linked };
                self.watch_cell(epoll, &id);
            }
            Err(error) => {
                tracing::error!(device = id, error = crate::remedy::chain(&error), "replacing");
                self.supervisor.watched[w].phase = Phase::Resting(now + REST);
            }
        }
    }

    fn start_blk(&mut self, w: usize, device: usize, failed: bool) -> Result<bool, ReplaceError> {
        let watched = &mut self.supervisor.watched[w];
        let Kind::Blk { recipe, .. } = &watched.kind else {
            return Err(ReplaceError::Unknown);
        };
        let limits = self.disks.iter().find(|disk| disk.id == watched.id);
        let limits = limits.map_or_else(ThrottleLimits::default, |disk| disk.throttle);
        let n = self.cells.iter().position(|cell| cell.id() == watched.id);
        let n = n.ok_or(ReplaceError::Unknown)?;
        let (near, far) = UnixStream::pair().map_err(ReplaceError::Socket)?;
        let spawner = &mut self.spawner;
        let common = self.supervisor.common;
        self.cells[n].succeed(|before| {
            let counters = before.counters().ok_or(ReplaceError::Unknown)?;
            let cell = recipe.launch(spawner, common, counters, limits, failed, far);
            cell.map_err(ReplaceError::from)
        })?;
        watched.link = self.devices[device].1.reconnect(near)?;
        Ok(true)
    }

    /// False where there is to be none any more.
    pub(super) fn start_serial(&mut self, w: usize, failed: bool) -> Result<bool, ReplaceError> {
        let watched = &self.supervisor.watched[w];
        let Kind::Serial { recipe } = &watched.kind else { return Err(ReplaceError::Unknown) };
        let ring = self.ring.clone().ok_or(ReplaceError::Unknown)?;
        if failed {
            ring.set_dead(true);
            return Ok(false);
        }
        let n = self.cells.iter().position(|cell| cell.id() == watched.id);
        let n = n.ok_or(ReplaceError::Unknown)?;
        // Whatever the one before wrote there. Before there is another: the head that is put
        // right here must not be one that it has moved.
        ring.set_dead(false);
        let (spawner, common) = (&mut self.spawner, self.supervisor.common);
        self.cells[n].succeed(|before| recipe.launch(spawner, common, before.client()))?;
        Ok(true)
    }

    /// The spawner started a process.
    pub(super) fn process_started(&mut self, ticket: u32, pid: i32, pidfd: OwnedFd) {
        let Some(cell) = self.cells.iter_mut().find(|cell| cell.ticket() == ticket) else { return };
        cell.started(pid, pidfd);
        let (id, open) = (cell.id().to_string(), cell.is_open());
        if let Some(w) = self.supervisor.find(&id) {
            if open { self.settle(w) } else { self.kill_process(w) }
        }
    }

    /// The spawner could not start a process.
    pub(super) fn process_failed(&mut self, epoll: &Epoll, ticket: u32, step: &str, why: &str) {
        let Some(cell) = self.cells.iter().find(|cell| cell.ticket() == ticket) else { return };
        let id = cell.id().to_string();
        tracing::error!(role = cell.role(), device = id, "replacing its process: {step}: {why}");
        if let Some(w) = self.supervisor.find(&id) {
            self.bury(epoll, w);
        }
    }

    /// The process of cell `n` has sealed itself and serves.
    pub(super) fn process_ready(&mut self, n: usize) {
        let Some(w) = self.supervisor.find(self.cells[n].id()) else { return };
        if let Phase::Starting { ready, .. } = &mut self.supervisor.watched[w].phase {
            *ready = true;
            self.settle(w);
        }
    }

    /// Front ends have news of their connections.
    pub(super) fn link_news(&mut self) {
        for (device, link) in self.supervisor.links.take() {
            let id = &self.devices[device].0;
            let Some(w) = self.supervisor.find(id) else { continue };
            let watched = &mut self.supervisor.watched[w];
            let (Link::Lost(number) | Link::Restored(number) | Link::Fresh(number)) = link;
            if number != watched.link {
                continue; // of a connection that is over
            }
            if let Kind::BackEnd { place, .. } = watched.kind {
                self.back_end_news(w, place, link);
                continue;
            }
            match (link, &mut watched.phase) {
                (Link::Lost(_), Phase::Serving | Phase::Starting { .. }) => {
                    watched.phase = Phase::Ending(Instant::now() + GRACE);
                }
                (Link::Restored(_) | Link::Fresh(_), Phase::Starting { linked, .. }) => {
                    *linked = true;
                    if matches!(link, Link::Fresh(_)) {
                        self.devices[device].1.must_reset();
                    }
                    self.settle(w);
                }
                _ => {}
            }
        }
    }

    /// Says so when a successor has taken over.
    fn settle(&mut self, w: usize) {
        let watched = &mut self.supervisor.watched[w];
        let pid = self.cells.iter().find(|cell| cell.id() == watched.id).and_then(|c| c.pid());
        let (Phase::Starting { ready: true, linked: true, .. }, Some(pid)) = (watched.phase, pid)
        else {
            return;
        };
        watched.phase = Phase::Serving;
        if std::mem::replace(&mut watched.exchange, Exchange::None) == Exchange::Starting {
            return;
        }
        watched.restarts += 1;
        let took_us = watched.died.elapsed().as_micros() as u64;
        let (role, id) = (watched.role().to_string(), watched.id.clone());
        let restarts = watched.restarts;
        tracing::warn!(role, device = id, pid, took_us, "another process has taken over");
        if !watched.failed {
            self.event(EventKind::DeviceReplaced { role, id, pid, restarts, took_us });
        }
    }

    pub(super) fn kill_process(&mut self, w: usize) {
        let id = &self.supervisor.watched[w].id;
        let pid = self.cells.iter().find(|cell| cell.id() == id).and_then(|cell| cell.pid());
        if let Some(pid) = pid
            && let Err(error) = self.spawner.kill(pid)
        {
            tracing::error!(error = crate::remedy::chain(&error), "ending a device process");
        }
    }

    /// From now on nothing is replaced; what waits for a successor is told that none comes.
    pub(super) fn end_supervision(&mut self) {
        for (_, device) in &self.devices {
            device.abandon();
        }
    }
}

impl Watched {
    fn role(&self) -> &'static str {
        match self.kind {
            Kind::Blk { .. } | Kind::BackEnd { .. } => "blk",
            Kind::Serial { .. } => "serial",
        }
    }
}

/// Why no successor could be asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReplaceError {
    #[error("there is no such process")]
    Unknown,
    #[error("making its vhost-user connection")]
    Socket(#[source] std::io::Error),
    #[error(transparent)]
    Cell(#[from] CellError),
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
}
