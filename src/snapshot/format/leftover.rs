//! What a writer that was killed has left behind: taken away by the next one in the same parent.
//!
//! A temporary directory is locked for as long as its writer lives, however that ends. One that
//! nobody has locked is nobody's, if it is ours by its name and by what is in it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

use super::files::{self, MANIFEST, MEMORY, STATE};
use super::{SnapshotId, manifest};

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

/// Most bytes of a name on any file system.
const MOST: usize = 255;

/// The name of the temporary directory of snapshot `id`, which will be `last`: of a long one its
/// beginning, for there has to be room for the rest.
pub(super) fn name(last: &OsStr, id: SnapshotId) -> OsString {
    let end = format!(".{id}");
    let most = MOST - 1 - end.len();
    let mut name = OsString::from(".");
    name.push(OsStr::from_bytes(&last.as_bytes()[..last.len().min(most)]));
    name.push(end);
    name
}

/// Removes what killed writers left in `parent`. What cannot be removed stays, and is in nobody's
/// way.
pub(super) fn sweep(parent: &OwnedFd) {
    for name in entries(parent).unwrap_or_default() {
        if let Some(id) = id_of(&name)
            && let Ok(true) = remove(parent, &name, id)
        {
            let name = crate::remedy::printable(&name.to_string_lossy());
            tracing::warn!(name, "removed what a snapshot that was killed had left");
        }
    }
}

/// The id in `.NAME.ID`, where it is one in hexadecimal digits.
fn id_of(name: &OsStr) -> Option<SnapshotId> {
    let bytes = name.as_bytes();
    let (front, back) = bytes.split_at(bytes.len().checked_sub(33)?);
    let digits = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let ours =
        front.len() > 1 && front[0] == b'.' && back[0] == b'.' && back[1..].iter().all(digits);
    SnapshotId::parse(std::str::from_utf8(&back[1..]).ok().filter(|_| ours)?)
}

/// Whether what is in a directory is snapshot `id`, as far as there is a manifest that says so. A
/// snapshot that was completed, and is called like one that was not, is another.
fn is_of(directory: &OwnedFd, id: SnapshotId) -> bool {
    let Ok((manifest, _)) = files::regular(directory, MANIFEST) else { return true };
    let mut found = [0; 16];
    manifest.read_exact_at(&mut found, manifest::ID).is_err() || SnapshotId(found) == id
}

/// Removes one, if it is nobody's.
fn remove(parent: &OwnedFd, name: &OsStr, id: SnapshotId) -> io::Result<bool> {
    let directory = lock(parent, name, FlockArg::LockExclusiveNonblock)?;
    let facts = fstat(&*directory)?;
    let files = entries(&directory)?;
    let ours = |file: &OsString| {
        [MANIFEST, STATE, MEMORY].iter().any(|known| file == *known)
            || file.as_bytes().starts_with(b"disk-")
    };
    let age = SystemTime::UNIX_EPOCH + Duration::from_secs(facts.st_mtime.unsigned_abs());
    let young = age.elapsed().is_ok_and(|age| age < YOUNG) && files.is_empty();
    if facts.st_uid != geteuid().as_raw()
        || young
        || !files.iter().all(ours)
        || !is_of(&directory, id)
    {
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
        let [left, locked, foreign, young, other] =
            [1, 2, 3, 4, 5].map(|n| name(OsStr::new("s"), id(n)));
        make(&left, &["memory", "state", "disk-a"]);
        make(&locked, &["memory"]);
        make(&foreign, &["memory", "letter"]);
        make(&young, &[]);
        // Somebody has called a snapshot so.
        make(&other, &["memory", "state"]);
        std::fs::write(dir.path().join(&other).join("manifest"), [9; 64]).expect("file");
        make(&name(OsStr::new(&"s".repeat(255)), id(6)), &["memory"]);
        make(OsStr::new(".s.0123"), &["memory"]);
        make(OsStr::new("s"), &["memory", "state", "manifest"]);
        let held = open(&parent, &locked).expect("locked");
        let again = lock(&parent, &locked, FlockArg::LockExclusiveNonblock);
        assert!(again.is_err(), "locked twice");
        sweep(&parent);
        let there = |name: &OsStr| dir.path().join(name).exists();
        assert!(!there(&left));
        assert!(!there(&name(OsStr::new(&"s".repeat(255)), id(6))));
        assert!(there(&locked) && there(&foreign) && there(&young) && there(&other));
        assert!(there(OsStr::new(".s.0123")) && there(OsStr::new("s")));
        drop(held);
        sweep(&parent);
        assert!(!there(&locked));
    }
}
