//! File descriptors: how many there are, and who gets them.
//!
//! A pool that lacks them can neither make VMs nor be told to stop, so clients get what shells
//! leave over.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Connections at a time, however many descriptors there are.
const MOST_CLIENTS: u64 = 1024;
/// So many may always try.
const FEW_CLIENTS: u64 = 8;
/// The service's own, and what its makers need for a moment.
const OWN: u64 = 64;
/// A shell's socket, and the disk that a claim brings for it.
const SHELL: u64 = 4;

/// Raises this process's limit as far as it may; returns it.
pub(super) fn raise() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return OWN };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

/// Clients that there may be at a time, beside so many shells and VMs.
pub(super) fn clients(limit: u64, shells: usize) -> usize {
    let reserve = OWN.saturating_add((shells as u64).saturating_mul(SHELL));
    let left = limit.saturating_sub(reserve);
    if left < FEW_CLIENTS {
        let wanted = reserve.saturating_add(FEW_CLIENTS);
        tracing::warn!(
            limit,
            wanted,
            "so many VMs need more file descriptors: raise the limit (ulimit -n)"
        );
    }
    left.clamp(FEW_CLIENTS, MOST_CLIENTS) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_get_what_shells_leave_over() {
        assert_eq!(clients(1 << 20, 68), MOST_CLIENTS as usize);
        assert_eq!(clients(400, 6), 400 - 64 - 24);
        assert_eq!(clients(256, 68), FEW_CLIENTS as usize);
        assert_eq!(clients(u64::MAX, usize::MAX), FEW_CLIENTS as usize);
    }
}
