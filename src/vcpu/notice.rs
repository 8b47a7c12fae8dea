//! The news that the VM has ended: the reason, and an eventfd for the main loop's epoll.

use crate::bus::VmExit;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, OnceLock};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

#[derive(Debug)]
struct Notice {
    end: OnceLock<VmEnd>,
    event: EventFd,
}

/// Which vCPU ended the VM, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmEnd {
    /// The vCPU whose exit it was.
    pub vcpu: usize,
    /// The reason.
    pub exit: VmExit,
}

/// The side that reports the VM's end. **The first report wins**, later ones are logged.
#[derive(Clone, Debug)]
pub struct ExitNotifier(Arc<Notice>);

/// The side that hears of the VM's end. Its descriptor becomes readable then, and stays so.
#[derive(Debug)]
pub struct ExitListener(Arc<Notice>);

/// Makes the two sides.
///
/// # Errors
/// When the kernel has no eventfd for us.
pub fn exit_notice() -> io::Result<(ExitNotifier, ExitListener)> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let notice = Arc::new(Notice { end: OnceLock::new(), event });
    Ok((ExitNotifier(notice.clone()), ExitListener(notice)))
}

impl ExitNotifier {
    /// Reports the end.
    pub fn notify(&self, vcpu: usize, exit: VmExit) {
        if let Err(late) = self.0.end.set(VmEnd { vcpu, exit }) {
            tracing::debug!(vcpu = late.vcpu, exit = ?late.exit, "the vm has ended already");
            return;
        }
        if let Err(error) = self.0.event.write(1) {
            tracing::error!(%error, "signalling the end of the vm");
        }
    }
}

impl ExitListener {
    /// The end of the VM, once there is one.
    pub fn end(&self) -> Option<&VmEnd> {
        self.0.end.get()
    }
}

impl AsRawFd for ExitListener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.event.as_raw_fd()
    }
}

impl AsFd for ExitListener {
    #[allow(unsafe_code)] // EventFd has no AsFd of its own
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd lives as long as `self`, from which the borrow is taken.
        unsafe { BorrowedFd::borrow_raw(self.0.event.as_raw_fd()) }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_first_report_wins() {
        let (notifier, listener) = exit_notice().unwrap();
        assert_eq!(listener.end(), None);
        notifier.clone().notify(2, VmExit::Reset);
        notifier.notify(0, VmExit::Shutdown);
        assert_eq!(listener.end(), Some(&VmEnd { vcpu: 2, exit: VmExit::Reset }));
        assert_eq!(listener.0.event.read().unwrap(), 1, "one report, one wake-up");
    }
}
