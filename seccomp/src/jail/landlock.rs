//! Landlock without a single right: no file can be opened, no port bound or
//! connected, no process outside signalled, even by calls that a later kernel
//! adds and the seccomp policy allows by mistake.

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, Scope};
use nix::errno::Errno;

use super::JailError;

/// The newest set of rights the crate knows; a kernel that knows fewer enforces
/// those, one without Landlock none (the empty root and seccomp stand anyway).
const NEWEST: ABI = ABI::V9;

pub(super) fn deny_all() -> Result<(), JailError> {
    restrict().map_err(|e| {
        let errno = match std::error::Error::source(&e)
            .and_then(|e| e.downcast_ref::<std::io::Error>())
            .and_then(std::io::Error::raw_os_error)
        {
            Some(number) => Errno::from_raw(number),
            None => Errno::EINVAL,
        };
        JailError {
            step: "restrict by Landlock",
            errno,
            remedy: "boot with `lsm=` including landlock, or without Landlock altogether",
        }
    })
}

fn restrict() -> Result<(), RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .restrict_self()?;
    Ok(())
}
