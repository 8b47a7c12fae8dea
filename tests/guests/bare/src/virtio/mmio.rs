//! The virtio-mmio transport, version 2.

use crate::arch::cpu::{mmio_read8, mmio_read32, mmio_write8, mmio_write32};
use crate::cmdline::MmioDevice;
use crate::virtio::queue::Queue;

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_AVAILABLE: u64 = 0x090;
const QUEUE_USED: u64 = 0x0a0;
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// The device has given up and waits for a reset.
pub const NEEDS_RESET: u32 = 64;

/// The device follows version 1 of the specification.
pub const FEATURE_VERSION_1: u64 = 1 << 32;

/// A device's registers.
#[derive(Clone, Copy)]
pub struct Transport {
    base: u64,
    /// Its interrupt line.
    pub line: u32,
}

impl Transport {
    /// The device at this place, if one of the given type is there; fails the guest when something
    /// is there that is not virtio-mmio version 2.
    pub fn find(place: MmioDevice, device_id: u32) -> Option<Self> {
        let base = place.address;
        let (magic, version) = (mmio_read32(base + MAGIC), mmio_read32(base + VERSION));
        if magic != 0x7472_6976 || version != 2 {
            crate::exit::fail(format_args!(
                "no virtio-mmio device at {base:#x}: magic {magic:#x} version {version}"
            ));
        }
        (mmio_read32(base + DEVICE_ID) == device_id).then_some(Self { base, line: place.line })
    }

    /// Resets the device and negotiates: `wanted` as far as the device has it. Returns what holds.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        self.reset();
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.write(DEVICE_FEATURES_SELECT, half);
            offered |= u64::from(self.read(DEVICE_FEATURES)) << (32 * half);
        }
        let features = offered & (wanted | FEATURE_VERSION_1);
        for half in 0..2 {
            self.write(DRIVER_FEATURES_SELECT, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if features & FEATURE_VERSION_1 == 0 || self.read(STATUS) & FEATURES_OK == 0 {
            crate::exit::fail(format_args!(
                "the device at {:#x} offers {offered:#x} and refuses {features:#x}",
                self.base
            ));
        }
        features
    }

    /// Resets the device and waits until it is.
    pub fn reset(&self) {
        self.write(STATUS, 0);
        while self.read(STATUS) != 0 {}
    }

    /// The most entries a queue may have; 0 when there is no such queue.
    pub fn queue_size_max(&self, index: u32) -> u16 {
        self.write(QUEUE_SELECT, index);
        self.read(QUEUE_SIZE_MAX) as u16
    }

    /// Hands a queue to the device.
    pub fn set_queue(&self, index: u32, queue: &Queue) {
        self.write(QUEUE_SELECT, index);
        if self.read(QUEUE_READY) != 0 {
            crate::exit::fail(format_args!("queue {index} is ready after a reset"));
        }
        self.write(QUEUE_SIZE, u32::from(queue.size()));
        let (descriptors, available, used) = queue.addresses();
        for (register, address) in
            [(QUEUE_DESCRIPTORS, descriptors), (QUEUE_AVAILABLE, available), (QUEUE_USED, used)]
        {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
    }

    /// Tells the device that the driver is ready.
    pub fn start(&self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// The device status register.
    pub fn status(&self) -> u32 {
        self.read(STATUS)
    }

    /// Tells the device that a queue has something new.
    pub fn notify(&self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    /// Reads and acknowledges why the device interrupted.
    pub fn acknowledge(&self) -> u32 {
        let status = self.read(INTERRUPT_STATUS);
        if status != 0 {
            self.write(INTERRUPT_ACK, status);
        }
        status
    }

    /// A 32-bit field of the configuration.
    pub fn config32(&self, offset: u64) -> u32 {
        self.read(CONFIG + offset)
    }

    /// Writes a byte of the configuration.
    pub fn set_config8(&self, offset: u64, value: u8) {
        mmio_write8(self.base + CONFIG + offset, value);
    }

    /// A byte of the configuration.
    pub fn config8(&self, offset: u64) -> u8 {
        mmio_read8(self.base + CONFIG + offset)
    }

    /// A 64-bit field of the configuration, both halves of one generation.
    pub fn config64(&self, offset: u64) -> u64 {
        loop {
            let generation = self.read(CONFIG_GENERATION);
            let (low, high) = (self.config32(offset), self.config32(offset + 4));
            if self.read(CONFIG_GENERATION) == generation {
                return u64::from(high) << 32 | u64::from(low);
            }
        }
    }

    fn read(&self, register: u64) -> u32 {
        mmio_read32(self.base + register)
    }

    fn write(&self, register: u64, value: u32) {
        mmio_write32(self.base + register, value);
    }
}
