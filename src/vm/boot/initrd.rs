//! The initial RAM disk: as high in low RAM as the kernel allows, away from where
//! the kernel unpacks itself.

use std::fs::File;

use super::Loaded;
use crate::vm::memory::{GuestRam, MemoryError};

/// An initrd that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// Reading failed.
    #[error("reading the file")]
    Read(#[source] std::io::Error),
    /// A directory, device, pipe or socket.
    #[error("it is not a regular file: give a cpio archive")]
    NotAFile,
    /// No bytes at all.
    #[error("the file is empty: leave it out or give a cpio archive")]
    Empty,
    /// It does not fit beside the kernel.
    #[error(
        "it has {size} bytes and {room} are free beside the kernel in the guest's low memory: \
         give more memory"
    )]
    TooLarge {
        /// Its size in bytes.
        size: u64,
        /// What is free for it, in bytes.
        room: u64,
    },
    /// Placing it failed.
    #[error("copying it to guest memory")]
    Place(#[source] MemoryError),
}

/// Where an initrd was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// Guest-physical address, page-aligned.
    pub start: u64,
    /// Size in bytes.
    pub len: u64,
}

pub(super) fn load(ram: &GuestRam, file: &File, kernel: &Loaded) -> Result<Initrd, InitrdError> {
    let metadata = file.metadata().map_err(InitrdError::Read)?;
    if !metadata.is_file() {
        return Err(InitrdError::NotAFile);
    }
    let initrd = place(metadata.len(), kernel.end, kernel.initrd_max, ram.low_end())?;
    ram.fill_from(initrd.start, file, 0, initrd.len).map_err(InitrdError::Place)?;
    Ok(initrd)
}

fn place(len: u64, kernel_end: u64, max: u64, ram_end: u64) -> Result<Initrd, InitrdError> {
    const PAGE: u64 = 4096;
    if len == 0 {
        return Err(InitrdError::Empty);
    }
    let floor = kernel_end.next_multiple_of(PAGE);
    let ceiling = ram_end.min(max.saturating_add(1));
    let room = ceiling.saturating_sub(floor);
    let start = ceiling.saturating_sub(len) / PAGE * PAGE;
    if len > room || start < floor {
        return Err(InitrdError::TooLarge { size: len, room });
    }
    Ok(Initrd { start, len })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn lies_at_the_top_of_what_the_kernel_allows() {
        let at = |len, max, end| place(len, 16 * MIB, max, end).unwrap().start;
        assert_eq!(at(4096, u64::MAX, 64 * MIB), 64 * MIB - 4096);
        assert_eq!(at(1, u64::MAX, 64 * MIB), 64 * MIB - 4096);
        assert_eq!(at(4096, 0x1fff_ffff, 1024 * MIB), 512 * MIB - 4096);
        assert_eq!(at(48 * MIB, u64::MAX, 64 * MIB), 16 * MIB);
    }

    #[test]
    fn never_overlaps_the_kernel() {
        let refused = |len, end| place(len, end, u64::MAX, 64 * MIB).unwrap_err().to_string();
        assert!(refused(48 * MIB + 1, 16 * MIB).contains("50331648 are free"));
        assert!(refused(u64::MAX, 16 * MIB).contains("give more memory"));
        assert!(refused(1, 64 * MIB).contains("0 are free"));
        assert!(refused(4097, 64 * MIB - 4097).contains("4096 are free"));
        assert!(refused(0, 16 * MIB).contains("empty"));
    }
}
