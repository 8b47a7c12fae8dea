//! Connecting for a VMM that may not: to sockets whose paths were fixed at the fork.
//!
//! Under its filter the VMM makes no connection by a path. What it can ask for is one of a
//! list that the spawner inherited, by number, and it gets the connected socket. Nothing
//! here waits: where nobody accepts at once, the answer is no, and it may ask again.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

/// The sockets that may be connected to.
#[derive(Debug, Default)]
pub(super) struct Places(pub(super) Vec<PathBuf>);

impl Places {
    /// A connection to place `n`; `None` where there is no such place.
    pub(super) fn connect(&self, n: u32) -> Option<Result<OwnedFd, Errno>> {
        self.0.get(usize::try_from(n).ok()?).map(|path| to(path))
    }
}

fn to(path: &Path) -> Result<OwnedFd, Errno> {
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &address)?;
    // The VMM waits in it, with a deadline of its own.
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn only_places_of_the_list_and_only_at_once() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("s");
        let places = Places(vec![path.clone(), dir.path().join("none")]);
        assert!(places.connect(2).is_none());
        assert_eq!(places.connect(0).expect("listed").expect_err("not there"), Errno::ENOENT);
        let listener = UnixListener::bind(&path).expect("bind");
        let mut near = UnixStream::from(places.connect(0).expect("listed").expect("connects"));
        let (mut far, _) = listener.accept().expect("accept");
        far.write_all(b"x").expect("write");
        let mut byte = [0];
        near.read_exact(&mut byte).expect("it waits, and reads");
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).expect("0"))
            .expect("listen");
        let _first = places.connect(0).expect("listed").expect("one waits");
        assert_eq!(places.connect(0).expect("listed").expect_err("full"), Errno::EAGAIN);
        drop(listener);
        assert_eq!(places.connect(0).expect("listed").expect_err("gone"), Errno::ECONNREFUSED);
    }
}
