//! A file's bytes shared with, or copied to, another file by the kernel.
#![allow(unsafe_code)] // an ioctl and two copies between files

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

nix::ioctl_write_int!(ficlone, 0x94, 9);

/// Makes `to` share all blocks of `from`, where the file system can.
pub(super) fn clone(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: FICLONE takes an fd and no pointer; both files are open.
    unsafe { ficlone(to.as_raw_fd(), from.as_raw_fd() as u64) }?;
    Ok(())
}

/// Copies up to `len` bytes at `at` to the same place of `to`. Returns how many.
pub(super) fn copy_range(from: &File, to: &File, at: i64, len: usize) -> io::Result<usize> {
    let (mut source, mut target) = (at, at);
    // SAFETY: both files are open, and the offsets outlive the call.
    let copied = unsafe {
        let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
        libc::copy_file_range(from, &mut source, to, &mut target, len, 0)
    };
    match copied {
        0.. => Ok(copied as usize),
        _ => match io::Error::last_os_error() {
            // Between these file systems it does not work.
            e if matches!(e.raw_os_error(), Some(libc::EXDEV | libc::EINVAL | libc::ENOSYS)) => {
                by_hand(from, to, at, len)
            }
            e => Err(e),
        },
    }
}

fn by_hand(from: &File, to: &File, at: i64, len: usize) -> io::Result<usize> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; len.min(1 << 20)];
    let n = from.read_at(&mut buffer, at as u64)?;
    to.write_all_at(&buffer[..n], at as u64)?;
    Ok(n)
}
