//! The register file of a virtio-mmio device: what a driver wrote, and what it
//! reads back. It knows no device process; the status machine in front of it does.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;

use serde::{Deserialize, Serialize};

use crate::transport::queue::{QUEUE_SIZE_MAX, QueueConfig};

pub(super) const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
pub(super) const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
pub(super) const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;

const MAGIC: u32 = 0x7472_6976; // "virt"
const VERSION: u32 = 2;
const VENDOR: u32 = 0x4c4c_4243; // "CBLL"

/// What the driver wrote since the last reset.
#[derive(Debug, Default)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) driver_features: u64,
    pub(super) queues: Vec<QueueConfig>,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    config_changed: bool,
    generation: u32,
}

impl Registers {
    /// The registers of a device with so many queues, as after a reset.
    pub(super) fn new(queues: usize) -> Registers {
        Registers { queues: vec![QueueConfig::default(); queues], ..Registers::default() }
    }

    /// A reset. The generation goes on: a driver that read half of the configuration
    /// before must see that it changed.
    pub(super) fn reset(&mut self) {
        let generation = self.generation;
        *self = Registers { generation, ..Registers::new(self.queues.len()) };
    }

    /// The value at `offset` of a device that offers `features`. The device's type is
    /// not ours to know.
    pub(super) fn read(&self, offset: u32, features: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_sel {
                0 => features as u32,
                1 => (features >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |_| u32::from(QUEUE_SIZE_MAX)),
            reg::VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |q| u32::from(q.ready)),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => {
                reg::VIRTIO_MMIO_INT_VRING
                    | if self.config_changed { reg::VIRTIO_MMIO_INT_CONFIG } else { 0 }
            }
            reg::VIRTIO_MMIO_STATUS => self.status,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.generation,
            // No shared memory regions: length and base read as all ones.
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// A write to any register but the status. `changing`: the device process is being
    /// told of a status change, for which the queues stay what they are.
    pub(super) fn write(&mut self, offset: u32, value: u32, changing: bool) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            reg::VIRTIO_MMIO_INTERRUPT_ACK if value & reg::VIRTIO_MMIO_INT_CONFIG != 0 => {
                self.config_changed = false;
            }
            _ if !changing => self.write_queue(offset, value),
            _ => {}
        }
    }

    /// Fixed once the driver said it was done (virtio 1.2 section 3.1.1).
    fn accept_features(&mut self, value: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    /// Queue registers count only between FEATURES_OK and DRIVER_OK: rings are
    /// neither moved nor resized while they are live.
    fn write_queue(&mut self, offset: u32, value: u32) {
        let setting_up = self.status & FEATURES_OK != 0
            && self.status & VIRTIO_CONFIG_S_DRIVER != 0
            && self.status & (DRIVER_OK | NEEDS_RESET) == 0;
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize).filter(|_| setting_up)
        else {
            return;
        };
        if offset == reg::VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value == 1;
            return;
        }
        if queue.ready {
            return;
        }
        match offset {
            // An absurd size is kept as 0, which no activation accepts.
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.desc, value),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.desc, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// The status that a write of `value`, not 0, asks for, of a device that offers
    /// `features`. A driver may only add bits (virtio 1.2 section 2.1.1), so none is
    /// taken away: without a reset no live queue is set up a second time. NEEDS_RESET
    /// is not the driver's, and FEATURES_OK is refused by not being taken.
    pub(super) fn asked_status(&self, value: u32, features: u64) -> u32 {
        let mut added = value & 0xff & !NEEDS_RESET & !self.status;
        if self.driver_features & !features != 0
            || self.driver_features & 1 << VIRTIO_F_VERSION_1 == 0
        {
            added &= !FEATURES_OK;
        }
        self.status | added
    }

    /// Sets NEEDS_RESET; true if the driver has to be interrupted for it, because it
    /// runs (virtio 1.2 section 2.1.2).
    pub(super) fn needs_reset(&mut self) -> bool {
        self.status |= NEEDS_RESET;
        if self.status & DRIVER_OK == 0 {
            return false;
        }
        self.config_changed = true;
        self.generation = self.generation.wrapping_add(1);
        true
    }
}

fn set_low(word: &mut u64, value: u32) {
    *word = *word & !0xffff_ffff | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = *word & 0xffff_ffff | u64::from(value) << 32;
}

/// A virtio-mmio device between two accesses of its driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Feature bits the device offered.
    pub features: u64,
    /// The configuration space, with what the driver wrote to it.
    pub config: Vec<u8>,
    /// Queues, with the position of each that was running.
    pub queues: Vec<QueueState>,
    /// Device status.
    pub status: u32,
    pub(super) driver_features: u64,
    selectors: [u32; 3],
    config_changed: bool,
    generation: u32,
}

/// One queue of a [`TransportState`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// As the driver set it up.
    pub config: QueueConfig,
    /// The first available entry not taken; `None` for a queue that did not run.
    pub base: Option<u16>,
}

impl Registers {
    /// The state, less what the registers do not know.
    pub(super) fn save(&self) -> TransportState {
        TransportState {
            features: 0,
            config: Vec::new(),
            queues: self.queues.iter().map(|q| QueueState { config: *q, base: None }).collect(),
            status: self.status,
            driver_features: self.driver_features,
            selectors: [self.device_features_sel, self.driver_features_sel, self.queue_sel],
            config_changed: self.config_changed,
            generation: self.generation,
        }
    }

    /// Registers that go on from `state`, of a device that offers `features` and has as
    /// many queues as this one. `None` where no driver could have brought them there.
    pub(super) fn load(&self, state: &TransportState, features: u64) -> Option<Registers> {
        let [device_features_sel, driver_features_sel, queue_sel] = state.selectors;
        let agreed = state.status & FEATURES_OK == 0 || state.driver_features & !features == 0;
        (state.queues.len() == self.queues.len() && state.status <= 0xff && agreed).then(|| {
            Registers {
                status: state.status,
                driver_features: state.driver_features,
                queues: state.queues.iter().map(|queue| queue.config).collect(),
                device_features_sel,
                driver_features_sel,
                queue_sel,
                config_changed: state.config_changed,
                generation: state.generation,
            }
        })
    }
}
