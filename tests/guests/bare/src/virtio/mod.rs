//! Virtio drivers, after the virtio 1.2 specification (sections 2.7, 4.2 and 5.2).

pub mod blk;
pub mod mmio;
pub mod queue;
