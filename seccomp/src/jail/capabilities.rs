//! Giving up capabilities, for good.
#![allow(unsafe_code)] // capset has no wrapper

use nix::errno::Errno;

use super::JailError;

const REMEDY: &str = "this cannot fail on Linux: report it with the kernel's version";
/// Highest number a capability can have in the kernel's two words.
const MAX_CAPABILITY: libc::c_ulong = 63;

// include/uapi/linux/capability.h
const CAP_SETGID: u32 = 6;
const CAP_SETUID: u32 = 7;
const CAP_SETPCAP: u32 = 8;
const VERSION_3: u32 = 0x2008_0522;

// include/uapi/linux/securebits.h: uid 0 means nothing, changes of uid keep
// nothing, and both stay so.
const NOROOT_LOCKED: libc::c_ulong = 0x3;
const NO_SETUID_FIXUP_LOCKED: libc::c_ulong = 0xc;
const KEEP_CAPS_LOCKED: libc::c_ulong = 0x20;
const NO_AMBIENT_RAISE_LOCKED: libc::c_ulong = 0xc0;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Words {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Which capabilities stay.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// None at all.
    None,
    /// Those for writing id maps, as far as the process has them: the spawner's.
    SetIds,
}

/// Reduces all five capability sets of this thread to `kept`, so that no exec and
/// no uid change brings anything back.
pub(crate) fn restrict(kept: Kept) -> Result<(), JailError> {
    let before = get().map_err(JailError::new("read capabilities", REMEDY))?;
    // An ordinary user has no CAP_SETPCAP and so a full bounding set; its
    // capability sets are empty and no_new_privs keeps them so.
    if before[0].effective & (1 << CAP_SETPCAP) != 0 {
        drop_bounding(kept).map_err(JailError::new("drop bounding set", REMEDY))?;
        if kept == Kept::None {
            let bits =
                NOROOT_LOCKED | NO_SETUID_FIXUP_LOCKED | KEEP_CAPS_LOCKED | NO_AMBIENT_RAISE_LOCKED;
            prctl(libc::PR_SET_SECUREBITS, bits, 0)
                .map_err(JailError::new("lock securebits", REMEDY))?;
        }
    }
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0)
        .map_err(JailError::new("drop ambient capabilities", REMEDY))?;
    let keep = before[0].permitted & mask(kept);
    let after = [Words { effective: keep, permitted: keep, inheritable: 0 }, Words::default()];
    set(&after).map_err(JailError::new("drop capabilities", REMEDY))
}

fn mask(kept: Kept) -> u32 {
    match kept {
        Kept::None => 0,
        Kept::SetIds => 1 << CAP_SETUID | 1 << CAP_SETGID,
    }
}

fn drop_bounding(kept: Kept) -> Result<(), Errno> {
    for capability in 0..=MAX_CAPABILITY {
        if capability < 32 && mask(kept) & (1 << capability) != 0 {
            continue;
        }
        match prctl(libc::PR_CAPBSET_DROP, capability, 0) {
            Ok(()) => {}
            Err(Errno::EINVAL) => break, // the kernel has no more
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn prctl(option: libc::c_int, a: libc::c_ulong, b: libc::c_ulong) -> Result<(), Errno> {
    // SAFETY: the options used here take numbers only.
    Errno::result(unsafe { libc::prctl(option, a, b, 0 as libc::c_ulong, 0 as libc::c_ulong) })
        .map(drop)
}

fn get() -> Result<[Words; 2], Errno> {
    let header = Header { version: VERSION_3, pid: 0 };
    let mut words = [Words::default(); 2];
    // SAFETY: version 3 reads the header and writes exactly two Words.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw const header, &raw mut words) })?;
    Ok(words)
}

fn set(words: &[Words; 2]) -> Result<(), Errno> {
    let header = Header { version: VERSION_3, pid: 0 };
    // SAFETY: version 3 reads the header and exactly two Words.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) })
        .map(drop)
}
