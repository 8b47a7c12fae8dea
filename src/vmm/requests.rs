//! What the control socket can ask of a running machine.

use std::time::{Duration, Instant};

use cellblock_devices::protocol::{CellStats, FromCell, Marker, ToCell};
use cellblock_seccomp::spawner::ProcessInfo;

use super::event_loop::Vm;
use crate::cell::Cell;
use crate::cell::counters;
use crate::control::protocol::{
    CapSet, DeviceState, DiskStats, EventKind, Process, Reply, Request, SerialStats, State, Stats,
    Thread, VcpuStats,
};
use crate::spec::Throttle;
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
            Request::Reset => Some(self.reset()),
            Request::Stop => {
                self.asked_to_stop = true;
                Some(Reply::Stop)
            }
            Request::Stats => Some(Reply::Stats(Box::new(self.stats()))),
            // The spawner looks, and answers in its own time.
            Request::Throttle { id, bw, bw_burst, iops, iops_burst } => {
                Some(self.throttle(id, &Throttle { bw, bw_burst, iops, iops_burst }))
            }
            Request::Ps => match self.spawner.inspect() {
                Ok(()) => None,
                Err(error) => Some(Reply::error(crate::remedy::chain(&error), None)),
            },
            // Carried out where their answers go.
            Request::Snapshot { .. }
            | Request::Kept { .. }
            | Request::Held
            | Request::AwaitTrigger
            | Request::Events => Some(Reply::Events),
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

    pub(super) fn is_paused(&mut self) -> bool {
        self.vcpus.is_paused()
    }

    fn resume(&mut self) -> Reply {
        let start = Instant::now();
        let epoch = self.vcpus.epoch();
        if self.is_held() {
            self.end_hold();
            self.event(EventKind::Resume { epoch });
            return Reply::Resume { epoch, took_us: start.elapsed().as_micros() as u64 };
        }
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

    fn throttle(&mut self, id: String, change: &Throttle) -> Reply {
        let Some(disk) = self.disks.iter_mut().find(|disk| disk.id == id) else {
            let ids: Vec<&str> = self.disks.iter().map(|disk| disk.id.as_str()).collect();
            let remedy = match ids.as_slice() {
                [] => "this VM has none".to_string(),
                ids => format!("its disks are {}", ids.join(", ")),
            };
            return Reply::error("the VM has no disk of that id", Some(&remedy));
        };
        if self.back_ends.iter().any(|end| end.id == id) {
            let why = "another program's back end serves this disk, and has no limits of ours";
            return Reply::error(why, Some("set them in that program"));
        }
        let limits = match change.applied_to(&disk.throttle) {
            Ok(limits) => limits,
            Err(why) => return Reply::error(why, None),
        };
        let cell = self.cells.iter().find(|cell| cell.role() == "blk" && cell.id() == id);
        let told = cell
            .filter(|cell| cell.is_open())
            .map(|cell| cell.channel().try_send(&ToCell::Throttle(limits), &[]));
        match told {
            Some(Ok(true)) => {
                disk.throttle = limits;
                Reply::Throttle { id, limits: limits.into() }
            }
            Some(Ok(false)) => {
                Reply::error("the disk's process does not listen", Some("try again"))
            }
            // The one that takes its place is told at its start.
            Some(Err(_)) | None if self.supervisor.replaces(&id) => {
                disk.throttle = limits;
                Reply::Throttle { id, limits: limits.into() }
            }
            Some(Err(_)) | None => Reply::error("the disk's process is dead", None),
        }
    }

    fn stats(&mut self) -> Stats {
        self.refresh_counters();
        self.is_paused(); // who parked late is heard of
        let states = self.vcpus.states();
        let vcpus = states.iter().enumerate().map(|(id, state)| VcpuStats {
            id: id as u32,
            state: state_of(*state),
            exits: None,
        });
        let disks = self.disks.iter().map(|disk| {
            // None with a back end of another program, which reports nothing.
            let cell = self.cells.iter().find(|cell| cell.id() == disk.id);
            let queues = cell.map(Cell::queues).unwrap_or_default();
            let counters = counters::total(&queues);
            let gone = self.back_ends.iter().any(|end| end.id == disk.id && end.gone);
            DiskStats {
                id: disk.id.clone(),
                pid: cell.and_then(Cell::pid),
                restarts: self.supervisor.history(&disk.id).0,
                state: match cell {
                    _ if self.supervisor.history(&disk.id).1 => DeviceState::Failed,
                    Some(cell) => cell_state(cell),
                    None if gone => DeviceState::Dead,
                    None => DeviceState::Running,
                },
                read_only: disk.read_only,
                size: disk.size,
                reads: counters.reads_completed,
                writes: counters.writes_completed,
                flushes: counters.flushes_completed,
                errors: counters.io_errors,
                throttle: disk.throttle.into(),
                counters,
                queues,
            }
        });
        let serials = self.cells.iter().filter(|cell| cell.role() == "serial").map(|cell| {
            let (output, input, dropped) = match cell.stats() {
                CellStats::Serial { output, input, dropped } => (*output, *input, *dropped),
                _ => Default::default(),
            };
            SerialStats {
                id: cell.id().to_string(),
                pid: cell.pid(),
                restarts: self.supervisor.history(cell.id()).0,
                state: match self.supervisor.history(cell.id()).1 {
                    true => DeviceState::Failed,
                    false => cell_state(cell),
                },
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
            uptime_us: self.phases.elapsed().as_micros() as u64,
            memory: self.ram.regions().iter().map(|region| region.len).sum(),
            vcpus: vcpus.collect(),
            disks: disks.collect(),
            serials: serials.collect(),
            phases: self.phases.report(),
            plugin_socket: self.plugin_socket.clone(),
        }
    }

    /// Asks every serial process for its counters. One that does not answer keeps those
    /// it last gave. Block processes count in shared memory.
    fn refresh_counters(&mut self) {
        let end = Instant::now() + STATS_LIMIT;
        let asked: Vec<bool> =
            self.cells.iter_mut().map(|cell| cell.role() == "serial" && cell.ask_stats()).collect();
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
