//! The command line's side of the control socket: blocking, with deadlines.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::fds;
use super::protocol::{Event, Reply, Request, SnapshotReport};
use crate::remedy::Remedy;

/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How often it is looked whether a cut is still wanted.
const LOOK: Duration = Duration::from_millis(100);
/// Longest line accepted from a VM, in bytes.
const MAX_ANSWER: u64 = 4 << 20;

/// A request that was not answered as hoped.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error("connecting to the control socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The connection broke while talking.
    #[error("{doing} the VM")]
    Talk {
        /// What was being done.
        doing: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// No answer in time.
    #[error("the VM did not answer within {} s", ANSWER.as_secs())]
    Timeout,
    /// No cut in time.
    #[error("the VM did not answer within {} s", .0.as_secs())]
    Late(Duration),
    /// It was not waited for.
    #[error("waiting for the VM was called off")]
    Cancelled,
    /// End of file in place of an answer.
    #[error("the VM closed the connection without an answer")]
    Gone,
    /// End of file in place of the shutdown event.
    #[error("the VM went away without a shutdown event")]
    Vanished,
    /// Something that is no reply.
    #[error("the answer is not one of Cellblock's control protocol")]
    Garbage(#[source] Option<serde_json::Error>),
    /// The VM said no.
    #[error("{message}")]
    Refused {
        /// The VM's line.
        message: String,
        /// The VM's remedy.
        remedy: Option<String>,
    },
}

impl Remedy for ClientError {
    fn remedy(&self) -> Option<String> {
        match self {
            ClientError::Connect { source, .. } => match source.kind() {
                ErrorKind::NotFound => {
                    Some("check the path: it is the one given to 'cellblock run --control'".into())
                }
                ErrorKind::PermissionDenied => Some("run as the VM's user or as root".into()),
                ErrorKind::ConnectionRefused => {
                    Some("the VM that made it is gone, or it is no control socket".into())
                }
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    Some("the VM does not take connections; it may be stopped or stuck".into())
                }
                _ => None,
            },
            ClientError::Timeout | ClientError::Late(_) => {
                Some("see with 'ps' whether its process is stopped or starved".into())
            }
            ClientError::Gone | ClientError::Vanished => {
                Some("it ended or was killed; its standard error says why".into())
            }
            ClientError::Refused { remedy, .. } => remedy.clone(),
            ClientError::Talk { .. } | ClientError::Garbage(_) | ClientError::Cancelled => None,
        }
    }
}

/// A cut through a VM, to be written down.
#[derive(Debug)]
pub struct Cut {
    /// How it went.
    pub report: SnapshotReport,
    /// The report as it came.
    pub line: String,
    /// The encoded state.
    pub state: OwnedFd,
    /// Guest memory, laid out as in the VM's memfd.
    pub memory: OwnedFd,
    /// What was written to each `cow` disk.
    pub written: Vec<OwnedFd>,
    /// With a base: the pages that were written since, a bit each.
    pub pages: Option<OwnedFd>,
}

/// A connection to a running VM.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the VM at `path`.
    pub fn connect(path: &Path) -> Result<Client, ClientError> {
        let stream = connect_within(path, ANSWER)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(Client { stream: BufReader::new(stream) })
    }

    /// A connection that somebody else has made.
    pub fn from_stream(stream: UnixStream) -> Client {
        Client { stream: BufReader::new(stream) }
    }

    /// Waits until the VM says that it is time for a snapshot, and why; `None` where it ends
    /// first.
    pub fn await_trigger(&mut self) -> Result<Option<String>, ClientError> {
        let asked = self.stream.get_ref().set_read_timeout(None);
        asked.map_err(|source| ClientError::Talk { doing: "waiting for", source })?;
        let answer = self.ask(Request::AwaitTrigger);
        let asked = self.stream.get_ref().set_read_timeout(Some(ANSWER));
        asked.map_err(|source| ClientError::Talk { doing: "waiting for", source })?;
        match answer {
            Ok((Reply::Trigger { trigger }, _)) => Ok(Some(trigger).filter(|t| !t.is_empty())),
            Ok(_) => Err(ClientError::Garbage(None)),
            Err(ClientError::Gone | ClientError::Talk { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends `request` and returns the answer, with its line as it came.
    ///
    /// # Errors
    /// An answer that is an error becomes [`ClientError::Refused`].
    pub fn ask(&mut self, request: Request) -> Result<(Reply, String), ClientError> {
        let mut line = serde_json::to_vec(&request).map_err(|e| ClientError::Garbage(Some(e)))?;
        line.push(b'\n');
        // A server that turned us away has closed already: its line says why.
        let written = self.stream.get_mut().write_all(&line);
        let answer = match self.line() {
            Ok(Some(answer)) => answer,
            Ok(None) => return Err(ClientError::Gone),
            Err(error) => {
                return Err(match written {
                    Err(source) => ClientError::Talk { doing: "sending the request to", source },
                    Ok(()) => error,
                });
            }
        };
        match serde_json::from_str(&answer).map_err(|e| ClientError::Garbage(Some(e)))? {
            Reply::Error { message, remedy } => Err(ClientError::Refused { message, remedy }),
            reply => Ok((reply, answer)),
        }
    }

    /// Asks for a cut: the report, its line, the state and guest memory. The VM may take as
    /// long as `limit` over it.
    pub fn snapshot(
        &mut self,
        hold: bool,
        live: bool,
        timeout: Duration,
        trigger: &str,
        limit: Duration,
    ) -> Result<Cut, ClientError> {
        self.snapshot_unless(&AtomicBool::new(false), hold, live, timeout, trigger, limit)
    }

    /// The same, until `cancel` is set: the VM goes on when the connection ends.
    pub fn snapshot_unless(
        &mut self,
        cancel: &AtomicBool,
        hold: bool,
        live: bool,
        timeout: Duration,
        trigger: &str,
        limit: Duration,
    ) -> Result<Cut, ClientError> {
        let is_cancelled = || cancel.load(Ordering::Relaxed);
        let timeout_us = Some(u64::try_from(timeout.as_micros()).unwrap_or(u64::MAX));
        let request = Request::Snapshot { hold, live, timeout_us, trigger: Some(trigger.into()) };
        let mut line = serde_json::to_vec(&request).map_err(|e| ClientError::Garbage(Some(e)))?;
        line.push(b'\n');
        let talk = |doing| move |source| ClientError::Talk { doing, source };
        let stream = self.stream.get_mut();
        stream.write_all(&line).map_err(talk("sending the request to"))?;
        stream.set_read_timeout(Some(LOOK.min(limit))).map_err(talk("waiting for"))?;
        let end = Instant::now() + limit;
        let waits = || !is_cancelled() && Instant::now() < end;
        let (answer, fds) = fds::line(stream, MAX_ANSWER as usize, waits).map_err(|source| {
            match source.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut if is_cancelled() => {
                    ClientError::Cancelled
                }
                ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::Late(limit),
                ErrorKind::UnexpectedEof => ClientError::Gone,
                _ => ClientError::Talk { doing: "waiting for", source },
            }
        })?;
        stream.set_read_timeout(Some(limit)).map_err(talk("waiting for"))?;
        match serde_json::from_str(&answer).map_err(|e| ClientError::Garbage(Some(e)))? {
            Reply::Error { message, remedy } => Err(ClientError::Refused { message, remedy }),
            Reply::Snapshot(report) => {
                let mut fds = fds.into_iter();
                let cows = report.disks.iter().filter(|disk| disk.cow).count();
                match (fds.next(), fds.next(), fds.collect::<Vec<_>>()) {
                    (Some(state), Some(memory), mut written) => {
                        let pages = report.base.as_ref().and_then(|_| written.pop());
                        if written.len() != cows || pages.is_some() != report.base.is_some() {
                            return Err(ClientError::Garbage(None));
                        }
                        Ok(Cut { report, line: answer, state, memory, written, pages })
                    }
                    _ => Err(ClientError::Garbage(None)),
                }
            }
            _ => Err(ClientError::Garbage(None)),
        }
    }

    /// After [`Request::Events`]: the next event with its line, or `None` at the end.
    /// Waits for as long as it takes.
    pub fn next_event(&mut self) -> Result<Option<(Event, String)>, ClientError> {
        self.stream
            .get_ref()
            .set_read_timeout(None)
            .map_err(|source| ClientError::Talk { doing: "waiting for", source })?;
        let Some(line) = self.line()? else { return Ok(None) };
        let event = serde_json::from_str(&line).map_err(|e| ClientError::Garbage(Some(e)))?;
        Ok(Some((event, line)))
    }

    /// Waits until the VM closes the connection, at most `limit`. True if it did.
    pub fn wait_closed(&mut self, limit: Duration) -> bool {
        let _ = self.stream.get_ref().set_read_timeout(Some(limit));
        matches!(self.line(), Ok(None))
    }

    /// One line without its end; `None` at the end of the stream.
    fn line(&mut self) -> Result<Option<String>, ClientError> {
        let mut line = Vec::new();
        let read = (&mut self.stream).take(MAX_ANSWER).read_until(b'\n', &mut line);
        match read {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(ClientError::Timeout);
            }
            // The VM was killed with our request unread.
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(source) => {
                return Err(ClientError::Talk { doing: "reading the answer of", source });
            }
        }
        if line.pop() != Some(b'\n') {
            return Err(ClientError::Garbage(None));
        }
        String::from_utf8(line).map(Some).map_err(|_| ClientError::Garbage(None))
    }
}

/// Connects with a deadline: a Unix socket whose queue is full makes `connect` wait.
fn connect_within(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let seconds = i64::try_from(limit.as_secs()).map_err(|_| Errno::EINVAL)?;
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(seconds, 0))?;
    let address = UnixAddr::new(path)?;
    loop {
        match connect(fd.as_raw_fd(), &address) {
            Err(Errno::EINTR) => {}
            done => break done?,
        }
    }
    let stream = UnixStream::from(fd);
    stream.set_read_timeout(Some(limit))?;
    Ok(stream)
}
