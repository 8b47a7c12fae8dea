//! Closing what came from outside, by threads that nobody waits for.
//!
//! Whoever closes the last reference to an open file does what its kind takes: a TCP socket that
//! lingers waits for its peer, a file of a FUSE server for that server, and a Unix socket for all
//! that lies unread in it. An fd that others chose is therefore never closed by a thread that
//! serves others still, but handed over here.
//!
//! A process in which [`start`] was not called has nobody who could be held up: there it is closed
//! at once.

use std::io;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Builder;

/// One that is held up leaves the others to the rest.
const THREADS: usize = 4;
const STACK: usize = 64 << 10;

static QUEUE: OnceLock<Sender<OwnedFd>> = OnceLock::new();
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// Starts the threads, each of which calls `confine` first. They end with the process. Called
/// again, it does nothing.
///
/// # Errors
/// When there is no thread, or one cannot be confined.
pub fn start(confine: impl Fn() -> Result<(), String> + Clone + Send + 'static) -> io::Result<()> {
    if QUEUE.get().is_some() {
        return Ok(());
    }
    let (queue, fds) = channel();
    let (ready, confined) = channel();
    let fds = Arc::new(Mutex::new(fds));
    for _ in 0..THREADS {
        let (fds, ready, confine) = (fds.clone(), ready.clone(), confine.clone());
        Builder::new().name("closer".into()).stack_size(STACK).spawn(move || {
            let result = confine();
            let go_on = result.is_ok();
            let _ = ready.send(result);
            if go_on {
                run(&fds);
            }
        })?;
        let result = confined.recv().unwrap_or_else(|_| Err("it ended".into()));
        result.map_err(io::Error::other)?;
    }
    let _ = QUEUE.set(queue); // another thread was quicker: ours end
    Ok(())
}

fn run(fds: &Mutex<Receiver<OwnedFd>>) {
    let next = || fds.lock().unwrap_or_else(PoisonError::into_inner).recv();
    while let Ok(fd) = next() {
        drop(fd);
        WAITING.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Closes an fd, however long that takes.
pub fn close(fd: OwnedFd) {
    if let Some(queue) = QUEUE.get() {
        WAITING.fetch_add(1, Ordering::AcqRel);
        let _ = queue.send(fd); // the threads live as long as the process
    }
}

/// Closes several.
pub fn close_all(fds: Vec<OwnedFd>) {
    fds.into_iter().for_each(close);
}

/// How many fds are not closed yet. Who takes more from outside has to reckon with them.
pub fn waiting() -> usize {
    WAITING.load(Ordering::Acquire)
}

/// Something that others have put things into, or chose: [`close`]d when it is dropped.
#[derive(Debug)]
pub struct Outside<T: Into<OwnedFd>>(Option<T>);

impl<T: Into<OwnedFd>> From<T> for Outside<T> {
    fn from(inner: T) -> Outside<T> {
        Outside(Some(inner))
    }
}

impl<T: Into<OwnedFd>> Deref for Outside<T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.0 {
            Some(inner) => inner,
            None => unreachable!("it is taken by the drop alone"),
        }
    }
}

impl<T: Into<OwnedFd>> Drop for Outside<T> {
    fn drop(&mut self) {
        if let Some(inner) = self.0.take() {
            close(inner.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    use nix::sys::socket::{setsockopt, sockopt::Linger};

    /// A socket that takes ten minutes to close, and what keeps it from being quicker.
    fn lingering() -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let mut socket = TcpStream::connect(listener.local_addr().expect("name")).expect("connect");
        let (peer, _) = listener.accept().expect("accept");
        let linger = libc::linger { l_onoff: 1, l_linger: 600 };
        setsockopt(&socket.as_fd(), Linger, &linger).expect("linger");
        socket.set_nonblocking(true).expect("mode");
        while socket.write(&[0; 65536]).is_ok() {}
        socket.set_nonblocking(false).expect("mode");
        (socket.into(), peer)
    }

    #[test]
    fn what_does_not_close_holds_up_neither_us_nor_the_rest() {
        start(|| Ok(())).expect("threads");
        let (slow, peer) = lingering();
        let begin = Instant::now();
        close(slow);
        let (near, far) = crate::Channel::pair().expect("pair");
        drop(Outside::from(near));
        while far.try_recv::<u8>().is_ok() {
            assert!(begin.elapsed() < Duration::from_secs(5), "the second is not closed");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(waiting(), 1, "the first is");
        drop(peer);
        while waiting() > 0 {
            assert!(begin.elapsed() < Duration::from_secs(20), "never closed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
