//! Memory barriers on one side only (`membarrier(2)`).
//!
//! A process that stores something and then loads a flag, and another that sets the flag and
//! then loads what was stored, both need a full barrier between: one of the two must see what the
//! other did. Where the first does so all the time and the second seldom, the kernel can have the
//! second pay for both.
#![allow(unsafe_code)] // a system call without a wrapper

use std::io;

/// Takes part in the barriers of others from now on. Without, this process has to use its own.
pub fn take_part() -> io::Result<()> {
    call(libc::MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED)
}

/// A full barrier in every thread that runs of every process that takes part, and here.
pub fn everywhere() -> io::Result<()> {
    call(libc::MEMBARRIER_CMD_GLOBAL_EXPEDITED)
}

fn call(command: libc::c_int) -> io::Result<()> {
    // SAFETY: takes numbers, and returns one.
    match unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
