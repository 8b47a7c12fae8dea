//! Which chunks were touched first, in order: kept beside the snapshot for the next restore.
//!
//! ```text
//!  0  magic "CBTOUCH\n"      24  number of chunks (u64)
//!  8  snapshot id            32  chunks (u32 each), then the checksum of all before
//! ```
//!
//! It is advice. A record that is missing, damaged or of another snapshot is as good as
//! none; one that is good is left as it is.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::snapshot::format::checksum::crc64;
use crate::snapshot::format::{Chain, SnapshotId};

const NAME: &str = "touch";
const MAGIC: [u8; 8] = *b"CBTOUCH\n";
const HEADER: usize = 32;
/// Most chunks recorded: 1 GiB touched.
const MOST: usize = 4096;

/// The record of one restore.
#[derive(Debug)]
pub(super) struct Record {
    id: SnapshotId,
    /// Where to keep it; none where there is a good one, or no way to write.
    file: Option<File>,
    order: Vec<u32>,
    touched: Vec<u32>,
}

impl Record {
    /// Reads the record of `chain`'s snapshot, or prepares to make it.
    pub(super) fn open(chain: &Chain) -> Record {
        let id = chain.manifest().id;
        let path = chain.snapshot().path().join(NAME);
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let open = |more| open(&path, flags | more, Mode::S_IRUSR | Mode::S_IWUSR);
        let mut record = Record { id, file: None, order: Vec::new(), touched: Vec::new() };
        if let Ok(fd) = open(OFlag::O_RDONLY)
            && let Some(order) = read(&File::from(fd), id)
        {
            record.order = order;
            return record;
        }
        let writable = open(OFlag::O_RDWR | OFlag::O_CREAT).map(File::from);
        let regular = |file: &File| file.metadata().is_ok_and(|data| data.is_file());
        record.file = writable.ok().filter(regular);
        record
    }

    /// The order to prefetch in, the first chunk last.
    pub(super) fn take_order(&mut self) -> Vec<u32> {
        let mut order = std::mem::take(&mut self.order);
        order.reverse();
        order
    }

    /// Somebody waited for chunk `index`.
    pub(super) fn touched(&mut self, index: usize) {
        if self.file.is_some() && self.touched.len() < MOST {
            self.touched.extend(u32::try_from(index));
        }
    }

    /// Keeps what was recorded.
    pub(super) fn keep(&mut self) {
        if let Some(file) = self.file.take() {
            // A record that is not whole does not check, and is made again.
            let _ = file.write_all_at(&encode(self.id, &self.touched), 0);
        }
    }
}

fn encode(id: SnapshotId, chunks: &[u32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + chunks.len() * 4 + 8);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&id.0);
    out.extend_from_slice(&(chunks.len() as u64).to_le_bytes());
    chunks.iter().for_each(|chunk| out.extend_from_slice(&chunk.to_le_bytes()));
    let crc = crc64(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

fn read(file: &File, id: SnapshotId) -> Option<Vec<u32>> {
    let data = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let most = (HEADER + MOST * 4 + 8) as u64;
    let mut bytes = vec![0; data.len().min(most) as usize];
    file.read_exact_at(&mut bytes, 0).ok()?;
    decode(&bytes, id)
}

fn decode(bytes: &[u8], id: SnapshotId) -> Option<Vec<u32>> {
    let header = bytes.get(..HEADER)?;
    let count = u64::from_le_bytes(*header[24..].first_chunk()?);
    let count = usize::try_from(count).ok().filter(|count| *count <= MOST)?;
    // A longer one that was there before may be left behind it.
    let bytes = bytes.get(..HEADER + count * 4 + 8)?;
    let (body, crc) = bytes.split_last_chunk::<8>()?;
    let whole = header.starts_with(&MAGIC)
        && header[8..24] == id.0
        && u64::from_le_bytes(*crc) == crc64(body);
    let (chunks, _) = body[HEADER..].as_chunks::<4>();
    whole.then(|| chunks.iter().map(|chunk| u32::from_le_bytes(*chunk)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SnapshotId = SnapshotId([4; 16]);

    #[test]
    fn a_record_comes_back_or_is_as_good_as_none() {
        let bytes = encode(ID, &[5, 0, 900]);
        assert_eq!(decode(&bytes, ID), Some(vec![5, 0, 900]));
        assert_eq!(decode(&bytes, SnapshotId([5; 16])), None);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(decode(&damaged, ID), None, "byte {at}");
            assert_eq!(decode(&bytes[..at], ID), None, "{at} bytes");
        }
        let mut huge = bytes;
        huge[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(decode(&huge, ID), None);
    }
}
