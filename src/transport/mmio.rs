//! virtio-mmio, version 2 (virtio 1.2 section 4.2), in front of a vhost-user
//! device process.
//!
//! The registers and the status machine are here, in the VMM. Notifications are
//! ioeventfds and interrupts irqfds that the device process holds, so neither
//! comes by. InterruptStatus always shows the used-buffer bit, since a driver
//! looks at the ring anyway and only the device process knows; the
//! configuration bit is ours, set before the line is raised. InterruptACK of the
//! used-buffer bit alone is swallowed by an ioeventfd.

mod freeze;
mod registers;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::EventFd;

pub use self::freeze::{FreezeError, Loading};
use self::registers::{DRIVER_OK, FEATURES_OK, NEEDS_RESET, Registers};
pub use self::registers::{QueueState, TransportState};
use super::front_end::{
    Activation, Answer, DEADLINE, DeviceInfo, FrontEnd, FrontEndError, QueueSetup, Watcher,
};
use super::queue::QueueError;
use super::wait::Waited;
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
    /// The bytes of its configuration space that a driver may write.
    pub writable: Range<u64>,
    /// Makes the configuration space that of a device whose driver accepted these features.
    pub adapt: fn(&mut [u8], u64),
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
    writable: Range<u64>,
    adapt: fn(&mut [u8], u64),
    ram: GuestRam,
    front_end: FrontEnd,
    wiring: Wiring,
    vcpu_kicks: Arc<Kicks>,
    state: Mutex<State>,
    lines: Mutex<Throttle>,
}

struct State {
    registers: Registers,
    /// The configuration space, with what the driver wrote to it.
    config: Vec<u8>,
    pending: Option<Pending>,
    /// Where each queue that ran stood when the device was frozen.
    frozen: Option<Vec<(usize, u16)>>,
}

/// A status or configuration write that waits for the device process.
#[derive(Clone)]
struct Pending {
    vcpu: usize,
    change: Change,
    answer: Answer<()>,
}

#[derive(Clone)]
enum Change {
    DriverOk(u32),
    Config(usize, Vec<u8>),
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
        let Identity { id, device_type, info, writable, adapt } = identity;
        let registers = Registers::new(wiring.kicks.len());
        let state = Mutex::new(State {
            registers,
            config: info.config.clone(),
            pending: None,
            frozen: None,
        });
        let lines = Mutex::default();
        VirtioMmio {
            id,
            device_type,
            info,
            writable,
            adapt,
            ram,
            front_end,
            wiring,
            vcpu_kicks,
            state,
            lines,
        }
    }

    /// Unique in the VM.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What its back end said of it.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The kick hook: a vCPU that waits for this device process stops waiting.
    pub fn kick(&self, vcpu: usize) {
        let state = self.lock();
        if let Some(pending) = state.pending.as_ref().filter(|p| p.vcpu == vcpu) {
            pending.answer.kick();
        }
    }

    /// Tells the driver that the device gave up: DEVICE_NEEDS_RESET and a
    /// configuration interrupt (virtio 1.2 section 2.1.2). False where that is known
    /// already, or no driver runs the device: a reset may have come first.
    fn fail(&self) -> bool {
        let mut state = self.lock();
        let status = state.registers.status;
        let starting = matches!(state.pending, Some(Pending { change: Change::DriverOk(_), .. }));
        let news = (starting || status & DRIVER_OK != 0) && status & NEEDS_RESET == 0;
        if news {
            self.needs_reset(&mut state);
        }
        news
    }

    /// The device process is gone: nothing waits for it any longer.
    pub fn lost(&self) {
        self.front_end.abort();
        self.fail();
    }

    /// Has the ends of its connections told to `watcher`. What the driver asks for while
    /// there is none waits for the next.
    pub fn watch(&self, watcher: Watcher) {
        self.front_end.watch(watcher);
    }

    /// Goes on with another process, at the other end of `socket`. See
    /// [`FrontEnd::reconnect`].
    pub fn reconnect(&self, socket: UnixStream) -> Result<u64, FrontEndError> {
        self.front_end.reconnect(socket)
    }

    /// Ends the connection, whatever is going on over it.
    pub fn disconnect(&self) {
        self.front_end.abort();
    }

    /// There will be no other process: see [`FrontEnd::abandon`].
    pub fn abandon(&self) {
        self.front_end.abandon();
    }

    /// What the driver had begun is lost: it has to reset the device.
    pub fn must_reset(&self) {
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
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets DEVICE_NEEDS_RESET, with a configuration interrupt for a driver that runs.
    fn needs_reset(&self, state: &mut State) {
        if state.registers.needs_reset() {
            let _ = self.wiring.call.write(1); // a full eventfd is an interrupt all the same
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset as u32 {
            reg::VIRTIO_MMIO_DEVICE_ID => self.device_type,
            offset => self.lock().registers.read(offset, self.info.features),
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let config = usize::try_from(offset).ok().and_then(|at| state.config.get(at..));
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
        let mut state = self.lock();
        let changing = state.pending.is_some();
        state.registers.write(offset, value, changing);
        Outcome::Done
    }

    fn write_status(&self, vcpu: usize, value: u32) -> Outcome {
        self.change(vcpu, |state| self.begin(state, vcpu, value))
    }

    /// A write behind the end of what can be written changes nothing.
    fn write_config(&self, vcpu: usize, offset: u64, data: &[u8]) -> Outcome {
        let end = offset + data.len() as u64; // both are of an access to a register window
        if data.is_empty() || offset < self.writable.start || end > self.writable.end {
            return Outcome::Done;
        }
        self.change(vcpu, |state| {
            // The fields belong to features (virtio 1.2 section 3.1.1).
            if state.registers.status & (FEATURES_OK | NEEDS_RESET) != FEATURES_OK {
                return None;
            }
            let answer = self.front_end.set_config(offset as u32, data.to_vec());
            Some(Pending { vcpu, change: Change::Config(offset as usize, data.to_vec()), answer })
        })
    }

    /// Waits for the device process to do what `begin` starts, if it starts something.
    fn change(&self, vcpu: usize, begin: impl FnOnce(&mut State) -> Option<Pending>) -> Outcome {
        let pending = {
            let mut state = self.lock();
            match state.pending.clone() {
                Some(pending) if pending.vcpu == vcpu => pending,
                // Two vCPUs change one device at once: only a broken
                // driver does, and the later write loses.
                Some(_) => return Outcome::Done,
                None => {
                    let Some(pending) = begin(&mut state) else {
                        return Outcome::Done;
                    };
                    state.pending = Some(pending.clone());
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
    fn begin(&self, state: &mut State, vcpu: usize, value: u32) -> Option<Pending> {
        if value == 0 {
            let answer = self.front_end.reset();
            return Some(Pending { vcpu, change: Change::Reset, answer });
        }
        let status = state.registers.asked_status(value, self.info.features);
        let added = status & !state.registers.status;
        if added & FEATURES_OK != 0 {
            (self.adapt)(&mut state.config, state.registers.driver_features);
        }
        if added & DRIVER_OK == 0 || status & FEATURES_OK == 0 || status & NEEDS_RESET != 0 {
            state.registers.status = status & !(added & DRIVER_OK);
            return None;
        }
        match self.activation(&state.registers) {
            Ok(activation) => {
                let answer = self.front_end.activate(activation);
                Some(Pending { vcpu, change: Change::DriverOk(status), answer })
            }
            Err(error) => {
                self.activation_failed(state, status, &error);
                None
            }
        }
    }

    fn finish(&self, change: Change, result: Result<(), FrontEndError>) {
        let mut state = self.lock();
        state.pending = None;
        match (change, result) {
            (Change::DriverOk(status), Ok(())) => {
                // The device may have been lost while it was being started.
                let needs_reset = state.registers.status & NEEDS_RESET != 0;
                state.registers.status = status;
                if needs_reset {
                    self.needs_reset(&mut state);
                }
                tracing::debug!(device = self.id, "driver is running");
            }
            (Change::DriverOk(status), Err(error)) => {
                self.activation_failed(&mut state, status, &error);
            }
            (Change::Config(offset, bytes), Ok(())) => {
                if let Some(field) = state.config.get_mut(offset..offset + bytes.len()) {
                    field.copy_from_slice(&bytes);
                }
            }
            // The field keeps its value, which the driver can read.
            (Change::Config(..), Err(error)) => {
                tracing::debug!(device = self.id, error = crate::remedy::chain(&error), "config");
            }
            (Change::Reset, result) => {
                // The guest sees its reset done in any case; a device process that
                // failed it fails the next activation too.
                if let Err(error) = result
                    && self.may_log()
                {
                    tracing::warn!(device = self.id, error = crate::remedy::chain(&error), "reset");
                }
                state.registers.reset();
                state.config.clone_from(&self.info.config);
            }
        }
    }

    fn activation_failed(&self, state: &mut State, status: u32, error: &dyn std::error::Error) {
        if self.may_log() {
            tracing::warn!(device = self.id, error = crate::remedy::chain(error), "not activated");
        }
        state.registers.status = status;
        self.needs_reset(state);
    }

    fn activation(&self, registers: &Registers) -> Result<Activation, ActivateError> {
        let mut queues = Vec::new();
        for (index, queue) in registers.queues.iter().enumerate().filter(|(_, q)| q.ready) {
            queue
                .check(&self.ram, registers.driver_features)
                .map_err(|source| ActivateError::Queue { index, source })?;
            queues.push(QueueSetup {
                index,
                config: *queue,
                base: 0,
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
        let config = u64::from(reg::VIRTIO_MMIO_CONFIG);
        if offset >= config {
            return self.write_config(vcpu, offset - config, data);
        }
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
