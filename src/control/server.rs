//! The VM's side of the control socket, driven by the main loop without a thread.
//!
//! One epoll fd holds the listener and every client, so the main loop watches one fd
//! and calls [`ControlServer::poll`] when it is readable. Nothing here blocks, and
//! nothing a client does costs others more than a bounded amount of work and memory:
//!
//! * a client is let in by its user id, and there are at most [`MAX_CLIENTS`];
//! * a line is at most [`MAX_LINE`] bytes, and a bad one ends the connection;
//! * one request of a client is in flight at a time, and a round does a few of each;
//! * answers wait in a bounded buffer: a client that does not read is dropped.

mod peer;

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use self::peer::Peer;
use super::protocol::{Event, EventKind, Reply, Request};
use super::socket::{ListeningSocket, Node, SocketError};
use crate::remedy::Remedy;

/// Connections at a time; the next one is told and closed.
pub const MAX_CLIENTS: usize = 64;
/// Bytes of a request's line, its end included.
pub const MAX_LINE: usize = 64 << 10;
/// Bytes that may wait for a client to read them.
pub const MAX_BACKLOG: usize = 1 << 20;
/// Events kept for those who subscribe later.
pub const HISTORY: usize = 256;
/// Requests of one client in one round.
const ROUND: usize = 16;
/// Most connections that wait to be accepted: more than any system lets wait.
const BACKLOG: usize = 1 << 16;
/// The epoll key of the listener; clients count from 1.
const LISTENER: u64 = 0;

/// Carries requests out.
pub trait Handler {
    /// Carries `request` out, quickly: the main loop waits. What needs an answer from
    /// somewhere else keeps `token`, returns [`Response::Later`], and gives the answer
    /// to [`ControlServer::complete`]. [`Request::Events`] never comes here.
    fn handle(&mut self, request: Request, token: Token) -> Response;

    /// The connection of a client is no more; it may have left something undone. Told by
    /// [`ControlServer::poll`], and of one that goes while it is sent something by
    /// [`ControlServer::take_lost`].
    fn gone(&mut self, client: u64) {
        let _ = client;
    }
}

/// What a [`Handler`] has to say at once.
#[derive(Debug)]
pub enum Response {
    /// The answer.
    Now(Reply),
    /// The answer, and what comes with it.
    WithFds(Reply, Vec<OwnedFd>),
    /// The answer comes through [`ControlServer::complete`].
    Later,
}

/// Names a request that will be answered later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    client: u64,
    request: u64,
}

impl Token {
    /// The connection it came by, as in [`Handler::gone`].
    pub fn client(self) -> u64 {
        self.client
    }
}

/// A control socket that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket.
    #[error("making the control socket")]
    Socket(#[source] SocketError),
    /// The event queue.
    #[error("watching the control socket")]
    Watch(#[source] Errno),
}

impl Remedy for ServerError {
    fn remedy(&self) -> Option<String> {
        match self {
            ServerError::Socket(error) => error.remedy(),
            ServerError::Watch(_) => None,
        }
    }
}

/// The control socket of a running VM. The path is removed on drop.
#[derive(Debug)]
pub struct ControlServer {
    epoll: Epoll,
    /// None where nobody can connect.
    listener: Option<UnixListener>,
    /// Dropped first when the VM ends, so that nobody finds the path any more.
    node: Option<Node>,
    /// Given up for a moment to turn a client away when the process has no fds left.
    spare: Option<OwnedFd>,
    uid: u32,
    clients: HashMap<u64, Peer>,
    /// The one that was handed over.
    adopted: Option<u64>,
    /// Those that went while something was sent to them, which the handler has not heard of.
    lost: Vec<u64>,
    next_client: u64,
    next_event: u64,
    /// Lines of the last events.
    history: VecDeque<Vec<u8>>,
}

/// The connections of the clients of a VM that ends: see [`ControlServer::finish`].
#[derive(Debug)]
pub struct Farewell {
    _connections: Vec<UnixStream>,
}

impl Farewell {
    /// Leaves closing the connections to the end of this process.
    pub fn at_exit(self) {
        std::mem::forget(self);
    }
}

impl ControlServer {
    /// Makes the socket at `path`, with mode 0600, and listens.
    ///
    /// # Errors
    /// A path that exists, whatever is there, or that cannot be made.
    pub fn bind(path: &Path) -> Result<ControlServer, ServerError> {
        let (listener, node) =
            ListeningSocket::bind(path).map_err(ServerError::Socket)?.into_listener();
        let watch = |e: io::Error| {
            ServerError::Watch(Errno::from_raw(e.raw_os_error().unwrap_or_default()))
        };
        listener.set_nonblocking(true).map_err(watch)?;
        let spare = listener.as_fd().try_clone_to_owned().map_err(watch)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(ServerError::Watch)?;
        epoll
            .add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))
            .map_err(ServerError::Watch)?;
        Ok(ControlServer {
            listener: Some(listener),
            node: Some(node),
            spare: Some(spare),
            epoll,
            ..ControlServer::without_socket()?
        })
    }

    /// Serves those it is handed, and nobody else.
    pub fn without_socket() -> Result<ControlServer, ServerError> {
        Ok(ControlServer {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(ServerError::Watch)?,
            listener: None,
            node: None,
            spare: None,
            uid: geteuid().as_raw(),
            clients: HashMap::new(),
            adopted: None,
            lost: Vec::new(),
            next_client: LISTENER + 1,
            next_event: 1,
            history: VecDeque::with_capacity(HISTORY),
        })
    }

    /// Serves a connection that somebody else has made.
    /// Its client learns the end of the VM before all is over: this process waits for it. Returns
    /// the client's number.
    pub fn adopt(&mut self, stream: UnixStream) -> u64 {
        let id = self.next_client;
        self.adopted = Some(id);
        self.admit(stream);
        id
    }

    /// Does what can be done now for every client that needs something. To be called
    /// when the fd is readable; calling it at other times is harmless.
    pub fn poll(&mut self, handler: &mut dyn Handler) {
        let mut events = [EpollEvent::empty(); MAX_CLIENTS + 1];
        // An interrupted wait comes again with the next round of the main loop.
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accept(),
                id => self.serve(id, event.events(), handler),
            }
        }
    }

    /// Answers a request for which the handler said [`Response::Later`]. Its client
    /// may be gone, or `token` answered already: then nothing happens.
    pub fn complete(&mut self, token: Token, reply: &Reply) {
        self.complete_with(token, reply, Vec::new());
    }

    /// The same, with what comes with the answer.
    pub fn complete_with(&mut self, token: Token, reply: &Reply, fds: Vec<OwnedFd>) {
        let Some(client) = self.clients.get_mut(&token.client) else { return };
        if client.pending == Some(token.request) {
            client.pending = None;
            match fds.is_empty() {
                true => client.send_json(reply),
                false => client.send_fds(reply, fds),
            }
            self.settle(token.client);
        }
    }

    /// Numbers and dates an event, sends it to every subscriber and keeps it for
    /// later ones. Returns the event as sent.
    pub fn broadcast(&mut self, kind: EventKind) -> Event {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        let event = Event { seq: self.next_event, time_us, kind };
        self.next_event += 1;
        let line = peer::line(&event);
        let ids: Vec<u64> =
            self.clients.iter().filter(|(_, c)| c.subscribed).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(client) = self.clients.get_mut(&id) {
                client.send(&line);
            }
            self.settle(id);
        }
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(line);
        event
    }

    /// Clients that have gone outside of [`ControlServer::poll`]: to be asked for after whatever
    /// sends them something, and to be treated as [`Handler::gone`] says.
    pub fn take_lost(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.lost)
    }

    /// Lets every client go, and forgets what has happened: who comes next is to see nothing
    /// of it.
    pub fn part(&mut self) {
        self.clients.clear();
        self.history.clear();
        // Those too who wait to be accepted.
        if let Some(listener) = &self.listener {
            // No more can wait.
            let _ = (0..BACKLOG).take_while(|_| listener.accept().is_ok()).count();
        }
    }

    /// Number of connections.
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// The end of the VM: takes the path away and hands over what clients have not
    /// read yet, for at most `limit`. To be called after the last event and answer.
    ///
    /// A client learns the end from the end of its connection. So that this is the
    /// end of everything, the connections are returned, to be kept to the very last.
    #[must_use = "dropping the connections tells clients that the VM has ended"]
    pub fn finish(mut self, limit: Duration) -> Farewell {
        drop(self.node.take());
        let deadline = Instant::now() + limit;
        let waits = |c: &mut Peer| c.flush() && !c.is_flushed();
        while self.clients.values_mut().any(waits) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            for (id, client) in &mut self.clients {
                let flags = if waits(client) { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
                let _ = self.epoll.modify(&client.stream, &mut EpollEvent::new(flags, *id));
            }
            let mut events = [EpollEvent::empty(); MAX_CLIENTS];
            let timeout = EpollTimeout::try_from(left).unwrap_or(EpollTimeout::ZERO);
            match self.epoll.wait(&mut events, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => break,
            }
            // One that hung up would be reported again and again.
            for event in &events {
                if event.events().intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                    self.clients.remove(&event.data());
                }
            }
        }
        if let Some(id) = self.adopted {
            self.clients.remove(&id);
        }
        Farewell { _connections: self.clients.into_values().map(|c| c.stream).collect() }
    }

    fn accept(&mut self) {
        let Some(listener) = self.listener.take() else { return };
        self.accept_from(&listener);
        self.listener = Some(listener);
    }

    fn accept_from(&mut self, listener: &UnixListener) {
        // A bounded number a round; the listener stays readable if there are more.
        for _ in 0..ROUND {
            match listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                    tracing::warn!("a control client was turned away: no file descriptors left");
                    self.spare = None;
                    drop(listener.accept());
                    self.spare = listener.as_fd().try_clone_to_owned().ok();
                    return;
                }
                Err(_) => return,
            }
        }
    }

    fn admit(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        let refusal = match getsockopt(&stream, PeerCredentials) {
            Ok(who) if who.uid() != self.uid && who.uid() != 0 => {
                tracing::warn!(uid = who.uid(), pid = who.pid(), "a control client was refused");
                Reply::error(
                    format!("user id {} may not control this VM", who.uid()),
                    Some("run the command as the VM's user or as root"),
                )
            }
            Err(_) => return,
            Ok(_) if self.clients.len() >= MAX_CLIENTS => Reply::error(
                format!("the VM has {MAX_CLIENTS} control clients already"),
                Some("end one of them, or try again later"),
            ),
            Ok(_) => {
                let id = self.next_client;
                let event = EpollEvent::new(EpollFlags::EPOLLIN, id);
                if self.epoll.add(&stream, event).is_ok() {
                    self.next_client += 1;
                    self.clients.insert(id, Peer::new(stream));
                }
                return;
            }
        };
        // As much as fits the fresh socket, which is all of it.
        let _ = (&stream).write(&peer::line(&refusal));
    }

    fn serve(&mut self, id: u64, flags: EpollFlags, handler: &mut dyn Handler) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            client.gone = true;
        }
        if flags.contains(EpollFlags::EPOLLIN) {
            client.fill();
        }
        client.flush();
        for _ in 0..ROUND {
            if !client.may_ask() {
                break;
            }
            let Some(line) = client.take_line() else { break };
            let request = match serde_json::from_slice::<Request>(&line) {
                Ok(request) => request,
                Err(error) => {
                    client.refuse(&format!("that is no request: {error}"));
                    break;
                }
            };
            if request == Request::Events {
                client.subscribed = true;
                client.send_json(&Reply::Events);
                for line in &self.history {
                    client.send(line);
                }
                break;
            }
            client.requests += 1;
            client.pending = Some(client.requests);
            let token = Token { client: id, request: client.requests };
            match handler.handle(request, token) {
                Response::Now(reply) => {
                    client.pending = None;
                    client.send_json(&reply);
                }
                Response::WithFds(reply, fds) => {
                    client.pending = None;
                    client.send_fds(&reply, fds);
                }
                Response::Later => {}
            }
        }
        self.settle(id);
        for id in self.take_lost() {
            handler.gone(id);
        }
    }

    /// Watches a client for what it needs next, or lets it go.
    fn settle(&mut self, id: u64) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let mut event = EpollEvent::new(client.interest(), id);
        if client.is_done() || self.epoll.modify(&client.stream, &mut event).is_err() {
            // Closing the stream takes it out of the epoll set.
            self.clients.remove(&id);
            self.lost.push(id);
        }
    }
}

impl AsFd for ControlServer {
    /// Readable when [`ControlServer::poll`] has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
