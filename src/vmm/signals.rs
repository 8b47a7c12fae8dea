//! SIGINT, SIGTERM and SIGHUP end the VM in good order.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Readable when one of the signals came.
#[derive(Debug)]
pub struct Signals {
    receiver: UnixStream,
}

impl Signals {
    /// Takes the signals over.
    pub fn install() -> std::io::Result<Signals> {
        let (receiver, sender) = UnixStream::pair()?;
        receiver.set_nonblocking(true)?;
        sender.set_nonblocking(true)?;
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
        }
        Ok(Signals { receiver })
    }

    /// Forgets those that came; true if there was one.
    pub fn take(&mut self) -> bool {
        let mut buffer = [0; 64];
        let mut any = false;
        while matches!(self.receiver.read(&mut buffer), Ok(n) if n > 0) {
            any = true;
        }
        any
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.receiver.as_fd()
    }
}
