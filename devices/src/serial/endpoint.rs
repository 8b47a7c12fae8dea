//! The ends of the line: where output goes and where input comes from.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, SockFlag, accept4, shutdown};

use super::SerialError;
use super::input::{Pipe, Reader};
use super::output::{Kept, OnError, Output, To};
use crate::protocol::SerialEndpoint;

/// How often a pseudo-terminal that nobody has open is looked at again.
const PTY_RETRY: Duration = Duration::from_millis(100);

/// A console endpoint. Only [`Endpoint::Null`] has no [`Output`].
pub(super) enum Endpoint {
    Null,
    File,
    Stdio(Reader),
    Pty(Pty),
    Socket(Socket),
}

/// The master of a pseudo-terminal. While no slave is open, poll says HUP without
/// end (or nothing, before the first one was), so it is left out and tried by time.
pub(super) struct Pty {
    master: Arc<OwnedFd>,
    away_since: Option<Instant>,
}

/// A listening socket and at most one client.
pub(super) struct Socket {
    listener: OwnedFd,
    client: Option<Client>,
    /// There is another client than the VMM knows of, or none any more.
    news: bool,
}

struct Client {
    stream: Arc<OwnedFd>,
    /// It may have shut down its sending side, and still listen.
    sends: bool,
    /// It has left; what it sent may still have to be read.
    left: bool,
}

impl Endpoint {
    /// Takes the fds that follow those of the ring and of what outlives the process, and
    /// starts the threads. `pipe` is where input goes.
    pub(super) fn new(
        kind: SerialEndpoint,
        buffer: usize,
        kept: Kept,
        pipe: &Arc<Pipe>,
        fds: Vec<OwnedFd>,
    ) -> Result<(Endpoint, Option<Output>), SerialError> {
        let output =
            |on_error, to| Output::start(buffer, on_error, kept, to).map_err(SerialError::Thread);
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or(SerialError::MissingFd(kind));
        Ok(match kind {
            SerialEndpoint::Null => (Endpoint::Null, None),
            SerialEndpoint::Stdio => {
                let (input, file) = (next()?, Arc::new(next()?));
                let reader = Reader::start(input, pipe.clone()).map_err(SerialError::Thread)?;
                (
                    Endpoint::Stdio(reader),
                    Some(output(OnError::Drop, Some(To { file, own: false }))?),
                )
            }
            SerialEndpoint::File => {
                let to = To { file: Arc::new(next()?), own: true };
                (Endpoint::File, Some(output(OnError::Drop, Some(to))?))
            }
            SerialEndpoint::Pty => {
                let master = Arc::new(non_blocking(next()?)?);
                let output = output(OnError::Keep, None)?;
                output.attach(Arc::clone(&master));
                (Endpoint::Pty(Pty { master, away_since: None }), Some(output))
            }
            SerialEndpoint::Socket => {
                let listener = non_blocking(next()?)?;
                let output = output(OnError::Keep, None)?;
                let mut socket = Socket { listener, client: None, news: false };
                if let Ok(client) = next() {
                    socket.take(client, &output);
                }
                (Endpoint::Socket(socket), Some(output))
            }
        })
    }

    /// What to poll: at most two fds. `hungry`: input can be used now.
    pub(super) fn interest(&self, hungry: bool) -> [Option<PollFd<'_>>; 2] {
        let input = if hungry { PollFlags::POLLIN } else { PollFlags::empty() };
        match self {
            Endpoint::Null | Endpoint::File => [None, None],
            Endpoint::Stdio(reader) => {
                if hungry {
                    reader.want();
                }
                [Some(PollFd::new(reader.as_fd(), PollFlags::POLLIN)), None]
            }
            Endpoint::Pty(pty) if pty.away_since.is_some() => [None, None],
            Endpoint::Pty(pty) => [Some(PollFd::new(pty.master.as_fd(), input)), None],
            Endpoint::Socket(Socket { listener, client, .. }) => [
                Some(PollFd::new(listener.as_fd(), PollFlags::POLLIN)),
                client.as_ref().and_then(|client| {
                    let events = if client.sends { input } else { PollFlags::empty() };
                    // Poll never stops saying that one has left.
                    let news = !client.left || !events.is_empty();
                    news.then(|| PollFd::new(client.stream.as_fd(), events))
                }),
            ],
        }
    }

    /// When to look again although nothing is ready.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        match self {
            Endpoint::Pty(pty) => pty.away_since.map(|since| since + PTY_RETRY),
            _ => None,
        }
    }

    /// Acts on what poll said of the fds of [`Endpoint::interest`]; how many bytes are in
    /// the `pipe` then.
    pub(super) fn ready(
        &mut self,
        events: [PollFlags; 2],
        output: Option<&Output>,
        pipe: &Pipe,
    ) -> usize {
        match (self, output) {
            (Endpoint::Stdio(reader), _) if !events[0].is_empty() => reader.take(),
            (Endpoint::Pty(pty), Some(output)) => pty.ready(events[0], output, pipe),
            (Endpoint::Socket(socket), Some(output)) => socket.ready(events, output, pipe),
            _ => 0,
        }
    }

    /// Where the VMM has to be told: the client there is, if there is one.
    pub(super) fn client_news(&self) -> Option<Option<BorrowedFd<'_>>> {
        match self {
            Endpoint::Socket(Socket { client, news: true, .. }) => {
                Some(client.as_ref().map(|client| client.stream.as_fd()))
            }
            _ => None,
        }
    }

    /// The VMM was told.
    pub(super) fn news_told(&mut self) {
        if let Endpoint::Socket(socket) = self {
            socket.news = false;
        }
    }

    /// Sends the client of a socket away, and those who wait to be one.
    pub(super) fn part(&mut self) {
        let Endpoint::Socket(socket) = self else { return };
        if let Some(client) = socket.client.take() {
            // Somebody else may hold it too: the VMM for a successor, or a write under way.
            let _ = shutdown(client.stream.as_raw_fd(), Shutdown::Both); // or it has left
            socket.news = true;
        }
        while socket.accept().is_some() {}
    }

    /// A write found that the reader has gone.
    pub(super) fn lost(&mut self, reader: &Arc<OwnedFd>) {
        match self {
            Endpoint::Pty(pty) => pty.away_since = Some(Instant::now()),
            Endpoint::Socket(socket) => {
                if let Some(client) = &mut socket.client
                    && Arc::ptr_eq(&client.stream, reader)
                {
                    client.left = true;
                }
            }
            _ => {}
        }
    }
}

impl Pty {
    fn ready(&mut self, mut events: PollFlags, output: &Output, pipe: &Pipe) -> usize {
        if let Some(since) = self.away_since {
            if since.elapsed() < PTY_RETRY {
                return 0;
            }
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::empty())];
            let _ = poll(&mut fds, PollTimeout::ZERO); // failing: tried again by time
            events = fds[0].revents().unwrap_or(PollFlags::POLLHUP);
            if !events.contains(PollFlags::POLLHUP) {
                self.away_since = None;
                output.attach(Arc::clone(&self.master));
            } else {
                self.away_since = Some(Instant::now());
            }
            return 0;
        }
        // What was typed before the hang-up can still be read.
        let input = if events.contains(PollFlags::POLLIN) {
            pipe.draw(&*self.master).unwrap_or(0)
        } else {
            0
        };
        if input == 0 && events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
            self.away_since = Some(Instant::now());
            output.detach();
        }
        input
    }
}

impl Socket {
    fn ready(&mut self, events: [PollFlags; 2], output: &Output, pipe: &Pipe) -> usize {
        let input = self.serve_client(events[1], output, pipe);
        if !events[0].is_empty() {
            while let Some(stream) = self.accept() {
                if self.client.as_ref().is_some_and(|client| !client.left) {
                    tracing::warn!("console client refused: another one is connected");
                    continue; // closed by drop
                }
                self.take(stream, output);
                self.news = true;
                tracing::debug!("console client connected");
            }
        }
        input
    }

    fn take(&mut self, stream: OwnedFd, output: &Output) {
        let stream = Arc::new(stream);
        output.attach(Arc::clone(&stream));
        self.client = Some(Client { stream, sends: true, left: false });
    }

    fn serve_client(&mut self, events: PollFlags, output: &Output, pipe: &Pipe) -> usize {
        let Some(client) = &mut self.client else { return 0 };
        let mut input = 0;
        if client.sends && events.contains(PollFlags::POLLIN) {
            match pipe.draw(&*client.stream) {
                Ok(count) if count > 0 => input = count,
                Err(Errno::EAGAIN) => {}
                _ => client.sends = false,
            }
        }
        if !client.left && events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
            client.left = true;
            output.detach();
            tracing::debug!("console client left");
        }
        if client.left && !client.sends {
            self.client = None;
            self.news = true;
        }
        input
    }

    #[allow(unsafe_code)] // owning a fresh fd
    fn accept(&self) -> Option<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        match accept4(self.listener.as_raw_fd(), flags) {
            // SAFETY: the kernel just made this fd, for nobody else.
            Ok(fd) => Some(unsafe { OwnedFd::from_raw_fd(fd) }),
            Err(_) => None, // none waits, or it has left already
        }
    }
}

/// Only for an open file that nobody shares with us.
fn non_blocking(fd: OwnedFd) -> Result<OwnedFd, SerialError> {
    let flags = fcntl(fd.as_fd(), FcntlArg::F_GETFL).map_err(SerialError::NonBlocking)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags)).map_err(SerialError::NonBlocking)?;
    Ok(fd)
}
