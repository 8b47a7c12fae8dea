//! Sleeping until a word of shared memory changes, and waking who sleeps.
#![allow(unsafe_code)] // raw system calls on words that are borrowed for the call

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

// <linux/futex.h>; not all of it is in the libc crate.
const FUTEX2_SIZE_U32: u32 = 2;
const FUTEX2_PRIVATE: u32 = 128;

/// `struct futex_waitv` of <linux/futex.h>.
#[repr(C)]
struct Waiter {
    value: u64,
    address: u64,
    flags: u32,
    reserved: u32,
}

impl Waiter {
    fn new(word: &AtomicU32, value: u32, flags: u32) -> Waiter {
        let flags = FUTEX2_SIZE_U32 | flags;
        Waiter { value: value.into(), address: word.as_ptr() as u64, flags, reserved: 0 }
    }
}

/// Whether the kernel has `futex_waitv`, which [`wait_either`] needs: ENOSYS where it does not.
///
/// # Errors
/// The kernel's.
pub fn probe() -> Result<(), Errno> {
    // SAFETY: no waiters are passed, so nothing is read or written; the call fails
    // with EINVAL where it exists.
    let result = unsafe { libc::syscall(libc::SYS_futex_waitv, 0usize, 0u32, 0u32, 0usize, 0u32) };
    match Errno::result(result) {
        Err(Errno::ENOSYS) => Err(Errno::ENOSYS),
        _ => Ok(()),
    }
}

/// Sleeps while `word` holds `value`, at most for `limit`. Returns for any reason at all: the
/// caller looks again.
pub fn wait_shared(word: &AtomicU32, value: u32, limit: Duration) {
    let limit = timespec(limit);
    // SAFETY: the word is borrowed, and so mapped, until the call returns; the kernel reads
    // `limit`, which outlives the call, and writes nothing.
    unsafe {
        let (address, wait) = (word.as_ptr(), libc::FUTEX_WAIT);
        libc::syscall(libc::SYS_futex, address, wait, value, &raw const limit);
    }
}

/// Sleeps while `shared.0` holds `shared.1` and `private.0` holds `private.1`, at most for
/// `limit`. Returns for any reason at all: the caller looks again.
pub fn wait_either(shared: (&AtomicU32, u32), private: (&AtomicU32, u32), limit: Duration) {
    let waiters =
        [Waiter::new(shared.0, shared.1, 0), Waiter::new(private.0, private.1, FUTEX2_PRIVATE)];
    // A clock that cannot be read would make this a busy loop, not a wrong answer.
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return };
    let until = timespec(Duration::from(now) + limit);
    // SAFETY: both words are borrowed, and so mapped, until the call returns; the kernel reads
    // `waiters` and `until`, which outlive the call, and writes nothing.
    unsafe {
        libc::syscall(
            libc::SYS_futex_waitv,
            waiters.as_ptr(),
            waiters.len() as u32,
            0u32,
            &raw const until,
            libc::CLOCK_MONOTONIC,
        );
    }
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs() as libc::time_t, tv_nsec: time.subsec_nanos().into() }
}

/// Wakes every thread, of any process, that sleeps on `word`.
pub fn wake_shared(word: &AtomicU32) {
    wake(word, libc::FUTEX_WAKE);
}

/// Wakes every thread of this process that sleeps on `word`.
pub fn wake_private(word: &AtomicU32) {
    wake(word, libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG);
}

fn wake(word: &AtomicU32, operation: i32) {
    // SAFETY: FUTEX_WAKE uses the word's address only, and the word is borrowed.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, i32::MAX) };
}
