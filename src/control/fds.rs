//! A line that brings file descriptors with it.
#![allow(unsafe_code)] // owning received fds

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Most fds of one line.
const MOST: usize = 64;

/// Reads up to the next line feed, which is the last byte there is, and the fds that came
/// with it. Where the stream has a limit to how long a read waits, it waits on for as long as
/// `waits` says.
pub fn line(
    stream: &UnixStream,
    limit: usize,
    mut waits: impl FnMut() -> bool,
) -> io::Result<(String, Vec<OwnedFd>)> {
    let (mut line, mut fds) = (Vec::new(), Vec::new());
    while line.last() != Some(&b'\n') {
        let mut chunk = [0; 4096];
        let mut space = cmsg_space!([i32; MOST]);
        let mut buffers = [IoSliceMut::new(&mut chunk)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(stream.as_raw_fd(), &mut buffers, Some(&mut space), flags)
        {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(nix::errno::Errno::EAGAIN) if waits() => continue,
            other => other?,
        };
        let count = message.bytes;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = part {
                // SAFETY: the kernel has just made these fds, for nobody else.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        line.extend_from_slice(&chunk[..count]);
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.len() > limit {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an endless line"));
        }
    }
    line.pop();
    let line = String::from_utf8(line)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a line that is no text"))?;
    Ok((line, fds))
}
