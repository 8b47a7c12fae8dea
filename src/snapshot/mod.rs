//! Snapshots: one cut through every process of a VM, kept on disk.
//!
//! | module | holds |
//! |---|---|
//! | [`coordinator`] | the order of a snapshot, all or nothing |
//! | [`state`] | everything of a VM but its memory and disks, as one value |

pub mod coordinator;
pub mod state;
