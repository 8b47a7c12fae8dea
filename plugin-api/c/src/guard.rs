//! What stands between C and Rust at every function.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cellblock_plugin_api::Error;
use libc::{EINVAL, EIO, c_int};

/// An error number.
pub(crate) struct Errno(pub(crate) c_int);

pub(crate) type Result<T = c_int> = std::result::Result<T, Errno>;

impl From<Error> for Errno {
    fn from(error: Error) -> Errno {
        Errno(error.errno())
    }
}

/// Runs the body of a function. A panic, which would be a bug of ours, is -EIO.
pub(crate) fn guard(body: impl FnOnce() -> Result) -> c_int {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => value,
        Ok(Err(Errno(number))) => -number,
        Err(_) => -EIO,
    }
}

/// # Safety
/// Null, or valid for reads as a `T` for as long as the result is used.
pub(crate) unsafe fn input<'a, T>(pointer: *const T) -> Result<&'a T> {
    // SAFETY: by the caller's word it is null or valid for that.
    unsafe { pointer.as_ref() }.ok_or(Errno(EINVAL))
}

/// # Safety
/// Null, or valid for reads and writes as a `T`, by nobody else, for as long as the result
/// is used.
pub(crate) unsafe fn output<'a, T>(pointer: *mut T) -> Result<&'a mut T> {
    // SAFETY: by the caller's word it is null, or valid and nobody else's.
    unsafe { pointer.as_mut() }.ok_or(Errno(EINVAL))
}

/// An array; null only where it is empty.
///
/// # Safety
/// Null, or valid for reads of `count` times a `T`.
pub(crate) unsafe fn inputs<'a, T>(pointer: *const T, count: u32) -> Result<&'a [T]> {
    match (pointer.is_null(), count) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(Errno(EINVAL)),
        // SAFETY: by the caller's word it is valid for so many where it is not null.
        (false, count) => Ok(unsafe { std::slice::from_raw_parts(pointer, count as usize) }),
    }
}

/// Hands a list out into a buffer of the caller's: -E2BIG where it is too small, with the
/// count that is needed.
///
/// # Safety
/// `buffer` is null, or valid for writes of `count` times a `T`; `out_count` is null or valid.
pub(crate) unsafe fn fill<T: Copy>(
    list: &[T],
    count: u32,
    buffer: *mut T,
    out_count: *mut u32,
) -> Result {
    // SAFETY: by the caller's word it is null or valid.
    *unsafe { output(out_count) }? = list.len() as u32;
    if list.len() > count as usize {
        return Err(Errno(libc::E2BIG));
    }
    if !list.is_empty() {
        if buffer.is_null() {
            return Err(Errno(EINVAL));
        }
        // SAFETY: by the caller's word it is valid for `count` of them where it is not null, which
        // is no fewer than there are.
        unsafe { buffer.copy_from_nonoverlapping(list.as_ptr(), list.len()) };
    }
    Ok(0)
}
