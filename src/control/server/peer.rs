//! One control client: what it sent and what it has not read yet.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;

use super::super::protocol::Reply;
use super::{MAX_BACKLOG, MAX_LINE};

/// Bytes read from a client in one round.
const CHUNK: usize = 4096;

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) stream: UnixStream,
    /// Bytes of requests not yet looked at; after [`Peer::fill`], at most a line and a chunk.
    input: Vec<u8>,
    output: Vec<u8>,
    /// How much of `output` is sent.
    sent: usize,
    /// Number of the request being carried out.
    pub(super) pending: Option<u64>,
    /// Requests so far.
    pub(super) requests: u64,
    pub(super) subscribed: bool,
    /// It closed its sending side: no more requests, but it may still read.
    ended: bool,
    /// It was told off: what is waiting is sent, then the connection closed.
    refused: bool,
    /// The connection is no more, or not worth keeping.
    pub(super) gone: bool,
}

impl Peer {
    pub(super) fn new(stream: UnixStream) -> Peer {
        Peer {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            pending: None,
            requests: 0,
            subscribed: false,
            ended: false,
            refused: false,
            gone: false,
        }
    }

    /// Reads one chunk of what the client sent.
    pub(super) fn fill(&mut self) {
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => self.ended = true,
            // A subscriber has nothing more to say; what it says is discarded.
            Ok(_) if self.subscribed || self.refused => {}
            Ok(n) => {
                self.input.extend_from_slice(&chunk[..n]);
                if !self.has_line() && self.input.len() >= MAX_LINE {
                    self.refuse(&format!("a request is one line of at most {MAX_LINE} bytes"));
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.gone = true,
        }
    }

    /// Whether its next request may be looked at: one at a time, and none from a
    /// client that leaves answers unread.
    pub(super) fn may_ask(&self) -> bool {
        !(self.gone || self.refused || self.subscribed)
            && self.pending.is_none()
            && self.is_flushed()
    }

    /// The next whole line, without its end. Empty lines are skipped.
    pub(super) fn take_line(&mut self) -> Option<Vec<u8>> {
        loop {
            let end = self.input.iter().position(|b| *b == b'\n')?;
            let line = self.input[..end].trim_ascii().to_vec();
            self.input.drain(..=end);
            if !line.is_empty() {
                return Some(line);
            }
        }
    }

    fn has_line(&self) -> bool {
        self.input.contains(&b'\n')
    }

    pub(super) fn send_json(&mut self, reply: &Reply) {
        self.send(&line(reply));
    }

    /// Sends `reply` with `fds`, which go with its first byte. One that the socket does
    /// not take now is an error for its client, who has read all that came before.
    pub(super) fn send_fds(&mut self, reply: &Reply, fds: Vec<OwnedFd>) {
        let line = line(reply);
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let bytes = [IoSlice::new(&line)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(self.stream.as_raw_fd(), &bytes, &rights, flags, None) {
            Ok(sent) => self.send(&line[sent..]),
            Err(_) => self.gone = true,
        }
    }

    /// Queues `bytes` and sends what the socket takes.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        if self.gone {
            return;
        }
        self.output.extend_from_slice(bytes);
        self.flush();
        if self.output.len() - self.sent > MAX_BACKLOG {
            tracing::warn!("a control client that does not read its answers was dropped");
            self.gone = true;
        }
    }

    /// Says why, and closes the connection once that is sent.
    pub(super) fn refuse(&mut self, why: &str) {
        self.refused = true;
        self.input.clear();
        self.send_json(&Reply::error(why, Some("send one JSON request a line")));
    }

    /// Sends what the socket takes now. False when the connection is no more.
    pub(super) fn flush(&mut self) -> bool {
        while !self.gone && !self.is_flushed() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => self.gone = true,
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.gone = true,
            }
        }
        if self.is_flushed() {
            self.output.clear();
            self.sent = 0;
        } else if self.sent >= CHUNK {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        !self.gone
    }

    /// Whether nothing waits to be read.
    pub(super) fn is_flushed(&self) -> bool {
        self.sent == self.output.len()
    }

    /// Whether the connection has served its purpose.
    pub(super) fn is_done(&self) -> bool {
        self.gone
            || (self.is_flushed()
                && (self.refused
                    || (self.ended
                        && !self.subscribed
                        && self.pending.is_none()
                        && !self.has_line())))
    }

    /// What to be woken for.
    pub(super) fn interest(&self) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        let more = self.pending.is_none() && self.has_line();
        // With a request waiting in `input`, being writable is the reason to come back.
        if !self.is_flushed() || more {
            flags |= EpollFlags::EPOLLOUT;
        }
        if !self.ended && self.pending.is_none() && !more && self.is_flushed() {
            flags |= EpollFlags::EPOLLIN;
        }
        flags
    }
}

/// `message` as one line of JSON.
pub(super) fn line(message: &impl Serialize) -> Vec<u8> {
    // The messages are plain data of ours: there is nothing in them that JSON cannot say.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}
