//! A snapshot on disk: a directory of these files.
//!
//! | file | holds |
//! |---|---|
//! | `manifest` | a fixed header: format, ids, sizes, checksums; readable without the rest |
//! | `state` | a header with the id, then the state as its maker encoded it |
//! | `memory` | guest RAM at the offsets of its memfd, sparse, then the table of chunks |
//! | `disk-ID` | of a copied disk: the image; of a `cow` disk: what was written to it |
//! | `touch` | once a VM was restored lazily: what it needed first. Part of nothing, and trusted for nothing |
//!
//! All numbers are little-endian. Every checksum is a CRC-64/NVME ([`checksum`]). `state`
//! and the table carry the snapshot's id, so that files of two snapshots are never taken
//! for one.
//!
//! **Chunks.** Memory is divided into chunks of 256 KiB, each of 64 pages. The table has
//! for each chunk which pages this snapshot says something about (all, but for a diff),
//! which of these have bytes in the file (the others are zero and cost nothing), and the
//! checksum of these bytes ([`table`]). What a diff does not say, its parent does
//! ([`Chain`]).
//!
//! **Trust.** A snapshot is a file from anywhere. Lengths are compared with limits and
//! with the sizes of the files before anything is read or allocated; nothing but regular
//! files is opened, and no symbolic link in the directory is followed.
//!
//! **Versions.** A reader takes its own major version and any minor version up to its own.
//! Fields are added in reserved places and raise the minor version; snapshots of every
//! version that was ever released stay readable (`tests/golden`).

mod chain;
pub mod checksum;
mod clone;
mod copy;
mod error;
mod files;
pub mod fuzz;
mod leftover;
mod manifest;
mod merge;
mod reader;
pub mod table;
mod writer;

use std::fmt;

pub use chain::Chain;
pub use error::{Fault, FormatError, WriteError};
pub use manifest::{DiskCopy, Manifest, Suspect};
pub use merge::{MergeError, merge};
pub use reader::{Description, Snapshot, describe};
pub use writer::{Base, Contents, Writer};

/// First bytes of a manifest. The first is no text, and the last shows a transfer that
/// changed line ends.
pub const MAGIC: [u8; 8] = *b"\x89CBSNAP\n";
/// A reader reads its own major version only.
pub const FORMAT_MAJOR: u16 = 1;
/// Rises when a field is added.
pub const FORMAT_MINOR: u16 = 0;
/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Pages of a chunk: a word of a bitmap.
pub const CHUNK_PAGES: usize = 64;
/// Bytes of a chunk.
pub const CHUNK: usize = PAGE * CHUNK_PAGES;
/// Most bytes of the state.
pub const MAX_STATE: u64 = 64 << 20;
/// Most bytes of memory.
pub const MAX_MEMORY: u64 = 1 << 42;
/// Most copied disks.
pub const MAX_DISKS: usize = 32;
/// Most snapshots in a chain.
pub const MAX_CHAIN: usize = 64;

/// Names one snapshot among all; never zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId(pub [u8; 16]);

impl SnapshotId {
    /// A new one.
    pub fn random() -> std::io::Result<SnapshotId> {
        let mut id = [0; 16];
        crate::snapshot::random::fill(&mut id)?;
        // One of 2^128; it would read as none.
        id[15] |= u8::from(id == [0; 16]);
        Ok(SnapshotId(id))
    }

    /// From its 32 hexadecimal digits.
    pub fn parse(text: &str) -> Option<SnapshotId> {
        let (digits, rest) = text.as_bytes().as_chunks::<2>();
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let mut id = [0; 16];
        if digits.len() != id.len() || !rest.is_empty() {
            return None;
        }
        for (byte, [high, low]) in id.iter_mut().zip(digits) {
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        SnapshotId::from_bytes(id)
    }

    /// `None` for all zeros.
    fn from_bytes(bytes: [u8; 16]) -> Option<SnapshotId> {
        (bytes != [0; 16]).then_some(SnapshotId(bytes))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
