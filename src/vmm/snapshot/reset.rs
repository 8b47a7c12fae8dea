//! A restored machine put back to its snapshot, in place: the same processes, jails and
//! connections, and nothing of what the guest did since.
//!
//! Everyone comes to rest as for a cut; then memory that differs is put back, what was written
//! to `cow` disks dropped, and the state set as in a restore. Which pages were written since is
//! known from the second reset on, or from the start where the VM was restored so; the first one
//! compares all that has bytes.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_devices::protocol::overlay::Extent;
use nix::errno::Errno;

use super::super::event_loop::Vm;
use super::devices::{Frozen, Strangers};
use super::put_back::{self, Kept};
use super::{LoadError, micros};
use crate::control::protocol::{EventKind, Reply};
use crate::snapshot::coordinator::{CutError, Input, Phase};
use crate::snapshot::eager::FillError;
use crate::snapshot::format::{Chain, PAGE};
use crate::snapshot::state::MicrovmState;
use crate::vm::layout;
use crate::vm::vmgenid::VmGenIdError;

/// How long vCPUs and processes may take to come to rest.
pub(super) const LIMIT: Duration = Duration::from_secs(5);

/// Where a restored machine came from.
pub struct Origin {
    /// Its memory.
    pub chain: Arc<Chain>,
    /// All but its memory.
    pub state: Arc<MicrovmState>,
    /// What had been written to each `cow` disk, by id.
    pub written: Vec<(String, Vec<Extent>, File)>,
    /// Pages that were put back before.
    pub kept: Kept,
}

/// A reset that failed halfway: the machine is in no state a guest knows.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResetError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Fill(#[from] FillError),
    #[error(transparent)]
    Log(#[from] crate::vm::kvm::KvmError),
    #[error("guest memory does not come any more")]
    Memory,
    #[error("looking at guest memory")]
    Look(#[source] Errno),
    #[error(transparent)]
    Overlay(#[from] crate::cell::overlay::OverlayError),
    #[error(transparent)]
    Disk(#[from] crate::transport::mmio::FreezeError),
    #[error("plugin {0}: {1}")]
    Plugin(String, String),
    #[error(transparent)]
    Generation(#[from] VmGenIdError),
}

impl Vm {
    /// Answers a request to go back.
    pub(in super::super) fn reset(&mut self) -> Reply {
        let Some(mut origin) = self.origin.take() else {
            return Reply::error(
                "the VM was started from a kernel, not from a snapshot",
                Some("only a VM that 'cellblock restore' made can be reset"),
            );
        };
        let reply = self.reset_to(&mut origin);
        self.origin = Some(origin);
        reply
    }

    fn reset_to(&mut self, origin: &mut Origin) -> Reply {
        if self.is_held() || self.copies() {
            return Reply::error("a snapshot of the VM is being taken", Some("try again"));
        }
        if let Some(id) = self.supervisor.failed() {
            return Reply::error(
                format!("no reset: device '{id}' has failed, and would have no process"),
                Some("restore the snapshot anew"),
            );
        }
        let begun = Instant::now();
        let mut frozen = Frozen::of_plugins(match self.returning(&origin.state) {
            Ok(plugins) => plugins,
            Err(who) => {
                return Reply::error(
                    format!("no reset: the snapshot has no state that {who} could go back to"),
                    Some("restore the snapshot anew"),
                );
            }
        });
        self.snapshots.cut.participate(self.participants(&frozen));
        self.snapshots.was_paused = self.is_paused();
        if let Err(CutError { phase, who, why }) = self.come_to_rest(&mut frozen) {
            self.thaw(frozen, Input::Thaw);
            let message = format!("no reset: {phase}: {who}: {why}");
            return Reply::error(crate::remedy::printable(&message), Some("try again"));
        }
        let pages = match self.go_back(origin, &frozen) {
            Ok(pages) => pages,
            Err(error) => {
                // Half of it is of then and half of now: no guest can go on from that.
                let why = crate::remedy::chain(&error);
                tracing::error!(error = why, "the reset failed halfway; the VM is stopped");
                self.asked_to_stop = true;
                return Reply::error(format!("the reset failed halfway: {why}"), None);
            }
        };
        let epoch = self.vcpus.epoch();
        self.release_processes();
        self.release_plugins(&frozen);
        let _ = self.snapshots.cut.step(Input::Failed { who: String::new(), why: String::new() });
        self.nudge();
        if !self.snapshots.was_paused
            && let Err(error) = self.vcpus.resume()
        {
            tracing::error!(error = crate::remedy::chain(&error), "going on after a reset");
        }
        let took_us = micros(begun.elapsed());
        self.event(EventKind::Reset { epoch, took_us, pages });
        Reply::Reset { epoch, took_us, pages }
    }

    fn come_to_rest(&mut self, frozen: &mut Frozen) -> Result<(), CutError> {
        self.refuse_strangers(Strangers::Refused("what its back end wrote is in no log of ours"))?;
        self.step(Input::Begin)?;
        self.park(LIMIT)?;
        self.step(Input::Parked)?;
        self.quiesce(LIMIT, frozen)?;
        debug_assert_eq!(self.snapshots.cut.phase(), Phase::Frozen);
        Ok(())
    }

    /// Used rings are written by device processes, through no log of theirs.
    fn rings_were_written(&mut self) {
        for (_, device) in &self.devices {
            for (gpa, len) in device.used_rings() {
                self.snapshots.tracker.wrote(&self.ram, gpa, len);
            }
        }
    }

    /// Puts memory, disks and state back; returns how many pages were put back.
    fn go_back(&mut self, origin: &mut Origin, frozen: &Frozen) -> Result<u64, ResetError> {
        let id = origin.chain.manifest().id;
        self.tell_plugins_back(&origin.state, frozen)?;
        let known = self.snapshots.tracker.base() == Some(id);
        self.nothing_kept();
        // Processes forget beside what follows.
        let forgotten: Vec<_> =
            self.devices.iter().map(|(_, device)| device.forget_frozen()).collect();
        let pages = if known {
            self.rings_were_written();
            let (_, since) = self.snapshots.tracker.cut(&self.machine)?;
            let pages = put_back::known(&origin.chain, &self.ram, &since, &mut origin.kept)?;
            self.snapshots.tracker.put_back(&since);
            self.keep(id);
            pages
        } else {
            let mut written = vec![0; self.snapshots.tracker.chunks()];
            let pager = self.pager.as_ref();
            let pages = put_back::all(&origin.chain, &self.ram, pager, &mut written)?;
            self.snapshots.tracker.put_back(&written);
            // From now on it is known what is written: the next time is short.
            self.track_since(id)?;
            pages
        };
        for disk in &self.disks {
            let Some((overlay, _)) = disk.image.as_ref().and_then(|image| image.overlay.as_ref())
            else {
                continue;
            };
            match origin.written.iter().find(|(id, ..)| *id == disk.id) {
                Some((_, extents, data)) => overlay.load(data, extents)?,
                None => overlay.clear()?,
            }
        }
        if let Some(vmgenid) = &self.vmgenid {
            vmgenid.new_life(&self.ram, None, Vec::new())?;
            self.snapshots.tracker.wrote(&self.ram, layout::VMGENID, PAGE as u64);
        }
        for ((_, device), begun) in self.devices.iter().zip(&forgotten) {
            device.finish_load(begun)?;
        }
        self.load(&origin.state)?;
        self.await_plugins_back(frozen)?;
        Ok(pages)
    }
}
