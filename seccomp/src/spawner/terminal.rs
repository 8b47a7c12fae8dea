//! The terminal's mode, put back when the VMM could not do it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};

/// A terminal and the mode it had.
pub(super) struct Saved {
    fd: OwnedFd,
    mode: Termios,
}

impl Saved {
    /// Notes the mode of `fd`; none where it is not a terminal.
    pub(super) fn new(fd: Option<RawFd>) -> Option<Saved> {
        let fd = duplicate(fd?)?;
        let mode = tcgetattr(&fd).ok()?;
        Some(Saved { fd, mode })
    }

    /// Puts the mode back if the terminal is raw.
    ///
    /// Only then: after the VMM's death a shell may already edit a line, in a mode
    /// of its own (which keeps signal characters on), and must not be disturbed.
    pub(super) fn restore(&self) {
        let raw = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
        if let Ok(now) = tcgetattr(&self.fd)
            && !now.local_flags.intersects(raw)
        {
            // The terminal may be gone; then there is nothing to restore.
            let _ = tcsetattr(&self.fd, SetArg::TCSANOW, &self.mode);
        }
    }
}

impl AsFd for Saved {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[allow(unsafe_code)] // borrowing a fd by number
fn duplicate(fd: RawFd) -> Option<OwnedFd> {
    if fd < 0 {
        return None;
    }
    // SAFETY: borrowed for the duplication only; a number that is no open fd gives
    // EBADF.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().ok()
}
