//! What the control socket can ask of a running machine.

use std::time::{Duration, Instant};

use cellblock_devices::protocol::{CellStats, FromCell, Marker};
use cellblock_seccomp::spawner::ProcessInfo;

use super::event_loop::Vm;
use crate::cell::Cell;
use crate::control::protocol::{
    CapSet, DeviceState, DiskStats, EventKind, Process, Reply, Request, SerialStats, State, Stats,
    Thread, VcpuStats,
};
use crate::vcpu::{PauseError, VcpuState};

/// How long the vCPUs may take to park.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// How long device processes may take to report their counters, all together.
const STATS_LIMIT: Duration = Duration::from_millis(200);
/// What each has at least.
const LAST_LOOK: Duration = Duration::from_millis(2);

impl Vm {
    pub(super) fn answer(&mut self, request: Request) -> Option<Reply> {
        match request {
            Request::Pause => Some(self.pause()),
            Request::Resume => Some(self.resume()),
            Request::Stop => {
                self.asked_to_stop = true;
                Some(Reply::Stop)
            }
            Request::Stats => Some(Reply::Stats(Box::new(self.stats()))),
            // The spawner looks, and answers in its own time.
            Request::Ps => None,
            Request::Events => Some(Reply::Events),
        }
    }

    fn pause(&mut self) -> Reply {
        match self.vcpus.pause(PAUSE_LIMIT) {
            Ok(report) => {
                let (epoch, took_us) = (report.epoch, report.took.as_micros() as u64);
                self.event(EventKind::Pause { epoch, took_us });
                Reply::Pause { epoch, took_us }
            }
            Err(PauseError::State(_)) if self.is_paused() => {
                Reply::error("the VM is paused already", None)
            }
            Err(error) => Reply::error(crate::remedy::chain(&error), None),
        }
    }

    fn is_paused(&self) -> bool {
        self.vcpus.states().iter().all(|state| *state == VcpuState::Paused)
    }

    fn resume(&mut self) -> Reply {
        let start = Instant::now();
        let epoch = self.vcpus.epoch();
        match self.vcpus.resume() {
            Ok(()) => {
                self.event(EventKind::Resume { epoch });
                Reply::Resume { epoch, took_us: start.elapsed().as_micros() as u64 }
            }
            Err(_) if !self.is_paused() => {
                Reply::error("the VM is not paused", Some("pause it first"))
            }
            Err(error) => Reply::error(crate::remedy::chain(&error), None),
        }
    }

    fn stats(&mut self) -> Stats {
        self.refresh_counters();
        let states = self.vcpus.states();
        let vcpus = states.iter().enumerate().map(|(id, state)| VcpuStats {
            id: id as u32,
            state: state_of(*state),
            exits: None,
        });
        let disks = self.disks.iter().filter_map(|disk| {
            let cell = self.cells.iter().find(|cell| cell.id() == disk.id)?;
            let (reads, writes, flushes, bytes_read, bytes_written, errors) = match cell.stats() {
                CellStats::Blk { reads, writes, flushes, bytes_read, bytes_written, errors } => {
                    (*reads, *writes, *flushes, *bytes_read, *bytes_written, *errors)
                }
                _ => Default::default(),
            };
            Some(DiskStats {
                id: disk.id.clone(),
                pid: cell.pid(),
                state: cell_state(cell),
                read_only: disk.read_only,
                size: disk.size,
                reads,
                writes,
                flushes,
                bytes_read,
                bytes_written,
                errors,
            })
        });
        let serials = self.cells.iter().filter(|cell| cell.role() == "serial").map(|cell| {
            let (output, input, dropped) = match cell.stats() {
                CellStats::Serial { output, input, dropped } => (*output, *input, *dropped),
                _ => Default::default(),
            };
            SerialStats {
                id: cell.id().to_string(),
                pid: cell.pid(),
                state: cell_state(cell),
                output,
                input,
                dropped,
            }
        });
        Stats {
            version: env!("CARGO_PKG_VERSION").to_string(),
            pid: std::process::id() as i32,
            state: states.first().map_or(State::Stopped, |state| state_of(*state)),
            epoch: self.vcpus.epoch(),
            uptime_us: self.started.elapsed().as_micros() as u64,
            memory: self.ram.regions().iter().map(|region| region.len).sum(),
            vcpus: vcpus.collect(),
            disks: disks.collect(),
            serials: serials.collect(),
        }
    }

    /// Asks every device process for its counters. One that does not answer keeps
    /// those it last gave.
    fn refresh_counters(&mut self) {
        let end = Instant::now() + STATS_LIMIT;
        let asked: Vec<bool> = self.cells.iter_mut().map(Cell::ask_stats).collect();
        for n in (0..asked.len()).filter(|n| asked[*n]) {
            // One that used all of the time up leaves the others a last look.
            let end = end.max(Instant::now() + LAST_LOOK);
            while let Some(message) = self.cells[n].wait_message(end) {
                let last = matches!(message, FromCell::Stats(_));
                self.cell_message(n, message);
                if last {
                    break;
                }
            }
        }
    }
}

/// Answer to `ps`.
pub(super) fn processes(found: &[ProcessInfo]) -> Reply {
    let processes = found
        .iter()
        .map(|p| Process {
            role: p.role.clone(),
            id: p.id.clone(),
            pid: p.pid,
            uid: p.uid,
            seccomp: p.seccomp,
            no_new_privs: p.no_new_privs,
            cap_eff: CapSet(p.cap_eff),
            cap_prm: CapSet(p.cap_prm),
            cap_bnd: CapSet(p.cap_bnd),
            namespaces: p.namespaces.clone(),
            rss_kib: p.rss_kib,
            pss_kib: p.pss_kib,
            threads: p
                .threads
                .iter()
                .map(|t| Thread { name: t.name.clone(), tid: t.tid, seccomp: t.seccomp })
                .collect(),
        })
        .collect();
    Reply::Ps { processes }
}

/// The event for a marker that came by `source`: `port` or `console`.
pub(super) fn marker_event(marker: Marker, source: &str) -> EventKind {
    let marker = match marker {
        Marker::Heartbeat => "heartbeat",
        Marker::PreExec => "pre-exec",
        Marker::Listener => "listener",
        Marker::ListenerGone => "listener-gone",
        Marker::Parked => "parked",
    };
    EventKind::Marker { marker: marker.to_string(), source: source.to_string() }
}

fn state_of(state: VcpuState) -> State {
    match state {
        VcpuState::Created => State::Created,
        VcpuState::Running => State::Running,
        VcpuState::Pausing => State::Pausing,
        VcpuState::Paused => State::Paused,
        VcpuState::Stopped => State::Stopped,
    }
}

fn cell_state(cell: &Cell) -> DeviceState {
    match (cell.is_open(), cell.pid()) {
        (true, Some(_)) => DeviceState::Running,
        (true, None) => DeviceState::Starting,
        (false, _) => DeviceState::Dead,
    }
}
