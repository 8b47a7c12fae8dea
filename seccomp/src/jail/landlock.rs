//! Landlock without a single right: no file can be opened, no port bound or
//! connected, no process outside signalled, even by calls that a later kernel
//! adds and the seccomp policy allows by mistake.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use nix::errno::Errno;

use super::JailError;

/// The newest set of rights the crate knows; a kernel that knows fewer enforces
/// those, one without Landlock none (the empty root and seccomp stand anyway).
const NEWEST: ABI = ABI::V9;

pub(super) fn deny_all() -> Result<(), JailError> {
    let deny = || {
        everything()?.create()?.restrict_self()?;
        Ok(())
    };
    told(deny())
}

/// For a plugin: reading and executing below the root, writing only where it was
/// granted; no network, no signals to others.
pub(super) fn root_only(writable: &[&Path]) -> Result<(), JailError> {
    let read = AccessFs::Execute | AccessFs::ReadFile | AccessFs::ReadDir;
    let restrict = || {
        let mut rules = everything()?.create()?;
        for (path, rights) in
            [(Path::new("/"), read)].into_iter().chain(writable.iter().map(|path| (*path, write())))
        {
            // What cannot be opened cannot be written to either.
            let Ok(fd) = PathFd::new(path) else { continue };
            let folder = path.is_dir();
            let rights = if folder { rights } else { rights & AccessFs::from_file(NEWEST) };
            rules = rules.add_rule(PathBeneath::new(fd, rights))?;
        }
        rules.restrict_self()?;
        Ok(())
    };
    told(restrict())
}

fn write() -> BitFlags<AccessFs> {
    AccessFs::from_all(NEWEST)
}

fn told(result: Result<(), RulesetError>) -> Result<(), JailError> {
    result.map_err(|e| {
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

/// Everything that can be restricted is.
fn everything() -> Result<Ruleset, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))
}
