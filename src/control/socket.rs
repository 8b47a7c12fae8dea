//! A Unix socket at a path: made private, and removed again if still ours.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, fstat, fstatat};
use nix::unistd::{LinkatFlags, UnlinkatFlags, linkat, unlinkat};

use crate::remedy::Remedy;
use crate::snapshot::random;

/// Longest path a Unix socket can have, in bytes.
const PATH_MAX: usize = 107;

/// A socket that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path is longer than the kernel takes.
    #[error("the socket path {} has {} bytes", .0.display(), .0.as_os_str().len())]
    TooLong(PathBuf),
    /// A socket somebody answers on.
    #[error("the socket path {} is in use by a running program", .0.display())]
    Live(PathBuf),
    /// A socket nobody answers on.
    #[error("the socket path {} exists, left over from a program that is gone", .0.display())]
    Stale(PathBuf),
    /// Something else.
    #[error("the socket path {} exists and is no socket", .0.display())]
    Exists(PathBuf),
    /// The kernel refused.
    #[error("{doing} the socket {}", path.display())]
    System {
        /// What was being done.
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

impl Remedy for SocketError {
    fn remedy(&self) -> Option<String> {
        Some(match self {
            SocketError::TooLong(_) => format!("choose a path of at most {PATH_MAX} bytes"),
            SocketError::Live(_) => "choose another path".into(),
            SocketError::Stale(path) => format!("remove it with 'rm {}'", path.display()),
            SocketError::Exists(_) => "choose another path, or move it away".into(),
            SocketError::System { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => "make the directory first".into(),
                io::ErrorKind::PermissionDenied => {
                    "choose a directory that this user may write to".into()
                }
                _ => return None,
            },
        })
    }
}

/// A listening socket and its path, which is unlinked on drop if it still names it.
#[derive(Debug)]
pub struct ListeningSocket {
    fd: OwnedFd,
    node: Node,
}

/// The path of a socket, unlinked on drop if it still names that socket.
#[derive(Debug)]
pub struct Node {
    path: PathBuf,
    /// Device and inode of the socket made there.
    identity: (u64, u64),
}

impl ListeningSocket {
    /// Makes a socket at `path` with mode 0600 and listens. An existing path is refused. Clients
    /// send bytes, and no fds.
    pub fn bind(path: &Path) -> Result<ListeningSocket, SocketError> {
        ListeningSocket::make(path, SockType::Stream, Mode::S_IRUSR | Mode::S_IWUSR, false)
    }

    /// As [`ListeningSocket::bind`], with a socket of another type and mode, whose clients send fds
    /// as well.
    pub fn bind_as(
        path: &Path,
        kind: SockType,
        mode: Mode,
    ) -> Result<ListeningSocket, SocketError> {
        ListeningSocket::make(path, kind, mode, true)
    }

    fn make(
        path: &Path,
        kind: SockType,
        mode: Mode,
        takes_fds: bool,
    ) -> Result<ListeningSocket, SocketError> {
        let fail = |doing| {
            move |errno: Errno| SocketError::System {
                doing,
                path: path.to_owned(),
                source: errno.into(),
            }
        };
        if path.as_os_str().len() > PATH_MAX {
            return Err(SocketError::TooLong(path.to_owned()));
        }
        let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None);
        let fd = fd.map_err(fail("making"))?;
        // The node takes the mode of the socket's inode at the moment it is made, less
        // the umask: no other user can connect even for an instant, and the umask,
        // which is the whole process's, is left alone.
        fchmod(&fd, mode).map_err(fail("setting the mode of"))?;
        if !takes_fds {
            refuse_fds(&fd);
        }
        // Whoever waits for the path to be there connects at once: it has it when it listens.
        let hidden = Hidden::bind(&fd, path).map_err(fail("making"))?;
        if mode.intersects(Mode::S_IRWXG | Mode::S_IRWXO) {
            hidden.widen(mode).map_err(fail("letting other users reach"))?;
        }
        listen(&fd, Backlog::MAXCONN).map_err(fail("listening on"))?;
        match hidden.show(path) {
            Ok(node) => Ok(ListeningSocket { fd, node }),
            Err(Errno::EEXIST) => Err(occupied(path, kind)),
            Err(errno) => Err(fail("naming")(errno)),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.node.path
    }

    /// The socket for somebody else to accept from, and the path to be kept here.
    pub fn into_parts(self) -> (OwnedFd, Node) {
        (self.fd, self.node)
    }

    /// As the standard library's listener.
    pub(crate) fn into_listener(self) -> (UnixListener, Node) {
        (UnixListener::from(self.fd), self.node)
    }
}

impl AsFd for ListeningSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Removes the sockets of a process that was killed: at `path`, and what it was making there.
pub(crate) fn clear(path: &Path, pid: u32) {
    let _ = std::fs::remove_file(path);
    let _ = std::fs::remove_file(path.with_file_name(hidden_name(pid)));
}

/// Under which name a process makes a socket.
fn hidden_name(pid: u32) -> String {
    format!(".cellblock-{pid}")
}

/// The node of a socket under a name that nobody looks for, which is unlinked on drop.
struct Hidden {
    directory: OwnedFd,
    name: String,
    identity: (u64, u64),
    /// The name is that of the process: one socket at a time.
    _turn: MutexGuard<'static, ()>,
}

impl Hidden {
    /// Makes one in the directory of `path`.
    fn bind(socket: &OwnedFd, path: &Path) -> Result<Hidden, Errno> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(parent.unwrap_or(Path::new(".")), flags, Mode::empty())?;
        let mut name = hidden_name(std::process::id());
        // However long the path of the directory is, this one is short.
        let make = |name: &str| {
            let short = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
            bind(socket.as_raw_fd(), &UnixAddr::new(short.as_str())?)
        };
        match make(&name) {
            Err(Errno::EADDRINUSE) => {
                // Of a process of this number that was killed; or somebody else's, who cannot
                // guess the other name.
                if unlinkat(&directory, name.as_str(), UnlinkatFlags::NoRemoveDir).is_err() {
                    let mut number = [0; 8];
                    random::fill(&mut number).map_err(|_| Errno::EADDRINUSE)?;
                    name = format!("{name}-{:016x}", u64::from_le_bytes(number));
                }
                make(&name)?;
            }
            made => made?,
        }
        let mut hidden = Hidden { directory, name, identity: (0, 0), _turn: turn };
        let stat = fstatat(&hidden.directory, hidden.name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        hidden.identity = (stat.st_dev, stat.st_ino);
        Ok(hidden)
    }

    /// Gives the node the mode that the umask has taken from it. By a descriptor, since the name
    /// may lead elsewhere by now.
    fn widen(&self, mode: Mode) -> Result<(), Errno> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let node = openat(&self.directory, self.name.as_str(), flags, Mode::empty())?;
        let stat = fstat(&node)?;
        if (stat.st_dev, stat.st_ino) != self.identity {
            return Err(Errno::ESTALE);
        }
        let by_number = format!("/proc/self/fd/{}", node.as_raw_fd());
        fchmodat(AT_FDCWD, by_number.as_str(), mode, FchmodatFlags::FollowSymlink)
    }

    /// Gives it its path, if nothing is there. From then on the path is ours to remove.
    fn show(self, path: &Path) -> Result<Node, Errno> {
        linkat(&self.directory, self.name.as_str(), AT_FDCWD, path, LinkatFlags::empty())?;
        Ok(Node { path: path.to_owned(), identity: self.identity })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = unlinkat(&self.directory, self.name.as_str(), UnlinkatFlags::NoRemoveDir);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Somebody may have moved ours away and put theirs in its place.
        if identity(&self.path) == Ok(self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what is at `path`, links not followed.
fn identity(path: &Path) -> Result<(u64, u64), Errno> {
    // AT_EMPTY_PATH means nothing for a path that is not empty; it is the form of
    // the call that the VMM's seccomp policy lets through when the VM ends.
    let flags = AtFlags::AT_SYMLINK_NOFOLLOW | AtFlags::AT_EMPTY_PATH;
    let stat = fstatat(AT_FDCWD, path, flags)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Says what occupies `path`.
fn occupied(path: &Path, kind: SockType) -> SocketError {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if !is_socket {
        return SocketError::Exists(path.to_owned());
    }
    let refused = || -> Result<bool, Errno> {
        let fd = socket(
            AddressFamily::Unix,
            kind,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        Ok(connect(fd.as_raw_fd(), &UnixAddr::new(path)?) == Err(Errno::ECONNREFUSED))
    };
    match refused() {
        Ok(true) => SocketError::Stale(path.to_owned()),
        _ => SocketError::Live(path.to_owned()),
    }
}

/// Has the kernel refuse fds that are sent to a socket, and to those that are accepted from it: no
/// client sends any that is meant well, and whoever reads closes them, which can take as long as
/// the client likes. Linux 6.16 is the first that can.
#[allow(unsafe_code)] // an option that nix does not have
fn refuse_fds(socket: &OwnedFd) {
    // asm-generic/socket.h
    const SO_PASSRIGHTS: libc::c_int = 83;
    let off: libc::c_int = 0;
    // SAFETY: the kernel reads an int of this size; a kernel without the option refuses it.
    let _ = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const off).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remedy::one_line;
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, Instant};

    #[test]
    fn the_node_is_private_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let made = ListeningSocket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(made);
        assert!(!path.exists());

        let made = ListeningSocket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "somebody else's").unwrap();
        drop(made);
        assert!(path.exists(), "what is not ours stays");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nor is anything else left");
    }

    #[test]
    fn what_a_killed_process_was_making_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let left = dir.path().join(hidden_name(std::process::id()));
        std::fs::write(&left, "").unwrap();
        let made = ListeningSocket::bind(&path).unwrap();
        assert!(!left.exists());
        drop(made);
        // What cannot be removed either.
        std::fs::create_dir(&left).unwrap();
        let made = ListeningSocket::bind(&path).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        std::fs::remove_dir(&left).unwrap();
        std::mem::forget(made.node);
        std::fs::write(&left, "").unwrap();
        clear(&path, std::process::id());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// Who waits for the path to be there can connect then.
    #[test]
    fn what_can_be_seen_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for _ in 0..2000 {
            std::thread::scope(|scope| {
                let client = scope.spawn(|| {
                    let end = Instant::now() + Duration::from_secs(20);
                    loop {
                        match std::os::unix::net::UnixStream::connect(&path) {
                            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                            result => return result.map(drop),
                        }
                        assert!(Instant::now() < end, "no socket");
                    }
                });
                let _made = ListeningSocket::bind(&path).unwrap();
                client.join().unwrap().expect("it listens");
            });
        }
    }

    /// On kernels that can: what a client sends cannot be what takes long to close.
    #[test]
    #[allow(unsafe_code)] // asks for an option that nix does not have
    fn clients_send_no_fds() {
        use nix::sys::socket::{ControlMessage, MsgFlags, SockFlag, connect, sendmsg, socket};
        let dir = tempfile::tempdir().unwrap();
        let send = |made: &ListeningSocket| {
            let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None);
            let fd = fd.unwrap();
            connect(fd.as_raw_fd(), &UnixAddr::new(made.path()).unwrap()).unwrap();
            let (bytes, fds) = ([std::io::IoSlice::new(b"x")], [0]);
            let rights = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(fd.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None)
        };
        let closed = ListeningSocket::bind(&dir.path().join("closed")).unwrap();
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let open = dir.path().join("open");
        let open = ListeningSocket::bind_as(&open, SockType::Stream, mode).unwrap();
        let (mut on, mut len) = (0 as libc::c_int, size_of::<libc::c_int>() as libc::socklen_t);
        // SAFETY: the kernel writes an int of this size.
        let known = unsafe {
            let on = (&raw mut on).cast();
            libc::getsockopt(open.fd.as_raw_fd(), libc::SOL_SOCKET, 83, on, &raw mut len)
        };
        assert_eq!(send(&open), Ok(1));
        assert_eq!(send(&closed), if known == 0 { Err(Errno::EPERM) } else { Ok(1) });
    }

    #[test]
    fn an_occupied_path_is_refused_with_what_occupies_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let refused = |path: &Path| one_line(&ListeningSocket::bind(path).unwrap_err());

        let live = ListeningSocket::bind(&path).unwrap();
        assert!(refused(&path).contains("in use by a running program; choose another"));
        let (fd, node) = live.into_parts();
        drop(fd);
        let line = refused(&path);
        assert!(line.contains("left over") && line.contains("; remove it with 'rm "), "{line}");
        drop(node);

        std::fs::write(&path, "").unwrap();
        assert!(refused(&path).contains("exists and is no socket"));
        assert!(path.exists());
        assert!(refused(&dir.path().join("no/s")).contains("make the directory first"));
        let long = dir.path().join("x".repeat(120));
        assert!(refused(&long).contains("; choose a path of at most 107 bytes"));
    }
}
