//! Waiting for a shell, and holding one.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use super::{Doomed, Engine, Factory, Inner, Release, Waiter};
use crate::pool::ledger::Change;

/// How often somebody who waits looks whether there still is anybody to wait for.
const LOOK: Duration = Duration::from_millis(50);

/// A claim that came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError<E: std::error::Error + 'static> {
    /// Nobody gave a VM back, and no shell was made, in time.
    #[error(
        "no VM within {:.3} s: {live} of {max_live} are in use, {making} in the making, and {ahead} \
         claims came first", waited.as_secs_f64()
    )]
    TimedOut {
        /// How long it waited.
        waited: Duration,
        /// VMs in use.
        live: usize,
        /// Most of them.
        max_live: usize,
        /// Shells in the making.
        making: usize,
        /// Who would have been served before.
        ahead: usize,
    },
    /// Memory is all in use.
    #[error("no VM within {:.3} s: the pool's memory is all in use", .0.as_secs_f64())]
    Memory(Duration),
    /// There was no shell, and none could be made.
    #[error("making a VM")]
    Make(#[source] Arc<E>),
    /// As above, by a panic.
    #[error("making a VM: its maker panicked")]
    Panicked,
    /// The pool is being emptied.
    #[error("the pool takes no more claims")]
    Draining,
    /// Who wanted it is gone.
    #[error("who claimed a VM is gone")]
    Abandoned,
}

/// What a claim asks for.
#[derive(Clone, Copy, Default)]
pub struct Wish<'a> {
    /// Wait so long.
    pub patience: Duration,
    /// Since then; since now where not given.
    pub begun: Option<Instant>,
    /// Before all others: a claim that had its turn, and got a shell that was dead.
    pub first: bool,
    /// Whether somebody still wants it; looked at from time to time.
    pub wanted: Option<&'a dyn Fn() -> bool>,
}

impl fmt::Debug for Wish<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wish").field("patience", &self.patience).finish_non_exhaustive()
    }
}

/// A shell that is somebody's. Dropped, it is given back.
pub struct Lease<F: Factory> {
    inner: Arc<Inner<F>>,
    id: u64,
    /// There until the drop.
    shell: Option<F::Shell>,
    /// It did not become a VM.
    spoilt: bool,
    /// It is not to be reset.
    special: bool,
}

impl<F: Factory> Engine<F> {
    /// Waits for a shell.
    pub fn claim(&self, wish: Wish<'_>) -> Result<Lease<F>, ClaimError<F::Error>> {
        let begun = wish.begun.unwrap_or_else(Instant::now);
        let inner = &self.inner;
        let (ticket, answer) = {
            let mut state = inner.lock();
            let (send, answer) = sync_channel(1);
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            let change = if wish.first { Change::Retried } else { Change::Claimed };
            state.book(change, &inner.options.limits);
            let waiter = Waiter { ticket, fresh: true, first: wish.first, answer: send };
            // Among those who go before others, whoever came first does too.
            let at = match wish.first {
                true => state.waiting.iter().take_while(|waiter| waiter.first).count(),
                false => state.waiting.len(),
            };
            state.waiting.insert(at, waiter);
            inner.settle_claim(&mut state);
            state.waiting.iter_mut().for_each(|waiter| waiter.fresh = false);
            (ticket, answer)
        };
        let answered = match self.wait(&answer, begun, wish) {
            Some(answered) => answered,
            None => self.leave(ticket, &answer, begun, wish),
        };
        let (id, shell) = answered?;
        Ok(Lease { inner: inner.clone(), id, shell: Some(shell), spoilt: false, special: false })
    }

    /// The answer, or nothing where the time is over or nobody wants it any more.
    fn wait(
        &self,
        answer: &Receiver<Answer<F>>,
        begun: Instant,
        wish: Wish<'_>,
    ) -> Option<Answer<F>> {
        if let Ok(answer) = answer.try_recv() {
            return Some(answer);
        }
        loop {
            let left = wish.patience.saturating_sub(begun.elapsed());
            let step = if wish.wanted.is_some() { left.min(LOOK) } else { left };
            match answer.recv_timeout(step) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if left <= step || wish.wanted.is_some_and(|wanted| !wanted()) {
                return None;
            }
        }
    }

    /// Waits no longer. An answer that came at the last moment counts.
    fn leave(
        &self,
        ticket: u64,
        answer: &Receiver<Answer<F>>,
        begun: Instant,
        wish: Wish<'_>,
    ) -> Answer<F> {
        let inner = &self.inner;
        let limits = &inner.options.limits;
        let mut state = inner.lock();
        let Some(ahead) = state.waiting.iter().position(|waiter| waiter.ticket == ticket) else {
            return answer.try_recv().unwrap_or(Err(ClaimError::Draining));
        };
        state.waiting.remove(ahead);
        let waited = begun.elapsed();
        let (change, error) = if waited < wish.patience {
            (Change::Abandoned, ClaimError::Abandoned)
        } else {
            let books = state.books;
            let (live, max_live, making) = (books.live, limits.max_live, books.making);
            let error = match live < max_live && making == 0 && !books.admits(limits) {
                true => ClaimError::Memory(waited),
                false => ClaimError::TimedOut { waited, live, max_live, making, ahead },
            };
            (Change::TimedOut, error)
        };
        state.book(change, limits);
        inner.settle(&mut state);
        Err(error)
    }
}

/// What somebody who waits is told.
pub(super) type Answer<F> = Result<(u64, <F as Factory>::Shell), ClaimError<<F as Factory>::Error>>;

impl<F: Factory> Lease<F> {
    /// Its shell's number, unique in the pool.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The shell.
    pub fn shell(&mut self) -> Option<&mut F::Shell> {
        self.shell.as_mut()
    }

    /// Looks at the shell.
    pub fn get(&self) -> Option<&F::Shell> {
        self.shell.as_ref()
    }

    /// It is made into something for this claim alone: it is destroyed after that, never reset.
    pub fn keep_from_others(&mut self) {
        self.special = true;
    }

    /// Gives it back: it did not become a VM, and is destroyed whatever becomes of others.
    pub fn spoilt(mut self) {
        self.spoilt = true;
    }
}

impl<F: Factory> fmt::Debug for Lease<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("id", &self.id).finish_non_exhaustive()
    }
}

impl<F: Factory> Drop for Lease<F> {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        let limits = &self.inner.options.limits;
        state.book(Change::Released, limits);
        if self.spoilt {
            state.book(Change::RestoreFailed, limits);
        }
        let Some(shell) = self.shell.take() else {
            state.book(Change::Returned, limits);
            return self.inner.settle(&mut state);
        };
        let reset = !self.spoilt && !self.special && self.inner.options.release == Release::Reset;
        state.ending.push_back(Doomed { id: self.id, shell, was_live: true, reset });
        self.inner.settle(&mut state);
    }
}
