//! Resource limits of a jailed process.

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::JailError;

/// Resource, most it may be, name of the step.
///
/// The size of files is not limited (disk images), nor is address space (guest
/// memory is mapped).
const LIMITS: [(Resource, u64, &str); 8] = [
    // A core file would hold guest memory.
    (Resource::RLIMIT_CORE, 0, "limit core files"),
    // Sockets, memory regions, and for each of 32 queues eight: three events of the front end's,
    // three of its thread, and its io_uring with one more.
    (Resource::RLIMIT_NOFILE, 512, "limit open files"),
    // Queue workers and io_uring's kernel threads.
    (Resource::RLIMIT_NPROC, 256, "limit threads"),
    // io_uring counts its rings as locked: 28 KiB for each of 32 queues.
    (Resource::RLIMIT_MEMLOCK, 1 << 20, "limit locked memory"),
    // Private memory: what a process gone wrong can take from the host.
    (Resource::RLIMIT_DATA, 1 << 30, "limit private memory"),
    (Resource::RLIMIT_MSGQUEUE, 0, "limit message queues"),
    (Resource::RLIMIT_RTPRIO, 0, "limit real-time priority"),
    (Resource::RLIMIT_NICE, 0, "limit niceness"),
];

pub(super) fn apply() -> Result<(), JailError> {
    for (resource, most, step) in LIMITS {
        lower(resource, most).map_err(JailError::new(step, "raise no limit: this is a bug"))?;
    }
    Ok(())
}

/// As [`apply`], for a plugin: it may hold the memory, the events and the interrupts of a
/// whole machine.
pub(super) fn apply_to_plugin() -> Result<(), JailError> {
    for (resource, most, step) in LIMITS {
        let most = match resource {
            Resource::RLIMIT_NOFILE => 4096,
            Resource::RLIMIT_DATA => 4 << 30,
            _ => most,
        };
        lower(resource, most).map_err(JailError::new(step, "raise no limit: this is a bug"))?;
    }
    Ok(())
}

/// Lowers a limit to `most`; one that is lower already stays.
fn lower(resource: Resource, most: u64) -> Result<(), Errno> {
    let (_, hard) = getrlimit(resource)?;
    let limit = most.min(hard);
    setrlimit(resource, limit, limit)
}
