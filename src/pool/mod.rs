//! Restore pools: VMs from a snapshot, on demand, in a millisecond.
//!
//! ```text
//!  program with a RestorePool             cellblock pool-shell (one process group each)
//!   engine: who waits, who makes  ──────▶  VMM ── spawner ── serial, blk ...   waits
//!   (threads of the pool)          socket  VMM ── spawner ── serial, blk ...   waits
//!                                          VMM ── spawner ── serial, blk ...   somebody's
//! ```
//! A clone is as well isolated as any VM: it is a VMM process of its own with its device
//! processes in their jails. What a pool saves is the time it takes to make them. They are made
//! before anybody wants them, and a claim is one message to one of them.
//!
//! * **primed** shells have one snapshot loaded, with the memory that its VMs need first;
//! * shells of a **shape** have everything but a state, and serve any snapshot of such a machine.
//!
//! | module | what it holds |
//! |---|---|
//! | [`ledger`] | the books: every change and what must always be true |
//! | [`engine`] | who waits, who makes, who destroys; for any kind of shell |
//! | [`config`] | what a pool is made of |
//! | [`shell`] | a shell's process, seen from the pool |
//! | `claimers` | who claims is served as soon as they wake |
//! | `background` | shells in the making take what the processors have left |
//! | `scratch` | the directory of a pool that was given none |
//! | [`protocol`] | what the two say to each other |
//! | [`vm`] | a VM that somebody has |
//! | [`times`] | where the time of a claim goes |
//! | [`parts`] | a VM as bytes: guest memory and state |
//! | [`stats`] | how a pool is, as JSON and for Prometheus |
//! | [`service`] | a pool for other programs, at a socket |
//!
//! The other end of a shell is `crate::vmm::shell`.

mod background;
mod claimers;
pub mod config;
pub mod engine;
pub mod ledger;
pub mod parts;
pub mod protocol;
mod scratch;
pub mod service;
pub mod shell;
pub mod stats;
pub mod times;
pub mod vm;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub use config::{BaseConfig, Machine, PoolConfig, PoolError};
pub use engine::Release;
pub use protocol::Shape;
pub use times::ClaimTimes;
pub use vm::PooledRestoreVm;

use crate::cell::overlay::{Overlay, Place};
use crate::snapshot::format::{SnapshotId, describe};
use crate::snapshot::state::MicrovmState;
use crate::spec::{DiskSpec, OpenedDisk};
use crate::vm::metadata::MAX_DATA;
use crate::vmm::restore::{self, DiskOverride};
use crate::vmm::shell::EmptyError;
use config::Prepared;
use engine::{Engine, Lease, Options, Wish};
use protocol::{Claim, Origin, OtherDisk, Stage};
use shell::{Answer, Recipe, ShellError};
use stats::PoolStats;
use times::monotonic_ns;

/// How often a claim takes another shell after one that had died.
const TRIES: usize = 3;
/// What a shell gets to answer a claim that has waited for it for as long as it would.
const ANSWER_FLOOR: Duration = Duration::from_millis(500);
/// The same where it has to fetch a state, or to make the processes of other disks.
const WORK_FLOOR: Duration = Duration::from_secs(5);
/// How long the end of a pool waits for its idle shells.
const END_LIMIT: Duration = Duration::from_secs(20);

/// Shells that wait to become VMs. Clones are the same pool, for as many threads as there are.
/// With the last one its idle shells end; VMs live until they are dropped.
#[derive(Clone, Debug)]
pub struct RestorePool(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    engine: Engine<Recipe>,
    config: PoolConfig,
    charge: u64,
    memory: u64,
    /// What primed shells are primed with.
    primed: Option<(PathBuf, SnapshotId)>,
    /// What can be wished of the disks of primed shells and is so already.
    disks: Vec<DiskOverride>,
    /// Disks whose writes are not to be in memory.
    uncounted: Vec<String>,
    /// Claims that were carried out, and the microseconds that they took.
    carried_out: AtomicU64,
    took_us: AtomicU64,
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !self.engine.drain(false, END_LIMIT) {
            tracing::warn!("idle shells are slow to end");
        }
    }
}

/// What is wanted of a claim.
#[derive(Clone, Default)]
pub struct ClaimOrder<'a> {
    /// What the guest finds in its metadata ([`crate::vm::metadata`]).
    pub data: Vec<u8>,
    /// Disks that are to be others than those of the pool. Their processes are made on demand, and
    /// a VM that has had some is never reset for another claim.
    pub disks: Vec<DiskOverride>,
    /// How long to wait, in all; the pool's `acquire_timeout` where not given. A shell that is there
    /// gets half a second to answer even so, and five where it has to fetch a state or other disks.
    pub patience: Option<Duration>,
    /// Looked at from time to time while it waits: whether somebody still wants it.
    pub wanted: Option<&'a dyn Fn() -> bool>,
}

impl RestorePool {
    /// Makes a pool, whose shells are then made in the background.
    ///
    /// # Errors
    /// Limits that make no sense, and a snapshot that no VM can go on from.
    pub fn new(base: BaseConfig, config: PoolConfig) -> Result<RestorePool, PoolError> {
        let Prepared { recipe, limits, primed, disks, uncounted } = config::prepare(base, &config)?;
        let makers = std::thread::available_parallelism().map_or(2, usize::from).clamp(1, 4);
        let options = Options { limits, release: config.release, makers, enders: makers };
        let engine = Engine::new(recipe, options).map_err(PoolError::Thread)?;
        let (charge, memory) = (limits.charge, limits.memory);
        let (carried_out, took_us) = (AtomicU64::new(0), AtomicU64::new(0));
        let pool =
            Pool { engine, config, charge, memory, primed, disks, uncounted, carried_out, took_us };
        Ok(RestorePool(Arc::new(pool)))
    }

    /// A VM with this memory, whose bytes are guest RAM from its start on, and this state, as
    /// [`crate::snapshot::state::MicrovmState::encode`] gives it. Memory is copied: for large
    /// guests a snapshot is better.
    pub fn restore(&self, memory: &[u8], vcpu_state: &[u8]) -> Result<PooledRestoreVm, PoolError> {
        self.check_parts(memory, vcpu_state)?;
        let files = parts::files(memory, vcpu_state).map_err(PoolError::Parts)?;
        self.claim_from(Some(Origin::Parts), &files, &ClaimOrder::default())
    }

    /// A VM from what [`parts::pack`] made.
    pub fn restore_from_bytes(&self, data: &[u8]) -> Result<PooledRestoreVm, PoolError> {
        let (memory, state) = parts::unpack(data).map_err(PoolError::Parts)?;
        self.restore(memory, state)
    }

    /// A VM that goes on from a snapshot's directory, without reading what it does not need. In
    /// a primed pool it has to be the one that it is primed with.
    pub fn restore_snapshot(
        &self,
        snapshot: impl AsRef<Path>,
    ) -> Result<PooledRestoreVm, PoolError> {
        self.restore_snapshot_with(snapshot.as_ref(), &ClaimOrder::default())
    }

    /// As [`RestorePool::restore_snapshot`], with wishes.
    pub fn restore_snapshot_with(
        &self,
        snapshot: &Path,
        order: &ClaimOrder<'_>,
    ) -> Result<PooledRestoreVm, PoolError> {
        let Some((path, wanted)) = &self.0.primed else {
            let origin = Origin::Snapshot(config::absolute(snapshot)?);
            return self.claim_from(Some(origin), &[], order);
        };
        if path != snapshot {
            let found = describe(snapshot)?.manifest.map(|manifest| manifest.id);
            if found != Some(*wanted) {
                return Err(PoolError::OtherSnapshot {
                    path: snapshot.into(),
                    primed: path.clone(),
                });
            }
        }
        self.claim_from(None, &[], order)
    }

    /// A VM of a primed pool.
    pub fn claim(&self, order: &ClaimOrder<'_>) -> Result<PooledRestoreVm, PoolError> {
        self.claim_from(None, &[], order)
    }

    fn claim_from(
        &self,
        from: Option<Origin>,
        files: &[OwnedFd],
        order: &ClaimOrder<'_>,
    ) -> Result<PooledRestoreVm, PoolError> {
        let pool = &*self.0;
        match (&pool.primed, &from) {
            (Some((path, _)), Some(_)) => return Err(PoolError::Primed(path.clone())),
            (None, None) => return Err(PoolError::NotPrimed),
            _ => {}
        }
        if order.data.len() > MAX_DATA {
            return Err(PoolError::Data(order.data.len()));
        }
        self.check_fit(from.as_ref())?;
        let (begun, begun_ns) = (Instant::now(), monotonic_ns());
        pool.engine.factory().claimers.hasten();
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let patience = order.patience.unwrap_or(pool.config.acquire_timeout);
        // Before anybody's shell is taken: what cannot be had is to cost none.
        let mut others = self.open_others(&order.disks)?;
        let works = from.is_some() || !others.is_empty();
        let floor = if works { WORK_FLOOR } else { ANSWER_FLOOR };
        for again in 0.. {
            if again > 0 {
                if order.wanted.is_some_and(|wanted| !wanted()) {
                    return Err(engine::ClaimError::Abandoned.into());
                }
                // The shell that had them may have written to them.
                others.clear();
                others = self.open_others(&order.disks)?;
            }
            let first = again > 0;
            let wish = Wish { patience, begun: Some(begun), first, wanted: order.wanted };
            let mut lease = pool.engine.claim(wish)?;
            let granted_ns = monotonic_ns();
            let answer = Answer {
                limit: patience.saturating_sub(begun.elapsed()).max(floor),
                wanted: order.wanted,
            };
            let done = self.claim_shell(&mut lease, from.clone(), &fds, &others, order, answer);
            let error = match done {
                Ok((heard_ns, runs_ns)) => {
                    let points = [granted_ns, heard_ns, runs_ns, monotonic_ns()];
                    let times = ClaimTimes::since(begun_ns, points);
                    pool.engine.note_duration(times.answered);
                    pool.carried_out.fetch_add(1, Ordering::Relaxed);
                    let took_us = u64::try_from(times.answered.as_micros()).unwrap_or(u64::MAX);
                    pool.took_us.fetch_add(took_us, Ordering::Relaxed);
                    return Ok(PooledRestoreVm::new(lease, times));
                }
                Err(error) => error,
            };
            let another = match &error {
                // Not the claim's fault: another one may live.
                ShellError::Died(_) => true,
                // Its guest may run by now, or later: of two with the same data one is too many.
                ShellError::Silent => {
                    let gone = lease.shell().is_none_or(shell::Shell::kill);
                    gone && begun.elapsed() < patience
                }
                _ => false,
            };
            lease.spoilt();
            if !another || again + 1 == TRIES {
                return Err(error.into());
            }
        }
        unreachable!("the last try ends in one way or the other")
    }

    fn check_parts(&self, memory: &[u8], state: &[u8]) -> Result<(), PoolError> {
        // One that is primed says so at the claim.
        let Stage::Shape(shape) = &self.0.engine.factory().stage else { return Ok(()) };
        let misfit = |error: EmptyError| PoolError::Fit(Box::new(error));
        MicrovmState::decode(state).map_err(|error| misfit(error.into()))?;
        let (what, found) = ("bytes of memory", memory.len() as u64);
        match found > shape.memory {
            true => Err(misfit(EmptyError::Shape { what, found, shell: shape.memory })),
            false => Ok(()),
        }
    }

    /// Whether what is to be restored can be what the pool's shells are.
    fn check_fit(&self, from: Option<&Origin>) -> Result<(), PoolError> {
        let (Stage::Shape(shape), Some(Origin::Snapshot(path))) =
            (&self.0.engine.factory().stage, from)
        else {
            return Ok(());
        };
        let found = describe(path)?;
        let Some(manifest) = found.manifest.filter(|_| found.fault.is_none()) else {
            return found.fault.map_or(Ok(()), |fault| Err(fault.into()));
        };
        let pairs = [
            ("bytes of memory", manifest.memory, shape.memory),
            ("vCPUs", manifest.vcpus.into(), shape.cpus.into()),
        ];
        match pairs.into_iter().find(|(_, found, shell)| found != shell) {
            Some((what, found, shell)) => {
                Err(PoolError::Fit(Box::new(EmptyError::Shape { what, found, shell })))
            }
            None => Ok(()),
        }
    }

    fn claim_shell(
        &self,
        lease: &mut Lease<Recipe>,
        from: Option<Origin>,
        files: &[BorrowedFd<'_>],
        others: &[(DiskSpec, OpenedDisk)],
        order: &ClaimOrder<'_>,
        answer: Answer<'_>,
    ) -> Result<(u64, u64), ShellError> {
        if !others.is_empty() {
            // Nobody else wants it then.
            lease.keep_from_others();
        }
        let shell = lease.shell().ok_or(ShellError::Died(None))?;
        let serial = shell::serial_of(shell.id());
        let mut files = files.to_vec();
        let mut disks = Vec::new();
        for (spec, image) in others {
            files.push(image.fd.as_fd());
            files.extend(image.overlay.iter().flat_map(Overlay::fds));
            let mut spec = spec.clone();
            if spec.cow.is_some() {
                spec.serial = Some(serial.clone());
            }
            disks.push(OtherDisk { spec, size: image.size, cow: image.overlay.is_some() });
        }
        let claim = Claim { from, data: order.data.clone(), disks };
        shell.claim(claim, &files, answer)
    }

    /// Opens disks for a shell in the place of those that it has: it may open nothing.
    fn open_others(
        &self,
        disks: &[DiskOverride],
    ) -> Result<Vec<(DiskSpec, OpenedDisk)>, PoolError> {
        // A shell's cow disk is as empty as a new one.
        let has = |disk: &DiskOverride| self.0.disks.iter().any(|own| own == disk);
        if disks.iter().all(has) {
            return Ok(Vec::new());
        }
        let Stage::Primed { snapshot, id: wanted, disks: own, .. } = &self.0.engine.factory().stage
        else {
            return Err(PoolError::DisksOfShape);
        };
        let uncounted = |disk: &&DiskOverride| {
            disk.cow == Some(Place::Memory) && self.0.uncounted.contains(&disk.id)
        };
        if let Some(disk) = disks.iter().find(uncounted) {
            return Err(PoolError::Uncounted(disk.id.clone()));
        }
        let mut named: Vec<DiskOverride> = disks
            .iter()
            .chain(own.iter().filter(|own| disks.iter().all(|disk| disk.id != own.id)))
            .cloned()
            .collect();
        // Who says nothing of the image means the pool's, and not that of the snapshot.
        for disk in named.iter_mut().filter(|disk| disk.path.is_none()) {
            let own = own.iter().find(|own| own.id == disk.id);
            disk.path = own.and_then(|own| own.path.clone());
        }
        let mut opened =
            restore::open_others(snapshot, SnapshotId(*wanted), &named).map_err(Box::new)?;
        opened.retain(|(spec, _)| disks.iter().any(|disk| disk.id == spec.id()));
        Ok(opened)
    }

    /// Number of idle shells.
    pub fn idle_count(&self) -> usize {
        self.0.engine.idle_count()
    }

    /// Makes idle shells until there are `target`, or `max_size` if that is less; waits for them.
    /// Returns how many there are: fewer, where one could not be made.
    pub fn warm(&self, target: usize) -> usize {
        self.0.engine.warm(target)
    }

    /// How the pool is.
    pub fn stats(&self) -> PoolStats {
        let Pool { engine, config, memory, charge, carried_out, took_us, .. } = &*self.0;
        PoolStats {
            claim_us_count: carried_out.load(Ordering::Relaxed),
            claim_us_sum: took_us.load(Ordering::Relaxed),
            ..PoolStats::new(&engine.stats(), config, *memory, *charge)
        }
    }

    /// Takes no more claims and ends all idle shells, those in the making included; returns when
    /// they are gone, or with false after 20 s. VMs that somebody has stay theirs.
    pub fn drain(&self) -> bool {
        self.0.engine.drain(false, END_LIMIT)
    }

    /// As [`RestorePool::drain`], and waits for all VMs to be given back, for `limit` at most.
    /// False if they were not.
    pub fn drain_all(&self, limit: Duration) -> bool {
        self.0.engine.drain(true, limit)
    }
}
