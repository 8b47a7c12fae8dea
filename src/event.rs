//! Eventfds, as KVM's wrappers want them.
#![allow(unsafe_code)] // vmm-sys-util's EventFd does not lend its fd safely

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A non-blocking, close-on-exec eventfd.
///
/// # Errors
/// When the kernel has none for us.
pub fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// The fd of `event`, for as long as it lives.
pub fn fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: an open fd for as long as `event`, from which the lifetime is taken.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
