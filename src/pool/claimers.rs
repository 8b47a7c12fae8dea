//! Threads that have claimed a VM get a processor as soon as they wake, until the VM has had time
//! to start: what they wait for comes from several processes, on a machine that may have fewer
//! processors than that.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::slice;

/// For so long a VM counts as one that starts.
const STARTS: Duration = Duration::from_millis(100);

/// Threads with a short slice that they had not before, and since when. Dropped, none has.
#[derive(Debug, Default)]
pub(super) struct Claimers(Mutex<Vec<(Instant, libc::pid_t)>>);

impl Claimers {
    /// The calling thread claims a VM.
    pub(super) fn hasten(&self) {
        let own = nix::unistd::gettid().as_raw();
        let shortened = slice::shorten_own();
        let mut all = self.lock();
        match all.iter_mut().find(|(_, thread)| *thread == own) {
            Some((since, _)) => *since = Instant::now(),
            None if shortened => all.push((Instant::now(), own)),
            None => {} // it has chosen to, or cannot
        }
    }

    /// Takes that back where it has been long enough. To be called from time to time.
    pub(super) fn look_after(&self) {
        let over = |(since, _): &mut (Instant, libc::pid_t)| since.elapsed() >= STARTS;
        let over: Vec<_> = self.lock().extract_if(.., over).collect();
        over.into_iter().for_each(|(_, thread)| slice::lengthen(thread));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, libc::pid_t)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claimers {
    fn drop(&mut self) {
        self.lock().drain(..).for_each(|(_, thread)| slice::lengthen(thread));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_claims_is_hastened_for_a_while_only() {
        let thread = || {
            let claimers = Claimers::default();
            claimers.hasten();
            let hastened = !claimers.lock().is_empty();
            assert!(!slice::shorten_own(), "it has a short slice, or can have none");
            claimers.hasten();
            claimers.look_after();
            assert_eq!(claimers.lock().len(), usize::from(hastened));
            std::thread::sleep(STARTS);
            claimers.look_after();
            assert!(claimers.lock().is_empty());
            assert_eq!(slice::shorten_own(), hastened, "it was taken back");
            // Its own choice is left alone.
            claimers.hasten();
            assert!(claimers.lock().is_empty());
            slice::lengthen_own();
            claimers.hasten();
            drop(claimers);
            assert_eq!(slice::shorten_own(), hastened, "the end of the pool takes it back");
        };
        std::thread::spawn(thread).join().expect("no panic");
    }
}
