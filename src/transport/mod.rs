//! How a guest's driver reaches a virtio device: the registers here, the rings
//! and the interrupt straight between the guest and the device process.
//!
//! | module | what it holds |
//! |---|---|
//! | [`mmio`] | the virtio-mmio register file, and with it the device status machine |
//! | [`front_end`] | the vhost-user front end: one thread per device, a deadline on every exchange |
//! | [`queue`] | what a driver said of a queue, checked |
//! | [`wait`] | how a vCPU waits for something without ever being out of a pause's reach |

pub mod front_end;
pub mod mmio;
pub mod queue;
#[cfg(test)]
mod script;
pub mod wait;
