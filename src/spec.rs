//! `--disk` and `--serial`: `PATH[,key=value]...` as the user wrote it, checked.
//!
//! A bare key means true. A comma inside a value is written twice. Everything
//! that is wrong with a SPEC is found here, before anything is opened.

mod back_end;
mod disk;
mod fields;
mod plugin_socket;
mod serial;
mod size;
mod throttle;
mod time;

pub(crate) use disk::lock;
pub use disk::{Backing, DiskError, DiskSpec, OpenedDisk, name_disks};
pub(crate) use fields::split;
pub use plugin_socket::PluginSocketSpec;
pub use serial::SerialSpec;
pub use size::{memory_size, size};
pub use throttle::Throttle;
pub use time::time;

/// A SPEC that cannot be used as written. Each variant's text is a whole line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Nothing where the path belongs.
    #[error("the SPEC starts with no path: write PATH[,key=value]...")]
    NoPath,
    /// A key that no SPEC of this kind has.
    #[error("unknown key '{key}': known keys are {known}")]
    UnknownKey {
        /// As written.
        key: String,
        /// All keys, separated by commas.
        known: String,
    },
    /// An image and a back end at once.
    #[error(
        "the back end has the image: write vhost-user=SOCKET[,id=NAME][,queues=N] without a path"
    )]
    BackEndHasImage,
    /// A key that says something about an image which another program has.
    #[error(
        "key '{0}' is the back end's affair: beside vhost-user=SOCKET there are only id=NAME and queues=N"
    )]
    BackEnds(String),
    /// Writes that are refused and kept at once.
    #[error("give one of 'ro' and 'cow': a disk that refuses writes has none to keep")]
    ReadOnlyCow,
    /// An overlay is read and written through the page cache.
    #[error(
        "a disk with 'cow' has neither 'direct' nor 'engine=io_uring': its blocks come from two files, through the page cache"
    )]
    CachedCow,
    /// The same key twice.
    #[error("key '{0}' is given twice")]
    Twice(String),
    /// A key without its value.
    #[error("key '{key}' needs a value: {key}={hint}")]
    NoValue {
        /// The key.
        key: String,
        /// What a value looks like.
        hint: &'static str,
    },
    /// A value that its key does not take.
    #[error("key '{key}' cannot be '{value}': {why}")]
    BadValue {
        /// The key.
        key: String,
        /// The value as written.
        value: String,
        /// What it may be.
        why: String,
    },
    /// Limits that do not go together.
    #[error("{0}")]
    Throttle(String),
    /// An id that two devices of the VM would share.
    #[error("the id '{0}' is used by two devices: give each disk its own with id=NAME")]
    SharedId(String),
    /// A serial endpoint that does not exist.
    #[error(
        "unknown serial endpoint '{0}': known ones are stdout, file=F, pty, socket=PATH and null"
    )]
    UnknownEndpoint(String),
}
