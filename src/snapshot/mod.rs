//! Snapshots: one cut through every process of a VM, kept on disk.
//!
//! | module | holds |
//! |---|---|
//! | [`format`] | the directory a snapshot is on disk: writing, reading, checking |

pub mod format;
mod random;
