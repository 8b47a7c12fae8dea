//! Waiting until nothing that a dead process began is in flight.
//!
//! With io_uring a request outlives the process that made it, and its end would still reach
//! the image or the guest's memory. Each process of a disk holds the writing end of a pipe
//! of its own, and so do its rings in the kernel, until their last request is over.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{SFlag, fstat};

/// Longest wait. What takes longer is a device that hangs; starting is tried again then.
const LIMIT: Duration = Duration::from_secs(8);

/// Whether a file descriptor that was handed over is a pipe's.
pub(super) fn is_pipe(fd: &OwnedFd) -> bool {
    let is_fifo = |mode| SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFIFO;
    fstat(fd).is_ok_and(|stat| is_fifo(stat.st_mode))
}

/// Waits until all of `pipes` are held by nobody any more.
pub(super) fn wait(mut pipes: Vec<OwnedFd>) -> io::Result<()> {
    let end = Instant::now() + LIMIT;
    while let Some(pipe) = pipes.last() {
        let left = end.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => drop(pipes.pop()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::direct::Direct;
    use crate::blk::engine::Uring;
    use crate::blk::execute::Disk;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_ring_holds_its_pipe_and_lets_it_go() {
        let file = tempfile::tempfile().expect("file");
        file.set_len(4096).expect("size");
        let direct = Direct::of(&file).expect("examined");
        let disk = Disk {
            file,
            size: 4096,
            block_size: 4096,
            read_only: false,
            id: Default::default(),
            direct,
            overlay: None,
        };
        let (far, near) = std::io::pipe().expect("pipe");
        let near = OwnedFd::from(near);
        let ring = Uring::new(&disk, Some(&near)).expect("ring");
        drop(near);
        let let_go = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                wait(vec![far.into()]).expect("in time");
                assert!(let_go.load(Ordering::SeqCst), "the ring is still there");
            });
            std::thread::sleep(Duration::from_millis(50));
            let_go.store(true, Ordering::SeqCst);
            drop(ring);
            waiting.join().expect("waited for the ring");
        });
        wait(Vec::new()).expect("nothing to wait for");
    }
}
