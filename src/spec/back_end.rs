//! Connecting to another program's vhost-user back end.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_to, socket,
};

use super::DiskError;

/// How long a back end may leave connections waiting.
const LIMIT: Duration = Duration::from_secs(5);

/// Connects to the socket at `path`, in bounded time: a blocking connect would wait for
/// ever for a program that has stopped accepting.
pub(super) fn connect(path: &Path) -> Result<UnixStream, DiskError> {
    let fail = |source: io::Error| DiskError::Connect { path: path.to_owned(), source };
    let errno = |errno: Errno| fail(errno.into());
    let address = UnixAddr::new(path).map_err(errno)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(errno)?;
    let end = Instant::now() + LIMIT;
    loop {
        match connect_to(fd.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EAGAIN | Errno::EINTR) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(errno(error)),
        }
    }
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false).map_err(fail)?;
    Ok(stream)
}
