//! The user's terminal: raw while the guest's console is on it, itself again afterwards.
//!
//! In raw mode every key goes to the guest, ctrl-c included; the serial process
//! watches for ctrl-a x, which quits. The modes found are kept in one place of the
//! process, so that any way out can put them back: the guard's drop, the panic
//! hook, and [`restore`] before `exit`. (The spawner does it when the VMM is killed.)

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The terminal made raw and the modes it had before.
static SAVED: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);
/// Whether [`SAVED`] holds anything, for those who only want to know.
static RAW: AtomicBool = AtomicBool::new(false);

/// A terminal that could not be made raw.
#[derive(Debug, thiserror::Error)]
#[error("{step} the terminal on standard input")]
pub struct TerminalError {
    step: &'static str,
    #[source]
    source: Errno,
}

/// The terminal is raw for as long as this lives.
#[derive(Debug)]
pub struct RawTerminal {
    _private: (),
}

impl RawTerminal {
    /// Makes the terminal behind `fd` raw; `None` where `fd` is no terminal, or is one
    /// whose foreground is somebody else's: a program in the background must not
    /// change modes, and would be stopped for reading.
    ///
    /// # Errors
    /// A terminal that refuses, or one that this process already made raw.
    pub fn enter(fd: BorrowedFd<'_>) -> Result<Option<RawTerminal>, TerminalError> {
        let fail = |step| move |source| TerminalError { step, source };
        let found = match tcgetattr(fd) {
            Ok(modes) => modes,
            Err(Errno::ENOTTY | Errno::EBADF | Errno::EINVAL | Errno::EIO) => return Ok(None),
            Err(errno) => return Err(fail("reading the modes of")(errno)),
        };
        // Not our controlling terminal (an error): no job control, so no background.
        if nix::unistd::tcgetpgrp(fd).is_ok_and(|group| group != nix::unistd::getpgrp()) {
            return Ok(None);
        }
        let kept = fd.try_clone_to_owned().map_err(|error| {
            fail("keeping")(Errno::from_raw(error.raw_os_error().unwrap_or_default()))
        })?;
        let mut saved = saved();
        if saved.is_some() {
            return Err(fail("making raw, a second time,")(Errno::EBUSY));
        }
        let mut raw = found.clone();
        cfmakeraw(&mut raw);
        restore_on_panic();
        tcsetattr(fd, SetArg::TCSANOW, &raw).map_err(fail("making raw"))?;
        *saved = Some((kept, found));
        RAW.store(true, Ordering::Relaxed);
        Ok(Some(RawTerminal { _private: () }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether this process holds a terminal in raw mode, where a new line needs `\r\n`.
pub fn is_raw() -> bool {
    RAW.load(Ordering::Relaxed)
}

/// Puts the terminal's modes back if they were changed; for ways out that run no
/// destructors. Harmless to call at any time and from any thread.
pub fn restore() {
    let Some((terminal, modes)) = saved().take() else { return };
    // From the background, setting modes would stop us with SIGTTOU.
    let mut ttou = SigSet::empty();
    ttou.add(Signal::SIGTTOU);
    let before = ttou.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK);
    // A terminal that is gone needs no restoring.
    let _ = tcsetattr(terminal.as_fd(), SetArg::TCSANOW, &modes);
    RAW.store(false, Ordering::Relaxed);
    if let Ok(before) = before {
        let _ = before.thread_set_mask();
    }
}

/// The fd to hand to the spawner so that it can restore the terminal after a SIGKILL
/// of this process: standard input, where that is a terminal.
pub fn stdin_terminal() -> Option<std::os::fd::RawFd> {
    let stdin = std::io::stdin();
    tcgetattr(stdin.as_fd()).is_ok().then(|| stdin.as_raw_fd())
}

fn saved() -> MutexGuard<'static, Option<(OwnedFd, Termios)>> {
    // Nothing can panic between the two halves of a change.
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A panic's message has to appear on a terminal that works.
fn restore_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            before(info);
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::pty::openpty;
    use nix::sys::termios::LocalFlags;

    fn canonical(fd: &OwnedFd) -> bool {
        tcgetattr(fd).unwrap().local_flags.contains(LocalFlags::ICANON | LocalFlags::ISIG)
    }

    // One test, because there is one terminal per process.
    #[test]
    fn every_way_out_restores_the_terminal() {
        let pty = openpty(None, None).unwrap();
        let slave = &pty.slave;
        assert!(canonical(slave));

        let raw = RawTerminal::enter(slave.as_fd()).unwrap().expect("a terminal");
        assert!(!canonical(slave) && is_raw());
        assert!(RawTerminal::enter(slave.as_fd()).is_err(), "raw twice");
        drop(raw);
        assert!(canonical(slave) && !is_raw());

        let raw = RawTerminal::enter(slave.as_fd()).unwrap();
        restore();
        assert!(canonical(slave));
        drop(raw);

        let raw = RawTerminal::enter(slave.as_fd()).unwrap();
        std::thread::spawn(|| panic!("expected by this test")).join().unwrap_err();
        assert!(canonical(slave), "the panic hook restores");
        drop(raw);

        let file = tempfile::tempfile().unwrap();
        assert!(RawTerminal::enter(file.as_fd()).unwrap().is_none(), "a file is no terminal");
    }
}
