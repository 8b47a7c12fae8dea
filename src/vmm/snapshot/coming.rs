//! Waiting until all of a restored VM's memory has come: whoever reads it directly must not find
//! holes. The main loop goes on meanwhile, and hears of it when memory does not come any more.

use std::time::{Duration, Instant};

use super::super::event_loop::Vm;
use super::Wanted;
use crate::control::server::Token;
use crate::snapshot::coordinator::{CutError, Phase};

/// How long that may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// A snapshot that has to wait.
pub(super) struct Coming {
    wanted: Wanted,
    /// Who is answered in the end.
    pub(super) token: Token,
    until: Instant,
}

impl Vm {
    /// Has all of memory come, and then makes the cut.
    pub(super) fn await_memory(&mut self, wanted: Wanted, token: Token) {
        if let Some(pager) = &self.pager {
            pager.prefetch();
        }
        self.snapshots.coming = Some(Coming { wanted, token, until: Instant::now() + LIMIT });
    }

    /// Looks, if somebody waits, whether memory is there.
    pub(super) fn look_for_memory(&mut self) {
        let Some(coming) = self.snapshots.coming.take() else { return };
        let Coming { wanted, token, until } = coming;
        let cut = if !self.has_holes() {
            self.cut(&wanted, None, token.client())
        } else if Instant::now() < until {
            self.snapshots.coming = Some(Coming { wanted, token, until });
            return std::thread::sleep(LOOK);
        } else {
            let (who, why) = ("guest memory".into(), "it has not come in time".into());
            Err(CutError { phase: Phase::Running, who, why })
        };
        self.answer_later(cut, token);
    }
}
