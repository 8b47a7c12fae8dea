//! What a VM is told about itself: who it is, what it is for, and random bytes of its own.
//!
//! Clones of one snapshot wake up with the same memory, and so with the same names, the same
//! plans and the same random numbers to come. So there is a block behind the generation id, in
//! the same page, that is new in each life of a VM, and complete before its first instruction:
//!
//! | guest-physical | bytes | holds |
//! |---|---|---|
//! | `0xf0000` | 16 | VM generation id |
//! | `0xf0040` | 8 | `CBMETA`, 0, version 1 |
//! | `0xf0048` | 4 | bytes of data |
//! | `0xf0050` | 8 | real time, in nanoseconds since the Unix epoch |
//! | `0xf0060` | 16 | id of the VM |
//! | `0xf0080` | 64 | random bytes |
//! | `0xf0100` | 0 to 3840 | data of whoever claimed it from a pool |
//!
//! Numbers are little-endian; what the table leaves out is zero. The page is no memory to the
//! guest's system (e820 says reserved): root reads it in `/dev/mem`, a bare guest as it is.

use super::layout::VMGENID;
use super::memory::{GuestRam, MemoryError};

/// Where the block is.
pub const METADATA: u64 = VMGENID + 0x40;
/// Most bytes of data.
pub const MAX_DATA: usize = 0xf00;

const MAGIC: [u8; 8] = *b"CBMETA\0\x01";
/// From the block's start to the data.
const HEADER: usize = 0x100 - 0x40;
/// All that is ever written.
const BLOCK: usize = HEADER + MAX_DATA;

/// What the block holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Of the VM.
    pub id: [u8; 16],
    /// Nobody else's.
    pub random: [[u8; 32]; 2],
    /// Nanoseconds since the Unix epoch.
    pub real_ns: u64,
    /// Of whoever claimed it, at most [`MAX_DATA`] bytes; more is cut off.
    pub data: Vec<u8>,
}

impl Metadata {
    /// Puts it in its place, and nothing of an earlier one is left. The guest does not run.
    pub fn write(&self, ram: &GuestRam) -> Result<(), MemoryError> {
        ram.write(METADATA, &self.block())
    }

    fn block(&self) -> Vec<u8> {
        let data = &self.data[..self.data.len().min(MAX_DATA)];
        let mut block = vec![0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &MAGIC);
        put(0x08, &(data.len() as u32).to_le_bytes());
        put(0x10, &self.real_ns.to_le_bytes());
        put(0x20, &self.id);
        put(0x40, &self.random[0]);
        put(0x60, &self.random[1]);
        put(HEADER, data);
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn everything_is_where_the_table_says() {
        let ram = GuestRam::new(32 << 20).expect("memory");
        let at = |address: u64| ram.memory().read_obj::<u64>(GuestAddress(address)).expect("read");
        ram.write(VMGENID, &[7; 16]).expect("write");
        let long = Metadata { data: vec![b'x'; MAX_DATA + 9], ..Metadata::default() };
        long.write(&ram).expect("written");
        assert_eq!(at(0xf0048), MAX_DATA as u64);
        assert_eq!(at(0xf0ff8), u64::from_le_bytes([b'x'; 8]));
        assert_eq!(at(0xf1000), 0, "beyond the page");

        let data = b"do this".to_vec();
        let other = Metadata { id: [1; 16], random: [[2; 32], [3; 32]], real_ns: 4, data };
        other.write(&ram).expect("written");
        assert_eq!(at(0xf0000), u64::from_le_bytes([7; 8]), "the generation id");
        assert_eq!(at(0xf0040).to_le_bytes(), MAGIC);
        assert_eq!((at(0xf0048), at(0xf0050)), (7, 4));
        assert_eq!(at(0xf0060), u64::from_le_bytes([1; 8]));
        assert_eq!(at(0xf0078), 0);
        assert_eq!(
            (at(0xf0080), at(0xf00a0)),
            (u64::from_le_bytes([2; 8]), u64::from_le_bytes([3; 8]))
        );
        assert_eq!(at(0xf0100).to_le_bytes(), *b"do this\0");
        assert_eq!(at(0xf0ff8), 0, "of an earlier one");
    }
}
