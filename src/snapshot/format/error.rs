//! What can be wrong with a snapshot on disk.

use std::io;
use std::path::PathBuf;

use super::SnapshotId;
use crate::remedy::Remedy;

/// A snapshot that could not be read, or was refused.
#[derive(Debug, thiserror::Error)]
#[error("snapshot {}", .path.display())]
pub struct FormatError {
    /// The snapshot's directory.
    pub path: PathBuf,
    /// What is wrong.
    #[source]
    pub fault: Fault,
}

/// What is wrong with a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The directory cannot be opened.
    #[error("opening the directory")]
    Directory(#[source] io::Error),
    /// A file of it cannot be opened.
    #[error("opening '{file}'")]
    Open {
        /// The file's name in the directory.
        file: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A symbolic link, a directory, a pipe or the like.
    #[error("'{0}' is not a regular file")]
    NotAFile(String),
    /// Reading failed.
    #[error("reading '{file}'")]
    Read {
        /// The file's name in the directory.
        file: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The file is none of ours.
    #[error("'{0}' is not of a Cellblock snapshot: its first bytes are others")]
    Foreign(&'static str),
    /// Made by a newer Cellblock.
    #[error(
        "its format is {major}.{minor}, this program reads up to {}.{}",
        super::FORMAT_MAJOR,
        super::FORMAT_MINOR
    )]
    Version {
        /// Of the snapshot.
        major: u16,
        /// Of the snapshot.
        minor: u16,
    },
    /// A file is shorter or longer than it has to be.
    #[error("'{file}' has {found} bytes where {wanted} belong")]
    Length {
        /// The file's name in the directory.
        file: String,
        /// Its size.
        found: u64,
        /// What its size has to be.
        wanted: u64,
    },
    /// Bytes changed since they were written.
    #[error("{what} is damaged: its checksum is {found:016x}, not {wanted:016x}")]
    Checksum {
        /// What was checked.
        what: String,
        /// Of what is there.
        found: u64,
        /// Of what was written.
        wanted: u64,
    },
    /// A number that cannot be.
    #[error("{what} is {value}, which no snapshot has")]
    Value {
        /// Its name.
        what: &'static str,
        /// What it is.
        value: u64,
    },
    /// A file belongs to another snapshot.
    #[error("'{file}' belongs to snapshot {found}, not to {wanted}")]
    Mismatched {
        /// The file's name in the directory.
        file: &'static str,
        /// The id it carries.
        found: SnapshotId,
        /// The id it has to carry.
        wanted: SnapshotId,
    },
    /// Bytes where the snapshot has none.
    #[error("memory chunk {0} has data in pages that are recorded as empty")]
    Stray(u64),
    /// A chunk that is not there.
    #[error("there is no memory chunk {0}")]
    NoChunk(u64),
    /// The parent of a diff is another snapshot than the one it was made on.
    #[error("its parent {} is snapshot {found}, not {wanted}", .path.display())]
    WrongParent {
        /// Where the parent should be.
        path: PathBuf,
        /// The id of what is there.
        found: SnapshotId,
        /// The id it has to have.
        wanted: SnapshotId,
    },
    /// A parent with other memory.
    #[error("its parent has {found} bytes of memory, it has {wanted}")]
    ParentMemory {
        /// Of the parent.
        found: u64,
        /// Of the diff.
        wanted: u64,
    },
    /// More diffs on one another than are followed.
    #[error("it is the end of a chain of more than {0} snapshots")]
    Depth(usize),
    /// The parent of a diff could not be used.
    #[error("opening its parent")]
    Parent(#[source] Box<FormatError>),
}

impl Fault {
    /// The fault of the snapshot at `path`.
    pub(super) fn at(self, path: &std::path::Path) -> FormatError {
        FormatError { path: path.to_owned(), fault: self }
    }
}

impl Remedy for FormatError {
    fn remedy(&self) -> Option<String> {
        Some(
            match &self.fault {
                Fault::Directory(_) => "give the directory that 'cellblock snapshot' made",
                Fault::Open { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                    "run as the user who made it"
                }
                Fault::Version { .. } => "use the version of Cellblock that made it, or a newer",
                Fault::Foreign(_) => "give the directory that 'cellblock snapshot' made",
                Fault::WrongParent { .. } => "put the parent back where it was",
                Fault::Depth(_) => "use one of its parents, or take a full snapshot",
                Fault::Parent(parent) => return parent.remedy(),
                Fault::Mismatched { .. } => {
                    "put the files of one snapshot together, or take another"
                }
                _ => "use another copy of it, or take another snapshot",
            }
            .into(),
        )
    }
}

/// A snapshot that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The name is no name of a new directory.
    #[error("writing snapshot {}: this is no name for a directory", .0.display())]
    Name(PathBuf),
    /// Something is there already.
    #[error("writing snapshot {}: it exists", .0.display())]
    Exists(PathBuf),
    /// A diff that nobody could read.
    #[error(
        "snapshot {} is the end of a chain of {}, and no longer one is followed",
        .0.display(), super::MAX_CHAIN
    )]
    Depth(PathBuf),
    /// A step failed.
    #[error("writing snapshot {}: {step}", .path.display())]
    Step {
        /// The snapshot's directory.
        path: PathBuf,
        /// What was being done.
        step: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// More than a snapshot may hold; what is too large, its size and the limit.
    #[error("writing snapshot {}: {what} of {size} is more than {most}", .path.display())]
    TooLarge {
        /// The snapshot's directory.
        path: PathBuf,
        /// What is too large.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The limit.
        most: u64,
    },
    /// Memory that is no whole number of chunks.
    #[error("writing snapshot {}: memory of {size} bytes is not whole chunks", .path.display())]
    Uneven {
        /// The snapshot's directory.
        path: PathBuf,
        /// The memory's size.
        size: u64,
    },
    /// The state was never given.
    #[error("writing snapshot {}: there is no state", .0.display())]
    NoState(PathBuf),
    /// A part that was to be taken from another snapshot could not be read there.
    #[error("writing snapshot {}: reading what it builds on", .path.display())]
    Source {
        /// The snapshot's directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: Box<FormatError>,
    },
    /// Writing was called off.
    #[error("writing snapshot {}: it was called off", .0.display())]
    Cancelled(PathBuf),
}

impl Remedy for WriteError {
    fn remedy(&self) -> Option<String> {
        match self {
            WriteError::Name(_) | WriteError::Exists(_) => {
                Some("give a path at which nothing is yet".into())
            }
            WriteError::Depth(_) => {
                Some("take a full snapshot, to which the next can be diffs".into())
            }
            WriteError::Step { source, .. } => match source.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT) => {
                    Some("make room, or give a path on another file system".into())
                }
                Some(libc::ENOENT) => Some("make its parent directory first".into()),
                Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
                    Some("give a path in a directory you may write to".into())
                }
                _ => None,
            },
            WriteError::Source { source, .. } => source.remedy(),
            _ => None,
        }
    }
}
