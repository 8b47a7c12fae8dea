//! The files of a snapshot, opened and read within bounds.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use super::{Fault, FormatError, SnapshotId};

pub(super) const MANIFEST: &str = "manifest";
pub(super) const STATE: &str = "state";
pub(super) const MEMORY: &str = "memory";

/// First bytes of `state`.
pub(super) const STATE_MAGIC: [u8; 8] = *b"CBSTATE\n";
/// Bytes before the state itself: the magic, the snapshot's id, reserved zeros.
pub(super) const STATE_HEADER: usize = 64;

/// The directory of a snapshot.
pub(super) fn directory(path: &Path) -> Result<OwnedFd, FormatError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(|e| Fault::Directory(e.into()).at(path))
}

/// Opens a file of the snapshot: a regular one, not by a symbolic link, and without
/// waiting for the other end of a pipe. Returns its size as well.
pub(super) fn regular(directory: &impl AsFd, file: &str) -> Result<(File, u64), Fault> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let fd = openat(directory, file, flags, Mode::empty()).map_err(|e| match e {
        nix::errno::Errno::ELOOP | nix::errno::Errno::ENXIO => Fault::NotAFile(file.to_string()),
        e => Fault::Open { file: file.to_string(), source: e.into() },
    })?;
    let opened = File::from(fd);
    let data = opened.metadata().map_err(|source| Fault::Read { file: file.into(), source })?;
    if !data.is_file() {
        return Err(Fault::NotAFile(file.to_string()));
    }
    Ok((opened, data.len()))
}

/// Like [`regular`], for a file that has to have `wanted` bytes.
pub(super) fn sized(directory: &impl AsFd, file: &str, wanted: u64) -> Result<File, Fault> {
    let (opened, found) = regular(directory, file)?;
    match found == wanted {
        true => Ok(opened),
        false => Err(Fault::Length { file: file.to_string(), found, wanted }),
    }
}

/// `len` bytes of `opened` from `offset` on. The caller has bounded `len`.
pub(super) fn read(opened: &File, file: &str, offset: u64, len: usize) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0; len];
    read_into(opened, file, offset, &mut bytes)?;
    Ok(bytes)
}

/// Fills `bytes` from `offset` on.
pub(super) fn read_into(
    opened: &File,
    file: &str,
    offset: u64,
    bytes: &mut [u8],
) -> Result<(), Fault> {
    opened.read_exact_at(bytes, offset).map_err(|source| match source.kind() {
        // It was long enough when it was opened.
        io::ErrorKind::UnexpectedEof => Fault::Read {
            file: file.to_string(),
            source: io::Error::other("it became shorter while it was read"),
        },
        _ => Fault::Read { file: file.to_string(), source },
    })
}

/// The header of `state`.
pub(super) fn state_header(id: SnapshotId) -> [u8; STATE_HEADER] {
    let mut header = [0; STATE_HEADER];
    header[..8].copy_from_slice(&STATE_MAGIC);
    header[8..24].copy_from_slice(&id.0);
    header
}

/// Checks the header of `state`.
pub(super) fn check_state_header(bytes: &[u8], id: SnapshotId) -> Result<(), Fault> {
    match bytes.first_chunk::<STATE_HEADER>() {
        Some(header) if header.starts_with(&STATE_MAGIC) => {
            let mut carried = [0; 16];
            carried.copy_from_slice(&header[8..24]);
            match carried == id.0 {
                true => Ok(()),
                false => {
                    Err(Fault::Mismatched { file: STATE, found: SnapshotId(carried), wanted: id })
                }
            }
        }
        _ => Err(Fault::Foreign(STATE)),
    }
}
