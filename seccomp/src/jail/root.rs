//! An empty, read-only root directory.
#![allow(unsafe_code)] // the mount API has no safe wrappers

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chroot, fchdir, pivot_root};

use super::JailError;

// include/uapi/linux/mount.h
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const MOUNT_ATTR_RDONLY: u32 = 0x1;
const MOUNT_ATTR_NOSUID: u32 = 0x2;
const MOUNT_ATTR_NODEV: u32 = 0x4;
const MOUNT_ATTR_NOEXEC: u32 = 0x8;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x4;

const NO_TMPFS: &str = "the kernel needs tmpfs mounts in user namespaces (5.2 or newer)";
const NO_PIVOT: &str =
    "start cellblock from a root directory that is a mount point, or use --disable-sandbox";

/// A file system to be made.
#[derive(Clone, Copy)]
pub(crate) struct FileSystem<'a> {
    pub(crate) name: &'a CStr,
    pub(crate) options: &'a [(&'a CStr, &'a CStr)],
    /// As a file system and as a mount.
    pub(crate) read_only: bool,
}

/// Replaces the root of this mount namespace by an empty, read-only tmpfs, and lets go
/// of everything that was mounted.
pub(super) fn empty() -> Result<(), JailError> {
    let options = [(c"mode", c"0555"), (c"size", c"4096")];
    pivot(FileSystem { name: c"tmpfs", options: &options, read_only: true })
}

/// As [`empty`], with a tmpfs of the caller's choice.
pub(crate) fn pivot(tmpfs: FileSystem<'_>) -> Result<(), JailError> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(JailError::new(
            "make mounts private",
            "the spawner must have made a mount namespace: this is a bug",
        ))?;
    enter_tmpfs(tmpfs, c"/")?;
    // The new root takes the old one's place and the old one is stacked on top of
    // it, at the same path, from where it is detached.
    match pivot_root(".", ".") {
        Ok(()) => {}
        // The root of an initramfs has no parent mount and cannot be pivoted. A
        // tmpfs entered by chroot has one.
        Err(Errno::EINVAL) => {
            chroot(".").map_err(JailError::new("chroot into tmpfs", NO_PIVOT))?;
            enter_tmpfs(tmpfs, c".")?;
            pivot_root(".", ".").map_err(JailError::new("pivot root", NO_PIVOT))?;
        }
        Err(e) => return Err(JailError::new("pivot root", NO_PIVOT)(e)),
    }
    umount2(".", MntFlags::MNT_DETACH).map_err(JailError::new("detach old root", NO_PIVOT))?;
    nix::unistd::chdir("/").map_err(JailError::new("change to new root", NO_PIVOT))
}

/// Mounts a new tmpfs on `target` and makes it the working directory.
///
/// By fds: where the root directory is mode 0700 and not ours, no path below it
/// can be looked up, but "/" itself can be mounted on.
fn enter_tmpfs(tmpfs: FileSystem<'_>, target: &CStr) -> Result<(), JailError> {
    let tmpfs = detached_fs(tmpfs).map_err(JailError::new("create tmpfs", NO_TMPFS))?;
    // SAFETY: both paths are C strings; the call touches no other memory.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tmpfs.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map_err(JailError::new("mount tmpfs", NO_TMPFS))?;
    fchdir(&tmpfs).map_err(JailError::new("change to tmpfs", NO_TMPFS))
}

/// A detached mount of a new file system, without programs, devices and set-id files.
pub(crate) fn detached_fs(fs: FileSystem<'_>) -> Result<OwnedFd, Errno> {
    // SAFETY: the name is a C string; the result is a new fd that nobody else knows.
    let context = unsafe {
        let fd = libc::syscall(libc::SYS_fsopen, fs.name.as_ptr(), FSOPEN_CLOEXEC);
        OwnedFd::from_raw_fd(Errno::result(fd)? as i32)
    };
    let configure = |command: u32, key: Option<&CStr>, value: Option<&CStr>| {
        // SAFETY: key and value are C strings or null, as the command requires.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                command,
                key.map_or(ptr::null(), CStr::as_ptr),
                value.map_or(ptr::null(), CStr::as_ptr),
                0,
            )
        })
    };
    for (key, value) in fs.options {
        configure(FSCONFIG_SET_STRING, Some(key), Some(value))?;
    }
    let mut attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    if fs.read_only {
        configure(FSCONFIG_SET_FLAG, Some(c"ro"), None)?;
        attributes |= MOUNT_ATTR_RDONLY;
    }
    configure(FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: no memory is involved; the result is a new fd that nobody else knows.
    unsafe {
        let fd = libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, attributes);
        Ok(OwnedFd::from_raw_fd(Errno::result(fd)? as i32))
    }
}
