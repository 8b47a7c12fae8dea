//! The features the device offers and its configuration space (virtio 1.2, 5.2.3 and 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::clear;
use super::execute::Disk;

/// Bytes of a sector: the unit of the capacity and of a request's position and length.
pub(super) const SECTOR: u64 = 512;
/// Most entries of a queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Most data segments of a request: a whole queue but for header and status.
pub(super) const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes of a data segment. With [`SEG_MAX`] segments a request stays below
/// what Linux moves in one system call.
pub(super) const SIZE_MAX: u32 = 4 << 20;
/// Bytes of struct virtio_blk_config up to the last field of virtio 1.2 that is not
/// about zones; what a driver reads behind them is zero.
pub(super) const CONFIG_BYTES: usize = 60;

// Byte offsets in struct virtio_blk_config.
const CAPACITY: usize = 0;
const SIZE_MAX_AT: usize = 8;
const SEG_MAX_AT: usize = 12;
const BLK_SIZE: usize = 20;
const PHYSICAL_BLOCK_EXP: usize = 24;
const MIN_IO_SIZE: usize = 26;
/// Where the driver chooses between a write-back (1) and a write-through cache (0).
pub(super) const WRITEBACK: usize = 32;
const NUM_QUEUES: usize = 34;
const MAX_DISCARD_SECTORS: usize = 36;
const MAX_DISCARD_SEG: usize = 40;
const DISCARD_SECTOR_ALIGNMENT: usize = 44;
const MAX_WRITE_ZEROES_SECTORS: usize = 48;
const MAX_WRITE_ZEROES_SEG: usize = 52;
const WRITE_ZEROES_MAY_UNMAP: usize = 56;

/// True when `features` has the feature with bit number `bit`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// The virtio features offered.
pub(super) fn features(read_only: bool, queues: u16) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
    ];
    if read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_F_CONFIG_WCE]);
    }
    if queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    bits.into_iter().fold(0, |set, bit| set | 1 << bit)
}

/// The configuration space of a disk. Only its byte [`WRITEBACK`] can be written.
pub(super) fn space(disk: &Disk, queues: u16) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, value: &[u8]| space[at..at + value.len()].copy_from_slice(value);
    put(CAPACITY, &(disk.size / SECTOR).to_le_bytes());
    put(SIZE_MAX_AT, &SIZE_MAX.to_le_bytes());
    put(SEG_MAX_AT, &SEG_MAX.to_le_bytes());
    put(BLK_SIZE, &(SECTOR as u32).to_le_bytes());
    // What is smaller than a block of the file system costs it a read before the write.
    let blocks = disk.block_size / SECTOR as u32;
    put(PHYSICAL_BLOCK_EXP, &[blocks.ilog2() as u8]);
    put(MIN_IO_SIZE, &(blocks as u16).to_le_bytes());
    if !disk.read_only {
        put(WRITEBACK, &[1]);
        put(MAX_DISCARD_SECTORS, &clear::MAX_DISCARD_SECTORS.to_le_bytes());
        put(MAX_DISCARD_SEG, &clear::MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(DISCARD_SECTOR_ALIGNMENT, &blocks.to_le_bytes());
        put(MAX_WRITE_ZEROES_SECTORS, &clear::MAX_ZERO_SECTORS.to_le_bytes());
        put(MAX_WRITE_ZEROES_SEG, &clear::MAX_ZERO_SEGMENTS.to_le_bytes());
        put(WRITE_ZEROES_MAY_UNMAP, &[1]);
    }
    if queues > 1 {
        put(NUM_QUEUES, &queues.to_le_bytes());
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_follow_the_disk() {
        let plain = features(false, 1);
        assert!(!has(plain, VIRTIO_BLK_F_RO) && !has(plain, VIRTIO_BLK_F_MQ));
        assert!(has(plain, VIRTIO_F_VERSION_1) && has(plain, VIRTIO_BLK_F_FLUSH));
        let for_writing = 1 << VIRTIO_BLK_F_DISCARD
            | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        assert_eq!(features(true, 1) ^ plain, 1 << VIRTIO_BLK_F_RO | for_writing);
        assert_eq!(features(false, 2) ^ plain, 1 << VIRTIO_BLK_F_MQ);
    }

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let file = tempfile::tempfile().expect("file");
        let mut disk = Disk {
            file,
            size: 1 << 20,
            block_size: 4096,
            read_only: false,
            id: Default::default(),
            direct: None,
            overlay: None,
        };
        let space = super::space(&disk, 4);
        assert_eq!(space[..8], 2048u64.to_le_bytes());
        assert_eq!(space[8..12], (4u32 << 20).to_le_bytes());
        assert_eq!(space[12..16], 254u32.to_le_bytes());
        assert_eq!(space[20..24], 512u32.to_le_bytes());
        assert_eq!(space[34..36], 4u16.to_le_bytes());
        assert_eq!((space[24], space[25], space[32]), (3, 0, 1));
        assert_eq!(space[26..28], 8u16.to_le_bytes());
        assert_eq!(space[28..32], 0u32.to_le_bytes());
        for (at, value) in [(36, 1u32 << 22), (40, 32), (44, 8), (48, 1 << 16), (52, 4), (56, 1)] {
            assert_eq!(space[at..at + 4], value.to_le_bytes(), "field at {at}");
        }
        disk.read_only = true;
        assert!(super::space(&disk, 1)[32..].iter().all(|b| *b == 0));
    }

    #[test]
    fn a_request_of_full_segments_is_one_system_call() {
        const MAX_RW_COUNT: u64 = 0x7fff_f000;
        assert!(u64::from(SEG_MAX) * u64::from(SIZE_MAX) <= MAX_RW_COUNT);
    }
}
