//! Snapshots, carried out on the machine: what the coordinator says is done here.
//!
//! The VMM makes the cut and hands it out, the state and guest memory as two file
//! descriptors. Writing it to disk is the work of the process that asked, with that
//! process's rights and beside the guest: the VMM opens no path, and its filter stays.
//!
//! | module | what it does |
//! |---|---|
//! | `devices` | brings device processes to rest, and lets them go on |
//! | `coming` | waits until all of guest memory has come |
//! | `capture` | reads the state, and copies guest memory |
//! | `live`, `rounds` | copies guest memory, in the cut or in rounds before it |
//! | `layers` | copies what the guest has written to `cow` disks |
//! | `plugins` | brings plugins to rest, and lets them go on |
//! | `held` | a cut that a client holds, and what ends it |
//! | `load` | brings a machine to where a state is |
//! | `reset`, `put_back` | puts a restored machine back to its snapshot, and its memory |

mod capture;
mod coming;
mod devices;
mod held;
mod layers;
mod live;
mod load;
mod plugins;
mod put_back;
mod reset;
mod rounds;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::event_loop::Vm;
use crate::cell::{Cell, com1};
use crate::control::protocol::{EventKind, Reply, SnapshotDisk, SnapshotReport};
use crate::control::server::{Response, Token};
use crate::snapshot::coordinator::{Coordinator, CutError, Input, Phase};
use crate::snapshot::dirty::Tracker;
use crate::snapshot::format::{PAGE, SnapshotId};
use crate::snapshot::state::{Host, HostFacts, Metadata};
use crate::vcpu::{Outstanding, VcpuState};
use crate::vm::kvm::KvmError;
use crate::vm::layout;
use coming::Coming;
use devices::{Frozen, Strangers};
pub use load::LoadError;
pub use put_back::Kept;
pub use reset::Origin;
use rounds::Live;

/// How long each phase may take where the request does not say.
const PHASE_LIMIT: Duration = Duration::from_secs(5);
/// How long rounds of a live copy may go on.
const ROUNDS_LIMIT: Duration = Duration::from_secs(60);
/// The longest a request may ask for.
const PHASE_MOST: Duration = Duration::from_secs(600);

/// What snapshots need of the machine, found out before the VMM is confined.
pub(super) struct Snapshots {
    pub(super) host: Host,
    pub(super) facts: HostFacts,
    pub(super) boot_id: String,
    /// What was written since the last snapshot.
    pub(super) tracker: Tracker,
    /// What was written since the tracker's base before the last cut, until that is kept.
    unkept: Option<Vec<u64>>,
    /// Whose the last cut is, as long as it can be kept.
    cutter: Option<u64>,
    cut: Coordinator,
    /// The cut that a client holds: its connection, and what has to be thawed.
    held: Option<(u64, Frozen)>,
    /// The snapshot that waits for memory to come.
    coming: Option<Coming>,
    /// The live snapshot that is under way.
    live: Option<Live>,
    /// The VM was paused before the cut.
    was_paused: bool,
}

/// A cut, and its descriptors.
type Cut = (SnapshotReport, Vec<OwnedFd>);

/// What a request asks for.
#[derive(Clone)]
pub(super) struct Wanted {
    pub(super) hold: bool,
    pub(super) live: bool,
    pub(super) limit: Duration,
    pub(super) trigger: String,
}

impl Snapshots {
    pub(super) fn new(host: Host, boot_id: String, tracker: Tracker) -> Snapshots {
        let facts = host.facts();
        let cut = Coordinator::new(Vec::new());
        Snapshots {
            host,
            facts,
            boot_id,
            tracker,
            unkept: None,
            cutter: None,
            cut,
            held: None,
            coming: None,
            live: None,
            was_paused: false,
        }
    }
}

impl Vm {
    /// Answers a request for a snapshot.
    pub(super) fn snapshot(
        &mut self,
        hold: bool,
        live: bool,
        timeout_us: Option<u64>,
        trigger: Option<String>,
        token: Token,
    ) -> Response {
        if self.ram.is_empty() {
            return Response::Now(Reply::error(
                "no snapshot: all of the VM's memory is a plugin's, and none the VM's own",
                Some("take snapshots of VMs that have a kernel"),
            ));
        }
        if self.plugins.as_ref().is_some_and(|(hub, _)| hub.has_memory()) {
            return Response::Now(Reply::error(
                "no snapshot: a program that attached has given the guest memory of its own",
                Some("have it take that memory away again, or end it, and try again"),
            ));
        }
        if self.is_held() || self.copies() {
            return Response::Now(Reply::error(
                "another snapshot of the VM is being taken",
                Some("try again"),
            ));
        }
        let limit = timeout_us.map_or(PHASE_LIMIT, Duration::from_micros).min(PHASE_MOST);
        let trigger = crate::remedy::printable(&trigger.unwrap_or_else(|| "command".into()));
        let wanted = Wanted { hold, live: live && !hold, limit, trigger };
        self.nothing_kept();
        if wanted.hold && self.has_holes() {
            self.await_memory(wanted, token);
            return Response::Later;
        }
        let cut = match wanted.live {
            true => match self.prepare_live(wanted, token) {
                Ok(()) => return Response::Later,
                Err(error) => Err(error),
            },
            false => self.cut(&wanted, None, token.client()),
        };
        let (reply, fds) = self.told(cut, token.client());
        Response::WithFds(reply, fds)
    }

    /// What is said of a cut, and what goes with it.
    fn told(&mut self, cut: Result<Cut, CutError>, client: u64) -> (Reply, Vec<OwnedFd>) {
        self.release_guest(client);
        match cut {
            Ok((report, fds)) => {
                self.snapshots.cutter = Some(client);
                let (epoch, still_us) = (report.epoch, report.still_us);
                self.event(EventKind::Snapshot { epoch, still_us });
                (Reply::Snapshot(report), fds)
            }
            Err(CutError { phase, who, why }) => {
                let (phase, why) = (phase.to_string(), crate::remedy::printable(&why));
                let message = format!("no snapshot: {phase}: {who}: {why}");
                self.event(EventKind::SnapshotFailed { phase, who, why });
                (Reply::error(message, Some("the VM goes on; try again")), Vec::new())
            }
        }
    }

    fn prepare_live(&mut self, wanted: Wanted, token: Token) -> Result<(), CutError> {
        let why = "what its back end writes to guest memory is in no log of ours: take the \
                   snapshot without --live";
        self.refuse_strangers(Strangers::Refused(why))?;
        self.refuse_untold()?;
        self.begin_live(wanted, token)
    }

    /// A copy in rounds has what is in the logs, and nothing else.
    fn refuse_untold(&self) -> Result<(), CutError> {
        if self.snapshots.tracker.knows_all() {
            return Ok(());
        }
        let who = "a program that attached".to_string();
        let why = "it was given guest memory to write to (memory=rw), and what it writes is in no \
                   log: take the snapshot without --live"
            .to_string();
        Err(CutError { phase: Phase::Running, who, why })
    }

    /// Memory is copied but for what was written last.
    fn cut_live(&mut self, live: Live) -> Result<Cut, CutError> {
        self.refuse_untold()?; // somebody may have attached since
        let wanted = live.wanted.clone();
        let client = live.token.client();
        let (copy, rounds_us) = live.finish();
        let rounds = copy.rounds;
        let (report, fds) = self.cut(&wanted, Some(copy), client)?;
        Ok((SnapshotReport { rounds_us, rounds, ..report }, fds))
    }

    fn cut(
        &mut self,
        wanted: &Wanted,
        live: Option<live::Copy>,
        client: u64,
    ) -> Result<Cut, CutError> {
        let mut frozen = Frozen::of_plugins(self.plugin_holders());
        self.snapshots.cut.participate(self.participants(&frozen));
        self.snapshots.was_paused = self.is_paused();
        let begun = Instant::now();
        match self.make_cut(wanted, live, &mut frozen) {
            Ok((mut report, fds)) if wanted.hold => {
                report.still_us = 0;
                self.snapshots.held = Some((client, frozen));
                Ok((report, fds))
            }
            Ok((mut report, fds)) => {
                let copied = Instant::now();
                self.thaw(frozen, Input::Thaw);
                report.thaw_us = micros(copied.elapsed());
                report.still_us = micros(begun.elapsed());
                Ok((report, fds))
            }
            Err(error) => {
                self.thaw(frozen, Input::Thaw);
                Err(error)
            }
        }
    }

    fn make_cut(
        &mut self,
        wanted: &Wanted,
        mut live: Option<live::Copy>,
        frozen: &mut Frozen,
    ) -> Result<Cut, CutError> {
        let mut clock = Stopwatch::new();
        self.refuse_strangers(Strangers::Saved)?;
        self.step(Input::Begin)?;
        self.park(wanted.limit)?;
        self.step(Input::Parked)?;
        let pause_us = clock.lap();
        self.quiesce(wanted.limit, frozen)?;
        let drain_us = clock.lap();
        self.step(Input::Capture)?;
        let until = self.capture_until(wanted.limit);
        let epoch = self.vcpus.epoch();
        let metadata = Metadata { epoch, captured_us: now_us(), trigger: wanted.trigger.clone() };
        let state = self.capture(frozen, metadata, until);
        let state = self.or_give_up("the VMM", state)?;
        let capture_us = clock.lap();
        let base = self.snapshots.tracker.base();
        let layers = live.as_mut().map(|live| std::mem::take(&mut live.layers)).unwrap_or_default();
        let memory = self.copy_still(live, wanted.hold, until);
        let (memory, last_pages, since) = self.or_give_up("guest memory", memory)?;
        let pages = base.map(|_| live::pages_file(&since)).transpose();
        let pages = self.or_give_up("guest memory", pages)?;
        let overlays = self.finish_layers(layers, until);
        let overlays = self.or_give_up("the cow disks", overlays)?;
        let memory_us = clock.lap();
        let bytes = state.len() as u64;
        let state = self.or_give_up("the state", capture::as_file(&state))?;
        self.step(Input::Captured)?;
        let report = SnapshotReport {
            epoch,
            pause_us,
            drain_us,
            capture_us,
            memory_us,
            last_pages,
            base: base.map(|id| id.to_string()),
            memory: self.ram.len(),
            state: bytes,
            disks: self.snapshot_disks(),
            without: frozen.without_state(),
            ..SnapshotReport::default()
        };
        let fds = [state, memory].into_iter().chain(overlays).chain(pages).collect();
        Ok((report, fds))
    }

    /// The machine is as in snapshot `id`, and has not run.
    pub(super) fn track_since(&mut self, id: SnapshotId) -> Result<(), KvmError> {
        self.snapshots.tracker.begin(&self.machine)?;
        self.snapshots.tracker.cut(&self.machine)?;
        self.keep(id);
        // The new generation id is in memory already.
        self.snapshots.tracker.wrote(&self.ram, layout::VMGENID, PAGE as u64);
        Ok(())
    }

    /// The last cut was written down as a snapshot.
    pub(super) fn kept(&mut self, id: &str, client: u64) -> Reply {
        if self.snapshots.cutter != Some(client) {
            return Reply::error(
                "the VM has no cut of this connection that could be kept: another was made since, \
                 or the VM was reset",
                None,
            );
        }
        let Some(id) = SnapshotId::parse(id) else {
            return Reply::error("this is no snapshot's id", None);
        };
        self.keep(id);
        Reply::Kept
    }

    /// What is written from the tracker's last cut on is written since snapshot `id`.
    pub(super) fn keep(&mut self, id: SnapshotId) {
        (self.snapshots.cutter, self.snapshots.unkept) = (None, None);
        self.snapshots.tracker.keep(id);
    }

    /// If the last cut was not written down, what was written before it still counts.
    fn nothing_kept(&mut self) {
        self.snapshots.cutter = None;
        if let Some(since) = self.snapshots.unkept.take() {
            self.snapshots.tracker.forget(&since);
        }
    }

    fn snapshot_disks(&self) -> Vec<SnapshotDisk> {
        let disk = |disk: &super::event_loop::DiskFacts| {
            let image = disk.image.as_ref()?;
            Some(SnapshotDisk {
                id: disk.id.clone(),
                path: image.path.clone(),
                cow: image.overlay.is_some(),
            })
        };
        self.disks.iter().filter_map(disk).collect()
    }

    /// Brings every vCPU to a halt between two instructions.
    fn park(&mut self, limit: Duration) -> Result<(), CutError> {
        let end = Instant::now() + limit;
        if !self.snapshots.was_paused {
            let paused = self.vcpus.pause(limit);
            self.or_give_up("the vCPUs", paused)?;
        }
        let left = end.saturating_duration_since(Instant::now());
        let cells = &self.cells;
        let is_dead = |access: &Outstanding| {
            let console = cells.iter().find(|cell| cell.id() == com1::ID);
            plugins::is_console(access) && console.is_some_and(Cell::has_ended)
        };
        let settled = self.vcpus.settle(left, is_dead);
        let who = settled.as_ref().err().map(|error| self.who_holds(error)).unwrap_or_default();
        self.or_give_up(&who, settled)
    }

    fn step(&mut self, input: Input) -> Result<(), CutError> {
        self.snapshots.cut.step(input).map(|_| ())
    }

    /// Gives the cut up where something failed, and says whose fault it is.
    fn or_give_up<T, E: std::error::Error>(
        &mut self,
        who: &str,
        result: Result<T, E>,
    ) -> Result<T, CutError> {
        result.map_err(|error| {
            let (who, why) = (who.to_string(), crate::remedy::chain(&error));
            let phase = self.snapshots.cut.phase();
            match self.snapshots.cut.step(Input::Failed { who: who.clone(), why: why.clone() }) {
                Err(error) => error,
                Ok(_) => CutError { phase, who, why },
            }
        })
    }

    /// Lets everyone go on, as far as they were brought to rest.
    fn thaw(&mut self, frozen: Frozen, input: Input) {
        if self.snapshots.cut.phase() == Phase::Held {
            let _ = self.snapshots.cut.step(input); // it has its place there
        }
        self.release_devices(frozen);
        // Where they could not be paused they run already.
        let run = |state: &VcpuState| matches!(state, VcpuState::Running | VcpuState::Stopped);
        if !self.snapshots.was_paused
            && !self.vcpus.states().iter().any(run)
            && let Err(error) = self.vcpus.resume()
        {
            tracing::error!(error = crate::remedy::chain(&error), "going on after a snapshot");
        }
    }
}

/// Microseconds between one moment and the next.
struct Stopwatch(Instant);

impl Stopwatch {
    fn new() -> Stopwatch {
        Stopwatch(Instant::now())
    }

    fn lap(&mut self) -> u64 {
        let now = Instant::now();
        micros(now - std::mem::replace(&mut self.0, now))
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn now_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    micros(since.unwrap_or_default())
}
