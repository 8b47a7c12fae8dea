//! Holding the guest where it says that it is about to run its workload.
//!
//! A snapshot at this moment is only worth something if the workload has not begun in it:
//! the vCPU that writes the marker stays in that write until the machine is stopped for
//! the snapshot, and so is behind the instruction, and not yet at the next one, when its
//! state is read. Whoever stops the machine for another reason meanwhile is not kept from
//! it: a vCPU that is kicked leaves.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Keeps vCPUs waiting until it is released, or they are kicked.
#[derive(Debug)]
pub struct Hold {
    held: Mutex<bool>,
    changed: Condvar,
}

impl Hold {
    /// Holds from now on if `armed`.
    pub fn new(armed: bool) -> Hold {
        Hold { held: Mutex::new(armed), changed: Condvar::new() }
    }

    /// Waits as long as it holds and `kicked` is false.
    pub fn wait(&self, kicked: impl Fn() -> bool) {
        let mut held = self.lock();
        while *held && !kicked() {
            held = self.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has those that wait look again whether they are kicked.
    pub fn wake(&self) {
        // Under the lock, so that nobody is between their look and their sleep.
        let _held = self.lock();
        self.changed.notify_all();
    }

    /// Holds nobody any more.
    pub fn release(&self) {
        *self.lock() = false;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::channel;
    use std::time::Duration;

    /// Has a thread wait, sees it wait, and lets it go by `end`.
    fn waits_until(hold: &Hold, kicked: &AtomicBool, end: impl FnOnce()) {
        let (told, done) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                hold.wait(|| kicked.load(Ordering::Relaxed));
                told.send(()).expect("listening");
            });
            assert!(done.recv_timeout(Duration::from_millis(30)).is_err(), "it did not hold");
            end();
            done.recv_timeout(Duration::from_secs(5)).expect("let go");
        });
    }

    #[test]
    fn a_wait_ends_with_a_kick_or_with_the_release() {
        let (hold, kicked) = (Hold::new(true), AtomicBool::new(false));
        waits_until(&hold, &kicked, || {
            kicked.store(true, Ordering::Relaxed);
            hold.wake();
        });
        kicked.store(false, Ordering::Relaxed);
        waits_until(&hold, &kicked, || hold.release());
        hold.wait(|| false);
        Hold::new(false).wait(|| false);
    }
}
