//! A virtio device brought to rest for a snapshot, and brought to where one was.
//!
//! No vCPU runs meanwhile and none waits here: the caller has seen to both.

use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::registers::{DRIVER_OK, NEEDS_RESET};
use super::{Activation, QueueError, QueueSetup, TransportState, VirtioMmio};
use crate::transport::front_end::{Answer, FrontEndError, TransferError};
use crate::transport::queue::QueueConfig;
use crate::transport::wait::Waited;

/// What a device's process was asked for, to go on from elsewhere. It is done in order.
#[derive(Debug, Default)]
#[must_use]
pub struct Loading(Vec<Answer<()>>);

/// A device that could not be brought to rest, or to where another was.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// A vCPU waits for it.
    #[error("a vCPU waits for it")]
    Busy,
    /// It did not come to rest in time.
    #[error("it did not finish its requests within {:.3} s", .0.as_secs_f64())]
    Late(Duration),
    /// Its process.
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    /// The device's position is not what the ring in guest memory shows.
    #[error("queue {index}: the device says {base}, the ring has avail {avail} and used {used}")]
    Cursor {
        /// The queue.
        index: usize,
        /// What the device says.
        base: u16,
        /// The driver's index.
        avail: u16,
        /// The device's index.
        used: u16,
    },
    /// The rings cannot be read.
    #[error("reading queue {0}")]
    Ring(usize, #[source] GuestMemoryError),
    /// No driver could have brought a device of this kind there.
    #[error("the state does not fit the device: {0}")]
    Unfit(&'static str),
    /// A queue that cannot be.
    #[error("queue {0}")]
    Queue(usize, #[source] QueueError),
}

impl VirtioMmio {
    /// Has the device process finish what it holds and stop. [`VirtioMmio::finish_freeze`]
    /// waits for it.
    pub fn begin_freeze(&self) -> Result<Answer<Vec<(usize, u16)>>, FreezeError> {
        if self.lock().pending.is_some() {
            return Err(FreezeError::Busy);
        }
        Ok(self.front_end.freeze())
    }

    /// Waits until it has, up to `limit` after it began.
    pub fn finish_freeze(
        &self,
        begun: &Answer<Vec<(usize, u16)>>,
        limit: Duration,
    ) -> Result<(), FreezeError> {
        let bases = loop {
            match begun.wait(limit) {
                Waited::Done(result) => break result?,
                Waited::Kicked => {}
                // Slow or stopped, but not lost: it goes on when it can.
                Waited::TimedOut => return Err(FreezeError::Late(limit)),
            }
        };
        let mut state = self.lock();
        let checked = match state.registers.status & NEEDS_RESET {
            // A ring that was given up shows nothing.
            0 => bases.iter().try_for_each(|(index, base)| {
                let queue = state.registers.queues.get(*index);
                let queue = queue.ok_or(FreezeError::Unfit("a queue it has not"))?;
                self.check_cursor(*index, queue, *base)
            }),
            _ => Ok(()),
        };
        state.frozen = Some(bases);
        checked
    }

    /// What the back end of a frozen device keeps to itself.
    pub fn save_back_end(&self, limit: Duration) -> Result<Vec<u8>, TransferError> {
        self.front_end.save_state(limit)
    }

    /// Has a back end that has not run go on from it.
    pub fn load_back_end(&self, state: &[u8], limit: Duration) -> Result<(), TransferError> {
        self.front_end.load_state(state, limit)
    }

    /// Everything the device took is answered, and it took nothing that is not there.
    fn check_cursor(
        &self,
        index: usize,
        queue: &QueueConfig,
        base: u16,
    ) -> Result<(), FreezeError> {
        let read = |address: u64| {
            let word: u16 = self
                .ram
                .memory()
                .read_obj(GuestAddress(address + 2))
                .map_err(|e| FreezeError::Ring(index, e))?;
            Ok::<u16, FreezeError>(u16::from_le(word))
        };
        let (avail, used) = (read(queue.avail)?, read(queue.used)?);
        if used != base || avail.wrapping_sub(base) > queue.size {
            return Err(FreezeError::Cursor { index, base, avail, used });
        }
        Ok(())
    }

    /// Has a device go on whose freeze was begun. To be waited for by
    /// [`VirtioMmio::finish_thaw`], unless the freeze was late.
    pub fn begin_thaw(&self) -> Answer<()> {
        let mut state = self.lock();
        state.frozen = None;
        self.front_end.thaw()
    }

    /// Waits until it goes on. Where it cannot, its driver has to reset it.
    pub fn finish_thaw(&self, begun: &Answer<()>) -> Result<(), FreezeError> {
        self.front_end.wait_thawed(begun).map_err(|error| {
            self.fail();
            FreezeError::FrontEnd(error)
        })
    }

    fn setup(&self, index: usize, config: QueueConfig, base: u16) -> QueueSetup {
        QueueSetup {
            index,
            config,
            base,
            kick: self.wiring.kicks[index].clone(),
            call: self.wiring.call.clone(),
            err: self.wiring.err.clone(),
        }
    }

    /// The device is to go on from elsewhere: nothing is left of what was frozen.
    pub fn forget_frozen(&self) -> Loading {
        let answer = self.front_end.reset();
        let mut state = self.lock();
        state.frozen = None;
        state.config.clone_from(&self.info.config);
        Loading(vec![answer])
    }

    /// The rings that the device process writes, by address and length.
    pub fn used_rings(&self) -> Vec<(u64, u64)> {
        let state = self.lock();
        let live = state.registers.queues.iter().filter(|queue| queue.ready);
        live.map(|queue| (queue.used, 6 + 8 * u64::from(queue.size))).collect()
    }

    /// The state of a frozen device.
    pub fn save(&self) -> TransportState {
        let state = self.lock();
        let mut saved = state.registers.save();
        saved.features = self.info.features;
        saved.config.clone_from(&state.config);
        for (index, base) in state.frozen.iter().flatten() {
            if let Some(queue) = saved.queues.get_mut(*index) {
                queue.base = Some(*base);
            }
        }
        saved
    }

    /// Has a new device go on from `state`: registers, then the process, for which
    /// [`VirtioMmio::finish_load`] waits. Nothing is started of a device whose driver has to
    /// reset it.
    pub fn begin_load(&self, state: &TransportState) -> Result<Loading, FreezeError> {
        if state.features & !self.info.features != 0 {
            return Err(FreezeError::Unfit("it offered its driver features that are missing"));
        }
        if state.config.len() != self.info.config.len() {
            return Err(FreezeError::Unfit("its configuration has another length"));
        }
        let runs = state.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK;
        let mut queues = Vec::new();
        for (index, queue) in state.queues.iter().enumerate() {
            if let Some(base) = queue.base.filter(|_| runs) {
                if index >= self.wiring.kicks.len() {
                    return Err(FreezeError::Unfit("it has more queues"));
                }
                let checked = queue.config.check(&self.ram, state.driver_features);
                checked.map_err(|e| FreezeError::Queue(index, e))?;
                self.check_cursor(index, &queue.config, base)?;
                queues.push(self.setup(index, queue.config, base));
            }
        }
        let written = usize::try_from(self.writable.start).unwrap_or(usize::MAX)
            ..usize::try_from(self.writable.end).unwrap_or(usize::MAX);
        let features = {
            let mut own = self.lock();
            let loaded = own.registers.load(state, self.info.features);
            own.registers = loaded.ok_or(FreezeError::Unfit("its registers cannot be so"))?;
            own.config.clone_from(&self.info.config);
            if let (Some(to), Some(from)) =
                (own.config.get_mut(written.clone()), state.config.get(written.clone()))
            {
                to.copy_from_slice(from);
            }
            own.registers.driver_features
        };
        let mut loading = Loading::default();
        if let Some(bytes) = state.config.get(written.clone())
            && self.info.config.get(written.clone()) != Some(bytes)
        {
            loading.0.push(self.front_end.set_config(written.start as u32, bytes.to_vec()));
        }
        if !queues.is_empty() {
            loading.0.push(self.front_end.activate(Activation { features, queues }));
        }
        Ok(loading)
    }

    /// Waits until its process has done all of it.
    pub fn finish_load(&self, begun: &Loading) -> Result<(), FreezeError> {
        begun.0.iter().try_for_each(|answer| Ok(self.front_end.wait(answer)?))
    }

    /// Kicks every queue and raises the interrupt once: one too many is harmless.
    pub fn nudge(&self) {
        self.ring_doorbells();
        let _ = self.wiring.call.write(1);
    }

    /// Kicks every queue: its thread comes round.
    pub fn ring_doorbells(&self) {
        for kick in &self.wiring.kicks {
            let _ = kick.write(1); // a full eventfd is a kick all the same
        }
    }
}
