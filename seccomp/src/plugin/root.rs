//! The root directory of a plugin: a tmpfs with its own files, read-only.
#![allow(unsafe_code)] // the mount API has no safe wrappers

use std::ffi::{CStr, CString};
use std::fs::{DirBuilder, File};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Component, Path};

use nix::errno::Errno;

use super::plan::{Shown, Source};
use crate::jail::{self, FileSystem, JailError};

// include/uapi/linux/mount.h
const OPEN_TREE_CLONE: u32 = 1;
const AT_RECURSIVE: u32 = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x4;
const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;

#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// A mount of what `fd` has open that is not attached anywhere, with everything mounted
/// below it. Needs CAP_SYS_ADMIN in the user namespace of this mount namespace.
pub(super) fn detached(fd: impl AsFd, folder: bool) -> Result<OwnedFd, Errno> {
    let recursive = if folder { AT_RECURSIVE } else { 0 };
    let flags = OPEN_TREE_CLONE | (libc::O_CLOEXEC | libc::AT_EMPTY_PATH) as u32 | recursive;
    let number = fd.as_fd().as_raw_fd();
    // SAFETY: the path is a C string; the result is a new fd that nobody else knows.
    unsafe {
        let fd = libc::syscall(libc::SYS_open_tree, number, c"".as_ptr(), flags);
        Ok(OwnedFd::from_raw_fd(Errno::result(fd)? as i32))
    }
}

/// Opens a path for [`detached`], whatever it is.
pub(super) fn open(path: &Path) -> std::io::Result<File> {
    File::options().read(true).custom_flags(libc::O_PATH).open(path)
}

/// What is to be shown, as mounts, while the host's files can still be named.
pub(super) struct Gathered<'a> {
    shown: Vec<(OwnedFd, &'a Shown)>,
    proc: OwnedFd,
}

/// Gathers what the plan shows. `mounts` are the plan's fds.
pub(super) fn gather<'a>(
    shown: &'a [Shown],
    mounts: Vec<OwnedFd>,
) -> Result<Gathered<'a>, JailError> {
    let mut mounts = mounts.into_iter();
    let one = |shown: &'a Shown| {
        let mount = match &shown.source {
            Source::Mount => mounts.next().ok_or(Errno::EBADF),
            Source::Path(path) => open(Path::new(std::ffi::OsStr::from_bytes(path)))
                .map_err(io)
                .and_then(|file| detached(file, shown.folder)),
        };
        mount.and_then(|mount| restrict(&mount, shown).map(|()| (mount, shown))).map_err(
            JailError::new(
                "open what the plugin's root shows",
                "let its user read it and search the folders above it",
            ),
        )
    };
    let shown = shown.iter().map(one).collect::<Result<_, _>>()?;
    // The pid directories and nothing else of /proc: no settings, no kernel's state.
    let options = [(c"subset", c"pid")];
    let proc = jail::detached_fs(FileSystem { name: c"proc", options: &options, read_only: true })
        .map_err(JailError::new(
            "create /proc",
            "the kernel lets a new user namespace mount /proc only where all of the host's can \
             be seen: start cellblock outside the container that hides parts of it, or use \
             --disable-sandbox",
        ))?;
    Ok(Gathered { shown, proc })
}

fn restrict(mount: &OwnedFd, shown: &Shown) -> Result<(), Errno> {
    let mut set = MOUNT_ATTR_NOSUID;
    if !shown.writable {
        set |= MOUNT_ATTR_RDONLY;
    }
    if !shown.device {
        set |= MOUNT_ATTR_NODEV;
    }
    set_attributes(mount.as_raw_fd(), c"", set, shown.folder)
}

fn set_attributes(fd: i32, path: &CStr, set: u64, recursive: bool) -> Result<(), Errno> {
    const MS_PRIVATE: u64 = 1 << 18;
    let attr = MountAttr { set, propagation: MS_PRIVATE, ..MountAttr::default() };
    let flags = libc::AT_EMPTY_PATH as u32 | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, the kernel reads exactly the struct.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            path.as_ptr(),
            flags,
            &raw const attr,
            size_of_val(&attr),
        )
    })
    .map(drop)
}

impl Gathered<'_> {
    /// Makes the root of this mount namespace from what was gathered.
    pub(super) fn enter(self) -> Result<(), JailError> {
        let options = [(c"mode", c"0755"), (c"size", c"1048576"), (c"nr_inodes", c"4096")];
        jail::pivot(FileSystem { name: c"tmpfs", options: &options, read_only: false })?;
        for (mount, shown) in &self.shown {
            let destination = Path::new(std::ffi::OsStr::from_bytes(&shown.destination));
            attach(mount, destination, shown.folder).map_err(JailError::new(
                "show a file in the plugin's root",
                "a --plugin-mount is in its way, or its path is longer than a path may be",
            ))?;
        }
        attach(&self.proc, Path::new("/proc"), true)
            .map_err(JailError::new("mount /proc", "mount nothing over /proc of the plugin"))?;
        let set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
        set_attributes(libc::AT_FDCWD, c"/", set, false).map_err(JailError::new(
            "make the root read-only",
            "a kernel of at least 5.12 is needed (mount_setattr)",
        ))
    }
}

fn io(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Mounts at an absolute path, which is made where it is not there.
fn attach(mount: &OwnedFd, destination: &Path, folder: bool) -> Result<(), Errno> {
    if !destination.is_absolute() {
        return Err(Errno::EINVAL);
    }
    let above = if folder { Some(destination) } else { destination.parent() };
    let mut path = std::path::PathBuf::new();
    for part in above.into_iter().flat_map(Path::components) {
        path.push(part);
        if matches!(part, Component::Normal(_)) {
            match DirBuilder::new().mode(0o755).create(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(io(e)),
                _ => {}
            }
        }
    }
    if !folder {
        match File::create_new(destination) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(io(e)),
            _ => {}
        }
    }
    let target = CString::new(destination.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: both paths are C strings; the call touches no other memory.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map(drop)
}
