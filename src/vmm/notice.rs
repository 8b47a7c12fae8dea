//! What vCPU threads tell the main thread in passing.
//!
//! Bounded: a guest that floods a port costs itself time, not the VMM memory.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use cellblock_devices::protocol::Marker;
use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::eventfd::{EfdFlags, EventFd};

const PENDING_MAX: usize = 1024;

/// One thing to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The guest wrote a readiness byte.
    Marker(Marker),
    /// A plugin has had the vCPUs made: they can run.
    Made,
}

/// A bounded queue with an eventfd that says it is not empty.
#[derive(Debug)]
pub struct Notifier {
    sender: Sender<Notice>,
    receiver: Receiver<Notice>,
    event: EventFd,
}

impl Notifier {
    /// An empty queue.
    pub fn new() -> nix::Result<Arc<Notifier>> {
        let (sender, receiver) = bounded(PENDING_MAX);
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Arc::new(Notifier { sender, receiver, event }))
    }

    /// Adds a notice; one too many is dropped.
    pub fn send(&self, notice: Notice) {
        if self.sender.try_send(notice).is_ok() {
            let _ = self.event.write(1); // full means it is readable already
        }
    }

    /// Takes all that is there, but no more than came before: what is added meanwhile
    /// makes the event readable again, and a guest that never stops does not keep the
    /// caller here.
    pub fn take(&self) -> Vec<Notice> {
        let _ = self.event.read(); // empty is fine: the queue decides
        self.receiver.try_iter().take(PENDING_MAX).collect()
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
