//! Which chunks were touched first, in order: kept beside the snapshot for the next restore.
//!
//! ```text
//!  0  magic "CBTOUCH\n"      24  number of chunks (u64)
//!  8  snapshot id            32  chunks (u32 each), then the checksum of all before
//! ```
//!
//! It is advice. A record that is missing, empty, damaged or of another snapshot is as good as
//! none; one that is good is left as it is.
//!
//! One guest decides what all that come after it find in memory, so what it can decide is bounded:
//! the first moment of its run, and [`most`] chunks.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::snapshot::format::checksum::crc64;
use crate::snapshot::format::{Chain, SnapshotId};

const NAME: &str = "touch";
const MAGIC: [u8; 8] = *b"CBTOUCH\n";
const HEADER: usize = 32;
/// Most chunks recorded: 64 MiB, which come in some 50 ms, and are held by every shell of a pool.
const MOST: usize = 256;
/// So many may be recorded of the smallest guest.
const FEW: usize = 16;
/// Of a guest's memory a restore that brought this part early would not be a lazy one.
const PART: usize = 8;

/// Most chunks that a record of a guest with `chunks` of them may name.
fn most(chunks: usize) -> usize {
    (chunks / PART).clamp(FEW, MOST)
}

/// The record of one restore.
#[derive(Debug)]
pub(super) struct Record {
    id: SnapshotId,
    most: usize,
    /// Where to keep it; none where there is a good one, or no way to write.
    file: Option<File>,
    order: Vec<u32>,
    touched: Vec<u32>,
}

impl Record {
    /// Reads the record of `chain`'s snapshot, or prepares to make it.
    pub(super) fn open(chain: &Chain) -> Record {
        let (id, most) = (chain.manifest().id, most(chain.chunks()));
        let path = chain.snapshot().path().join(NAME);
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let open = |more| open(&path, flags | more, Mode::S_IRUSR | Mode::S_IWUSR);
        let mut record = Record { id, most, file: None, order: Vec::new(), touched: Vec::new() };
        if let Ok(fd) = open(OFlag::O_RDONLY)
            && let Some(order) = read(&File::from(fd), id, most)
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

    /// Whether anything is recorded.
    pub(super) fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// Somebody waited for chunk `index`.
    pub(super) fn touched(&mut self, index: usize) {
        if self.file.is_some() && self.touched.len() < self.most {
            self.touched.extend(u32::try_from(index));
        }
    }

    /// Keeps what was recorded, unless another VM has kept something meanwhile: many that were
    /// restored before there was a record end after it was made.
    pub(super) fn keep(&mut self) {
        if let Some(file) = self.file.take()
            && !self.touched.is_empty()
            && read(&file, self.id, self.most).is_none()
        {
            // A record that is not whole does not check, and is made again.
            let _ = file.write_all_at(&encode(self.id, &self.touched), 0);
        }
    }

    /// Records nothing more, and keeps nothing.
    pub(super) fn forget(&mut self) {
        self.file = None;
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

fn read(file: &File, id: SnapshotId, most: usize) -> Option<Vec<u32>> {
    let mut bytes = vec![0; HEADER + most * 4 + 8];
    let mut len = 0;
    while len < bytes.len() {
        match file.read_at(&mut bytes[len..], len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    decode(&bytes[..len], id, most)
}

fn decode(bytes: &[u8], id: SnapshotId, most: usize) -> Option<Vec<u32>> {
    let header = bytes.get(..HEADER)?;
    let count = u64::from_le_bytes(*header[24..].first_chunk()?);
    let count = usize::try_from(count).ok().filter(|count| (1..=most).contains(count))?;
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
        let decode = |bytes: &[u8], id| super::decode(bytes, id, 3);
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
        assert_eq!(decode(&encode(ID, &[]), ID), None, "an empty one says nothing");
        assert_eq!(decode(&encode(ID, &[1, 2, 3, 4]), ID), None, "one is too long");
    }

    #[test]
    fn the_first_record_stays_and_an_empty_one_is_none() {
        let file = tempfile::tempfile().expect("file");
        let record = |touched: &[usize]| {
            let file = Some(file.try_clone().expect("file"));
            let mut record =
                Record { id: ID, most: 3, file, order: Vec::new(), touched: Vec::new() };
            touched.iter().for_each(|index| record.touched(*index));
            record
        };
        // All of them were begun when there was none.
        let (mut none, mut first, mut late) = (record(&[]), record(&[7, 8, 9, 10]), record(&[1]));
        none.keep();
        assert_eq!(read(&file, ID, 3), None);
        first.keep();
        assert_eq!(read(&file, ID, 3), Some(vec![7, 8, 9]), "no more than there may be");
        late.keep();
        assert_eq!(read(&file, ID, 3), Some(vec![7, 8, 9]));
        assert_eq!((most(8), most(1024), most(1 << 20)), (FEW, 128, MOST));
    }
}
