//! The features the device offers and its configuration space (virtio 1.2, 5.2.3 and 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

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
const NUM_QUEUES: usize = 34;

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
    ];
    if read_only {
        bits.push(VIRTIO_BLK_F_RO);
    }
    if queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    bits.into_iter().fold(0, |set, bit| set | 1 << bit)
}

/// The configuration space of a disk of `bytes` bytes. Nothing in it can be written.
pub(super) fn space(bytes: u64, queues: u16) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, value: &[u8]| space[at..at + value.len()].copy_from_slice(value);
    put(CAPACITY, &(bytes / SECTOR).to_le_bytes());
    put(SIZE_MAX_AT, &SIZE_MAX.to_le_bytes());
    put(SEG_MAX_AT, &SEG_MAX.to_le_bytes());
    put(BLK_SIZE, &(SECTOR as u32).to_le_bytes());
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
        assert_eq!(features(true, 1) ^ plain, 1 << VIRTIO_BLK_F_RO);
        assert_eq!(features(false, 2) ^ plain, 1 << VIRTIO_BLK_F_MQ);
    }

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let space = space(1 << 20, 4);
        assert_eq!(space[..8], 2048u64.to_le_bytes());
        assert_eq!(space[8..12], (4u32 << 20).to_le_bytes());
        assert_eq!(space[12..16], 254u32.to_le_bytes());
        assert_eq!(space[20..24], 512u32.to_le_bytes());
        assert_eq!(space[34..36], 4u16.to_le_bytes());
        assert!(space[36..].iter().all(|b| *b == 0));
    }

    #[test]
    fn a_request_of_full_segments_is_one_system_call() {
        const MAX_RW_COUNT: u64 = 0x7fff_f000;
        assert!(u64::from(SEG_MAX) * u64::from(SIZE_MAX) <= MAX_RW_COUNT);
    }
}
