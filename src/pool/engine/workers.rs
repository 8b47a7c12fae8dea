//! The pool's threads. Whatever a factory does, a panic included, their part of the books is
//! closed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::{Doomed, Factory, Inner};
use crate::pool::ledger::Change;

/// How often idle shells are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Starts all of them. They end when the pool is closed and nothing of it exists any more:
/// the kernel ends a process with the thread that started it.
pub(super) fn start<F: Factory>(inner: &Arc<Inner<F>>) -> std::io::Result<()> {
    let spawn = |name: &str, body: fn(&Inner<F>)| {
        let inner = inner.clone();
        Builder::new().name(name.into()).spawn(move || body(&inner)).map(drop)
    };
    for _ in 0..inner.options.makers.max(1) {
        spawn("pool-make", make)?;
    }
    for _ in 0..inner.options.enders.max(1) {
        spawn("pool-end", end)?;
    }
    spawn("pool-watch", watch)
}

fn make<F: Factory>(inner: &Inner<F>) {
    let limits = &inner.options.limits;
    let mut state = inner.lock();
    loop {
        let now = Instant::now();
        if !state.wants_shell(limits, now) {
            if state.is_over() {
                return;
            }
            state = match state.refill_waits(now) {
                Some(pause) => {
                    inner
                        .making
                        .wait_timeout(state, pause)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => inner.making.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
            continue;
        }
        state.book(Change::MakeStarted, limits);
        let id = state.next_id;
        state.next_id += 1;
        // There may be work for the next of us.
        inner.settle(&mut state);
        drop(state);
        let waits = || inner.hurry.load(Ordering::Relaxed);
        let made = catch_unwind(AssertUnwindSafe(|| inner.factory.make(id, &waits)));
        state = inner.lock();
        match made {
            Ok(Ok(shell)) => {
                state.made_one(id);
                state.book(Change::Made, limits);
                state.idle.push_back((id, shell));
            }
            Ok(Err(error)) => state.make_failed(Some(error), limits),
            Err(_) => state.make_failed(None, limits),
        }
        inner.settle(&mut state);
    }
}

fn end<F: Factory>(inner: &Inner<F>) {
    let limits = &inner.options.limits;
    let mut state = inner.lock();
    loop {
        let Some(doomed) = state.ending.pop_front() else {
            if state.is_over() {
                return;
            }
            state = inner.ending.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let room = !state.draining && state.books.idle < limits.max_size;
        if !state.ending.is_empty() {
            inner.ending.notify_one();
        }
        drop(state);
        let Doomed { id, mut shell, was_live, reset } = doomed;
        let factory = &inner.factory;
        // A VM that has ended by itself is nothing to reset.
        let tried = reset && room && factory.is_alive(&mut shell);
        let mut good = false;
        if tried {
            good = match catch_unwind(AssertUnwindSafe(|| factory.reset(&mut shell))) {
                Ok(Ok(())) => true,
                Ok(Err(error)) => {
                    let error = crate::remedy::chain(&error);
                    tracing::warn!(error, "a VM could not be reset, and is destroyed");
                    false
                }
                Err(_) => false,
            };
        }
        if good {
            state = inner.lock();
            state.book(Change::Reset, limits);
            state.idle.push_back((id, shell));
        } else {
            // A panic leaves what the shell's own drop takes with it.
            let _ = catch_unwind(AssertUnwindSafe(|| factory.destroy(shell)));
            state = inner.lock();
            if tried {
                state.book(Change::ResetFailed, limits);
            }
            state.book(if was_live { Change::Returned } else { Change::Destroyed }, limits);
        }
        inner.settle(&mut state);
        if state.is_over() {
            // The others wait for the end too.
            inner.making.notify_all();
            inner.ending.notify_all();
        }
    }
}

/// Finds idle shells that have died, before somebody is given one; and wakes makers.
fn watch<F: Factory>(inner: &Inner<F>) {
    let limits = &inner.options.limits;
    let mut state = inner.lock();
    let mut looked = Instant::now();
    while !state.is_over() {
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            for _ in 0..state.idle.len() {
                let Some((id, mut shell)) = state.idle.pop_front() else { break };
                match inner.factory.is_alive(&mut shell) {
                    true => state.idle.push_back((id, shell)),
                    false => {
                        tracing::warn!(shell = id, "an idle shell has died");
                        state.give_up((id, shell), Change::Lost, limits);
                    }
                }
            }
            inner.settle(&mut state);
        }
        // Woken at the end only by the time: it is in no hurry.
        drop(state);
        let rang = inner.alarm.wait(LOOK.saturating_sub(looked.elapsed()));
        inner.factory.look_after();
        state = inner.lock();
        if rang && state.lacks_shells(limits) {
            inner.making.notify_one();
        }
    }
    inner.making.notify_all();
    inner.ending.notify_all();
}

impl<F: Factory> super::State<F> {
    /// Nothing is left to do, ever.
    fn is_over(&self) -> bool {
        let books = &self.books;
        self.closed && books.making + books.idle + books.live + books.ending == 0
    }
}
