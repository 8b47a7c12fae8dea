//! A live copy of guest memory, in turns of the main loop: between two of them requests are answered
//! and device processes looked after, so that nobody waits for the copy but who asked for it.

use std::time::Instant;

use super::super::event_loop::Vm;
use super::capture::{self, CaptureError, Whole};
use super::layers::At;
use super::live::{Copy, absent};
use super::{Cut, ROUNDS_LIMIT, Wanted, micros};
use crate::control::server::Token;
use crate::snapshot::coordinator::{CutError, Phase};
use crate::snapshot::dirty;
use crate::snapshot::format::{CHUNK, PAGE};

/// Few enough pages for the guest to stand still: 1 MiB.
const ENOUGH: u64 = 256;
/// Most rounds: a guest that writes faster than we copy is not waited for.
const MOST_ROUNDS: u32 = 8;
/// What is copied in a turn, or a little more: some milliseconds.
const TURN: u64 = 4 << 20;
/// What a look at a part of a disk counts for where nothing is to be copied.
const LOOK: u64 = 256;

/// A live snapshot that is under way.
pub(super) struct Live {
    pub(super) wanted: Wanted,
    /// Who is answered in the end.
    pub(super) token: Token,
    begun: Instant,
    copy: Copy,
    work: Work,
    /// Pages of this round, those of disks included, and of the one before.
    pages: u64,
    before: u64,
}

/// What a round has to do yet.
enum Work {
    /// Of the first: all of memory.
    All(Whole),
    /// Then what has not come, from this chunk on.
    Absent(usize),
    /// Of the others: what was written meanwhile, from this chunk on.
    Written(Vec<u64>, usize),
    /// Of each, last: what was written to `cow` disks.
    Layers(At),
}

impl Live {
    /// The copy, and how long it took so far.
    pub(super) fn finish(self) -> (Copy, u64) {
        (self.copy, micros(self.begun.elapsed()))
    }

    /// Copies as much as fits a turn; whether that was all.
    fn turn(&mut self, vm: &mut Vm) -> Result<bool, CaptureError> {
        let mut left = TURN;
        while left > 0 {
            match self.copy_part(vm, left)? {
                Some(copied) => left = left.saturating_sub(copied),
                None if self.next_work(vm)? => {}
                None => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Copies a part, at most `most` bytes or a chunk; how many. `None` where nothing is left of
    /// the work at hand.
    fn copy_part(&mut self, vm: &Vm, most: u64) -> Result<Option<u64>, CaptureError> {
        let first = self.copy.rounds == 0;
        match &mut self.work {
            Work::All(whole) => {
                let copied = whole.copy(&vm.ram, &self.copy.memory, most)?;
                Ok((copied > 0).then_some(copied))
            }
            Work::Absent(next) => {
                let Some(index) = self.copy.next_absent(*next) else { return Ok(None) };
                *next = index + 1;
                self.copy.fill_absent(index, vm.pager.as_ref())?;
                Ok(Some(CHUNK as u64))
            }
            Work::Written(pages, next) => {
                let mut written = pages.iter().enumerate().skip(*next);
                let Some((index, set)) = written.find(|(_, set)| **set != 0) else {
                    return Ok(None);
                };
                *next = index + 1;
                let copied = self.copy.chunk(vm.ram.fd(), index, *set, vm.has_holes());
                copied.map_err(CaptureError::Copy)?;
                Ok(Some(u64::from(set.count_ones()) * PAGE as u64))
            }
            Work::Layers(at) => {
                let copied = vm.copy_layers(&self.copy.layers, at, first)?;
                self.pages += copied.unwrap_or(0) / PAGE as u64;
                // Chunks that are looked at in vain take their time too.
                Ok(copied.map(|bytes| bytes.max(LOOK)))
            }
        }
    }

    /// Whether there is more to do.
    fn next_work(&mut self, vm: &mut Vm) -> Result<bool, CaptureError> {
        self.work = match self.work {
            Work::All(_) => Work::Absent(0),
            Work::Absent(_) | Work::Written(..) => Work::Layers(At::default()),
            Work::Layers(_) => return self.next_round(vm),
        };
        Ok(true)
    }

    /// A round is complete: whether one more is to follow.
    fn next_round(&mut self, vm: &mut Vm) -> Result<bool, CaptureError> {
        self.copy.rounds += 1;
        if self.copy.rounds > 1 {
            if self.pages <= ENOUGH || self.pages >= self.before / 2 {
                return Ok(false);
            }
            self.before = self.pages;
        }
        if self.copy.rounds >= MOST_ROUNDS || self.begun.elapsed() >= ROUNDS_LIMIT {
            return Ok(false);
        }
        let pages = vm.snapshots.tracker.round(&vm.machine)?;
        self.pages = dirty::count(&pages);
        self.work = Work::Written(pages, 0);
        Ok(true)
    }
}

impl Vm {
    /// Begins to copy memory while the guest runs.
    pub(super) fn begin_live(&mut self, wanted: Wanted, token: Token) -> Result<(), CutError> {
        let copy = self.begin_copy().map_err(|error| copying(&error))?;
        let work = Work::All(Whole::default());
        let begun = Instant::now();
        let (pages, before) = (0, u64::MAX);
        self.snapshots.live = Some(Live { wanted, token, begun, copy, work, pages, before });
        Ok(())
    }

    fn begin_copy(&mut self) -> Result<Copy, CaptureError> {
        self.snapshots.tracker.begin(&self.machine)?;
        // From here on every write is in the next round.
        self.snapshots.tracker.round(&self.machine)?;
        let absent = absent(self.pager.as_ref(), self.snapshots.tracker.chunks())?;
        let (memory, layers) = (capture::room(&self.ram)?, self.begin_layers()?);
        Ok(Copy { memory, rounds: 0, absent, layers })
    }

    /// Whether a snapshot is under way that takes turns with everything else.
    pub(in super::super) fn copies(&self) -> bool {
        self.snapshots.live.is_some() || self.snapshots.coming.is_some()
    }

    /// Goes on with such a one: a turn, or all that comes after the last.
    pub(in super::super) fn copy_on(&mut self) {
        self.look_for_memory();
        let Some(mut live) = self.snapshots.live.take() else { return };
        let token = live.token;
        let cut = match live.turn(self) {
            Ok(false) => {
                self.snapshots.live = Some(live);
                return;
            }
            Ok(true) => self.cut_live(live),
            Err(error) => Err(copying(&error)),
        };
        self.answer_later(cut, token);
    }

    /// Answers a request for a snapshot that was told to wait.
    pub(super) fn answer_later(&mut self, cut: Result<Cut, CutError>, token: Token) {
        let (reply, fds) = self.told(cut, token.client());
        if let Some(control) = &mut self.control {
            control.complete_with(token, &reply, fds);
        }
    }
}

fn copying(error: &CaptureError) -> CutError {
    let (who, why) = ("guest memory".into(), crate::remedy::chain(error));
    CutError { phase: Phase::Running, who, why }
}
