//! virtio-mmio, version 2 (virtio 1.2 section 4.2), in front of a vhost-user
//! device process.
//!
//! The registers and the status machine are here, in the VMM. Notifications are
//! ioeventfds and interrupts irqfds that the device process holds, so neither
//! comes by. InterruptStatus always shows the used-buffer bit, since a driver
//! looks at the ring anyway and only the device process knows; the
//! configuration bit is ours, set before the line is raised. InterruptACK of the
//! used-buffer bit alone is swallowed by an ioeventfd.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::EventFd;

use super::front_end::{
    Activation, Answer, DEADLINE, DeviceInfo, FrontEnd, FrontEndError, QueueSetup,
};
use super::queue::{QUEUE_SIZE_MAX, QueueConfig, QueueError};
use super::wait::{Completion, Waited};
use crate::bus::{BusDevice, Outcome};
use crate::event;
use crate::throttle::Throttle;
use crate::vcpu::Kicks;
use crate::vm::memory::GuestRam;

/// Offset of QueueNotify.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Offset of InterruptACK.
pub const INTERRUPT_ACK: u64 = 0x64;
/// Bytes of a device's register window.
pub const WINDOW: u64 = 0x1000;

const MAGIC: u32 = 0x7472_6976; // "virt"
const VERSION: u32 = 2;
const VENDOR: u32 = 0x4c4c_4243; // "CBLL"
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;

/// An activation that never reached the device process.
#[derive(Debug, thiserror::Error)]
enum ActivateError {
    #[error("queue {index} set up by the driver")]
    Queue {
        index: usize,
        #[source]
        source: QueueError,
    },
    #[error("the driver set no queue up")]
    NoQueue,
}

/// What a device is, and what its process said of it.
#[derive(Debug)]
pub struct Identity {
    /// Unique in the VM.
    pub id: String,
    /// VIRTIO_ID_*.
    pub device_type: u32,
    /// From the process.
    pub info: DeviceInfo,
}

/// The events between guest and device process.
#[derive(Debug)]
pub struct Wiring {
    /// Rung by the guest, one a queue.
    pub kicks: Vec<Arc<EventFd>>,
    /// Raises the device's interrupt line.
    pub call: Arc<EventFd>,
    /// Rung by the process when it gives a queue up.
    pub err: Arc<EventFd>,
}

/// A virtio device as its driver sees it.
pub struct VirtioMmio {
    id: String,
    device_type: u32,
    info: DeviceInfo,
    ram: GuestRam,
    front_end: FrontEnd,
    wiring: Wiring,
    vcpu_kicks: Arc<Kicks>,
    registers: Mutex<Registers>,
    lines: Mutex<Throttle>,
}

#[derive(Default)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueConfig>,
    config_changed: bool,
    generation: u32,
    pending: Option<Pending>,
}

/// A status write that waits for the device process.
#[derive(Clone)]
struct Pending {
    vcpu: usize,
    change: Change,
    answer: Arc<Completion<Result<(), FrontEndError>>>,
}

#[derive(Clone, Copy)]
enum Change {
    DriverOk(u32),
    Reset,
}

impl VirtioMmio {
    /// A device behind `front_end`, for the vCPUs of `vcpu_kicks`.
    pub fn new(
        identity: Identity,
        front_end: FrontEnd,
        wiring: Wiring,
        ram: GuestRam,
        vcpu_kicks: Arc<Kicks>,
    ) -> VirtioMmio {
        let Identity { id, device_type, info } = identity;
        let queues = vec![QueueConfig::default(); wiring.kicks.len()];
        let registers = Mutex::new(Registers { queues, ..Registers::default() });
        let lines = Mutex::default();
        VirtioMmio { id, device_type, info, ram, front_end, wiring, vcpu_kicks, registers, lines }
    }

    /// The kick hook: a vCPU that waits for this device process stops waiting.
    pub fn kick(&self, vcpu: usize) {
        let registers = self.lock();
        if let Some(pending) = registers.pending.as_ref().filter(|p| p.vcpu == vcpu) {
            pending.answer.kick();
        }
    }

    /// Tells the driver that the device gave up: DEVICE_NEEDS_RESET and a
    /// configuration interrupt (virtio 1.2 section 2.1.2). False where that is known
    /// already, or no driver runs the device: a reset may have come first, and after
    /// one the status is 0.
    fn fail(&self) -> bool {
        let mut registers = self.lock();
        let starting =
            registers.pending.as_ref().is_some_and(|p| matches!(p.change, Change::DriverOk(_)));
        let runs = starting || registers.status & DRIVER_OK != 0;
        let news = runs && registers.status & NEEDS_RESET == 0;
        if news {
            self.needs_reset(&mut registers);
        }
        news
    }

    /// The device process is gone: nothing waits for it any longer.
    pub fn lost(&self) {
        self.front_end.abort();
        self.fail();
    }

    /// Rung when the device process gives a queue up. To be watched edge-triggered and
    /// never read: the process shares it, and can make any read of it block.
    pub fn err_event(&self) -> BorrowedFd<'_> {
        event::fd(&self.wiring.err)
    }

    /// The device process gave a queue up: the driver has to reset the device. False
    /// where that is nothing new.
    pub fn gave_up(&self) -> bool {
        let news = self.fail();
        if news && self.may_log() {
            tracing::warn!(
                device = self.id,
                "driver broke the rules of its queue; it has to reset the device"
            );
        }
        news
    }

    /// What a guest can cause as often as it likes is not logged as often.
    fn may_log(&self) -> bool {
        let left_out = self.lines.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(lines @ 1..) = left_out {
            tracing::warn!(
                device = self.id,
                "{lines} log lines were left out: there were too many"
            );
        }
        left_out.is_some()
    }

    /// Has the device process finish what it holds and stop, at the end of the VM.
    pub fn begin_drain(&self) -> Answer<()> {
        self.front_end.reset()
    }

    /// Waits until it has, up to the [`DEADLINE`] that began with `begun`.
    pub fn finish_drain(&self, begun: &Answer<()>) -> Result<(), FrontEndError> {
        self.front_end.wait(begun)
    }

    // Nothing that can panic runs under this lock but slice indexing that was
    // checked, so that a poisoned one is whole.
    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn needs_reset(&self, registers: &mut Registers) {
        registers.status |= NEEDS_RESET;
        if registers.status & DRIVER_OK != 0 {
            registers.config_changed = true;
            registers.generation = registers.generation.wrapping_add(1);
            let _ = self.wiring.call.write(1); // a full eventfd is an interrupt all the same
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let registers = self.lock();
        let queue = registers.queues.get(registers.queue_sel as usize);
        match offset as u32 {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device_type,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match registers.device_features_sel {
                0 => self.info.features as u32,
                1 => (self.info.features >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |_| u32::from(QUEUE_SIZE_MAX)),
            reg::VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |q| u32::from(q.ready)),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => {
                reg::VIRTIO_MMIO_INT_VRING
                    | if registers.config_changed { reg::VIRTIO_MMIO_INT_CONFIG } else { 0 }
            }
            reg::VIRTIO_MMIO_STATUS => registers.status,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => registers.generation,
            // No shared memory regions: length and base read as all ones.
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = usize::try_from(offset).ok().and_then(|at| self.info.config.get(at..));
        let config = config.unwrap_or_default();
        let len = data.len().min(config.len());
        data.fill(0);
        data[..len].copy_from_slice(&config[..len]);
    }

    fn write_register(&self, vcpu: usize, offset: u64, value: u32) -> Outcome {
        let offset = offset as u32;
        if offset == reg::VIRTIO_MMIO_STATUS {
            return self.write_status(vcpu, value);
        }
        let mut registers = self.lock();
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => {
                // Fixed once the driver said it was done (virtio 1.2 section 3.1.1).
                if registers.status & FEATURES_OK == 0 {
                    let features = registers.driver_features;
                    registers.driver_features = match registers.driver_features_sel {
                        0 => features & !0xffff_ffff | u64::from(value),
                        1 => features & 0xffff_ffff | u64::from(value) << 32,
                        _ => features,
                    };
                }
            }
            reg::VIRTIO_MMIO_QUEUE_SEL => registers.queue_sel = value,
            reg::VIRTIO_MMIO_INTERRUPT_ACK if value & reg::VIRTIO_MMIO_INT_CONFIG != 0 => {
                registers.config_changed = false;
            }
            _ => registers.write_queue(offset, value),
        }
        Outcome::Done
    }

    fn write_status(&self, vcpu: usize, value: u32) -> Outcome {
        let pending = {
            let mut registers = self.lock();
            match registers.pending.clone() {
                Some(pending) if pending.vcpu == vcpu => pending,
                // Two vCPUs write the status of one device at once: only a broken
                // driver does, and the later write loses.
                Some(_) => return Outcome::Done,
                None => {
                    let Some(pending) = self.begin(&mut registers, vcpu, value) else {
                        return Outcome::Done;
                    };
                    registers.pending = Some(pending.clone());
                    pending
                }
            }
        };
        // A kick from before there was anything to kick.
        if self.vcpu_kicks.kicked(vcpu) {
            return Outcome::Retry;
        }
        let result = match pending.answer.wait(DEADLINE) {
            Waited::Done(result) => result,
            Waited::Kicked => return Outcome::Retry,
            Waited::TimedOut => {
                self.front_end.abort();
                Err(self.front_end.silent())
            }
        };
        self.finish(pending.change, result);
        Outcome::Done
    }

    /// Starts what a status write asks for; `None` where nothing has to be waited for.
    fn begin(&self, registers: &mut Registers, vcpu: usize, value: u32) -> Option<Pending> {
        if value == 0 {
            let answer = self.front_end.reset();
            return Some(Pending { vcpu, change: Change::Reset, answer });
        }
        let added = value & !registers.status;
        let mut status = value | registers.status & NEEDS_RESET;
        if added & FEATURES_OK != 0 && !self.acceptable(registers) {
            status &= !FEATURES_OK;
        }
        if added & DRIVER_OK == 0 || status & FEATURES_OK == 0 || status & NEEDS_RESET != 0 {
            registers.status = status & !(added & DRIVER_OK);
            return None;
        }
        match self.activation(registers) {
            Ok(activation) => {
                let answer = self.front_end.activate(activation);
                Some(Pending { vcpu, change: Change::DriverOk(status), answer })
            }
            Err(error) => {
                self.activation_failed(registers, status, &error);
                None
            }
        }
    }

    fn finish(&self, change: Change, result: Result<(), FrontEndError>) {
        let mut registers = self.lock();
        registers.pending = None;
        match (change, result) {
            (Change::DriverOk(status), Ok(())) => {
                // A failure while the device was being started is told now.
                let failed = registers.status & NEEDS_RESET != 0;
                registers.status = status;
                if failed {
                    self.needs_reset(&mut registers);
                }
                tracing::debug!(device = self.id, "driver is running");
            }
            (Change::DriverOk(status), Err(error)) => {
                self.activation_failed(&mut registers, status, &error);
            }
            (Change::Reset, result) => {
                // The guest sees its reset done in any case; a device process that
                // failed it fails the next activation too.
                if let Err(error) = result
                    && self.may_log()
                {
                    tracing::warn!(device = self.id, error = crate::remedy::chain(&error), "reset");
                }
                let queues = vec![QueueConfig::default(); self.wiring.kicks.len()];
                let generation = registers.generation;
                *registers = Registers { queues, generation, ..Registers::default() };
            }
        }
    }

    fn activation_failed(
        &self,
        registers: &mut Registers,
        status: u32,
        error: &dyn std::error::Error,
    ) {
        if self.may_log() {
            tracing::warn!(device = self.id, error = crate::remedy::chain(error), "not activated");
        }
        registers.status = status;
        self.needs_reset(registers);
    }

    fn acceptable(&self, registers: &Registers) -> bool {
        registers.driver_features & !self.info.features == 0
            && registers.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activation(&self, registers: &Registers) -> Result<Activation, ActivateError> {
        let mut queues = Vec::new();
        for (index, queue) in registers.queues.iter().enumerate().filter(|(_, q)| q.ready) {
            queue.check(&self.ram).map_err(|source| ActivateError::Queue { index, source })?;
            queues.push(QueueSetup {
                index,
                config: *queue,
                kick: self.wiring.kicks[index].clone(),
                call: self.wiring.call.clone(),
                err: self.wiring.err.clone(),
            });
        }
        if queues.is_empty() {
            return Err(ActivateError::NoQueue);
        }
        Ok(Activation { features: registers.driver_features, queues })
    }
}

impl Registers {
    /// Queue registers count only between FEATURES_OK and DRIVER_OK: rings are
    /// neither moved nor resized while they are live.
    fn write_queue(&mut self, offset: u32, value: u32) {
        let setting_up = self.status & FEATURES_OK != 0
            && self.status & VIRTIO_CONFIG_S_DRIVER != 0
            && self.status & (DRIVER_OK | NEEDS_RESET) == 0
            && self.pending.is_none();
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
        let low = |address: &mut u64| *address = *address & !0xffff_ffff | u64::from(value);
        let high = |address: &mut u64| *address = *address & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            // An absurd size is kept as 0, which no activation accepts.
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => low(&mut queue.desc),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => high(&mut queue.desc),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => low(&mut queue.avail),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => high(&mut queue.avail),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => low(&mut queue.used),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => high(&mut queue.used),
            _ => {}
        }
    }
}

impl BusDevice for VirtioMmio {
    fn read(&self, _vcpu: usize, offset: u64, data: &mut [u8]) -> Outcome {
        if offset >= u64::from(reg::VIRTIO_MMIO_CONFIG) {
            self.read_config(offset - u64::from(reg::VIRTIO_MMIO_CONFIG), data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        } else {
            data.fill(0); // virtio 1.2 section 4.2.2.2: 32-bit aligned accesses only
        }
        Outcome::Done
    }

    fn write(&self, vcpu: usize, offset: u64, data: &[u8]) -> Outcome {
        match data.try_into().map(u32::from_le_bytes) {
            Ok(value)
                if offset < u64::from(reg::VIRTIO_MMIO_CONFIG) && offset.is_multiple_of(4) =>
            {
                self.write_register(vcpu, offset, value)
            }
            _ => Outcome::Done,
        }
    }
}

impl std::fmt::Debug for VirtioMmio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioMmio")
            .field("id", &self.id)
            .field("call", &self.wiring.call.as_raw_fd())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    /// A device, and the far end of its vhost-user socket.
    fn device() -> (VirtioMmio, UnixStream) {
        let ram = GuestRam::new(32 << 20).unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let front_end = FrontEnd::start("disk0", near, 60, ram.clone(), || Ok(())).unwrap();
        let event = || Arc::new(event::event().unwrap());
        let wiring = Wiring { kicks: vec![event()], call: event(), err: event() };
        let info = DeviceInfo { features: 1 << VIRTIO_F_VERSION_1, config: vec![], queues: 1 };
        let identity = Identity { id: "disk0".into(), device_type: 2, info };
        (VirtioMmio::new(identity, front_end, wiring, ram, Kicks::new(2)), far)
    }

    fn status(device: &VirtioMmio) -> u32 {
        device.read_register(reg::VIRTIO_MMIO_STATUS.into())
    }

    #[test]
    fn a_device_that_empties_its_error_event_does_not_block_the_vmm() {
        let (device, _far) = device();
        device.lock().status = DRIVER_OK;
        // What a device process can do to an open file it shares with us.
        let fd = device.err_event();
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_RDWR)).unwrap();
        let (done, wait) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(device.gave_up()));
        assert_eq!(wait.recv_timeout(Duration::from_secs(5)), Ok(true));
    }

    #[test]
    fn only_a_running_device_can_need_a_reset_and_says_so_once() {
        let (device, _far) = device();
        assert!(!device.gave_up());
        assert_eq!(status(&device), 0, "an error from before a reset leaves no trace");
        device.lock().status = DRIVER_OK;
        assert!(device.gave_up());
        assert_eq!(status(&device), DRIVER_OK | NEEDS_RESET);
        let generation = device.lock().generation;
        assert!(!device.gave_up());
        assert_eq!(device.lock().generation, generation);
    }

    #[test]
    fn an_error_during_the_start_is_told_when_it_is_done() {
        let (device, _far) = device();
        let change = Change::DriverOk(DRIVER_OK);
        device.lock().pending = Some(Pending { vcpu: 0, change, answer: Completion::new() });
        assert!(device.gave_up());
        let generation = device.lock().generation;
        device.finish(change, Ok(()));
        assert_eq!(status(&device), DRIVER_OK | NEEDS_RESET);
        assert_ne!(device.lock().generation, generation, "the interrupt comes with it");
    }

    /// Writes of random registers from several vCPUs at once, most of them in the
    /// order that brings a device up, with a device process that answers nothing, or
    /// hangs up. Whatever comes of it, every access ends.
    #[test]
    fn a_hostile_guest_and_a_dead_process_end_in_needs_reset() {
        let (device, far) = device();
        drop(far);
        let device = Arc::new(device);
        let guests: Vec<_> = (0..2u64)
            .map(|vcpu| {
                let device = device.clone();
                std::thread::spawn(move || {
                    let mut random = 0x9e37_79b9_7f4a_7c15 ^ vcpu;
                    for _ in 0..20_000 {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let offset = random & 0xfc;
                        let value = match random >> 8 & 3 {
                            0 => [0, 1, 3, 0xb, 0xf, 0x4f][(random >> 16) as usize % 6],
                            1 => 1,
                            2 => 128,
                            _ => (random >> 32) as u32,
                        };
                        let offset = if random >> 12 & 3 == 0 { 0x70 } else { offset };
                        while device.write(vcpu as usize, offset, &value.to_le_bytes())
                            == Outcome::Retry
                        {}
                        let mut data = vec![0; (random >> 40) as usize % 9];
                        let _ = device.read(vcpu as usize, random >> 48 & 0xfff, &mut data);
                    }
                })
            })
            .collect();
        for guest in guests {
            guest.join().unwrap();
        }
        assert!(device.lock().pending.is_none());
    }
}
