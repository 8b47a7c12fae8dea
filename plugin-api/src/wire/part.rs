//! The messages of a plugin that takes part in snapshots, on a channel of their own: they come
//! whatever the plugin's connections are doing.

use serde::{Deserialize, Serialize};

use super::Payload;

/// The most bytes of a plugin's state.
pub const MAX_STATE: usize = 1 << 20;

/// What the VMM says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToPart {
    /// No vCPU runs: come to rest, and answer with [`FromPart::Quiesced`] of the same epoch.
    Quiesce {
        /// Number of the snapshot.
        epoch: u64,
    },
    /// The VM is put back in place: go back to this, and answer with [`FromPart::Restored`] of the
    /// same epoch. It comes between [`ToPart::Quiesce`], which was answered, and [`ToPart::Thaw`].
    Restore {
        /// Number of the pause.
        epoch: u64,
        /// What the plugin gave to the snapshot.
        state: Payload,
    },
    /// The snapshot is over, or was given up. It follows each [`ToPart::Quiesce`].
    Thaw {
        /// Its number.
        epoch: u64,
    },
}

/// What the plugin says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromPart {
    /// It is at rest: nothing of the guest's memory or of its state changes until the thaw.
    Quiesced {
        /// As in the request.
        epoch: u64,
        /// All that it needs to go on from here, of at most [`MAX_STATE`] bytes.
        state: Payload,
    },
    /// It is what the state says.
    Restored {
        /// As in the request.
        epoch: u64,
    },
    /// It cannot.
    Failed {
        /// As in the request.
        epoch: u64,
        /// Why: an error number.
        errno: i32,
    },
}
