//! What a process does to itself to be jailed.
//!
//! The spawner has given the process its namespaces and ids; the rest happens
//! here, in the process, before it reads anything a guest could have influenced:
//! parent-death signal, stray fds, an empty read-only root, resource limits, no
//! capabilities, no_new_privs, Landlock without rights. The seccomp filter
//! ([`crate::filter::seal`]) comes last.

mod capabilities;
mod landlock;
mod limits;
mod root;

use std::os::fd::RawFd;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;

pub(crate) use capabilities::{Kept, restrict};
pub(crate) use root::{FileSystem, detached_fs, pivot};

/// A step of building a jail that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("jail step `{step}` failed: {errno}; {remedy}")]
pub struct JailError {
    /// Name of the step.
    pub step: &'static str,
    /// The kernel's reason. Not a source in the sense of [`std::error::Error`]: the
    /// remedy has to come after it, so the message holds it already.
    pub errno: Errno,
    /// What to do about it.
    pub remedy: &'static str,
}

impl JailError {
    pub(crate) fn new(step: &'static str, remedy: &'static str) -> impl Fn(Errno) -> JailError {
        move |errno| JailError { step, errno, remedy }
    }
}

/// Closes every fd that is not in `keep`.
pub fn close_others(keep: &[RawFd]) -> Result<(), JailError> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let mut next = 0u32;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if next < fd {
            let last = if fd == u32::MAX { fd } else { fd - 1 };
            close_range(next, last).map_err(JailError::new(
                "close stray fds",
                "a kernel of at least 5.9 is needed (close_range)",
            ))?;
        }
        next = fd.saturating_add(1);
    }
    Ok(())
}

#[allow(unsafe_code)] // close_range has no wrapper
fn close_range(first: u32, last: u32) -> Result<(), Errno> {
    // SAFETY: closes fds that the caller says nobody needs; no memory is involved.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// Ends this process when its parent dies.
///
/// To be called again after an exec that gained capabilities and after a change
/// of ids: both clear it.
pub fn die_with_parent() -> Result<(), JailError> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(JailError::new(
        "set parent-death signal",
        "this cannot fail on Linux: report it with the kernel's version",
    ))
}

/// Everything between exec and the seccomp filter, in order.
///
/// The process must have been made by [`crate::spawner`] with `sandbox` set, must
/// still be single-threaded, and must already have closed what it does not need.
/// After a failure it must exit: the jail is only half built.
pub fn enter() -> Result<(), JailError> {
    in_own_namespaces()?;
    single_threaded()?;
    die_with_parent()?;
    root::empty()?;
    limits::apply()?;
    restrict(Kept::None)?;
    no_new_privs()?;
    landlock::deny_all()?;
    Ok(())
}

/// As [`enter`], for a plugin: `root` makes its root directory, `landlock` says what of
/// it may be written to.
pub(crate) fn enter_plugin(
    root: impl FnOnce() -> Result<(), JailError>,
    writable: &[&std::path::Path],
) -> Result<(), JailError> {
    in_own_namespaces()?;
    single_threaded()?;
    die_with_parent()?;
    root()?;
    limits::apply_to_plugin()?;
    restrict(Kept::None)?;
    no_new_privs()?;
    landlock::root_only(writable)
}

/// Gives up what the VMM itself does not need: all capabilities, the bounding
/// set, and the possibility of gaining any by exec.
///
/// To be called while single-threaded (all of this is per thread and inherited)
/// and after everything that needs root has been opened.
pub fn drop_vmm_privileges() -> Result<(), JailError> {
    single_threaded()?;
    restrict(Kept::None)?;
    no_new_privs()
}

fn no_new_privs() -> Result<(), JailError> {
    prctl::set_no_new_privs()
        .map_err(JailError::new("set no_new_privs", "a kernel of at least 3.5 is needed"))
}

/// Fails with EPERM where the process is not the first of a pid namespace: it was
/// not made by the spawner, and what follows would unmount the host's file systems.
fn in_own_namespaces() -> Result<(), JailError> {
    if nix::unistd::getpid().as_raw() == 1 {
        return Ok(());
    }
    Err(JailError {
        step: "check for namespaces",
        errno: Errno::EPERM,
        remedy: "device processes are started by `cellblock run`, not by hand",
    })
}

/// Fails with EINVAL where the process has more than one thread: what is done to
/// one thread would leave the others free.
pub(crate) fn single_threaded() -> Result<(), JailError> {
    // unshare of CLONE_THREAD does nothing, and is refused to a process with
    // several threads; no /proc is needed to ask.
    unshare(CloneFlags::CLONE_THREAD).map_err(JailError::new(
        "check that there is one thread",
        "start threads only after this step",
    ))
}
