//! A `SOCK_SEQPACKET` socket that carries one serde value, and its fds, per datagram.
//!
//! The peer is not trusted: a datagram is bounded in bytes and fds, one that was
//! cut short or does not decode is an error of this channel and of nothing else,
//! and fds that came with it are closed where that holds up nobody ([`closer`]).

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::closer;
use crate::codec::{self, CodecError};

/// The largest message, in bytes. Fits the default socket buffer of Linux.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most file descriptors one message carries.
pub const MAX_FDS: usize = 64;

/// A failed exchange on a [`Channel`].
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket pair could not be made.
    #[error("creating a channel")]
    Create(#[source] Errno),
    /// The datagram could not be sent.
    #[error("sending a message")]
    Send(#[source] Errno),
    /// The datagram could not be received.
    #[error("receiving a message")]
    Receive(#[source] Errno),
    /// The peer closed its end, or died.
    #[error("peer closed the channel")]
    Closed,
    /// No message came, or could be sent, in time.
    #[error("peer did not answer within {0:?}")]
    TimedOut(Duration),
    /// A message was larger, or carried more fds, than allowed.
    #[error("message from peer was cut short")]
    Truncated,
    /// More fds than [`MAX_FDS`] were to be sent.
    #[error("{0} file descriptors are more than the {MAX_FDS} a message carries")]
    TooManyFds(usize),
    /// The message did not encode or decode.
    #[error("message is not valid")]
    Codec(#[from] CodecError),
}

/// One end of a `SOCK_SEQPACKET` connection. Dropping it closes it.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Makes a connected pair, close-on-exec.
    pub fn pair() -> Result<(Channel, Channel), ChannelError> {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(ChannelError::Create)?;
        Ok((Channel(a), Channel(b)))
    }

    /// Takes over a connected `SOCK_SEQPACKET` socket.
    pub fn from_fd(fd: OwnedFd) -> Channel {
        Channel(fd)
    }

    /// Gives the socket away, for a child process.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Sends `message` with copies of `fds`, waiting for room as long as it takes.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        self.send_bytes(&codec::encode(message)?, fds, MsgFlags::empty())
    }

    /// Like [`Channel::send`], but returns `Ok(false)` where the peer's buffer is full.
    pub fn try_send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<bool, ChannelError> {
        match self.send_bytes(&codec::encode(message)?, fds, MsgFlags::MSG_DONTWAIT) {
            Ok(()) => Ok(true),
            Err(ChannelError::Send(Errno::EAGAIN)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn send_bytes(
        &self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        flags: MsgFlags,
    ) -> Result<(), ChannelError> {
        if fds.len() > MAX_FDS {
            return Err(ChannelError::TooManyFds(fds.len()));
        }
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        loop {
            match sendmsg::<()>(
                self.0.as_raw_fd(),
                &[IoSlice::new(bytes)],
                control,
                flags | MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(ChannelError::Closed),
                Err(e) => return Err(ChannelError::Send(e)),
            }
        }
    }

    /// Waits for the next message and the fds that came with it.
    pub fn recv<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        self.recv_flags(MsgFlags::empty())
    }

    /// The next message if one is there.
    pub fn try_recv<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        match self.recv_flags(MsgFlags::MSG_DONTWAIT) {
            Ok(message) => Ok(Some(message)),
            Err(ChannelError::Receive(Errno::EAGAIN)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Waits at most `limit` for the next message.
    pub fn recv_timeout<T: DeserializeOwned>(
        &self,
        limit: Duration,
    ) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            // Rounded up, so that the last wait does not become a busy loop.
            let timeout = PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000) as u64)
                .unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_zero() => return Err(ChannelError::TimedOut(limit)),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => {
                    if let Some(message) = self.try_recv()? {
                        return Ok(message);
                    }
                }
                Err(e) => return Err(ChannelError::Receive(e)),
            }
        }
    }

    /// Whether the peer has not read all that was sent.
    pub fn has_unread(&self) -> bool {
        self.unread() > 0
    }

    /// What the peer has not read of what was sent, in bytes as the kernel counts them for its
    /// limit: with what it takes to keep a message.
    #[allow(unsafe_code)] // an ioctl that nix does not have
    pub fn unread(&self) -> usize {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the kernel writes an int.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        if result == 0 { usize::try_from(bytes).unwrap_or(0) } else { 0 }
    }

    /// Whether the peer closed its end, or died; what it had sent before can still be read.
    pub fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        let told = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
            && told(&fds[0]).contains(PollFlags::POLLHUP)
    }

    /// Whether the next message, which is waited for at most so long, brings fds: they stay in it.
    #[allow(unsafe_code)] // recvmsg, as below
    pub fn brings_fds(&self, limit: Duration) -> bool {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut fds, timeout), Ok(1)) {
            return false;
        }
        // SAFETY: all zeroes is a valid msghdr: no room for anything.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: the kernel writes to the header alone.
        let result = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut header, flags) };
        result >= 0 && header.msg_flags & libc::MSG_CTRUNC != 0
    }

    fn recv_flags<T: DeserializeOwned>(
        &self,
        flags: MsgFlags,
    ) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let mut bytes = vec![0u8; MAX_MESSAGE];
        let (len, fds, cut) = loop {
            match receive(self.0.as_fd(), &mut bytes, flags) {
                Ok(received) => break received,
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Err(ChannelError::Closed),
                Err(e) => return Err(ChannelError::Receive(e)),
            }
        };
        let message = if cut || fds.len() > MAX_FDS {
            Err(ChannelError::Truncated)
        } else if len == 0 {
            // Every message of ours has at least one byte, so zero is the end of file.
            Err(ChannelError::Closed)
        } else {
            codec::decode(&bytes[..len]).map_err(ChannelError::from)
        };
        match message {
            Ok(message) => Ok((message, fds)),
            Err(error) => {
                closer::close_all(fds);
                Err(error)
            }
        }
    }
}

/// The most that the kernel lets one message carry (SCM_MAX_FD). There is room for all of them:
/// those that find none would be closed by the thread that receives.
const RECEIVED_FDS: usize = 253;

/// Room for the fds of one message, aligned as control messages have to be.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

#[allow(unsafe_code)] // a macro of the C library that only computes
// SAFETY: computes a size.
const CONTROL: usize =
    unsafe { libc::CMSG_SPACE((RECEIVED_FDS * size_of::<RawFd>()) as u32) } as usize;

/// One datagram: its length, its fds, and whether any of it was cut off.
///
/// By hand, because nix gives out no fd at all of a message that lost some: those
/// that did arrive, which a hostile peer can arrange, would stay open for ever.
#[allow(unsafe_code)] // recvmsg, and owning fds the kernel just handed over
fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    flags: MsgFlags,
) -> Result<(usize, Vec<OwnedFd>, bool), Errno> {
    let mut control = Control([0; CONTROL]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all zeroes is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = CONTROL;
    let flags = (flags | MsgFlags::MSG_CMSG_CLOEXEC).bits();
    // SAFETY: the header names `bytes` and `control` with their sizes, and both
    // outlive the call.
    let len = Errno::result(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) })?;
    let mut fds = Vec::new();
    // SAFETY: the kernel filled `control` up to `msg_controllen`, where the macros
    // stay; a message's data is read unaligned and within its own length.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(&raw const header);
        while let Some(message) = next.as_ref() {
            if (message.cmsg_level, message.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(next).cast::<RawFd>();
                let space = message.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                for i in 0..space / size_of::<RawFd>() {
                    // The kernel installed it in this process just now, and nothing
                    // else knows its number.
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            next = libc::CMSG_NXTHDR(&raw const header, next);
        }
    }
    let cut = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    Ok((len as usize, fds, cut))
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> OwnedFd {
        channel.0
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn values_and_fds_arrive_together() {
        let (a, b) = Channel::pair().expect("pair");
        let (mut near, far) = std::os::unix::net::UnixStream::pair().expect("pair");
        a.send(&("disk0".to_string(), 3u8), &[far.as_fd()]).expect("send");
        drop(far);
        let ((name, n), fds) = b.recv::<(String, u8)>().expect("recv");
        assert_eq!((name.as_str(), n, fds.len()), ("disk0", 3, 1));
        let mut far = std::os::unix::net::UnixStream::from(fds.into_iter().next().expect("fd"));
        near.write_all(b"hi").expect("write");
        let mut got = [0; 2];
        far.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"hi");
    }

    #[test]
    fn a_dead_peer_is_closed_not_an_error_number() {
        let (a, b) = Channel::pair().expect("pair");
        b.send(&1u8, &[]).expect("send");
        assert!(!a.is_closed());
        drop(b);
        assert!(a.is_closed());
        assert_eq!(a.recv::<u8>().expect("what it had said").0, 1);
        assert!(matches!(a.recv::<u8>(), Err(ChannelError::Closed)));
        assert!(matches!(a.send(&1u8, &[]), Err(ChannelError::Closed)));
    }

    #[test]
    fn garbage_is_refused_and_the_channel_goes_on() {
        let (a, b) = Channel::pair().expect("pair");
        a.send_bytes(&[255; 9], &[], MsgFlags::empty()).expect("send");
        a.send(&5u32, &[]).expect("send");
        assert!(matches!(b.recv::<String>(), Err(ChannelError::Codec(_))));
        assert_eq!(b.recv::<u32>().expect("recv").0, 5);
    }

    #[test]
    fn oversized_datagrams_are_truncated_not_believed() {
        let (a, b) = Channel::pair().expect("pair");
        a.send_bytes(&vec![0; MAX_MESSAGE + 1], &[], MsgFlags::empty()).expect("send");
        assert!(matches!(b.recv::<Vec<u8>>(), Err(ChannelError::Truncated)));
    }

    #[test]
    fn fds_of_a_message_that_lost_some_are_closed() {
        let (a, b) = Channel::pair().expect("pair");
        let (mut near, far) = std::os::unix::net::UnixStream::pair().expect("pair");
        let raw = [far.as_raw_fd(); MAX_FDS + 1];
        let rights = [ControlMessage::ScmRights(&raw)];
        let bytes = [IoSlice::new(&[1])];
        sendmsg::<()>(a.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None).expect("send");
        assert!(matches!(b.recv::<u8>(), Err(ChannelError::Truncated)));
        // The other end is seen closed once nobody in this process has it any more.
        drop(far);
        near.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        assert_eq!(near.read(&mut [0]).expect("end of file"), 0);
    }

    #[test]
    fn fds_are_seen_before_they_are_taken() {
        let (a, b) = Channel::pair().expect("pair");
        let soon = Duration::from_millis(5);
        assert!(!b.brings_fds(soon));
        a.send(&1u8, &[]).expect("send");
        a.send(&2u8, &[a.as_fd(), b.as_fd()]).expect("send");
        assert!(!b.brings_fds(soon));
        assert_eq!(b.recv::<u8>().expect("recv").0, 1);
        assert!(b.brings_fds(soon) && b.brings_fds(soon));
        assert_eq!(b.recv::<u8>().expect("recv").1.len(), 2);
    }

    #[test]
    fn what_was_not_read_is_known() {
        let (a, b) = Channel::pair().expect("pair");
        assert!(!a.has_unread());
        a.send(&1u8, &[]).expect("send");
        assert!(a.has_unread() && !b.has_unread());
        b.recv::<u8>().expect("recv");
        assert!(!a.has_unread());
    }

    #[test]
    fn silence_times_out() {
        let (a, _b) = Channel::pair().expect("pair");
        let limit = Duration::from_millis(20);
        assert!(matches!(a.recv_timeout::<u8>(limit), Err(ChannelError::TimedOut(_))));
        assert!(a.try_recv::<u8>().expect("quiet").is_none());
    }

    #[test]
    fn a_full_channel_says_so() {
        let (a, _b) = Channel::pair().expect("pair");
        let block = vec![0u8; 32 * 1024];
        let sent = (0..1000).take_while(|_| a.try_send(&block, &[]).expect("open")).count();
        assert!(sent > 0 && sent < 1000, "{sent}");
    }
}
