//! Guest memory of a VM that a program is attached to.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::Duration;

use nix::errno::Errno;

use super::vm::{STRANGE, Vm};
use crate::error::{Error, refused};
use crate::types::{MemoryAccess, RamRegion};
use crate::wire::{Answer, Handle, Object, Request};

/// Between two questions whether memory has come.
const WHILE: Duration = Duration::from_millis(2);

/// Guest memory by guest-physical addresses. Every write is told to the VMM, so that snapshots,
/// resets and whoever else asks know of it; with [`Vm::memory`] the program has all of the memfd
/// and the VMM no longer knows what is written.
#[derive(Debug)]
pub struct GuestMemory {
    /// Of its own: writes wait for no other request.
    vm: Vm,
    file: File,
    access: MemoryAccess,
    regions: Vec<RamRegion>,
}

impl Vm {
    /// Guest memory of the VM that is attached to, for reading and, where the VM hands it out so,
    /// for writing.
    ///
    /// # Errors
    /// EPERM where the VM does not hand it out.
    pub fn guest_memory(&self) -> Result<GuestMemory, Error> {
        let vm = self.new_connection()?;
        let (fd, access, regions) = vm.hand_out(true)?;
        Ok(GuestMemory { vm, file: fd.into(), access, regions })
    }

    /// The memfd of guest memory of the VM that is attached to: how it may be used, and what lies
    /// where. Where it may be written to, the VMM does not know from now on what was written: it
    /// takes no snapshots that are differences, and resets compare all of memory.
    ///
    /// # Errors
    /// EPERM where the VM does not hand it out.
    pub fn memory(&self) -> Result<(OwnedFd, MemoryAccess, Vec<RamRegion>), Error> {
        self.hand_out(false)
    }

    fn hand_out(&self, tells: bool) -> Result<(OwnedFd, MemoryAccess, Vec<RamRegion>), Error> {
        loop {
            match self.ask("getting guest memory", &Request::Memory { tells }, &[]) {
                Ok((Answer::Memory { access, regions }, mut fds)) => {
                    return Ok((fds.pop().ok_or(STRANGE)?, access, regions));
                }
                Ok(_) => return Err(STRANGE),
                // A VM that was just restored: some of it is still to come.
                Err(Error::Refused { errno: Errno::EAGAIN, .. }) => sleep(WHILE),
                Err(error) => return Err(error),
            }
        }
    }

    /// Has the pages of the VM's own memory noted that are written from now on, by the guest, by
    /// device processes, by the VMM or by programs that tell of it; or no more.
    ///
    /// # Errors
    /// EPERM without the right to control, ENODATA in a VM without memory of its own.
    pub fn log_memory(&self, on: bool) -> Result<(), Error> {
        self.done("logging what is written", &Request::LogMemory(on))
    }

    /// The pages that were written since the last time: a bit for each, lowest first, in the order
    /// of the memfd. What a disk has written comes once more each time until all devices stand
    /// still, as for a snapshot.
    ///
    /// # Errors
    /// ENOENT where [`Vm::log_memory`] is not on.
    pub fn memory_log(&self) -> Result<Vec<u8>, Error> {
        self.bytes("reading what was written", &Request::MemoryLog)
    }
}

impl GuestMemory {
    /// How it may be used.
    pub fn access(&self) -> MemoryAccess {
        self.access
    }

    /// What lies where.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The memfd, to be read or mapped.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where `length` bytes at guest-physical `address` lie in the memfd, if they are all memory.
    pub fn place(&self, address: u64, length: usize) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let inside = address.checked_sub(region.gpa)?;
            (inside.checked_add(length as u64)? <= region.len).then(|| region.offset + inside)
        })
    }

    /// Reads at guest-physical `address`.
    ///
    /// # Errors
    /// EFAULT where that is not all memory.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Error> {
        const WHAT: &str = "reading guest memory";
        let at = self.place(address, bytes.len()).ok_or_else(|| refused(WHAT)(Errno::EFAULT))?;
        self.file.read_exact_at(bytes, at).map_err(failed(WHAT))
    }

    /// Writes at guest-physical `address`. While the VM stands still for a snapshot or a reset,
    /// this waits: either has all of the write or nothing of it.
    ///
    /// # Errors
    /// EFAULT where that is not all memory, EPERM where it is for reading only.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        const WHAT: &str = "writing guest memory";
        let offset =
            self.place(address, bytes.len()).ok_or_else(|| refused(WHAT)(Errno::EFAULT))?;
        let length = bytes.len() as u64;
        let writing = self.begin(WHAT, offset, length)?;
        let result = self.file.write_all_at(bytes, offset).map_err(failed(WHAT));
        self.vm.done(WHAT, &Request::Destroy(Object::Writing, writing))?;
        result
    }

    fn begin(&self, what: &'static str, offset: u64, length: u64) -> Result<Handle, Error> {
        loop {
            match self.vm.ask(what, &Request::Writing { offset, length }, &[]) {
                Ok((Answer::Handle(handle), _)) => return Ok(handle),
                Ok(_) => return Err(STRANGE),
                Err(Error::Refused { errno: Errno::EAGAIN, .. }) => sleep(WHILE),
                Err(error) => return Err(error),
            }
        }
    }
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |error| refused(what)(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}
