//! Guest memory on its way to the file: zero pages left out, checksums on the fly.
//!
//! A chunk is read to a buffer that stays in the processor's cache, looked through for
//! zero pages, checked and written from there. Several threads take chunks in turn.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::uio::pread;
use nix::unistd::{Whence, lseek64};

use super::checksum::Crc64;
use super::{CHUNK, PAGE, table};

/// Most threads that copy at once.
const MAX_THREADS: usize = 4;
/// Chunks below which a thread more is not worth its start.
const MIN_SHARE: usize = 64;

/// Pages to copy of one chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task {
    /// The chunk.
    pub index: usize,
    /// Its pages.
    pub pages: u64,
    /// Those that have bytes in the file already: they are written even if they are zero.
    pub written: u64,
}

/// A chunk that was copied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copied {
    pub index: usize,
    /// The pages of the task that have bytes in the file now.
    pub data: u64,
    /// Of these bytes.
    pub crc: u64,
}

/// The chunks of which `ram` has anything, by what the kernel knows; all others are zero.
pub(super) fn populated(ram: BorrowedFd<'_>, memory: u64) -> io::Result<Vec<usize>> {
    let mut chunks = Vec::new();
    let mut at = 0;
    while at < memory {
        match lseek64(ram, at as i64, Whence::SeekData) {
            Ok(found) if (found as u64) < memory => {
                let index = found as usize / CHUNK;
                chunks.push(index);
                at = ((index + 1) * CHUNK) as u64;
            }
            Ok(_) | Err(Errno::ENXIO) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(chunks)
}

/// Does `tasks`, from `ram` to `out`, and returns what came of them in no order. Stops
/// early, with an error, once `cancel` is set.
pub(super) fn copy(
    ram: BorrowedFd<'_>,
    out: &File,
    tasks: &[Task],
    cancel: &AtomicBool,
) -> io::Result<Vec<Copied>> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = processors.min(MAX_THREADS).min(tasks.len() / MIN_SHARE);
    let next = AtomicUsize::new(0);
    if threads <= 1 {
        return share(ram, out, tasks, &next, cancel);
    }
    let all = Mutex::new(Ok(Vec::with_capacity(tasks.len())));
    let work = || {
        let mine = share(ram, out, tasks, &next, cancel);
        let mut all = all.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match (&mut *all, mine) {
            (Ok(all), Ok(mine)) => all.extend(mine),
            (all @ Ok(_), Err(e)) => {
                *all = Err(e);
                // The others need not finish.
                next.store(tasks.len(), Ordering::Relaxed);
            }
            (Err(_), _) => {}
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Without a thread more it takes longer, no more than that.
            let _ = std::thread::Builder::new().name("copy".into()).spawn_scoped(scope, work);
        }
        work();
    });
    all.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Takes tasks in turn until there are none.
fn share(
    ram: BorrowedFd<'_>,
    out: &File,
    tasks: &[Task],
    next: &AtomicUsize,
    cancel: &AtomicBool,
) -> io::Result<Vec<Copied>> {
    let mut buffer = vec![0; CHUNK];
    let mut done = Vec::new();
    while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
        if cancel.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        done.push(one(ram, out, task, &mut buffer)?);
    }
    Ok(done)
}

fn one(ram: BorrowedFd<'_>, out: &File, task: &Task, buffer: &mut [u8]) -> io::Result<Copied> {
    let start = task.index * CHUNK;
    for (page, pages) in table::runs(task.pages) {
        read(ram, start + page * PAGE, &mut buffer[page * PAGE..(page + pages) * PAGE])?;
    }
    write(out, task.index, task.pages, task.written, buffer)
}

/// Writes `pages` of the chunk in `buffer`, but for those that are zero and were not
/// `written` before.
pub(super) fn write(
    out: &File,
    index: usize,
    pages: u64,
    written: u64,
    buffer: &[u8],
) -> io::Result<Copied> {
    let mut data = 0;
    for (page, bytes) in buffer.chunks_exact(PAGE).enumerate() {
        let bit = 1 << page;
        if pages & bit != 0 && (written & bit != 0 || !is_zero(bytes)) {
            data |= bit;
        }
    }
    let mut crc = Crc64::new();
    for (page, pages) in table::runs(data) {
        let bytes = &buffer[page * PAGE..(page + pages) * PAGE];
        crc.update(bytes);
        out.write_all_at(bytes, (index * CHUNK + page * PAGE) as u64)?;
    }
    Ok(Copied { index, data, crc: crc.finish() })
}

fn read(ram: BorrowedFd<'_>, mut offset: usize, mut into: &mut [u8]) -> io::Result<()> {
    while !into.is_empty() {
        match pread(ram.as_fd(), into, offset as i64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                into = &mut into[n..];
                offset += n;
            }
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Sixteen words at a time, which the compiler turns into vector instructions.
fn is_zero(page: &[u8]) -> bool {
    let (blocks, rest) = page.as_chunks::<128>();
    let block_is_zero = |block: &[u8; 128]| {
        let (words, _) = block.as_chunks::<8>();
        words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
    };
    blocks.iter().all(block_is_zero) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_makes_a_page_no_zero_page() {
        let mut page = vec![0; PAGE];
        assert!(is_zero(&page));
        for at in [0, 1, 127, 128, 2048, PAGE - 1] {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }
}
