//! Device processes that hang: stopped, or going round in circles.
//!
//! Such a process is alive, so nothing reports it; its guest waits for ever. Now and then each
//! process is asked for a sign of life on its channel, which its main thread gives, and the
//! doorbells of a disk are rung, at which the thread of a queue beats in the page of the
//! counters. One that has given none for as long as the user allows is ended: then it is one
//! that died, and is replaced as any other.
//!
//! **A slow disk is no reason.** A thread that is inside of a request on the image says so
//! beside its beat, and is not expected to beat: its successor would wait for the same image.
//! It is ended only if the main thread is silent too, as it is when the process is stopped.
//!
//! Time counts by looks: whoever stopped the whole VM, this process included, has not made
//! anything hang. A VM that does not run is not looked at.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cellblock_devices::protocol::counters::Beat;

use super::event_loop::Vm;
use super::supervise::{Kind, Phase, START_LIMIT};
use crate::control::protocol::EventKind;
use crate::vcpu::VcpuState;

/// Looks within the time that a process may be silent.
const LOOKS: u32 = 4;

/// What is known of all processes.
#[derive(Debug)]
pub(super) struct Watchdog {
    /// None where nobody is looked after.
    limit: Option<Duration>,
    next: Instant,
    pulses: BTreeMap<String, Pulse>,
}

impl Watchdog {
    /// With the longest that a process may be silent; zero for ever.
    pub(super) fn new(limit: Duration) -> Watchdog {
        let limit = (!limit.is_zero()).then_some(limit);
        Watchdog { limit, next: Instant::now(), pulses: BTreeMap::new() }
    }

    /// When to look.
    pub(super) fn due(&self) -> Option<Instant> {
        self.limit.map(|_| self.next)
    }
}

/// What a process has shown so far.
#[derive(Debug, Default)]
struct Pulse {
    pid: i32,
    beats: Vec<Beat>,
    silent: u32,
}

impl Pulse {
    /// One more look; how many there were without a sign of life. `answers` tells whether the
    /// main thread has answered what it was asked at the look before.
    fn look(&mut self, pid: i32, answers: bool, beats: Vec<Beat>) -> u32 {
        if self.pid != pid {
            *self = Pulse { pid, beats, silent: 0 };
            return 0;
        }
        let beaten = |(now, before): (&Beat, &Beat)| now.count != before.count || now.excused;
        let alive = answers && beats.iter().zip(&self.beats).all(beaten);
        self.silent = if alive { 0 } else { self.silent + 1 };
        self.beats = beats;
        self.silent
    }
}

impl Vm {
    /// Looks at every process, if it is time to.
    pub(super) fn look_for_life(&mut self, now: Instant) {
        let Some(limit) = self.watchdog.limit.filter(|_| self.watchdog.next <= now) else { return };
        self.watchdog.next = now + limit / LOOKS;
        let runs = self.vcpus.states().contains(&VcpuState::Running);
        if !runs || self.is_held() {
            self.watchdog.pulses.clear();
            return;
        }
        for n in 0..self.cells.len() {
            let Some(w) = self.supervisor.find(self.cells[n].id()) else { continue };
            let Some(pid) = self.cells[n].pid() else { continue };
            if self.supervisor.watched[w].phase != Phase::Serving || !self.cells[n].is_open() {
                continue;
            }
            let id = self.cells[n].id().to_string();
            let (answers, beats) = (self.cells[n].ping(), self.cells[n].beats());
            let pulse = self.watchdog.pulses.entry(id.clone()).or_default();
            if pulse.look(pid, answers, beats) >= LOOKS {
                self.end_hung(w, n, pid, limit);
            } else if let Kind::Blk { device, .. } = self.supervisor.watched[w].kind {
                self.devices[device].1.ring_doorbells();
            }
        }
    }

    fn end_hung(&mut self, w: usize, n: usize, pid: i32, limit: Duration) {
        let (role, id) = (self.cells[n].role().to_string(), self.cells[n].id().to_string());
        tracing::error!(role, device = id, pid, "no sign of life in {limit:?}: it is ended");
        self.supervisor.watched[w].phase = Phase::Ending(Instant::now() + START_LIMIT);
        self.event(EventKind::DeviceHung { role, id, pid });
        self.kill_process(w);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(count: u64) -> Beat {
        Beat { count, excused: false }
    }

    fn busy(count: u64) -> Beat {
        Beat { count, excused: true }
    }

    /// Looks at one process one after the other; how long it was silent at each.
    fn looks<const N: usize>(looks: [(bool, Vec<Beat>); N]) -> [u32; N] {
        let mut pulse = Pulse::default();
        assert_eq!(pulse.look(7, true, vec![beat(0), beat(0)]), 0);
        looks.map(|(answers, beats)| pulse.look(7, answers, beats))
    }

    #[test]
    fn every_thread_has_to_show_that_it_lives() {
        let alive = looks([
            (true, vec![beat(1), beat(1)]),
            (true, vec![beat(2), beat(9)]),
            (true, vec![beat(0), beat(0)]), // whatever it counts
        ]);
        assert_eq!(alive, [0, 0, 0]);
        let one_stuck = looks([
            (true, vec![beat(1), beat(1)]),
            (true, vec![beat(2), beat(1)]),
            (true, vec![beat(3), beat(1)]),
            (true, vec![beat(4), beat(2)]),
        ]);
        assert_eq!(one_stuck, [0, 1, 2, 0]);
        let stopped = looks([
            (true, vec![beat(1), beat(1)]),
            (false, vec![beat(1), beat(1)]),
            (false, vec![beat(1), beat(1)]),
        ]);
        assert_eq!(stopped, [0, 1, 2]);
    }

    #[test]
    fn a_slow_disk_is_waited_for_but_not_by_a_process_that_is_stopped() {
        let slow = looks([
            (true, vec![busy(1), beat(1)]),
            (true, vec![busy(1), beat(2)]),
            (true, vec![busy(1), beat(3)]),
        ]);
        assert_eq!(slow, [0, 0, 0]);
        let stopped = looks([
            (true, vec![busy(1), beat(1)]),
            (false, vec![busy(1), beat(2)]),
            (false, vec![busy(1), beat(2)]),
        ]);
        assert_eq!(stopped, [0, 1, 2]);
    }

    #[test]
    fn a_successor_begins_anew() {
        let mut pulse = Pulse::default();
        assert_eq!(pulse.look(7, true, vec![beat(5)]), 0);
        assert_eq!(pulse.look(7, false, vec![beat(5)]), 1);
        assert_eq!(pulse.look(8, false, vec![beat(5)]), 0);
        assert_eq!(pulse.look(8, true, vec![beat(5)]), 1);
    }
}
