//! What a driver told us about a virtqueue, checked before anyone believes it.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::vm::memory::GuestRam;

/// The largest queue a device offers (QueueNumMax).
pub const QUEUE_SIZE_MAX: u16 = 256;

/// A split virtqueue as the driver set it up: addresses are guest-physical.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueConfig {
    /// Entries: a power of two, at most [`QUEUE_SIZE_MAX`].
    pub size: u16,
    /// The driver set QueueReady.
    pub ready: bool,
    /// Descriptor table, 16 bytes an entry, aligned to 16.
    pub desc: u64,
    /// Avail ring, 6 bytes and 2 an entry, aligned to 2.
    pub avail: u64,
    /// Used ring, 6 bytes and 8 an entry, aligned to 4.
    pub used: u64,
}

/// A queue no device may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Not a power of two in range.
    #[error("queue size {0} is not a power of two from 1 to {QUEUE_SIZE_MAX}")]
    Size(u16),
    /// Virtio 1.2 section 2.7 fixes the alignments.
    #[error("{part} at {address:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Which part.
        part: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// The alignment it needs.
        align: u64,
    },
    /// A part lies, in whole or in part, outside one region of guest RAM.
    #[error("{part} at {address:#x} with {len} bytes is outside guest memory")]
    Outside {
        /// Which part.
        part: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// What a device that interprets the rings takes for a queue that is not set up.
    #[error("avail ring at address 0")]
    Nowhere,
    /// Two parts share bytes.
    #[error("{0} and {1} overlap")]
    Overlap(&'static str, &'static str),
}

impl QueueConfig {
    /// Checks size, alignment and bounds (virtio 1.2 section 2.7): every part lies in
    /// one region of guest RAM, and none in another. What is refused here is never shown to a
    /// back end, which could refuse it only by ending the connection.
    pub fn check(&self, ram: &GuestRam, features: u64) -> Result<(), QueueError> {
        if self.size == 0 || !self.size.is_power_of_two() || self.size > QUEUE_SIZE_MAX {
            return Err(QueueError::Size(self.size));
        }
        let n = u64::from(self.size);
        let parts = [
            ("descriptor table", self.desc, 16, 16 * n),
            ("avail ring", self.avail, 2, 6 + 2 * n),
            ("used ring", self.used, 4, 6 + 8 * n),
        ];
        for (part, address, align, len) in parts {
            if !address.is_multiple_of(align) {
                return Err(QueueError::Misaligned { part, address, align });
            }
            let inside = ram.regions().iter().any(|region| {
                address >= region.gpa
                    && address - region.gpa < region.len
                    && len <= region.len - (address - region.gpa)
            });
            if !inside {
                return Err(QueueError::Outside { part, address, len });
            }
        }
        if self.avail == 0 {
            return Err(QueueError::Nowhere);
        }
        // The event fields at the ends are only there where they were agreed on.
        let unused = if features & 1 << VIRTIO_RING_F_EVENT_IDX == 0 { 2 } else { 0 };
        let parts = parts.map(|(part, at, align, len)| {
            (part, at..at + len - if align < 16 { unused } else { 0 })
        });
        for (n, (a, one)) in parts.iter().enumerate() {
            if let Some((b, _)) =
                parts[..n].iter().find(|(_, other)| one.start < other.end && other.start < one.end)
            {
                return Err(QueueError::Overlap(b, a));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn good() -> QueueConfig {
        QueueConfig { size: 256, ready: true, desc: 0x1000, avail: 0x2000, used: 0x3000 }
    }

    #[test]
    fn only_whole_rings_inside_ram_are_accepted() {
        let ram = GuestRam::new(32 * MIB).expect("ram");
        let check = |queue: QueueConfig| queue.check(&ram, 1 << VIRTIO_RING_F_EVENT_IDX);
        assert_eq!(check(good()), Ok(()));
        for size in [0, 3, 512, u16::MAX] {
            assert_eq!(check(QueueConfig { size, ..good() }), Err(QueueError::Size(size)));
        }
        let bad = [
            QueueConfig { desc: 0x1008, ..good() },
            QueueConfig { avail: 0x2001, ..good() },
            QueueConfig { used: 0x3002, ..good() },
            QueueConfig { desc: 32 * MIB, ..good() },
            QueueConfig { desc: 32 * MIB - 16, ..good() },
            QueueConfig { avail: u64::MAX - 1, ..good() },
            QueueConfig { used: 32 * MIB - 6 - 8 * 256, ..good() },
        ];
        for queue in &bad[..6] {
            assert!(check(*queue).is_err(), "{queue:x?}");
        }
        // The last one ends exactly at the end of RAM, but for its alignment.
        assert_eq!(bad[6].used % 4, 2);
        assert!(check(QueueConfig { used: 32 * MIB - 8 - 8 * 256, ..good() }).is_ok());
    }

    #[test]
    fn parts_that_overlap_are_refused() {
        let ram = GuestRam::new(32 * MIB).expect("ram");
        let event_idx = 1 << VIRTIO_RING_F_EVENT_IDX;
        let overlap = |a, b| Err(QueueError::Overlap(a, b));
        let (table, avail, used) = ("descriptor table", "avail ring", "used ring");
        for (queue, features, wanted) in [
            (QueueConfig { avail: 0x1000, ..good() }, 0, overlap(table, avail)),
            (QueueConfig { avail: 0x1ffe, ..good() }, 0, overlap(table, avail)),
            (QueueConfig { used: 0x1ffc, ..good() }, 0, overlap(table, used)),
            (QueueConfig { used: 0x2200, ..good() }, 0, overlap(avail, used)),
            // 4 bytes and 256 entries of 2; with the event field that is 2 more.
            (QueueConfig { used: 0x2204, ..good() }, 0, Ok(())),
            (QueueConfig { used: 0x2204, ..good() }, event_idx, overlap(avail, used)),
            (QueueConfig { used: 0x2208, ..good() }, event_idx, Ok(())),
            (QueueConfig { avail: 0, ..good() }, 0, Err(QueueError::Nowhere)),
        ] {
            assert_eq!(queue.check(&ram, features), wanted, "{queue:x?}");
        }
    }
}
