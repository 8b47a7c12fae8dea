//! The limit of open files: what a VM has of them grows with its vCPUs, clients and plugins.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// More than is ever used.
const ENOUGH: u64 = 1 << 17;

/// Takes as many as the system lets us have. The soft limit is a precaution for programs that use
/// select, which this one does not; device processes have limits of their own.
pub fn raise_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // Refused, it stays as it is: who counts on it asks for it.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, soft.max(hard.min(ENOUGH)), hard);
    }
}
