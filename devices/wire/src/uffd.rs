//! userfaultfd: pages that are missing are somebody's to bring.
//!
//! A userfaultfd belongs to the address space of the process that made it, and what is
//! registered with it is a part of that address space. Whoever holds the fd can answer.
//! It is made from `/dev/userfaultfd`, which works without privileges for whoever was
//! given that fd, and never for user-mode accesses only: KVM and the system calls of a
//! process reach its memory from within the kernel.
#![allow(unsafe_code)] // ioctls with structures, which no crate wraps for a passed device fd

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;

const API: u64 = 0xaa;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of a message.
const MESSAGE: usize = 32;
/// An address every process may name, whether or not anything is there.
const SOME_PAGE: u64 = 0x10000;

#[repr(C)]
pub struct ApiArgs {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
pub struct RangeArgs {
    start: u64,
    len: u64,
}

#[repr(C)]
pub struct RegisterArgs {
    range: RangeArgs,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
pub struct CopyArgs {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
pub struct ZeroArgs {
    range: RangeArgs,
    mode: u64,
    zeroed: i64,
}

mod calls {
    use super::{ApiArgs, CopyArgs, RangeArgs, RegisterArgs, ZeroArgs};
    nix::ioctl_write_int_bad!(new, 0xaa00);
    nix::ioctl_readwrite!(api, 0xaa, 0x3f, ApiArgs);
    nix::ioctl_readwrite!(register, 0xaa, 0, RegisterArgs);
    nix::ioctl_read!(unregister, 0xaa, 1, RangeArgs);
    nix::ioctl_read!(wake, 0xaa, 2, RangeArgs);
    nix::ioctl_readwrite!(copy, 0xaa, 3, CopyArgs);
    nix::ioctl_readwrite!(zero, 0xaa, 4, ZeroArgs);
}

/// A userfaultfd, of this process or of another.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Makes one for this process, from an open `/dev/userfaultfd`.
    pub fn new(device: BorrowedFd<'_>) -> io::Result<Uffd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: takes flags, and returns a new fd that nobody else owns.
        let fd = unsafe {
            let fd = calls::new(device.as_raw_fd(), flags)?;
            OwnedFd::from_raw_fd(fd)
        };
        let mut args = ApiArgs { api: API, features: FEATURE_MISSING_SHMEM, ioctls: 0 };
        // SAFETY: `args` is what the kernel reads and writes, and outlives the call.
        unsafe { calls::api(fd.as_raw_fd(), &mut args) }?;
        Ok(Uffd(fd))
    }

    /// One that somebody sent. Whatever else they sent is refused: nothing but a
    /// userfaultfd can be asked to wake nobody.
    pub fn received(fd: OwnedFd) -> io::Result<Uffd> {
        let uffd = Uffd(fd);
        uffd.wake(SOME_PAGE, 4096)?;
        // Reading it must never wait, whatever its other holders would like.
        fcntl(&uffd.0, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(uffd)
    }

    /// From now on whoever touches a missing page of `len` bytes at `start`, in this
    /// process, waits until it is brought.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let range = RangeArgs { start, len };
        let mut args = RegisterArgs { range, mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: as in `new`; the kernel checks the range and changes no contents.
        unsafe { calls::register(self.0.as_raw_fd(), &mut args) }?;
        Ok(())
    }

    /// Undoes [`Uffd::register`]: missing pages are zeros again.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut args = RangeArgs { start, len };
        // SAFETY: as in `register`.
        unsafe { calls::unregister(self.0.as_raw_fd(), &mut args) }?;
        Ok(())
    }

    /// Has whoever waits for a page of this range look again.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut args = RangeArgs { start, len };
        // SAFETY: as in `register`.
        unsafe { calls::wake(self.0.as_raw_fd(), &mut args) }?;
        Ok(())
    }

    /// Makes the missing pages at `start` be `bytes`, whole pages, and wakes who waits for
    /// them. Every page appears with its contents. Returns how many bytes there are now;
    /// fails with EEXIST if the first page is there already.
    pub fn copy(&self, start: u64, bytes: &[u8]) -> io::Result<usize> {
        let (src, len) = (bytes.as_ptr() as u64, bytes.len() as u64);
        let mut args = CopyArgs { dst: start, src, len, mode: 0, copy: 0 };
        // SAFETY: as in `new`; the kernel reads `bytes`, and fills only missing pages of a
        // range that is registered, behind no Rust reference.
        match unsafe { calls::copy(self.0.as_raw_fd(), &mut args) } {
            Ok(_) => Ok(bytes.len()),
            // Interrupted on the way: some are there.
            Err(_) if args.copy > 0 => Ok(args.copy as usize),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes a missing page zeros.
    pub fn zero(&self, start: u64, len: u64) -> io::Result<()> {
        let range = RangeArgs { start, len };
        let mut args = ZeroArgs { range, mode: 0, zeroed: 0 };
        // SAFETY: as in `copy`.
        unsafe { calls::zero(self.0.as_raw_fd(), &mut args) }?;
        Ok(())
    }

    /// The address of the next access that waits; `None` if there is none for now.
    pub fn next_fault(&self) -> io::Result<Option<u64>> {
        loop {
            let mut message = [0; MESSAGE];
            match nix::unistd::read(&self.0, &mut message) {
                Ok(MESSAGE) if message[0] == EVENT_PAGEFAULT => {
                    let address = message[16..].first_chunk().copied().unwrap_or_default();
                    return Ok(Some(u64::from_ne_bytes(address)));
                }
                Ok(MESSAGE) | Err(Errno::EINTR) => {}
                Ok(_) | Err(Errno::EAGAIN) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
