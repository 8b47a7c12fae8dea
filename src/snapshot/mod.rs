//! Snapshots: one cut through every process of a VM, kept on disk.
//!
//! | module | holds |
//! |---|---|
//! | [`coordinator`] | the order of a snapshot, all or nothing |
//! | [`dirty`] | which pages were written, by the guest or by anybody else |
//! | [`eager`] | guest memory filled from a snapshot, all of it, before the guest runs |
//! | [`mod@format`] | the directory a snapshot is on disk: writing, reading, checking |
//! | [`pager`] | guest memory that is brought when it is touched |
//! | [`state`] | everything of a VM but its memory and disks, as one value |
//! | [`trigger`] | when a VM is to be written down by itself |
//! | [`write_logs`] | what is written to guest memory, for all who want to know |

pub mod coordinator;
pub mod dirty;
pub mod eager;
pub mod format;
pub mod pager;
pub(crate) mod random;
pub mod state;
pub mod trigger;
pub mod write_logs;
