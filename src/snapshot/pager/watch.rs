//! Looks whether the pager gets on while somebody waits for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cellblock_seccomp::filter::FilterError;

use super::{PagerError, Shared, step};

/// Looks within the limit.
const LOOKS: u32 = 8;

/// Starts the watch; it ends with the pager.
pub(super) fn spawn(
    shared: Arc<Shared>,
    limit: Duration,
    confine: impl FnOnce() -> Result<(), FilterError> + Send + 'static,
) -> Result<(), PagerError> {
    let watch = move || {
        if let Err(error) = confine() {
            shared.end(Err(error.into()));
            return;
        }
        run(&shared, limit);
    };
    let thread = std::thread::Builder::new().name("pager-watch".into()).spawn(watch);
    thread.map(drop).map_err(step("starting the pager's watch"))
}

/// The thread counts a step at least once between two looks, however little there
/// is to do, so that one that stopped is found without asking who waits for it.
fn run(shared: &Shared, limit: Duration) {
    // Looks are counted, not time: a VM that was stopped as a whole got no further either.
    let (mut seen, mut looks) = (0, 0);
    while !shared.ended.load(Ordering::Acquire) {
        std::thread::sleep(limit / LOOKS);
        let steps = shared.steps.load(Ordering::Relaxed);
        looks = if steps == seen { looks + 1 } else { 0 };
        seen = steps;
        if looks == LOOKS {
            shared.end(Err(PagerError::Stalled(limit)));
            return;
        }
    }
}
