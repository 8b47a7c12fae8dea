//! Keeps shells ready and hands them out: who waits, who makes, who destroys.
//!
//! It knows nothing of VMs: a [`Factory`] makes, resets and destroys whatever a shell is. All
//! that is decided is decided under one lock, in `State::settle`, after every change:
//!
//! * an idle shell goes to whoever has waited longest, as long as fewer than `max_live` are live;
//! * a shell is made where somebody waits for one, and else up to `min_size` idle ones;
//! * no shell is begun that memory would not do for;
//! * a shell that cannot be made is an error for one of those who wait for it, the one who has
//!   waited longest, and never ends the refill: that goes on after a pause that grows.
//!
//! Shells are made by threads of the pool that live as long as any shell does, and destroyed by
//! others: neither a claim nor the end of one waits for that.

mod alarm;
mod claim;
mod workers;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use alarm::Alarm;
use claim::Answer;
pub use claim::{ClaimError, Lease, Wish};

use super::ledger::{Change, Ledger, Limits};

/// The first pause after a shell that could not be made; it doubles up to [`MOST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MOST_PAUSE: Duration = Duration::from_secs(5);
/// How long a refill waits after a claim was carried out: the guest's first steps are to be no
/// slower for it.
const QUIET: Duration = Duration::from_millis(3);
/// How long a claim may take to be carried out before the refill begins all the same.
const CARRY: Duration = Duration::from_millis(20);
/// A shell that dies so soon after it was made counts as one that could not be made.
const YOUNG: Duration = Duration::from_secs(1);
/// Claims whose duration is remembered.
const REMEMBERED: usize = 1024;

/// Makes what the pool keeps.
pub trait Factory: Send + Sync + 'static {
    /// What is kept.
    type Shell: Send + 'static;
    /// Why one cannot be made or reset.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Makes one; called by several threads at once. `id` is never used twice. While nobody
    /// waits, which is to be asked from time to time, it is in no hurry.
    fn make(&self, id: u64, waits: &dyn Fn() -> bool) -> Result<Self::Shell, Self::Error>;

    /// Whether an idle one can still be handed out. Called often, and under the pool's lock.
    fn is_alive(&self, shell: &mut Self::Shell) -> bool;

    /// Makes one that was used as good as new.
    fn reset(&self, shell: &mut Self::Shell) -> Result<(), Self::Error>;

    /// Called from time to time.
    fn look_after(&self) {}

    /// Has one begin to end: it is destroyed as soon as somebody has time for that, and is to cost
    /// nothing until then. Short.
    fn dismiss(&self, _shell: &mut Self::Shell) {}

    /// Ends one; nothing of it is left when this returns.
    fn destroy(&self, shell: Self::Shell);
}

/// What becomes of a VM that is given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Release {
    /// It is destroyed.
    #[default]
    Destroy,
    /// It is reset in place and used again; one that cannot be is destroyed.
    Reset,
}

/// What an engine is made of, besides its factory.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What it may have.
    pub limits: Limits,
    /// What becomes of what is given back.
    pub release: Release,
    /// Shells that are made at once.
    pub makers: usize,
    /// Shells that are destroyed at once.
    pub enders: usize,
}

/// A pool of whatever `F` makes. Cheap to clone; with the last clone it takes no more claims.
pub struct Engine<F: Factory> {
    inner: Arc<Inner<F>>,
    _closer: Arc<Closer<F>>,
}

impl<F: Factory> Clone for Engine<F> {
    fn clone(&self) -> Self {
        Engine { inner: self.inner.clone(), _closer: self._closer.clone() }
    }
}

impl<F: Factory> fmt::Debug for Engine<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("books", &self.inner.lock().books).finish_non_exhaustive()
    }
}

struct Inner<F: Factory> {
    factory: F,
    options: Options,
    state: Mutex<State<F>>,
    /// Something is to be made.
    making: Condvar,
    /// Something is to be destroyed.
    ending: Condvar,
    /// Something has changed.
    changed: Condvar,
    /// Somebody waits for a shell that is to be made.
    hurry: AtomicBool,
    /// Makers are to look whether there is something for them.
    alarm: Alarm,
}

/// Lets the threads end.
struct Closer<F: Factory>(Arc<Inner<F>>);

impl<F: Factory> Drop for Closer<F> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        state.draining = true;
        self.0.settle(&mut state);
        drop(state);
        self.0.making.notify_all();
        self.0.ending.notify_all();
        self.0.changed.notify_all();
    }
}

/// Somebody who waits for a shell.
struct Waiter<F: Factory> {
    ticket: u64,
    /// Whether they came just now.
    fresh: bool,
    /// Whether they go before those who came earlier.
    first: bool,
    answer: SyncSender<Answer<F>>,
}

/// A shell that is to go.
struct Doomed<F: Factory> {
    id: u64,
    shell: F::Shell,
    /// It was somebody's.
    was_live: bool,
    /// To be reset, if that is possible.
    reset: bool,
}

struct State<F: Factory> {
    books: Ledger,
    idle: VecDeque<(u64, F::Shell)>,
    waiting: VecDeque<Waiter<F>>,
    ending: VecDeque<Doomed<F>>,
    /// Idle shells wanted, by each [`Engine::warm`] that waits.
    warming: Vec<usize>,
    /// The most of them.
    warm: usize,
    draining: bool,
    closed: bool,
    next_id: u64,
    next_ticket: u64,
    /// Of whoever was served last, in their turn.
    last_ticket: u64,
    /// Makings that failed, one after the other, and until when the refill waits.
    failures: u32,
    not_before: Option<Instant>,
    /// Shells that were made a moment ago, and when.
    young: VecDeque<(u64, Instant)>,
    /// So many of those have died since one was of use.
    die_young: u32,
    /// Until when the refill leaves the CPUs to a claim.
    quiet_until: Option<Instant>,
    last_error: Option<String>,
    /// Microseconds that the last claims took.
    durations: VecDeque<u64>,
    violations: u64,
    last_violation: Option<String>,
}

/// How an engine is.
#[derive(Clone, Debug, Default)]
pub struct EngineStats {
    /// All counts.
    pub books: Ledger,
    /// No claims are taken any more.
    pub draining: bool,
    /// What the refill waits for, if it does.
    pub pause: Option<Duration>,
    /// Why the last shell that failed could not be made.
    pub last_error: Option<String>,
    /// Microseconds that the last claims took, sorted.
    pub durations: Vec<u64>,
    /// How often the books did not balance.
    pub violations: u64,
    /// The last time.
    pub last_violation: Option<String>,
}

impl<F: Factory> Engine<F> {
    /// Starts its threads. `options.limits` have been checked.
    pub fn new(factory: F, options: Options) -> std::io::Result<Engine<F>> {
        let state = State {
            books: Ledger::default(),
            idle: VecDeque::new(),
            waiting: VecDeque::new(),
            ending: VecDeque::new(),
            warming: Vec::new(),
            warm: 0,
            draining: false,
            closed: false,
            next_id: 1,
            next_ticket: 1,
            last_ticket: 0,
            failures: 0,
            not_before: None,
            young: VecDeque::new(),
            die_young: 0,
            quiet_until: None,
            last_error: None,
            durations: VecDeque::with_capacity(REMEMBERED),
            violations: 0,
            last_violation: None,
        };
        let inner = Arc::new(Inner {
            factory,
            options,
            state: Mutex::new(state),
            making: Condvar::new(),
            ending: Condvar::new(),
            changed: Condvar::new(),
            hurry: AtomicBool::new(false),
            alarm: Alarm::new()?,
        });
        // Made first: where a thread cannot be started, those that were end.
        let closer = Arc::new(Closer(inner.clone()));
        workers::start(&inner)?;
        Ok(Engine { inner, _closer: closer })
    }

    /// The factory.
    pub fn factory(&self) -> &F {
        &self.inner.factory
    }

    /// Number of idle shells.
    pub fn idle_count(&self) -> usize {
        self.inner.lock().books.idle
    }

    /// Makes idle shells until there are `target`, at most the pool's `max_size`; waits until
    /// they are there or one could not be made. Returns how many there are.
    pub fn warm(&self, target: usize) -> usize {
        let inner = &self.inner;
        let mut state = inner.lock();
        let target = target.min(inner.options.limits.max_size);
        let (failures, die_young) = (state.books.make_failures, state.die_young);
        state.warming.push(target);
        state.warm = state.warm.max(target);
        state.not_before = None;
        inner.settle(&mut state);
        while state.books.idle < target
            && state.books.make_failures == failures
            && state.die_young <= die_young
            && !state.draining
            // Where the refill leaves the processors to a claim, it goes on soon.
            && (state.books.making > 0 || state.lacks_shells(&inner.options.limits))
        {
            state = inner.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // Nobody waits for these any more; others may for theirs.
        if let Some(own) = state.warming.iter().position(|other| *other == target) {
            state.warming.swap_remove(own);
        }
        state.warm = state.warming.iter().copied().max().unwrap_or(0);
        inner.settle(&mut state);
        state.books.idle
    }

    /// Takes no more claims, answers those that wait, and destroys all idle shells. Waits up to
    /// `limit` until they are gone, and, with `live`, all VMs too. False if they are not.
    pub fn drain(&self, live: bool, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.inner.lock();
        state.draining = true;
        self.inner.settle(&mut state);
        loop {
            let books = state.books;
            if books.making + books.idle + books.ending == 0 && (!live || books.live == 0) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.inner.wait_changed(state, left);
        }
    }

    /// How it is.
    pub fn stats(&self) -> EngineStats {
        let state = self.inner.lock();
        let now = Instant::now();
        let mut durations: Vec<u64> = state.durations.iter().copied().collect();
        durations.sort_unstable();
        EngineStats {
            books: state.books,
            draining: state.draining,
            pause: state.not_before.and_then(|at| at.checked_duration_since(now)),
            last_error: state.last_error.clone(),
            durations,
            violations: state.violations,
            last_violation: state.last_violation.clone(),
        }
    }

    /// A claim has been carried out, and took so long in all.
    pub fn note_duration(&self, took: Duration) {
        let mut state = self.inner.lock();
        if state.durations.len() == REMEMBERED {
            state.durations.pop_front();
        }
        state.durations.push_back(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        let quiet = Instant::now() + QUIET;
        state.quiet_until = state.quiet_until.map(|until| until.min(quiet));
        self.inner.set_alarm(&state);
    }
}

impl<F: Factory> Inner<F> {
    fn lock(&self) -> MutexGuard<'_, State<F>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_changed<'s>(
        &self,
        state: MutexGuard<'s, State<F>>,
        limit: Duration,
    ) -> MutexGuard<'s, State<F>> {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Has makers woken when the refill goes on, if there is something for them.
    fn set_alarm(&self, state: &State<F>) {
        if state.lacks_shells(&self.options.limits) {
            let waits = state.refill_waits(Instant::now());
            self.alarm.set(waits.unwrap_or(Duration::from_micros(1)));
        }
    }

    /// Does all that can be done at once, and wakes who has to do the rest.
    fn settle(&self, state: &mut State<F>) {
        self.settle_with(state, true);
    }

    /// The same for a claim: where that has its shell, makers are left alone until it has been
    /// carried out.
    fn settle_claim(&self, state: &mut State<F>) {
        self.settle_with(state, false);
    }

    fn settle_with(&self, state: &mut State<F>, makers: bool) {
        state.settle(&self.factory, &self.options.limits);
        let hurry = state.warm > 0 || state.books.servable(&self.options.limits) > 0;
        self.hurry.store(hurry, Ordering::Relaxed);
        if state.lacks_shells(&self.options.limits) {
            match makers || state.books.waiting > 0 {
                // Where the refill waits, a maker has to know until when.
                true => self.making.notify_one(),
                false => self.set_alarm(state),
            }
        }
        if !state.ending.is_empty() {
            self.ending.notify_one();
        }
        self.changed.notify_all();
    }
}

impl<F: Factory> State<F> {
    /// Books a change.
    fn book(&mut self, change: Change, limits: &Limits) {
        let before = self.books;
        let booked = self.books.apply(change);
        let wrong = match booked {
            false => Err(format!("{change:?} cannot be, with {before:?}")),
            true => self.books.check(limits, false),
        };
        self.report(wrong);
    }

    fn report(&mut self, result: Result<(), String>) {
        if let Err(wrong) = result {
            tracing::error!("the pool's books do not balance: {wrong}");
            self.violations += 1;
            self.last_violation = Some(wrong);
        }
    }

    fn settle(&mut self, factory: &F, limits: &Limits) {
        if self.draining {
            while let Some(waiter) = self.waiting.pop_front() {
                self.book(Change::Refused, limits);
                let _ = waiter.answer.try_send(Err(ClaimError::Draining)); // it waits under the lock
            }
            while let Some(shell) = self.idle.pop_front() {
                self.give_up(shell, Change::Discarded, limits);
            }
        }
        while self.books.servable(limits) > 0
            && let Some((id, mut shell)) = self.idle.pop_front()
        {
            if !factory.is_alive(&mut shell) {
                self.give_up((id, shell), Change::Lost, limits);
                continue;
            }
            let Some(waiter) = self.waiting.pop_front() else { break };
            self.die_young = 0;
            self.book(if waiter.fresh { Change::Hit } else { Change::Miss }, limits);
            if !waiter.first {
                let last = std::mem::replace(&mut self.last_ticket, waiter.ticket);
                let turn = match last < waiter.ticket {
                    true => Ok(()),
                    false => Err(format!("claim {} comes after {last}", waiter.ticket)),
                };
                self.report(turn);
            }
            // Not put off again and again by claims that follow one another.
            let now = Instant::now();
            if self.quiet_until.is_none_or(|until| until + QUIET < now) {
                self.quiet_until = Some(now + CARRY);
            }
            // Who waits takes itself off the list under the lock before it goes: somebody has
            // the other end, and there is room for one answer.
            if let Err(unsent) = waiter.answer.try_send(Ok((id, shell)))
                && let Ok((id, shell)) = match unsent {
                    std::sync::mpsc::TrySendError::Full(answer)
                    | std::sync::mpsc::TrySendError::Disconnected(answer) => answer,
                }
            {
                self.book(Change::Released, limits);
                self.ending.push_back(Doomed { id, shell, was_live: true, reset: false });
            }
        }
        while self.idle.len() > limits.max_size
            && let Some(shell) = self.idle.pop_back()
        {
            self.give_up(shell, Change::Discarded, limits);
        }
        let counted = (self.books.idle, self.books.waiting);
        let there = (self.idle.len(), self.waiting.len());
        let same = match counted == there {
            true => self.books.check(limits, true),
            false => Err(format!("idle and waiting are {there:?}, the books say {counted:?}")),
        };
        self.report(same);
    }

    fn give_up(&mut self, (id, shell): (u64, F::Shell), why: Change, limits: &Limits) {
        self.book(why, limits);
        if why == Change::Lost {
            self.lost_one(id);
        }
        self.ending.push_back(Doomed { id, shell, was_live: false, reset: false });
    }

    /// Whether a shell is to be begun now. Where somebody waits for it, without a pause.
    fn wants_shell(&self, limits: &Limits, now: Instant) -> bool {
        let asked_for = self.books.making < self.books.servable(limits);
        self.lacks_shells(limits) && (asked_for || self.refill_waits(now).is_none())
    }

    /// Whether there are to be more shells than there are and are in the making.
    fn lacks_shells(&self, limits: &Limits) -> bool {
        let wanted = self.books.servable(limits) + limits.min_size.max(self.warm);
        let coming = self.books.idle + self.books.making;
        !self.draining && self.books.admits(limits) && coming < wanted
    }

    /// How long shells that nobody waits for are not to be made.
    fn refill_waits(&self, now: Instant) -> Option<Duration> {
        let until = self.not_before.into_iter().chain(self.quiet_until).max();
        until.and_then(|until| until.checked_duration_since(now)).filter(|left| !left.is_zero())
    }

    /// A shell was made.
    fn made_one(&mut self, id: u64) {
        let now = Instant::now();
        self.young.retain(|(_, made)| now.duration_since(*made) < YOUNG);
        self.young.push_back((id, now));
        if self.die_young == 0 {
            self.failures = 0;
            self.not_before = None;
            self.last_error = None;
        }
    }

    /// An idle shell has died. Where they do so as soon as they are made, that goes on for ever.
    fn lost_one(&mut self, id: u64) {
        let young = |(other, made): &(u64, Instant)| *other == id && made.elapsed() < YOUNG;
        if self.young.iter().any(young) {
            self.die_young = self.die_young.saturating_add(1);
            let pause = self.pause();
            let pause_ms = pause.as_millis() as u64;
            tracing::warn!(shell = id, pause_ms, "a shell died as soon as it was made");
            self.last_error = Some("they die as soon as they are made".into());
        }
    }

    /// The refill waits, each time for longer.
    fn pause(&mut self) -> Duration {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(MOST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(Instant::now() + pause);
        pause
    }

    /// A shell could not be made: whoever waits for it, and for no other, is told. Without
    /// `error` its maker panicked.
    fn make_failed(&mut self, error: Option<F::Error>, limits: &Limits) {
        let error = error.map(Arc::new);
        self.book(Change::MakeFailed, limits);
        let pause = self.pause();
        let why = error.as_deref().map_or("its maker panicked".into(), |e| crate::remedy::chain(e));
        let pause_ms = pause.as_millis() as u64;
        tracing::warn!(error = why, pause_ms, "a shell could not be made");
        self.last_error = Some(why);
        if self.books.making < self.books.servable(limits)
            && let Some(waiter) = self.waiting.pop_front()
        {
            self.book(Change::Refused, limits);
            let answer = error.map_or(ClaimError::Panicked, ClaimError::Make);
            let _ = waiter.answer.try_send(Err(answer)); // as above
        }
    }
}
