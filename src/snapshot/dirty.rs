//! Which pages of guest memory were written since the last snapshot, by whomever.
//!
//! | writer | how it is known |
//! |---|---|
//! | the guest, and KVM for it | KVM's dirty log, read and cleared |
//! | device processes | a log each, marked before the write ([`WriteLogs`]) |
//! | rings of device processes | the VMM knows where they are |
//! | the VMM | [`Tracker::wrote`] |
//! | programs that attached, with memory to write to | they say so ([`WriteLogs::writing`]), or nothing is known any more |
//!
//! A device process marks a page before it writes, and its log is cleared only while it
//! stands still: what it marked stays in every round of a live copy, so that a write that
//! comes after its mark is not missed. The log of KVM is marked after the write, or at once
//! with it, and may be cleared at any time.
//!
//! The logs are shared with plugins that ask what is written ([`super::write_logs`]). Pages are
//! counted in guest memory's file: a word for each chunk of a snapshot.

use std::time::Instant;

use super::format::SnapshotId;
pub use super::write_logs::WriteLogs;
use super::write_logs::{Reader, add};
use crate::vm::kvm::{KvmError, Machine};
use crate::vm::memory::GuestRam;

/// What was written since a snapshot.
#[derive(Debug)]
pub struct Tracker {
    logs: &'static WriteLogs,
    /// Written since `base`, as far as it was taken from the logs.
    since: Vec<u64>,
    /// The snapshot that is meant, once one was kept.
    base: Option<SnapshotId>,
    /// Once it is tracked what is written.
    reader: Option<Reader>,
}

impl Tracker {
    /// Nothing is tracked yet.
    pub fn new(logs: &'static WriteLogs) -> Tracker {
        Tracker { logs, since: vec![0; logs.chunks()], base: None, reader: None }
    }

    /// The snapshot since which everything is known, if there is one.
    pub fn base(&self) -> Option<SnapshotId> {
        self.base.filter(|_| self.reader.is_some() && self.logs.is_complete())
    }

    /// Whether every write to guest memory is told of: see [`WriteLogs::lose_track`].
    pub fn knows_all(&self) -> bool {
        self.logs.is_complete()
    }

    /// See [`WriteLogs::hold`].
    pub fn hold_writers(&self, until: Instant) -> bool {
        self.logs.hold(until)
    }

    /// See [`WriteLogs::let_go`].
    pub fn let_writers_go(&self) {
        self.logs.let_go();
    }

    /// Number of chunks, which is the length of every set of pages.
    pub fn chunks(&self) -> usize {
        self.since.len()
    }

    /// Has KVM log from now on. What was written before is not known.
    pub fn begin(&mut self, machine: &Machine) -> Result<(), KvmError> {
        if self.reader.is_none() {
            self.reader = Some(self.logs.join(machine)?);
            self.base = None;
        }
        Ok(())
    }

    /// The VMM wrote `len` bytes at guest-physical `gpa`, or a device process did whose log
    /// does not have it.
    pub fn wrote(&mut self, ram: &GuestRam, gpa: u64, len: u64) {
        self.logs.wrote(ram, gpa, len);
    }

    /// The VMM put these pages back to what they were in the snapshot: for everybody else they
    /// were written.
    pub fn put_back(&mut self, pages: &[u64]) {
        self.logs.note(pages, self.reader);
    }

    /// What the guest wrote since this was last asked, and what device processes wrote since
    /// the last [`Tracker::cut`]. To be begun before.
    pub fn round(&mut self, machine: &Machine) -> Result<Vec<u64>, KvmError> {
        let Some(reader) = self.reader else { return Ok(vec![u64::MAX; self.chunks()]) };
        let mut pages = self.logs.take(machine, reader).inspect_err(|_| {
            // Some of the log may have been read and cleared.
            self.base = None;
        })?;
        add(&mut self.since, &pages);
        self.logs.add_devices(&mut pages);
        Ok(pages)
    }

    /// Like [`Tracker::round`], while everybody stands still. Gives what was written since
    /// the last round, and everything since the base. From now on it is counted anew:
    /// [`Tracker::keep`] says since which snapshot, [`Tracker::forget`] that there is none.
    pub fn cut(&mut self, machine: &Machine) -> Result<(Vec<u64>, Vec<u64>), KvmError> {
        let round = self.round(machine)?;
        if let Some(reader) = self.reader {
            self.logs.at_rest(reader);
        }
        let mut since = std::mem::replace(&mut self.since, vec![0; round.len()]);
        add(&mut since, &round);
        Ok((round, since))
    }

    /// The cut became the snapshot `id`.
    pub fn keep(&mut self, id: SnapshotId) {
        self.base = Some(id);
    }

    /// The cut became nothing: `since`, what [`Tracker::cut`] gave, still counts.
    pub fn forget(&mut self, since: &[u64]) {
        add(&mut self.since, since);
    }
}

/// Number of pages in a set.
pub fn count(pages: &[u64]) -> u64 {
    pages.iter().map(|word| u64::from(word.count_ones())).sum()
}
