//! Snapshots: one cut through every process of a VM, kept on disk.
//!
//! | module | holds |
//! |---|---|
//! | [`dirty`] | which pages were written, by the guest or by anybody else |
//! | [`format`] | the directory a snapshot is on disk: writing, reading, checking |
//! | [`pager`] | guest memory that is brought when it is touched |

pub mod dirty;
pub mod format;
pub mod pager;
mod random;
