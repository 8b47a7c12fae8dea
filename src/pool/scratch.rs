//! The directory of a pool that was given none, and what pools that were killed left of theirs.
//!
//! A file in it is locked for as long as the pool's process lives, however that ends: one that
//! nobody has locked is nobody's. It gets its name after its lock, so that there is no moment at
//! which a living pool's directory looks like a dead one's.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

const PREFIX: &str = "cellblock-pool-";
const LOCK: &str = "lock";

const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);
/// Whatever it is, opening it is not to wait.
const FILE: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_NONBLOCK).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// A private directory, removed when it is dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    dir: tempfile::TempDir,
    _lock: Flock<File>,
}

impl Scratch {
    /// Makes one in `parent`, where what the dead left is removed first.
    pub(super) fn new(parent: &Path) -> io::Result<Scratch> {
        if let Err(error) = sweep(parent) {
            tracing::debug!(%error, "looking for what dead pools left");
        }
        let private = Permissions::from_mode(0o700);
        let dir =
            tempfile::Builder::new().prefix(PREFIX).permissions(private).tempdir_in(parent)?;
        let (new, path) = (dir.path().join("new"), dir.path().join(LOCK));
        let lock = Flock::lock(File::create_new(&new)?, FlockArg::LockExclusiveNonblock);
        let lock = lock.map_err(|(_, errno)| errno)?;
        std::fs::rename(new, path)?;
        Ok(Scratch { dir, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes directories of pools that are no more. What cannot be removed is in nobody's way.
fn sweep(parent: &Path) -> io::Result<()> {
    let parent = nix::fcntl::open(parent, DIRECTORY, Mode::empty())?;
    for name in names(&parent)? {
        if name.as_bytes().starts_with(PREFIX.as_bytes()) && remove(&parent, &name).is_ok() {
            let name = crate::remedy::printable(&name.to_string_lossy());
            tracing::info!(name, "removed what a pool that was killed had left");
        }
    }
    Ok(())
}

/// Removes one, if it is nobody's any more and there is in it what a pool leaves.
fn remove(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let not_ours = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
    let directory = openat(parent, name, DIRECTORY, Mode::empty())?;
    let facts = fstat(&directory)?;
    if facts.st_uid != geteuid().as_raw() || facts.st_mode & 0o077 != 0 {
        return not_ours();
    }
    let lock = openat(&directory, LOCK, FILE, Mode::empty())?;
    if SFlag::from_bits_truncate(fstat(&lock)?.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return not_ours();
    }
    let _lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    let files = names(&directory)?;
    let left = |file: &&OsString| file.as_os_str() != LOCK;
    if !files.iter().filter(left).all(|file| is_socket(&directory, file)) {
        return not_ours();
    }
    for file in files.iter().filter(left) {
        unlinkat(&directory, file.as_os_str(), UnlinkatFlags::NoRemoveDir)?;
    }
    // Last: without it nobody would try again.
    unlinkat(&directory, LOCK, UnlinkatFlags::NoRemoveDir)?;
    Ok(unlinkat(parent, name, UnlinkatFlags::RemoveDir)?)
}

fn is_socket(directory: &OwnedFd, name: &OsStr) -> bool {
    let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
    let facts = std::fs::symlink_metadata(Path::new(&path).join(name));
    facts.is_ok_and(|facts| facts.file_type().is_socket())
}

/// The names in an open directory, read through it: its path may be another's by now.
fn names(directory: &OwnedFd) -> io::Result<Vec<OsString>> {
    let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
    std::fs::read_dir(path)?.map(|entry| Ok(entry?.file_name())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// As a pool that was killed leaves it, or one that lives.
    fn make(parent: &Path, name: &str) -> (std::path::PathBuf, File) {
        let path = parent.join(format!("{PREFIX}{name}"));
        std::fs::create_dir(&path).expect("mkdir");
        std::fs::set_permissions(&path, Permissions::from_mode(0o700)).expect("mode");
        drop(UnixListener::bind(path.join("0123.console")).expect("socket"));
        let lock = File::create(path.join(LOCK)).expect("lock");
        (path, lock)
    }

    #[test]
    fn what_dead_pools_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().expect("directory");
        let (left, _) = make(dir.path(), "left");
        let (lives, lock) = make(dir.path(), "lives");
        let _held = Flock::lock(lock, FlockArg::LockExclusiveNonblock).expect("lock");
        let (new, _) = make(dir.path(), "new");
        std::fs::remove_file(new.join(LOCK)).expect("not there yet");
        let (letter, _) = make(dir.path(), "letter");
        std::fs::write(letter.join("letter"), "dear").expect("file");
        let (open, _) = make(dir.path(), "open");
        std::fs::set_permissions(&open, Permissions::from_mode(0o755)).expect("mode");
        let (fifo, _) = make(dir.path(), "fifo");
        std::fs::remove_file(fifo.join(LOCK)).expect("lock");
        nix::unistd::mkfifo(&fifo.join(LOCK), Mode::S_IRWXU).expect("fifo");
        let (other, _) = make(dir.path(), "other");
        let elsewhere = dir.path().join("elsewhere");
        std::fs::rename(&other, &elsewhere).expect("rename");
        std::os::unix::fs::symlink(&elsewhere, &other).expect("link");

        let one = Scratch::new(dir.path()).expect("directory");
        assert!(!left.exists());
        for stays in [&lives, &new, &letter, &open, &fifo, &other, &elsewhere] {
            assert!(stays.join("0123.console").exists(), "{}", stays.display());
        }
        let two = Scratch::new(dir.path()).expect("directory");
        assert!(one.path().join(LOCK).exists() && two.path().join(LOCK).exists());
        assert_ne!(one.path(), two.path());
        let paths = [one.path().to_path_buf(), two.path().to_path_buf()];
        drop((one, two));
        assert!(paths.iter().all(|path| !path.exists()));
    }
}
