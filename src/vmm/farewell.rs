//! The console's last words: what the guest wrote is delivered before its process ends.
//!
//! A process that dies over that, or had died before, is replaced once more: the output
//! that was accepted is in its journal.

use std::time::{Duration, Instant};

use cellblock_devices::protocol::{FromCell, ToCell};
use cellblock_seccomp::spawner::Event;

use super::DRAIN_LIMIT;
use super::event_loop::Vm;

/// Names the drain, of which there is one.
const EPOCH: u64 = 1;
/// Beyond the time that the process itself has.
const GRACE: Duration = Duration::from_secs(2);
/// Processes that may die over it.
const DEATHS: usize = 5;

/// How a process got on with it.
enum Drained {
    /// It is done; so many bytes were lost.
    Done(u64),
    Died,
    Late,
}

impl Vm {
    /// Waits until consoles have what their guest wrote, for as long as that may take.
    pub(super) fn deliver_consoles(&mut self) {
        let end = Instant::now() + DRAIN_LIMIT;
        for n in 0..self.cells.len() {
            if self.cells[n].role() == "serial" {
                self.deliver(n, end);
            }
        }
    }

    fn deliver(&mut self, n: usize, end: Instant) {
        let device = self.cells[n].id().to_string();
        if self.supervisor.history(&device).1 {
            return; // it has failed, and said so
        }
        for _ in 0..DEATHS {
            if !self.cells[n].is_open() && !self.revive(n, end) {
                break;
            }
            match self.drain(n, end) {
                Drained::Done(0) => return,
                Drained::Done(bytes) => {
                    tracing::warn!(
                        device,
                        bytes,
                        "console reader did not keep up; output was dropped"
                    );
                    return;
                }
                Drained::Late => break,
                Drained::Died => {}
            }
        }
        tracing::warn!(device, "console process did not finish in time");
    }

    fn drain(&mut self, n: usize, end: Instant) -> Drained {
        let left = end.saturating_duration_since(Instant::now());
        let limit_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
        let drain = ToCell::Drain { epoch: EPOCH, limit_ms };
        match self.cells[n].channel().try_send(&drain, &[]) {
            Ok(true) => {}
            // One that does not even read its messages is not waited for.
            Ok(false) => return Drained::Late,
            Err(_) => {
                self.cells[n].close();
                return Drained::Died;
            }
        }
        while let Some(message) = self.cells[n].wait_message(end + GRACE) {
            match message {
                // Counted by the process, and not trusted to add up.
                FromCell::Drained { epoch: EPOCH, dropped, unread } => {
                    return Drained::Done(dropped.saturating_add(unread));
                }
                other => self.cell_message(n, other),
            }
        }
        if self.cells[n].is_open() { Drained::Late } else { Drained::Died }
    }

    /// Has another process take the place of one that is gone. False where there is none.
    fn revive(&mut self, n: usize, end: Instant) -> bool {
        let Some(w) = self.supervisor.find(self.cells[n].id()) else { return false };
        if self.supervisor.awaits_end(w) && !self.await_end(n, end) {
            return false;
        }
        match self.start_serial(w, false) {
            Ok(started) => started,
            Err(error) => {
                tracing::error!(error = crate::remedy::chain(&error), "replacing the console");
                false
            }
        }
    }

    /// Waits until nothing of a process that closed its channel is left.
    fn await_end(&mut self, n: usize, end: Instant) -> bool {
        if let Some(pid) = self.cells[n].pid() {
            let _ = self.spawner.kill(pid); // as a rule it is dead
        }
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.spawner.next_event(left) {
                Ok(Event::Exited { pid, .. }) if self.cells[n].pid() == Some(pid) => return true,
                Ok(Event::Started { ticket, pid, pidfd }) if ticket == self.cells[n].ticket() => {
                    self.cells[n].started(pid, pidfd);
                }
                Ok(Event::Failed { ticket, .. }) if ticket == self.cells[n].ticket() => {
                    return true;
                }
                Ok(_) => {} // what others do is of no concern any more
                Err(_) => return false,
            }
        }
    }
}
