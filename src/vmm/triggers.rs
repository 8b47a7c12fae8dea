//! Snapshots that the VM takes by itself: markers and time in, a word to the writer out.
//!
//! The VMM opens no path, so who writes is a child started before everything else, with the
//! user's rights: it asks over a control connection of its own when it is time, and then
//! takes the snapshot as any client would.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_devices::protocol::Marker;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::event_loop::Vm;
use super::hold::Hold;
use crate::control::protocol::Reply;
use crate::control::server::Token;
use crate::snapshot::trigger::{self, Signs, SnapshotResources, Trigger};

/// The process that writes.
#[derive(Debug)]
pub(super) struct Scribe {
    child: Child,
    /// Its control connection, for the server to adopt.
    pub(super) stream: Option<UnixStream>,
}

impl Scribe {
    /// Starts it. To be called while there is one thread and nothing to inherit.
    pub(super) fn start(resources: &SnapshotResources) -> std::io::Result<Option<Scribe>> {
        let Some(path) = &resources.out_path else { return Ok(None) };
        let (near, far) = UnixStream::pair()?;
        let child = Command::new("/proc/self/exe")
            .args(["snapshot", "--when-triggered", "--", "-"])
            .arg(path)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(far)))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Some(Scribe { child, stream: Some(near) }))
    }

    /// Waits for what it has begun.
    pub(super) fn finish(mut self) {
        drop(self.stream.take());
        let _ = self.child.wait(); // it has said itself what went wrong
    }
}

/// Watches for the moment.
#[derive(Debug)]
pub(super) struct Triggers {
    resources: SnapshotResources,
    signs: Signs,
    started: Option<Instant>,
    timer: TimerFd,
    /// What is due, and when the cut is.
    due: Option<(Trigger, Instant)>,
    /// Where the guest waits that is about to run its workload.
    hold: Arc<Hold>,
    /// The connection of the process that writes.
    writer: u64,
    /// Its request, once it has asked.
    waiting: Option<Token>,
    told: bool,
}

impl Triggers {
    pub(super) fn new(
        resources: SnapshotResources,
        writer: u64,
        hold: Arc<Hold>,
    ) -> nix::Result<Triggers> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        Ok(Triggers {
            resources,
            signs: Signs::default(),
            started: None,
            timer,
            due: None,
            hold,
            writer,
            waiting: None,
            told: false,
        })
    }

    /// The guest runs from now on.
    pub(super) fn begin(&mut self) {
        self.started = Some(Instant::now());
        if let Some(after) = self.resources.after_ms {
            self.wake_in(Duration::from_millis(after));
        }
    }

    fn wake_in(&self, time: Duration) {
        // Zero would disarm it.
        let time = TimeSpec::from_duration(time.max(Duration::from_micros(1)));
        if let Err(error) = self.timer.set(Expiration::OneShot(time), TimerSetTimeFlags::empty()) {
            tracing::error!(%error, "arming the snapshot timer");
        }
    }

    /// Looks whether something has become due, and gives it once its time has come.
    fn look(&mut self) -> Option<Trigger> {
        if self.told {
            return None;
        }
        self.signs.elapsed = self.started.map_or(Duration::ZERO, |started| started.elapsed());
        let Some(trigger) = trigger::due(&self.resources, &self.signs) else {
            // A listener that things were settling after may be gone again. There is one
            // timer, and it rang for something else.
            self.due = None;
            if let Some(after) = self.resources.after_ms.filter(|_| self.started.is_some()) {
                self.wake_in(Duration::from_millis(after).saturating_sub(self.signs.elapsed));
            }
            return None;
        };
        let at = match self.due {
            Some((settling, at)) if settling == trigger => at,
            // A more important one comes first, with its own time to settle.
            _ => Instant::now() + trigger.settle(&self.resources),
        };
        self.due = Some((trigger, at));
        let left = at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Some(trigger);
        }
        self.wake_in(left);
        None
    }
}

impl AsFd for Triggers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

impl Vm {
    /// The guest said how far it is.
    pub(super) fn seen(&mut self, marker: Marker) {
        if let Some(triggers) = &mut self.triggers {
            triggers.signs.see(marker);
            self.pull();
        }
    }

    /// The timer rang.
    pub(super) fn trigger_timer(&mut self) {
        if let Some(triggers) = &self.triggers {
            let _ = triggers.timer.wait(); // readable, or it was not for us
        }
        self.pull();
    }

    /// Somebody wants to know when it is time. `None`: they are told later.
    pub(super) fn await_trigger(&mut self, token: Token) -> Option<Reply> {
        match &mut self.triggers {
            None => Some(Reply::error("no snapshot was asked for", Some("see --snapshot-out"))),
            Some(triggers) if token.client() != triggers.writer => Some(Reply::error(
                "the snapshot is another process's, which waits for it",
                Some("take one with 'cellblock snapshot'"),
            )),
            Some(triggers) => {
                triggers.waiting = Some(token);
                // The answer cannot be given while the request is being carried out.
                triggers.wake_in(Duration::ZERO);
                None
            }
        }
    }

    /// Tells who waits, if something is due.
    fn pull(&mut self) {
        let Some(triggers) = &mut self.triggers else { return };
        let Some(trigger) = triggers.look() else { return };
        match (&mut self.control, triggers.waiting) {
            (Some(control), Some(token)) => {
                triggers.told = true;
                control.complete(token, &Reply::Trigger { trigger: trigger.name().to_string() });
            }
            // In the middle of a request.
            (None, _) => triggers.wake_in(Duration::from_millis(1)),
            // The writer asks in a moment.
            (_, None) => {}
        }
    }

    /// `client` has its cut, or none, or is gone: if it is the writer, there is nothing to
    /// hold the guest for any more, whether it has asked or not.
    pub(super) fn release_guest(&self, client: u64) {
        if let Some(triggers) = self.triggers.as_ref().filter(|t| t.writer == client) {
            triggers.hold.release();
        }
    }

    /// The end of the VM: nobody has to wait any longer.
    pub(super) fn give_triggers_up(&mut self) {
        if let Some(triggers) = &mut self.triggers
            && let Some(token) = triggers.waiting.filter(|_| !triggers.told)
            && let Some(control) = &mut self.control
        {
            triggers.told = true;
            control.complete(token, &Reply::Trigger { trigger: String::new() });
        }
    }
}
