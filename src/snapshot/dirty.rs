//! Which pages of guest memory were written since the last snapshot, by whomever.
//!
//! | writer | how it is known |
//! |---|---|
//! | the guest, and KVM for it | KVM's dirty log, read and cleared |
//! | device processes | a log each, marked before the write ([`WriteLogs`]) |
//! | rings of device processes | the VMM knows where they are |
//! | the VMM | [`Tracker::wrote`] |
//!
//! A device process marks a page before it writes, and its log is cleared only while it
//! stands still: what it marked stays in every round of a live copy, so that a write that
//! comes after its mark is not missed. The log of KVM is marked after the write, or at once
//! with it, and may be cleared at any time.
//!
//! Pages are counted in guest memory's file: a word for each chunk of a snapshot.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use cellblock_devices::protocol::write_log::WriteLog;
use cellblock_wire::ShmError;

use super::format::{CHUNK, PAGE, SnapshotId};
use crate::vm::kvm::{KvmError, Machine};
use crate::vm::memory::GuestRam;

/// The logs of all device processes of a VM, those that are gone included.
#[derive(Debug)]
pub struct WriteLogs {
    memory: u64,
    logs: Mutex<Vec<WriteLog>>,
}

impl WriteLogs {
    /// For a VM with so many bytes of memory.
    pub fn new(memory: u64) -> WriteLogs {
        WriteLogs { memory, logs: Mutex::default() }
    }

    /// Makes the log of one more process: how much memory it is for, and what it maps.
    pub fn issue(&self) -> Result<(u64, OwnedFd), ShmError> {
        let (log, fd) = WriteLog::new(self.memory)?;
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).push(log);
        Ok((self.memory, fd))
    }

    fn each(&self, act: impl FnMut(&WriteLog)) {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(act);
    }
}

/// What was written since a snapshot.
#[derive(Debug)]
pub struct Tracker {
    logs: &'static WriteLogs,
    /// Written since `base`, as far as it was taken from KVM and noted by the VMM.
    since: Vec<u64>,
    /// The snapshot that is meant, once one was kept.
    base: Option<SnapshotId>,
    tracking: bool,
}

impl Tracker {
    /// Nothing is tracked yet.
    pub fn new(logs: &'static WriteLogs) -> Tracker {
        let chunks = (logs.memory / CHUNK as u64) as usize;
        Tracker { logs, since: vec![0; chunks], base: None, tracking: false }
    }

    /// The snapshot since which everything is known, if there is one.
    pub fn base(&self) -> Option<SnapshotId> {
        self.base.filter(|_| self.tracking)
    }

    /// Number of chunks, which is the length of every set of pages.
    pub fn chunks(&self) -> usize {
        self.since.len()
    }

    /// Has KVM log from now on. What was written before is not known.
    pub fn begin(&mut self, machine: &Machine) -> Result<(), KvmError> {
        if !self.tracking {
            machine.log_dirty_pages()?;
            self.tracking = true;
            self.base = None;
        }
        Ok(())
    }

    /// The VMM wrote `len` bytes at guest-physical `gpa`, or a device process did whose log
    /// does not have it.
    pub fn wrote(&mut self, ram: &GuestRam, gpa: u64, len: u64) {
        let region = ram.regions().iter().find(|r| gpa >= r.gpa && gpa - r.gpa < r.len);
        let (Some(region), Some(last)) = (region, len.checked_sub(1)) else { return };
        let start = region.offset + (gpa - region.gpa);
        let end = start.saturating_add(last).min(region.offset + region.len - 1);
        for page in start / PAGE as u64..=end / PAGE as u64 {
            self.since[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// What the guest wrote since this was last asked, and what device processes wrote since
    /// the last [`Tracker::cut`]. All pages of a VM that was not tracked before.
    pub fn round(&mut self, machine: &Machine) -> Result<Vec<u64>, KvmError> {
        let mut pages = machine.take_dirty_pages()?;
        for (all, new) in self.since.iter_mut().zip(&pages) {
            *all |= *new;
        }
        self.logs.each(|log| log.add_to(&mut pages));
        Ok(pages)
    }

    /// Like [`Tracker::round`], while everybody stands still. Gives what was written since
    /// the last round, and everything since the base. From now on it is counted anew:
    /// [`Tracker::keep`] says since which snapshot, [`Tracker::forget`] that there is none.
    pub fn cut(&mut self, machine: &Machine) -> Result<(Vec<u64>, Vec<u64>), KvmError> {
        let round = self.round(machine)?;
        self.logs.each(|log| log.clear());
        let mut since = std::mem::replace(&mut self.since, vec![0; round.len()]);
        for (all, new) in since.iter_mut().zip(&round) {
            *all |= *new;
        }
        Ok((round, since))
    }

    /// The cut became the snapshot `id`.
    pub fn keep(&mut self, id: SnapshotId) {
        self.base = Some(id);
    }

    /// What memory is now, no snapshot that is known has been: it was put back.
    pub fn lose(&mut self) {
        self.base = None;
    }

    /// The cut became nothing: `since`, what [`Tracker::cut`] gave, still counts.
    pub fn forget(&mut self, since: &[u64]) {
        for (all, old) in self.since.iter_mut().zip(since) {
            *all |= *old;
        }
    }
}

/// Number of pages in a set.
pub fn count(pages: &[u64]) -> u64 {
    pages.iter().map(|word| u64::from(word.count_ones())).sum()
}
