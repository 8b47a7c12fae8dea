//! Opening the endpoint of the guest's serial line, for the serial process to serve.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use cellblock_devices::protocol::SerialEndpoint;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use crate::control::socket::{ListeningSocket, Node, SocketError};
use crate::remedy::Remedy;
use crate::spec::{SerialSpec, lock};
use crate::terminal::{RawTerminal, TerminalError};

/// A serial endpoint, ready to be handed to the serial process.
#[derive(Debug)]
pub struct OpenedConsole {
    /// Kind of the endpoint.
    pub endpoint: SerialEndpoint,
    /// The fds [`SerialEndpoint`] asks for, in its order.
    pub fds: Vec<OwnedFd>,
    /// The user's terminal, raw until this is dropped; with it, the serial process
    /// watches for the escape sequence.
    pub terminal: Option<RawTerminal>,
    /// A line for the user: where to find the console.
    pub note: Option<String>,
    /// To be kept until the VM ends.
    pub keep: Keep,
}

/// What has to live as long as the VM, unused.
#[derive(Debug, Default)]
pub struct Keep {
    _node: Option<Node>,
}

/// A serial endpoint that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// A system call failed.
    #[error("{doing}")]
    System {
        /// What was being done, with the object.
        doing: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
        /// What to do.
        remedy: Option<&'static str>,
    },
    /// The output file is somebody else's, perhaps a disk.
    #[error("the serial output file {} is in use, as a disk or by another VM", .0.display())]
    InUse(PathBuf),
    /// The socket.
    #[error("making the serial socket")]
    Socket(#[source] SocketError),
    /// The terminal.
    #[error("preparing the console")]
    Terminal(#[source] TerminalError),
}

impl Remedy for ConsoleError {
    fn remedy(&self) -> Option<String> {
        match self {
            ConsoleError::System { remedy, .. } => remedy.map(str::to_owned),
            ConsoleError::InUse(_) => Some("choose another file".into()),
            ConsoleError::Socket(error) => error.remedy(),
            ConsoleError::Terminal(_) => Some("use '--serial null' or another endpoint".into()),
        }
    }
}

/// Opens what `spec` asks for. To be called after the disks are open and locked, so
/// that a disk named here by mistake is not emptied, and after the spawner is forked.
pub fn open(spec: &SerialSpec) -> Result<OpenedConsole, ConsoleError> {
    match spec {
        SerialSpec::Stdout => stdio(),
        SerialSpec::File(path) => Ok(plain(SerialEndpoint::File, vec![output_file(path)?])),
        SerialSpec::Pty => pty(),
        SerialSpec::Socket(path) => {
            let (fd, node) =
                ListeningSocket::bind(path).map_err(ConsoleError::Socket)?.into_parts();
            let mut console = plain(SerialEndpoint::Socket, vec![fd]);
            console.note = Some(format!("serial console on socket {}", path.display()));
            console.keep._node = Some(node);
            Ok(console)
        }
        SerialSpec::Null => Ok(plain(SerialEndpoint::Null, Vec::new())),
    }
}

fn plain(endpoint: SerialEndpoint, fds: Vec<OwnedFd>) -> OpenedConsole {
    OpenedConsole { endpoint, fds, terminal: None, note: None, keep: Keep::default() }
}

fn system(
    doing: impl Into<String>,
    remedy: Option<&'static str>,
) -> impl FnOnce(io::Error) -> ConsoleError {
    let doing = doing.into();
    move |source| ConsoleError::System { doing, source, remedy }
}

/// Standard input and output. The terminal is made raw last, when nothing can fail.
fn stdio() -> Result<OpenedConsole, ConsoleError> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let terminal = RawTerminal::enter(stdin.as_fd()).map_err(ConsoleError::Terminal)?;
    // A terminal we did not get is another program's at the moment: reading it would
    // stop us. Closed standard input counts as empty.
    let silent = terminal.is_none() && (is_terminal(stdin.as_fd()) || is_closed(stdin.as_fd()));
    let input = if silent { null(false)? } else { own(stdin.as_fd(), false)? };
    let output = if is_closed(stdout.as_fd()) { null(true)? } else { own(stdout.as_fd(), true)? };
    let mut console = plain(SerialEndpoint::Stdio, vec![input, output]);
    if terminal.is_some() {
        console.note = Some("ctrl-a x stops the VM".into());
    }
    console.terminal = terminal;
    Ok(console)
}

fn is_terminal(fd: BorrowedFd<'_>) -> bool {
    tcgetattr(fd).is_ok()
}

fn is_closed(fd: BorrowedFd<'_>) -> bool {
    fcntl(fd, FcntlArg::F_GETFD) == Err(Errno::EBADF)
}

fn null(write: bool) -> Result<OwnedFd, ConsoleError> {
    let file = OpenOptions::new().read(!write).write(write).open("/dev/null");
    file.map(OwnedFd::from).map_err(system("opening /dev/null", None))
}

/// An fd of our own for a standard one. Terminals and pipes are opened anew, without
/// blocking, because that mode belongs to the open file description, which is shared
/// with the shell. Files share it on purpose: it holds the position in them. What
/// cannot be opened anew (a terminal of another user, a socket) is duplicated.
fn own(fd: BorrowedFd<'_>, write: bool) -> Result<OwnedFd, ConsoleError> {
    let duplicate = fd
        .try_clone_to_owned()
        .map_err(system("duplicating a standard stream", Some("redirect it, or use --serial")))?;
    let duplicate = File::from(duplicate);
    let anew = duplicate.metadata().is_ok_and(|m| m.file_type().is_fifo())
        || is_terminal(duplicate.as_fd());
    if anew {
        let path = format!("/proc/self/fd/{}", duplicate.as_raw_fd());
        let again = OpenOptions::new()
            .read(!write)
            .write(write)
            .custom_flags(OFlag::O_NONBLOCK.bits() | OFlag::O_NOCTTY.bits())
            .open(path);
        if let Ok(again) = again {
            return Ok(again.into());
        }
    }
    Ok(duplicate.into())
}

/// Creates or empties the file, once it is certain that nobody else uses it.
fn output_file(path: &Path) -> Result<OwnedFd, ConsoleError> {
    let doing = || format!("opening the serial output file {}", path.display());
    let remedy = |e: &io::Error| match e.raw_os_error() {
        Some(libc::ENOENT) => Some("make its directory first"),
        Some(libc::EISDIR) => Some("give the name of a file in it"),
        Some(libc::ENXIO) => Some("start the pipe's reader first, or use socket=PATH"),
        Some(libc::EACCES | libc::EROFS) => Some("choose a place this user may write to"),
        _ => None,
    };
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(OFlag::O_NONBLOCK.bits() | OFlag::O_NOCTTY.bits())
        .open(path)
        .map_err(|e| system(doing(), remedy(&e))(e))?;
    let kind = file.metadata().map_err(system(doing(), None))?.file_type();
    if kind.is_file() {
        lock(&file, false).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => ConsoleError::InUse(path.to_owned()),
            errno => system(format!("locking the file {}", path.display()), None)(errno.into()),
        })?;
        file.set_len(0).map_err(system(format!("emptying {}", path.display()), None))?;
    } else if kind.is_block_device() {
        return Err(ConsoleError::InUse(path.to_owned()));
    } else {
        // What is no file has no end to append to, and what appends cannot be spliced to.
        let flags = FcntlArg::F_SETFL(OFlag::O_NONBLOCK);
        fcntl(&file, flags).map_err(|e| system(doing(), None)(e.into()))?;
    }
    Ok(file.into())
}

/// A pseudo-terminal, raw, so that it neither echoes nor translates.
fn pty() -> Result<OpenedConsole, ConsoleError> {
    let fail = || {
        let remedy = "check that /dev/pts is mounted, or use --serial socket=PATH";
        |errno: Errno| system("making a pseudo-terminal", Some(remedy))(errno.into())
    };
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags).map_err(fail())?;
    grantpt(&master).map_err(fail())?;
    unlockpt(&master).map_err(fail())?;
    let name = ptsname_r(&master).map_err(fail())?;
    // Opened once and closed, which makes the master say so when nobody has it open:
    // until somebody does, the serial process keeps what the guest says.
    let slave = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NOCTTY.bits())
        .open(&name)
        .map_err(system(format!("opening the pseudo-terminal {name}"), None))?;
    let mut modes = tcgetattr(&slave).map_err(fail())?;
    cfmakeraw(&mut modes);
    tcsetattr(&slave, SetArg::TCSANOW, &modes).map_err(fail())?;
    let master = master.as_fd().try_clone_to_owned().map_err(system("keeping a pty", None))?;
    let mut console = plain(SerialEndpoint::Pty, vec![master]);
    console.note = Some(format!("serial console on {name}"));
    Ok(console)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remedy::one_line;
    use crate::spec::DiskSpec;
    use nix::sys::termios::LocalFlags;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_file_is_emptied_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "old").unwrap();
        let mut console = open(&SerialSpec::File(path.clone())).unwrap();
        assert_eq!((console.endpoint, console.fds.len()), (SerialEndpoint::File, 1));
        File::from(console.fds.remove(0)).write_all(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_disk_is_never_emptied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(1024).unwrap();
        let spec: DiskSpec = format!("{},ro", path.display()).parse().unwrap();
        let _held = spec.open().unwrap();
        let line = one_line(&open(&SerialSpec::File(path.clone())).unwrap_err());
        assert!(line.contains("in use"), "{line}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1024);
    }

    #[test]
    fn unusable_files_come_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (path, part) in [
            (dir.path().to_owned(), "give the name of a file in it"),
            (dir.path().join("no/log"), "make its directory first"),
            (fifo, "start the pipe's reader first"),
        ] {
            let line = one_line(&open(&SerialSpec::File(path)).unwrap_err());
            assert!(line.contains(part), "{line}");
        }
    }

    #[test]
    fn a_pty_carries_bytes_unchanged_both_ways() {
        let mut console = open(&SerialSpec::Pty).unwrap();
        let note = console.note.clone().unwrap();
        let name = note.rsplit(' ').next().unwrap();
        let mut user = OpenOptions::new().read(true).write(true).open(name).unwrap();
        let mut master = File::from(console.fds.remove(0));
        master.write_all(b"out\n\x03").unwrap();
        let mut seen = [0; 5];
        user.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"out\n\x03");
        user.write_all(b"in\r\x03").unwrap();
        let mut seen = [0; 4];
        master.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"in\r\x03");
        // Nothing was echoed.
        let error = master.read(&mut seen).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        // The user's leaving is seen, and the mode outlives it.
        drop(user);
        assert_eq!(master.read(&mut seen).unwrap_err().raw_os_error(), Some(libc::EIO));
        let user = OpenOptions::new().read(true).write(true).open(name).unwrap();
        assert!(!tcgetattr(&user).unwrap().local_flags.contains(LocalFlags::ECHO));
    }

    #[test]
    fn a_socket_listens_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let console = open(&SerialSpec::Socket(path.clone())).unwrap();
        UnixStream::connect(&path).unwrap();
        assert!(one_line(&open(&SerialSpec::Socket(path.clone())).unwrap_err()).contains("in use"));
        drop(console);
        assert!(!path.exists());
    }
}
