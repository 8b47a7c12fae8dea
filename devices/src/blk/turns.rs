//! Who may write a disk of which parts of blocks are changed.
//!
//! Many share, or one is alone; everybody in the order in which they came, so that nobody
//! waits for ever. A share is not tied to a thread's stack: it is that of a write, which
//! may be in flight.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Turns {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The number that the next to come gets.
    next: u64,
    /// The number whose turn it is.
    turn: u64,
    sharing: usize,
    alone: bool,
}

/// A turn of the calling thread, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    alone: bool,
}

impl Turns {
    /// Shares at once, or not at all: somebody is alone or waits for that.
    pub fn try_share(&self) -> bool {
        let mut state = self.state();
        let free = state.turn == state.next && !state.alone;
        state.sharing += usize::from(free);
        free
    }

    /// Waits for a share. Who has one must not: whoever waits to be alone waits for that.
    pub fn share(&self) {
        let mut state = self.wait(|state| !state.alone);
        state.sharing += 1;
    }

    /// Gives a share back.
    pub fn leave(&self) {
        self.state().sharing -= 1;
        self.moved.notify_all();
    }

    /// Waits to be alone, or for a share. Who has a share must not.
    pub fn take(&self, alone: bool) -> Turn<'_> {
        if alone {
            self.wait(|state| !state.alone && state.sharing == 0).alone = true;
        } else {
            self.share();
        }
        Turn { turns: self, alone }
    }

    /// Waits for the caller's turn, and then until `ready`; the next one's turn has come.
    fn wait(&self, ready: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        while state.turn != number || !ready(&state) {
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.turn += 1;
        self.moved.notify_all();
        state
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.alone {
            self.turns.state().alone = false;
            self.turns.moved.notify_all();
        } else {
            self.turns.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    #[test]
    fn one_is_alone_and_many_share() {
        let (turns, sharing, alone) = (Turns::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for n in 0..6 {
                let (turns, sharing, alone) = (&turns, &sharing, &alone);
                scope.spawn(move || {
                    for _ in 0..2000 {
                        if n % 3 == 0 {
                            let guard = turns.take(true);
                            assert_eq!(alone.fetch_add(1, Ordering::SeqCst), 0);
                            assert_eq!(sharing.load(Ordering::SeqCst), 0);
                            alone.fetch_sub(1, Ordering::SeqCst);
                            drop(guard);
                        } else {
                            if !turns.try_share() {
                                turns.share();
                            }
                            sharing.fetch_add(1, Ordering::SeqCst);
                            assert_eq!(alone.load(Ordering::SeqCst), 0);
                            sharing.fetch_sub(1, Ordering::SeqCst);
                            turns.leave();
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn who_waits_to_be_alone_is_not_overtaken() {
        let turns = Turns::default();
        turns.share();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(turns.take(true)));
            while turns.state().next == 1 {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(!turns.try_share(), "it would be overtaken for ever");
            turns.leave();
            waiting.join().expect("its turn comes");
        });
        assert!(turns.try_share());
    }
}
