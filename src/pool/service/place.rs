//! Where a service is: its socket, and beside it the directory of its VMs' sockets.
//!
//! `PATH.d` holds a lock for as long as the service lives. Who gets it knows that whatever is
//! there was left by one that died, whose VMs have ended with it, and takes it over.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use crate::control::socket::{ListeningSocket, Node, SocketError};
use crate::remedy::Remedy;

/// How long nobody is accepted where nobody can even be turned away.
const TIRED: Duration = Duration::from_millis(50);

/// A place that cannot be had.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum PlaceError {
    #[error("{doing} {}", path.display())]
    System {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the directory {} is not this user's own and private", .0.display())]
    Foreign(PathBuf),
    #[error("a pool is served at {} already", .0.display())]
    Taken(PathBuf),
    #[error("the path {} is not text, in which clients could be told of their VMs' sockets", .0.display())]
    NotText(PathBuf),
    #[error("making the pool's socket")]
    Socket(#[from] SocketError),
}

impl Remedy for PlaceError {
    fn remedy(&self) -> Option<String> {
        match self {
            PlaceError::Foreign(path) => {
                Some(format!("remove {} if nobody needs it", path.display()))
            }
            PlaceError::NotText(_) => Some("choose another path".into()),
            PlaceError::Taken(_) => Some("choose another path, or end that one first".into()),
            PlaceError::Socket(error) => error.remedy(),
            PlaceError::System { .. } => None,
        }
    }
}

/// A place that is ours. Given up when it is dropped.
#[derive(Debug)]
pub struct Place {
    control: PathBuf,
    directory: PathBuf,
    _lock: Flock<File>,
}

/// The socket.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    /// Given up for a moment to turn a client away where there are none left.
    spare: Option<OwnedFd>,
    _node: Node,
}

impl Place {
    /// Takes the place of a service at `control`.
    pub fn take(control: &Path) -> Result<Place, PlaceError> {
        if control.to_str().is_none() {
            return Err(PlaceError::NotText(control.into()));
        }
        loop {
            // It comes to nothing only where somebody else gave it up at this very moment.
            if let Some(place) = Place::try_take(control)? {
                return Ok(place);
            }
        }
    }

    fn try_take(control: &Path) -> Result<Option<Place>, PlaceError> {
        let mut directory = control.as_os_str().to_owned();
        directory.push(".d");
        let directory = PathBuf::from(directory);
        let system = |doing, path: &Path| {
            let path = path.to_path_buf();
            move |source| PlaceError::System { doing, path, source }
        };
        match DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(system("making the directory", &directory)(error));
            }
            _ => {}
        }
        let looking = system("looking at", &directory);
        let found = match std::fs::symlink_metadata(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            found => found.map_err(looking)?,
        };
        let private = found.is_dir() && found.mode() & 0o077 == 0;
        if !private || found.uid() != geteuid().as_raw() {
            return Err(PlaceError::Foreign(directory));
        }
        let path = directory.join("lock");
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        let file = match file {
            Ok(file) => file,
            // The one before removed it just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(system("opening", &path)(error)),
        };
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Err(PlaceError::Taken(control.into())),
            Err((_, errno)) => return Err(system("locking", &path)(errno.into())),
        };
        // Opened before the one before us removed it, and locked after: anybody may make another.
        let ours = lock.metadata().map_err(system("looking at", &path))?;
        if std::fs::symlink_metadata(&path).ok().map(|there| there.ino()) != Some(ours.ino()) {
            return Ok(None);
        }
        let place = Place { control: control.into(), directory, _lock: lock };
        place.clear();
        // Somebody else's socket stays: binding it says so.
        if is_socket(control) && UnixStream::connect(control).is_err() {
            let _ = std::fs::remove_file(control);
        }
        Ok(Some(place))
    }

    /// Removes the sockets that nobody serves any more.
    fn clear(&self) {
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return };
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| is_socket(path)) {
            let _ = std::fs::remove_file(path); // it is in nobody's way
        }
    }

    /// For the VMs' sockets.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the socket.
    pub fn listen(&self) -> Result<Listener, PlaceError> {
        let (listener, node) = ListeningSocket::bind(&self.control)?.into_listener();
        let prepared = listener.set_nonblocking(true);
        let path = self.control.clone();
        prepared.map_err(|source| PlaceError::System { doing: "preparing", path, source })?;
        let spare = listener.as_fd().try_clone_to_owned().ok();
        Ok(Listener { listener, spare, _node: node })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clear();
        let _ = std::fs::remove_file(self.directory.join("lock"));
        let _ = std::fs::remove_dir(&self.directory);
    }
}

impl Listener {
    /// The next client, if there is one.
    pub(super) fn accept(&mut self) -> Option<UnixStream> {
        match self.listener.accept() {
            Ok((stream, _)) => stream.set_nonblocking(false).ok().map(|()| stream),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                self.turn_away();
                None
            }
            Err(_) => None,
        }
    }

    /// Of a client that stays in the queue the listener would tell again and again.
    fn turn_away(&mut self) {
        tracing::warn!("a client was turned away: no file descriptors left");
        self.spare = None;
        drop(self.listener.accept());
        self.spare = self.listener.as_fd().try_clone_to_owned().ok();
        if self.spare.is_none() {
            std::thread::sleep(TIRED);
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remedy::one_line;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn one_serves_at_a_time_and_what_the_dead_left_is_taken_over() {
        let dir = tempfile::tempdir().expect("directory");
        let control = dir.path().join("pool");
        let place = Place::take(&control).expect("free");
        let listener = place.listen().expect("socket");
        let line = one_line(&Place::take(&control).expect_err("taken"));
        assert!(line.contains("is served") && line.contains("end that one"), "{line}");
        drop((listener, place));
        assert_eq!(std::fs::read_dir(dir.path()).expect("directory").count(), 0);

        // As one that was killed leaves it.
        let directory = dir.path().join("pool.d");
        DirBuilder::new().mode(0o700).create(&directory).expect("directory");
        File::create(directory.join("lock")).expect("lock");
        drop(UnixListener::bind(directory.join("vm")).expect("socket"));
        drop(UnixListener::bind(&control).expect("socket"));
        let place = Place::take(&control).expect("left by the dead");
        assert!(!directory.join("vm").exists());
        drop(place.listen().expect("socket"));
        drop(place);

        // One that is being given up is waited for, and never had by two.
        let holds = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        match Place::take(&control) {
                            Ok(place) => {
                                use std::sync::atomic::Ordering::SeqCst;
                                assert_eq!(holds.fetch_add(1, SeqCst), 0, "two have it");
                                holds.fetch_sub(1, SeqCst);
                                drop(place);
                            }
                            Err(error) => {
                                assert!(matches!(error, PlaceError::Taken(_)), "{error:?}");
                            }
                        }
                    }
                });
            }
        });
        use std::os::unix::ffi::OsStrExt;
        let odd = dir.path().join(std::ffi::OsStr::from_bytes(b"p\xff"));
        assert!(matches!(Place::take(&odd), Err(PlaceError::NotText(_))));

        // What is not ours is left alone.
        std::fs::create_dir(&directory).expect("directory");
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o755)).expect("mode");
        assert!(matches!(Place::take(&control), Err(PlaceError::Foreign(_))));
        std::fs::remove_dir(&directory).expect("empty");
        std::fs::write(&control, "a file").expect("file");
        let place = Place::take(&control).expect("its directory is free");
        assert!(one_line(&place.listen().expect_err("a file")).contains("is no socket"));
        drop(place);
        assert!(control.exists());
    }
}
