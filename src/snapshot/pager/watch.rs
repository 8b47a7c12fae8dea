//! Looks whether the pager gets on while somebody waits for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cellblock_seccomp::filter::FilterError;

use super::{LAST_RESORT, PagerError, Shared, lock, step};

/// Looks within the limit.
const LOOKS: u32 = 8;

/// What to look for, and what to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watch {
    pub(super) limit: Duration,
    pub(super) last_resort: Option<fn(&str)>,
}

/// Starts the watch; it ends with the pager.
pub(super) fn spawn(
    shared: Arc<Shared>,
    watch: Watch,
    confine: impl FnOnce() -> Result<(), FilterError> + Send + 'static,
) -> Result<(), PagerError> {
    let run = move || {
        match confine() {
            Ok(()) => watch.run(&shared),
            Err(error) => shared.end(Err(error.into())),
        }
        // Whoever was to end the VM may wait for memory itself.
        if let (true, Some(end)) = (shared.failed.load(Ordering::Acquire), watch.last_resort) {
            std::thread::sleep(LAST_RESORT);
            end(&lock(&shared.why));
        }
    };
    let thread = std::thread::Builder::new().name("pager-watch".into()).spawn(run);
    thread.map(drop).map_err(step("starting the pager's watch"))
}

impl Watch {
    /// The thread counts a step at least once between two looks, so that one that stopped is found
    /// without asking who waits for it. Before the guest runs it may say that it sleeps instead.
    fn run(&self, shared: &Shared) {
        // Looks are counted, not time: a VM that was stopped as a whole got no further either.
        let (mut seen, mut looks) = (0, 0);
        while !shared.ended.load(Ordering::Acquire) {
            std::thread::sleep(self.limit / LOOKS);
            let steps = shared.steps.load(Ordering::Relaxed);
            let rests = shared.rests.load(Ordering::Relaxed);
            let runs = shared.runs.get().is_some();
            looks = if steps == seen && (runs || !rests) { looks + 1 } else { 0 };
            if runs && rests {
                let _ = shared.bell.write(1); // it fails only when it is rung already
            }
            seen = steps;
            if looks == LOOKS {
                return shared.end(Err(PagerError::Stalled(self.limit)));
            }
        }
    }
}
