//! Shared memory between processes that do not trust one another.
//!
//! Every shared page is a memfd sealed against resizing, so that neither side
//! can turn the other's access into SIGBUS. What it holds may change at any
//! time: read once, check the copy, use the copy.
#![allow(unsafe_code)] // mapping memory is what this module is for

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

/// Shared memory that could not be made or may not be used.
#[derive(Debug, thiserror::Error)]
pub enum ShmError {
    /// The memfd could not be created.
    #[error("creating shared memory of {size} bytes")]
    Create {
        /// Requested size in bytes.
        size: u64,
        /// The kernel's reason.
        #[source]
        source: Errno,
    },
    /// A received fd could not be examined.
    #[error("examining received shared memory")]
    Examine(#[source] Errno),
    /// A received fd could shrink or be resealed while it is mapped.
    #[error("received shared memory is not sealed against shrinking")]
    Unsealed,
    /// A received memfd is smaller than what it has to hold.
    #[error("received shared memory has {found} bytes where {needed} are needed")]
    TooSmall {
        /// Its size in bytes.
        found: u64,
        /// The least it has to have.
        needed: u64,
    },
    /// Mapping failed.
    #[error("mapping {len} bytes of shared memory")]
    Map {
        /// Length in bytes.
        len: usize,
        /// The kernel's reason.
        #[source]
        source: Errno,
    },
}

/// Creates a memfd of `size` zero bytes, sealed against shrinking, growing and resealing.
pub fn sealed_memfd(name: &str, size: u64) -> Result<OwnedFd, ShmError> {
    let wrap = |source| ShmError::Create { size, source };
    let name = CString::new(name).map_err(|_| wrap(Errno::EINVAL))?;
    let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
        .map_err(wrap)?;
    let len = i64::try_from(size).map_err(|_| wrap(Errno::EFBIG))?;
    ftruncate(&fd, len).map_err(wrap)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(wrap)?;
    Ok(fd)
}

/// Creates a memfd of `size` zero bytes that its maker may write, through the mapping that
/// comes with it, and everyone else only read.
pub fn published_memfd(name: &str, size: usize) -> Result<(OwnedFd, Mapping), ShmError> {
    let wrap = |source| ShmError::Create { size: size as u64, source };
    let name = CString::new(name).map_err(|_| wrap(Errno::EINVAL))?;
    let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
        .map_err(wrap)?;
    let len = i64::try_from(size).map_err(|_| wrap(Errno::EFBIG))?;
    ftruncate(&fd, len).map_err(wrap)?;
    let fixed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(fixed)).map_err(wrap)?;
    let mapping = Mapping::new(&fd, size, Access::ReadWrite)?;
    // Not yet named by nix.
    let future_write = SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE);
    fcntl(&fd, FcntlArg::F_ADD_SEALS(future_write | SealFlag::F_SEAL_SEAL)).map_err(wrap)?;
    Ok((fd, mapping))
}

/// Checks that `fd` is a memfd that cannot shrink and has at least `needed` bytes.
/// Returns its size in bytes.
pub fn check_sealed(fd: impl AsFd, needed: u64) -> Result<u64, ShmError> {
    let seals = fcntl(fd.as_fd(), FcntlArg::F_GET_SEALS).map_err(|e| match e {
        Errno::EINVAL => ShmError::Unsealed, // not a memfd at all
        e => ShmError::Examine(e),
    })?;
    if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Err(ShmError::Unsealed);
    }
    let found = fstat(fd.as_fd()).map_err(ShmError::Examine)?.st_size as u64;
    if found < needed {
        return Err(ShmError::TooSmall { found, needed });
    }
    Ok(found)
}

/// What a [`Mapping`] may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Stores through the mapping fault.
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

/// A whole sealed memfd mapped shared, unmapped on drop.
///
/// Access is through atomics only, because the other side may write at any time.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    access: Access,
}

// SAFETY: the mapping is plain memory reached through atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `fd`, after checking its seals and its size.
    pub fn new(fd: impl AsFd, len: usize, access: Access) -> Result<Mapping, ShmError> {
        check_sealed(fd.as_fd(), len as u64)?;
        let wrap = |source| ShmError::Map { len, source };
        let size = std::num::NonZeroUsize::new(len).ok_or_else(|| wrap(Errno::EINVAL))?;
        let prot = match access {
            Access::ReadOnly => ProtFlags::PROT_READ,
            Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        // SAFETY: a fresh shared mapping at an address of the kernel's choice; the
        // file cannot shrink below `len`, which was checked above.
        let base = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, fd.as_fd(), 0) }
            .map_err(wrap)?
            .cast();
        Ok(Mapping { base, len, access })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a mapping of no bytes, which cannot be made.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The 32-bit word at byte `offset`.
    ///
    /// # Panics
    /// If `offset` is misaligned or out of range: offsets are constants of a layout.
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        self.word(offset)
    }

    /// The 64-bit word at byte `offset`. Panics as [`Mapping::u32`] does.
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        self.word(offset)
    }

    /// The byte at `offset`. Panics as [`Mapping::u32`] does.
    pub fn u8(&self, offset: usize) -> &AtomicU8 {
        self.word(offset)
    }

    /// Whether stores are possible.
    pub fn access(&self) -> Access {
        self.access
    }

    fn word<T>(&self, offset: usize) -> &T {
        let size = size_of::<T>();
        assert!(
            offset.is_multiple_of(size)
                && offset.checked_add(size).is_some_and(|end| end <= self.len),
            "offset {offset} does not name a {size}-byte word of {} bytes",
            self.len
        );
        // SAFETY: in bounds and aligned as asserted, mapped for as long as `self`
        // lives, and only ever reached through atomics (T is one of them).
        unsafe { &*self.base.as_ptr().add(offset).cast::<T>() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and is given up here; borrows of
        // words end with `self`. Failure leaves it mapped, which is harmless.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn two_mappings_see_one_memory() {
        let fd = sealed_memfd("test", 4096).expect("memfd");
        let a = Mapping::new(&fd, 4096, Access::ReadWrite).expect("map");
        let b = Mapping::new(&fd, 4096, Access::ReadOnly).expect("map");
        a.u64(8).store(42, Ordering::Release);
        assert_eq!(b.u64(8).load(Ordering::Acquire), 42);
    }

    #[test]
    fn a_sealed_memfd_cannot_be_resized() {
        let fd = sealed_memfd("test", 4096).expect("memfd");
        assert_eq!(ftruncate(&fd, 0), Err(Errno::EPERM));
        assert_eq!(ftruncate(&fd, 8192), Err(Errno::EPERM));
        assert!(matches!(
            Mapping::new(&fd, 8192, Access::ReadOnly),
            Err(ShmError::TooSmall { found: 4096, needed: 8192 })
        ));
    }

    #[test]
    fn unsealed_fds_are_refused() {
        let plain = memfd_create(c"plain", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .expect("memfd");
        ftruncate(&plain, 4096).expect("size");
        assert!(matches!(check_sealed(&plain, 0), Err(ShmError::Unsealed)));
        let (a, _b) = std::os::unix::net::UnixStream::pair().expect("pair");
        assert!(matches!(check_sealed(&a, 0), Err(ShmError::Unsealed)));
    }

    #[test]
    #[should_panic(expected = "does not name")]
    fn offsets_are_checked() {
        let fd = sealed_memfd("test", 4096).expect("memfd");
        let map = Mapping::new(&fd, 4096, Access::ReadWrite).expect("map");
        map.u64(4092);
    }
}
