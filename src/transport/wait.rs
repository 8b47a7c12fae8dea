//! How a vCPU waits for something without ever being out of a pause's reach.
//!
//! A vCPU thread that waits for a device process sits outside KVM_RUN, where no
//! signal of a pause request is looked at. [`Completion::wait`] therefore ends
//! early when the vCPU is kicked; the access is then reported as
//! [`Outcome::Retry`](crate::bus::Outcome::Retry), the vCPU parks, and the same
//! access made again after the pause goes on waiting.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How a wait ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Waited<T> {
    /// The result is here.
    Done(T),
    /// The vCPU was kicked first. Wait again later.
    Kicked,
    /// Neither happened in time.
    TimedOut,
}

/// A result that one thread will provide and one vCPU waits for.
#[derive(Debug)]
pub struct Completion<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    since: Instant,
}

#[derive(Debug)]
struct State<T> {
    result: Option<T>,
    kicked: bool,
}

impl<T> Completion<T> {
    /// A result that is not there yet.
    pub fn new() -> Arc<Completion<T>> {
        Arc::new(Completion {
            state: Mutex::new(State { result: None, kicked: false }),
            changed: Condvar::new(),
            since: Instant::now(),
        })
    }

    /// Provides the result. A second result replaces one nobody took.
    pub fn complete(&self, result: T) {
        self.lock().result = Some(result);
        self.changed.notify_all();
    }

    /// Ends the wait that is going on, or else the next one, with [`Waited::Kicked`].
    pub fn kick(&self) {
        self.lock().kicked = true;
        self.changed.notify_all();
    }

    /// Waits until `limit` after this completion was made.
    pub fn wait(&self, limit: Duration) -> Waited<T> {
        let mut state = self.lock();
        loop {
            if let Some(result) = state.result.take() {
                return Waited::Done(result);
            }
            if std::mem::take(&mut state.kicked) {
                return Waited::Kicked;
            }
            let left = limit.saturating_sub(self.since.elapsed());
            if left.is_zero() {
                return Waited::TimedOut;
            }
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    // Nothing that can panic runs under this lock, so that a poisoned one is whole.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kick_ends_the_wait_and_the_result_is_still_taken_later() {
        let completion = Completion::new();
        let waiter = completion.clone();
        let thread = std::thread::spawn(move || {
            let first = waiter.wait(Duration::from_secs(10));
            let second = waiter.wait(Duration::from_secs(10));
            (first, second)
        });
        completion.kick();
        // The waiter may take the kick before or after this; it must see both.
        std::thread::sleep(Duration::from_millis(20));
        completion.complete(7);
        assert_eq!(thread.join().expect("no panic"), (Waited::Kicked, Waited::Done(7)));
    }

    #[test]
    fn silence_times_out_even_across_kicks() {
        let completion = Completion::<()>::new();
        let limit = Duration::from_millis(30);
        completion.kick();
        assert_eq!(completion.wait(limit), Waited::Kicked);
        assert_eq!(completion.wait(limit), Waited::TimedOut);
        assert_eq!(completion.wait(limit), Waited::TimedOut);
    }
}
