//! What a writer that was killed has left behind: taken away by the next one in the same parent.
//!
//! A temporary directory is locked for as long as its writer lives, however that ends. One that
//! nobody has locked is nobody's, if it is ours by its name and by what is in it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

use super::SnapshotId;
use super::files::{MANIFEST, MEMORY, STATE};

/// A directory without any file may be of a writer that is about to lock it.
const YOUNG: Duration = Duration::from_secs(60);

const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Opens a temporary directory in `parent` that was just made, and locks it. Whoever sweeps at that
/// moment has it locked for a look: it is young, and stays.
pub(super) fn open(parent: &OwnedFd, name: &OsStr) -> Result<Flock<OwnedFd>, Errno> {
    lock(parent, name, FlockArg::LockExclusive)
}

fn lock(parent: &OwnedFd, name: &OsStr, how: FlockArg) -> Result<Flock<OwnedFd>, Errno> {
    let directory = openat(parent, name, DIRECTORY, Mode::empty())?;
    Flock::lock(directory, how).map_err(|(_, errno)| errno)
}

/// The name of the temporary directory of snapshot `id`, which will be `last`.
pub(super) fn name(last: &OsStr, id: SnapshotId) -> OsString {
    let mut name = OsString::from(".");
    name.push(last);
    name.push(format!(".{id}"));
    name
}

/// Removes what killed writers left in `parent`. What cannot be removed stays, and is in nobody's
/// way.
pub(super) fn sweep(parent: &OwnedFd) {
    for name in entries(parent).unwrap_or_default().iter().filter(|name| is_ours(name)) {
        if let Ok(true) = remove(parent, name) {
            let name = crate::remedy::printable(&name.to_string_lossy());
            tracing::warn!(name, "removed what a snapshot that was killed had left");
        }
    }
}

/// `.NAME.ID`, of an id in hexadecimal digits.
fn is_ours(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    let Some(at) = bytes.len().checked_sub(33) else { return false };
    let (front, back) = bytes.split_at(at);
    let digits = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    front.len() > 1 && front[0] == b'.' && back[0] == b'.' && back[1..].iter().all(digits)
}

/// Removes one, if it is nobody's.
fn remove(parent: &OwnedFd, name: &OsStr) -> io::Result<bool> {
    let directory = lock(parent, name, FlockArg::LockExclusiveNonblock)?;
    let facts = fstat(&*directory)?;
    let files = entries(&directory)?;
    let ours = |file: &OsString| {
        [MANIFEST, STATE, MEMORY].iter().any(|known| file == *known)
            || file.as_bytes().starts_with(b"disk-")
    };
    let age = SystemTime::UNIX_EPOCH + Duration::from_secs(facts.st_mtime.unsigned_abs());
    let young = age.elapsed().is_ok_and(|age| age < YOUNG) && files.is_empty();
    if facts.st_uid != geteuid().as_raw() || young || !files.iter().all(ours) {
        return Ok(false);
    }
    for file in &files {
        unlinkat(&*directory, file.as_os_str(), UnlinkatFlags::NoRemoveDir)?;
    }
    unlinkat(parent, name, UnlinkatFlags::RemoveDir)?;
    Ok(true)
}

/// The names in an open directory, read through it: its path may be another's by now.
fn entries(directory: &OwnedFd) -> io::Result<Vec<OsString>> {
    let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
    std::fs::read_dir(path)?.map(|entry| Ok(entry?.file_name())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sweep that looks at a directory just made does not make its writer fail.
    #[test]
    fn a_writer_waits_for_a_sweep_that_looks_at_its_directory() {
        let dir = tempfile::tempdir().expect("directory");
        let parent = nix::fcntl::open(dir.path(), DIRECTORY, Mode::empty()).expect("open");
        let name = name(OsStr::new("s"), SnapshotId([1; 16]));
        std::fs::create_dir(dir.path().join(&name)).expect("mkdir");
        let looks = lock(&parent, &name, FlockArg::LockExclusiveNonblock).expect("locked");
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| open(&parent, &name).map(drop));
            std::thread::sleep(Duration::from_millis(20));
            drop(looks);
            assert_eq!(writer.join().expect("ends"), Ok(()));
        });
    }

    #[test]
    fn what_nobody_has_locked_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().expect("directory");
        let parent = nix::fcntl::open(dir.path(), DIRECTORY, Mode::empty()).expect("open");
        let id = |byte| SnapshotId([byte; 16]);
        let make = |name: &OsStr, files: &[&str]| {
            std::fs::create_dir(dir.path().join(name)).expect("mkdir");
            for file in files {
                std::fs::write(dir.path().join(name).join(file), b"x").expect("file");
            }
        };
        let [left, locked, foreign, young] = [1, 2, 3, 4].map(|n| name(OsStr::new("s"), id(n)));
        make(&left, &["memory", "state", "disk-a"]);
        make(&locked, &["memory"]);
        make(&foreign, &["memory", "letter"]);
        make(&young, &[]);
        make(OsStr::new(".s.0123"), &["memory"]);
        make(OsStr::new("s"), &["memory", "state", "manifest"]);
        let held = open(&parent, &locked).expect("locked");
        let again = lock(&parent, &locked, FlockArg::LockExclusiveNonblock);
        assert!(again.is_err(), "locked twice");
        sweep(&parent);
        let there = |name: &OsStr| dir.path().join(name).exists();
        assert!(!there(&left));
        assert!(there(&locked) && there(&foreign) && there(&young));
        assert!(there(OsStr::new(".s.0123")) && there(OsStr::new("s")));
        drop(held);
        sweep(&parent);
        assert!(!there(&locked));
    }
}
