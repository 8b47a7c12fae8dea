//! The life of a vCPU as a table.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

/// Where a vCPU is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum VcpuState {
    /// Its thread waits; the guest has not run yet.
    Created,
    /// The guest may execute on it.
    Running,
    /// Asked to park and not there yet.
    Pausing,
    /// Parked: no guest instruction executes until it is resumed.
    Paused,
    /// The guest never runs on it again.
    Stopped,
}

use VcpuState::{Created, Paused, Pausing, Running, Stopped};

impl VcpuState {
    /// Every state, in the order of the table.
    pub const ALL: [Self; 5] = [Created, Running, Pausing, Paused, Stopped];

    /// Whether a vCPU may go from `self` to `to`: the one table of allowed transitions.
    pub const fn may_become(self, to: Self) -> bool {
        matches!(
            (self, to),
            (Created, Running)       // first run
                | (Created, Stopped) // stopped without having run
                | (Running, Pausing) // asked to park
                | (Running, Stopped) // the guest ended, or a stop
                | (Pausing, Paused)  // arrived
                | (Pausing, Running) // the pause was given up
                | (Pausing, Stopped) // the guest ended before it could park
                | (Paused, Running)  // resumed
                | (Paused, Stopped) // stopped while parked
        )
    }

    const fn from_index(index: u8) -> Self {
        Self::ALL[index as usize]
    }
}

impl fmt::Display for VcpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Created => "created",
            Running => "running",
            Pausing => "pausing",
            Paused => "paused",
            Stopped => "stopped",
        })
    }
}

/// A transition the table does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a vcpu that is {from} cannot become {to}")]
pub struct ForbiddenTransition {
    /// The state the vCPU is in, and stays in.
    pub from: VcpuState,
    /// The state it was to enter.
    pub to: VcpuState,
}

/// The state of one vCPU, shared by its thread and the coordinator.
#[derive(Debug)]
pub(super) struct StateCell(AtomicU8);

impl StateCell {
    pub(super) const fn new(state: VcpuState) -> Self {
        Self(AtomicU8::new(state as u8))
    }

    pub(super) fn get(&self) -> VcpuState {
        VcpuState::from_index(self.0.load(Ordering::Acquire))
    }

    /// Goes to `to` and gives the state left behind, or changes nothing.
    ///
    /// Atomic: of a coordinator that wants `Pausing` and a thread that ends at that moment, one
    /// sees the other's result.
    pub(super) fn advance(&self, to: VcpuState) -> Result<VcpuState, ForbiddenTransition> {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |from| {
                VcpuState::from_index(from).may_become(to).then_some(to as u8)
            })
            .map(VcpuState::from_index)
            .map_err(|from| ForbiddenTransition { from: VcpuState::from_index(from), to })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table again, as a picture: rows from, columns to.
    #[rustfmt::skip]
    const WANTED: [[u8; 5]; 5] = [
        //        Created Running Pausing Paused Stopped
        /* Created */ [0,    1,      0,      0,     1],
        /* Running */ [0,    0,      1,      0,     1],
        /* Pausing */ [0,    1,      0,      1,     1],
        /* Paused  */ [0,    1,      0,      0,     1],
        /* Stopped */ [0,    0,      0,      0,     0],
    ];

    #[test]
    fn every_pair_is_allowed_or_refused_as_the_table_says() {
        let mut forbidden = 0;
        for from in VcpuState::ALL {
            for to in VcpuState::ALL {
                let cell = StateCell::new(from);
                if WANTED[from as usize][to as usize] == 1 {
                    assert_eq!(cell.advance(to), Ok(from), "{from} to {to}");
                    assert_eq!(cell.get(), to);
                } else {
                    forbidden += 1;
                    let refused = ForbiddenTransition { from, to };
                    assert_eq!(cell.advance(to), Err(refused), "{from} to {to}");
                    assert_eq!(cell.get(), from, "a refused transition changes nothing");
                    assert_eq!(
                        refused.to_string(),
                        format!("a vcpu that is {from} cannot become {to}")
                    );
                }
            }
        }
        assert_eq!(forbidden, 16);
    }
}
