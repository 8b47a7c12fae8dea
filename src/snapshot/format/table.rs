//! The table of chunks at the end of `memory`.
//!
//! ```text
//!  0  magic "CBCHUNKS"      entry:  0  pages this snapshot speaks for
//!  8  snapshot id                   8  pages of these with bytes in the file
//! 24  number of entries            16  CRC-64 of these bytes
//! 32  reserved, zero
//! 64  entries
//! ```

use super::checksum::crc64;
use super::{CHUNK, Fault, SnapshotId};

/// First bytes of the table.
const MAGIC: [u8; 8] = *b"CBCHUNKS";
/// Bytes before the entries.
pub const HEADER: usize = 64;
/// Bytes of an entry.
pub const ENTRY: usize = 24;

/// One chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// A bit for each page that this snapshot says something about.
    pub own: u64,
    /// Those of them that have bytes in the file; the others are zero.
    pub data: u64,
    /// Of the bytes of the pages with data, one after the other.
    pub crc: u64,
}

impl Entry {
    /// A chunk about which nothing is said.
    pub fn absent() -> Entry {
        Entry { own: 0, data: 0, crc: crc64(&[]) }
    }

    /// A chunk of zeros.
    pub fn zero() -> Entry {
        Entry { own: u64::MAX, ..Entry::absent() }
    }
}

/// Bytes of the table of `memory` bytes of RAM.
pub fn len(memory: u64) -> u64 {
    HEADER as u64 + memory / CHUNK as u64 * ENTRY as u64
}

/// The table as it is on disk.
pub fn encode(id: SnapshotId, entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + entries.len() * ENTRY);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&id.0);
    out.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    out.resize(HEADER, 0);
    for entry in entries {
        for word in [entry.own, entry.data, entry.crc] {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }
    out
}

/// Checks `bytes`, the whole table, against its checksum `wanted`, and decodes it.
/// `partial` is whether it may leave pages to a parent.
pub fn decode(
    bytes: &[u8],
    id: SnapshotId,
    wanted: u64,
    partial: bool,
) -> Result<Vec<Entry>, Fault> {
    let header = bytes.get(..HEADER).unwrap_or_default();
    if !header.starts_with(&MAGIC) {
        return Err(Fault::Foreign("memory"));
    }
    let mut carried = [0; 16];
    carried.copy_from_slice(&header[8..24]);
    if carried != id.0 {
        let found = SnapshotId(carried);
        return Err(Fault::Mismatched { file: "memory", found, wanted: id });
    }
    let found = crc64(bytes);
    if found != wanted {
        let what = "the table of memory chunks".to_string();
        return Err(Fault::Checksum { what, found, wanted });
    }
    let (entries, rest) = bytes[HEADER..].as_chunks::<ENTRY>();
    let count = u64::from_le_bytes(*header[24..].first_chunk().unwrap_or(&[0; 8]));
    if !rest.is_empty() || count != entries.len() as u64 {
        return Err(Fault::Value { what: "the number of memory chunks", value: count });
    }
    entries.iter().map(|entry| decode_entry(entry, partial)).collect()
}

fn decode_entry(bytes: &[u8; ENTRY], partial: bool) -> Result<Entry, Fault> {
    let (words, _) = bytes.as_chunks::<8>();
    let [own, data, crc] = [words[0], words[1], words[2]].map(u64::from_le_bytes);
    if data & !own != 0 {
        return Err(Fault::Value { what: "a chunk's set of pages with data", value: data });
    }
    if !partial && own != u64::MAX {
        return Err(Fault::Value { what: "a chunk's set of pages", value: own });
    }
    if data == 0 && crc != crc64(&[]) {
        return Err(Fault::Value { what: "an empty chunk's checksum", value: crc });
    }
    Ok(Entry { own, data, crc })
}

/// The runs of set bits of `pages`: first page and number of pages.
pub fn runs(pages: u64) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = pages.checked_shr(at).unwrap_or(0);
        if left == 0 {
            return None;
        }
        let start = at + left.trailing_zeros();
        let len = (pages >> start).trailing_ones();
        at = start + len;
        Some((start as usize, len as usize))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SnapshotId = SnapshotId([7; 16]);

    #[test]
    fn runs_are_those_of_the_bits() {
        let of = |pages| runs(pages).collect::<Vec<_>>();
        assert_eq!(of(0), []);
        assert_eq!(of(1), [(0, 1)]);
        assert_eq!(of(u64::MAX), [(0, 64)]);
        assert_eq!(of(1 << 63), [(63, 1)]);
        assert_eq!(of(0b1_0110_0111), [(0, 3), (5, 2), (8, 1)]);
        assert_eq!(of(!(1 << 40)), [(0, 40), (41, 23)]);
    }

    #[test]
    fn a_table_comes_back() {
        let entries = [Entry::zero(), Entry { own: u64::MAX, data: 5, crc: 9 }];
        let bytes = encode(ID, &entries);
        assert_eq!(bytes.len() as u64, len(2 * CHUNK as u64));
        let again = decode(&bytes, ID, crc64(&bytes), false).unwrap();
        assert_eq!(again, entries);
    }

    #[test]
    fn tables_that_cannot_be_are_refused() {
        let refused = |entry| {
            let bytes = encode(ID, &[entry]);
            decode(&bytes, ID, crc64(&bytes), false).unwrap_err()
        };
        assert!(matches!(refused(Entry::absent()), Fault::Value { .. }));
        assert!(matches!(refused(Entry { crc: 1, ..Entry::zero() }), Fault::Value { .. }));
        let beyond = Entry { own: 1, data: 2, crc: 0 };
        assert!(matches!(refused(beyond), Fault::Value { .. }));
        assert!(matches!(decode(&[], ID, crc64(&[]), false), Err(Fault::Foreign(_))));
        let mut short = encode(ID, &[Entry::zero(); 2]);
        short.truncate(HEADER + ENTRY);
        let cut = decode(&short, ID, crc64(&short), false);
        assert!(matches!(cut, Err(Fault::Value { .. })));
    }
}
