//! Requests on the image, by system calls that move data straight between guest
//! memory and the file.
#![allow(unsafe_code)] // preadv2 and pwritev2 take raw addresses of guest memory

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use libc::{c_int, iovec};
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;
use vm_memory::Bytes;

use super::clear::{self, Range};
use super::direct::{Bounce, Cursor, Direct};
use super::memory::Slice;
use super::overlay::Overlay;
use super::request::Operation;
use super::turns::Turns;

/// Bytes of a serial number.
pub(super) const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Most buffers of one system call (UIO_MAXIOV).
pub(super) const MAX_IOVECS: usize = 1024;

/// The image and what the device says about it.
#[derive(Debug)]
pub(super) struct Disk {
    /// Opened as `read_only` says.
    pub file: File,
    /// Size in bytes: whole sectors.
    pub size: u64,
    /// Bytes that the file system or the device below handles at once.
    pub block_size: u32,
    /// A flush has nothing to do, and a write never gets here.
    pub read_only: bool,
    /// Padded with zeros. It changes with the life of the machine, and is seldom asked for.
    pub id: Mutex<[u8; ID_BYTES]>,
    /// How it wants to be read and written, where that is not through the page cache.
    pub direct: Option<Direct>,
    /// Where writes go instead of to `file`, which is open read-only then.
    pub overlay: Option<Overlay>,
}

impl Disk {
    /// Its serial number from now on.
    pub fn set_id(&self, id: [u8; ID_BYTES]) {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    /// The turns that writes have to take.
    pub fn turns(&self) -> Option<&Turns> {
        self.direct.as_ref()?.turns.as_ref()
    }
}

/// The file could not do what a well-formed request asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExecuteError {
    /// The file has become shorter than the disk.
    #[error("image ends at byte {0}")]
    EndOfFile(u64),
    /// A system call failed.
    #[error("accessing the image")]
    Io(#[source] io::Error),
    /// The answer could not be put into guest memory.
    #[error("writing to guest memory")]
    Memory(#[source] vm_memory::VolatileMemoryError),
}

/// Executes requests one at a time on the calling thread.
#[derive(Debug)]
pub(super) struct Executor {
    iovecs: Vec<iovec>,
    bounce: Bounce,
    /// Every write is durable before it is answered.
    write_through: bool,
}

impl Executor {
    pub fn new(write_through: bool) -> Executor {
        Executor {
            iovecs: Vec::with_capacity(MAX_IOVECS),
            bounce: Bounce::default(),
            write_through,
        }
    }

    /// Does `operation`; `filled` is how many bytes from the start of `data` were
    /// written to, in case of an error too.
    pub fn execute(
        &mut self,
        disk: &Disk,
        operation: Operation,
        data: &[Slice<'_>],
        ranges: &[Range],
        filled: &mut u64,
    ) -> Result<(), ExecuteError> {
        if let Some(direct) = &disk.direct {
            return self.execute_direct(disk, direct, operation, data, ranges, filled);
        }
        self.execute_plain(disk, operation, data, ranges, filled)
    }

    #[inline]
    fn execute_plain(
        &mut self,
        disk: &Disk,
        operation: Operation,
        data: &[Slice<'_>],
        ranges: &[Range],
        filled: &mut u64,
    ) -> Result<(), ExecuteError> {
        let file = &disk.file;
        match (operation, &disk.overlay) {
            (Operation::Read(offset), None) => self.read(file, data, offset, filled),
            (Operation::Read(offset), Some(cow)) => cow.read(self, file, data, offset, filled),
            (Operation::Write(offset), None) => self.write(file, data, offset),
            (Operation::Write(offset), Some(cow)) => cow.write(self, file, data, offset),
            (Operation::Clear(what), None) => {
                let bounce = disk.direct.as_ref().map(|direct| (&mut self.bounce, direct));
                clear::execute(file, what, ranges, self.write_through, bounce)
            }
            (Operation::Clear(what), Some(cow)) => cow.clear(file, what, ranges),
            (Operation::Flush, _) if !disk.is_durable() => Ok(()),
            (Operation::Flush, _) => file.sync_data().map_err(ExecuteError::Io),
            (Operation::GetId, _) => {
                let id = *disk.id.lock().unwrap_or_else(PoisonError::into_inner);
                for slice in data {
                    let id = &id[*filled as usize..];
                    let n = slice.len().min(id.len());
                    slice.write_slice(&id[..n], 0).map_err(ExecuteError::Memory)?;
                    *filled += n as u64;
                }
                Ok(())
            }
        }
    }

    /// The same on an image that is not cached: in turn where others write, and over a
    /// buffer of ours where the guest's do not fit.
    #[cold]
    fn execute_direct(
        &mut self,
        disk: &Disk,
        direct: &Direct,
        operation: Operation,
        data: &[Slice<'_>],
        ranges: &[Range],
        filled: &mut u64,
    ) -> Result<(), ExecuteError> {
        let bytes = data.iter().map(|slice| slice.len() as u64).sum();
        let is_partial = match operation {
            Operation::Read(offset) if !direct.fits(offset, data) => {
                return self.bounce.read((&disk.file, direct), offset, data, bytes, filled);
            }
            Operation::Read(_) | Operation::Flush | Operation::GetId => {
                return self.execute_plain(disk, operation, data, ranges, filled);
            }
            Operation::Write(offset) => direct.is_partial(offset, bytes),
            // Zeros may have to be written, into parts of blocks too.
            Operation::Clear(_) => true,
        };
        let turns = direct.turns.as_ref();
        let _turn = turns.map(|turns| turns.take(is_partial));
        match operation {
            Operation::Write(offset) if !direct.fits(offset, data) => {
                let mut from = Cursor::new(data);
                let to = (&disk.file, direct);
                self.bounce.write(to, offset, bytes, self.write_through, |into| from.drain(into))
            }
            _ => self.execute_plain(disk, operation, data, ranges, filled),
        }
    }

    /// Does what is left of a read or write of `iovecs`, of which `done` bytes are moved;
    /// returns how many are then, in case of an error too.
    ///
    /// # Safety
    /// The iovecs, at most [`MAX_IOVECS`], must name mapped guest memory.
    pub unsafe fn go_on(
        &self,
        file: &File,
        operation: Operation,
        iovecs: &mut [iovec],
        mut done: u64,
    ) -> (u64, Result<(), ExecuteError>) {
        let left = advance(iovecs, usize::try_from(done).unwrap_or(usize::MAX));
        let flags = self.flags();
        let result = match operation {
            Operation::Read(at) => {
                drive(left, |left, done| preadv2(file, left, at + done, flags), at, &mut done)
            }
            Operation::Write(at) => {
                drive(left, |left, done| pwritev2(file, left, at + done, flags), at, &mut done)
            }
            Operation::Flush => file.sync_data().map_err(ExecuteError::Io),
            Operation::GetId | Operation::Clear(_) => Ok(()),
        };
        (done, result)
    }

    fn flags(&self) -> c_int {
        if self.write_through { libc::RWF_DSYNC } else { 0 }
    }

    /// Fills `data` from `file`; `done` is how many bytes were.
    pub fn read(
        &mut self,
        file: &File,
        data: &[Slice<'_>],
        offset: u64,
        done: &mut u64,
    ) -> Result<(), ExecuteError> {
        self.transfer(file, data, offset, done, preadv2)
    }

    /// Writes `data` to `file`.
    pub fn write(
        &mut self,
        file: &File,
        data: &[Slice<'_>],
        offset: u64,
    ) -> Result<(), ExecuteError> {
        self.transfer(file, data, offset, &mut 0, pwritev2)
    }

    fn transfer(
        &mut self,
        file: &File,
        data: &[Slice<'_>],
        offset: u64,
        done: &mut u64,
        call: impl Fn(&File, &[iovec], u64, c_int) -> io::Result<usize>,
    ) -> Result<(), ExecuteError> {
        let flags = self.flags();
        for chunk in data.chunks(MAX_IOVECS) {
            fill_iovecs(&mut self.iovecs, chunk);
            let call = |left: &[iovec], done| call(file, left, offset + done, flags);
            drive(&mut self.iovecs, call, offset, done)?;
        }
        Ok(())
    }
}

/// Makes `iovecs` name `data`, which is at most [`MAX_IOVECS`] slices.
#[inline]
pub(super) fn fill_iovecs(iovecs: &mut Vec<iovec>, data: &[Slice<'_>]) {
    iovecs.clear();
    iovecs.extend(data.iter().map(|slice| iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }));
}

/// Makes system calls until all of `left` is moved, to or from `offset` on. `done` counts
/// all bytes of the request.
fn drive(
    mut left: &mut [iovec],
    call: impl Fn(&[iovec], u64) -> io::Result<usize>,
    offset: u64,
    done: &mut u64,
) -> Result<(), ExecuteError> {
    while !left.is_empty() {
        match call(left, *done) {
            Ok(0) => return Err(ExecuteError::EndOfFile(offset + *done)),
            Ok(n) => {
                *done += n as u64;
                left = advance(left, n);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ExecuteError::Io(e)),
        }
    }
    Ok(())
}

/// What is left of `iovecs` after `n` bytes.
fn advance(iovecs: &mut [iovec], mut n: usize) -> &mut [iovec] {
    let whole = iovecs
        .iter()
        .take_while(|iovec| {
            let whole = n >= iovec.iov_len;
            n -= if whole { iovec.iov_len } else { 0 };
            whole
        })
        .count();
    let left = &mut iovecs[whole..];
    if let Some(first) = left.first_mut() {
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(n).cast();
        first.iov_len -= n;
    }
    left
}

/// Reads into guest memory. The callers' iovecs name parts of slices of it, which they
/// borrow until after the call.
fn preadv2(file: &File, to: &[iovec], offset: u64, _flags: c_int) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    // SAFETY: see above. Guest memory is shared with the guest, so it is never behind a
    // Rust reference that these stores could invalidate. The count is at most MAX_IOVECS.
    let n = unsafe {
        match to {
            // Spares the kernel a look at the iovec, and libc what makes its function a
            // place where a thread can be cancelled.
            [one] => {
                libc::syscall(libc::SYS_pread64, fd, one.iov_base, one.iov_len, offset) as isize
            }
            _ => libc::preadv2(fd, to.as_ptr(), to.len() as c_int, offset as i64, 0),
        }
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

fn pwritev2(file: &File, from: &[iovec], offset: u64, flags: c_int) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    // SAFETY: as for `preadv2`; the kernel only reads through these.
    let n = unsafe {
        match from {
            [one] if flags == 0 => {
                libc::syscall(libc::SYS_pwrite64, fd, one.iov_base, one.iov_len, offset) as isize
            }
            _ => libc::pwritev2(fd, from.as_ptr(), from.len() as c_int, offset as i64, flags),
        }
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::super::memory::Memory;

    fn disk(bytes: u64) -> Disk {
        let mut file = tempfile::tempfile().expect("temporary file");
        let content: Vec<u8> = (0..bytes).map(|i| (i / 512) as u8).collect();
        file.write_all(&content).expect("fill");
        let mut id = [0; ID_BYTES];
        id[..5].copy_from_slice(b"disk0");
        Disk {
            file,
            size: bytes,
            block_size: 4096,
            read_only: false,
            id: id.into(),
            direct: None,
            overlay: None,
        }
    }

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory")
    }

    fn slices<'m>(memory: &'m Memory, parts: &[(u64, usize)]) -> Vec<Slice<'m>> {
        parts
            .iter()
            .map(|(at, len)| {
                GuestMemoryBackend::get_slice(memory, GuestAddress(*at), *len).expect("slice")
            })
            .collect()
    }

    #[test]
    fn data_is_scattered_and_gathered() {
        let (disk, memory) = (disk(8192), memory());
        let mut executor = Executor::new(false);
        // Parts that end inside sectors, more of them than one call takes.
        let parts: Vec<(u64, usize)> = (0..1100u64).map(|i| (i * 16, 3)).collect();
        let (to, mut filled) = (slices(&memory, &parts), 0);
        executor.execute(&disk, Operation::Read(512), &to, &[], &mut filled).expect("read");
        assert_eq!(filled, 3300);
        let last: u8 = memory.read_obj(GuestAddress(1099 * 16 + 2)).expect("byte");
        assert_eq!(last, ((512 + 3299) / 512) as u8);

        executor.execute(&disk, Operation::Write(4096), &to, &[], &mut 0).expect("write");
        let (mut a, mut b) = (vec![0; 3300], vec![0; 3300]);
        disk.file.read_exact_at(&mut a, 512).expect("read");
        disk.file.read_exact_at(&mut b, 4096).expect("read");
        assert_eq!(a, b);
    }

    #[test]
    fn short_transfers_go_on_where_they_stopped() {
        let (disk, memory) = (disk(8192), memory());
        let to = slices(&memory, &[(0, 100), (1000, 200), (5000, 300)]);
        let calls = std::cell::Cell::new(0);
        // A kernel that is interrupted now and then, and moves at most 70 bytes a call.
        let stingy = |file: &File, to: &[iovec], at: u64, flags: c_int| {
            calls.set(calls.get() + 1);
            if calls.get() % 3 == 0 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let first = iovec { iov_len: to[0].iov_len.min(70), ..to[0] };
            preadv2(file, &[first], at, flags)
        };
        let mut done = 0;
        Executor::new(false).transfer(&disk.file, &to, 300, &mut done, stingy).expect("read");
        assert_eq!(done, 600);
        assert!(calls.get() > 10);
        let mut want = vec![0; 600];
        disk.file.read_exact_at(&mut want, 300).expect("read");
        let mut got = Vec::new();
        for slice in &to {
            let mut part = vec![0; slice.len()];
            slice.copy_to(&mut part);
            got.extend(part);
        }
        assert_eq!(got, want);
    }

    #[test]
    fn writes_are_durable_where_the_driver_cannot_flush() {
        let (disk, memory) = (disk(8192), memory());
        let from = slices(&memory, &[(0, 512)]);
        for (write_through, want) in [(false, 0), (true, libc::RWF_DSYNC)] {
            let seen = |file: &File, from: &[iovec], at: u64, flags: c_int| {
                assert_eq!(flags, want);
                pwritev2(file, from, at, flags)
            };
            Executor::new(write_through)
                .transfer(&disk.file, &from, 0, &mut 0, seen)
                .expect("write");
        }
    }

    #[test]
    fn a_file_that_shrank_is_an_error_not_zeros() {
        let (disk, memory) = (disk(8192), memory());
        disk.file.set_len(5000).expect("truncate");
        let (to, mut filled) = (slices(&memory, &[(0, 4096)]), 0);
        let mut executor = Executor::new(false);
        let error = executor
            .execute(&disk, Operation::Read(4096), &to, &[], &mut filled)
            .expect_err("short");
        assert!(matches!(error, ExecuteError::EndOfFile(5000)), "{error}");
        assert_eq!(filled, 904);
    }

    #[test]
    fn a_failing_system_call_is_reported() {
        let memory = memory();
        let file = File::open("/dev/null").expect("open");
        let disk = Disk {
            file,
            size: 512,
            block_size: 4096,
            read_only: false,
            id: Default::default(),
            direct: None,
            overlay: None,
        };
        let from = slices(&memory, &[(0, 512)]);
        let error = Executor::new(false)
            .execute(&disk, Operation::Write(0), &from, &[], &mut 0)
            .expect_err("read-only fd");
        assert!(matches!(error, ExecuteError::Io(_)), "{error}");
    }

    #[test]
    fn the_id_fills_what_there_is() {
        let (disk, memory) = (disk(512), memory());
        for (parts, want) in
            [(&[(0, 20)][..], 20), (&[(0, 3), (3, 2)], 5), (&[(0, 3), (3, 40)], 20)]
        {
            memory.write_slice(&[0xee; 64], GuestAddress(0)).expect("clear");
            let mut filled = 0;
            Executor::new(false)
                .execute(&disk, Operation::GetId, &slices(&memory, parts), &[], &mut filled)
                .expect("id");
            assert_eq!(filled, want);
            let mut got = [0; 24];
            memory.read_slice(&mut got, GuestAddress(0)).expect("read");
            assert_eq!(got[..5], *b"disk0");
            assert_eq!(got[5], if want > 5 { 0 } else { 0xee });
            assert_eq!(got[20..], [0xee; 4]);
        }
    }
}
