//! For tests: a vhost-user back end that says what the test wants.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

pub(super) const SET_OWNER: u32 = 3;
pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(super) const GET_QUEUE_NUM: u32 = 17;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const GET_CONFIG: u32 = 24;

const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// `VHOST_USER_F_PROTOCOL_FEATURES`, virtio 1.0, and bits no guest may be offered.
pub(super) const FEATURES: u64 = 1 << 30 | 1 << 32 | 1 << 26 | 1 << 34 | 1 << 9;
/// MQ, REPLY_ACK, CONFIG, and more than we ask for.
pub(super) const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 9 | 1 << 13;

/// A message as it came, less its fds.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: u32,
    flags: u32,
    pub(super) body: Vec<u8>,
}

/// The far end of a front end's connection.
pub(super) struct Peer(pub(super) UnixStream);

impl Peer {
    /// The next message; `None` at the end of the connection.
    pub(super) fn next(&mut self) -> Option<Message> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).ok()?;
        let word = |n: usize| u32::from_le_bytes(header[n..n + 4].try_into().expect("4 bytes"));
        let mut body = vec![0; word(8) as usize];
        self.0.read_exact(&mut body).ok()?;
        Some(Message { request: word(0), flags: word(4), body })
    }

    /// Sends the header of an answer to `request`, with `len` bytes to follow.
    pub(super) fn reply_header(&mut self, request: u32, len: u32) {
        let header = [request, 1 | REPLY, len].map(u32::to_le_bytes).concat();
        let _ = self.0.write_all(&header); // the front end may have hung up
    }

    /// Answers `request` with `body`.
    pub(super) fn reply_to(&mut self, request: u32, body: &[u8]) {
        self.reply_header(request, body.len() as u32);
        let _ = self.0.write_all(body); // as above
    }

    /// Answers as a good back end with `features` and `protocol` does, and an
    /// acknowledgement with `status` where one is asked for.
    pub(super) fn answer(&mut self, message: &Message, features: u64, protocol: u64, status: u64) {
        match message.request {
            GET_FEATURES => self.reply_to(message.request, &features.to_le_bytes()),
            GET_PROTOCOL_FEATURES => self.reply_to(message.request, &protocol.to_le_bytes()),
            GET_QUEUE_NUM => self.reply_to(message.request, &1u64.to_le_bytes()),
            // Offset, size, flags and content; or the index and its base.
            GET_CONFIG | GET_VRING_BASE => self.reply_to(message.request, &message.body),
            _ if message.flags & NEED_REPLY != 0 => {
                self.reply_to(message.request, &status.to_le_bytes())
            }
            _ => {}
        }
    }

    /// Behaves until `until` comes, and returns what came before it.
    pub(super) fn behave_until(&mut self, until: u32) -> Vec<u32> {
        let mut came = Vec::new();
        while let Some(message) = self.next() {
            if message.request == until {
                return came;
            }
            came.push(message.request);
            self.answer(&message, FEATURES, PROTOCOL, 0);
        }
        panic!("the connection ended after {came:?}, before {until}");
    }

    /// Reads what comes, silently, until the connection ends.
    pub(super) fn listen_to_the_end(&mut self) -> Vec<u32> {
        std::iter::from_fn(|| self.next()).map(|message| message.request).collect()
    }
}
