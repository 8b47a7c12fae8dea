//! Objects: io events, memory, irq events.

use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{EBADF, EINVAL, c_int};

use crate::guard::{Errno, guard, input, output};
use crate::handles::{Crosvm, CrosvmIo, CrosvmIrq, CrosvmMemory};
use crate::layout::space;

const PAGE: u64 = 4096;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_create_io_event(
    c: *mut Crosvm,
    of: u32,
    address: u64,
    length: u32,
    datamatch: *const u8,
    out: *mut *mut CrosvmIo,
) -> c_int {
    guard(|| {
        let (c, out) = (input(c)?, output(out)?);
        if !matches!(length, 0 | 1 | 2 | 4 | 8) {
            return Err(Errno(EINVAL));
        }
        let value = if datamatch.is_null() || length == 0 {
            None
        } else {
            let mut bytes = [0; 8];
            bytes.as_mut_ptr().copy_from_nonoverlapping(datamatch, length as usize);
            Some(u64::from_le_bytes(bytes))
        };
        let event = c.vm.create_io_event(space(of)?, address, length, value)?;
        *out = c.family.hand_out(CrosvmIo(event));
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_destroy_io_event(c: *mut Crosvm, io: *mut *mut CrosvmIo) -> c_int {
    guard(|| {
        let c = input(c)?;
        c.family.take_back(io, |io| c.vm.destroy_io_event(&io.0))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_io_event_fd(io: *mut CrosvmIo) -> c_int {
    guard(|| Ok(input(io)?.0.fd().as_raw_fd()))
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)] // the interface has as many
pub unsafe extern "C" fn crosvm_create_memory(
    c: *mut Crosvm,
    fd: c_int,
    offset: u64,
    length: u64,
    start: u64,
    read_only: u8,
    dirty_log: u8,
    out: *mut *mut CrosvmMemory,
) -> c_int {
    guard(|| {
        let (c, out) = (input(c)?, output(out)?);
        // In this order: what is wrong with the numbers comes before what is with the fd.
        if !offset.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE) {
            return Err(Errno(EINVAL));
        }
        if libc::fcntl(fd, libc::F_GETFD) < 0 {
            return Err(Errno(EBADF));
        }
        let fd = BorrowedFd::borrow_raw(fd);
        let (read_only, dirty_log) = (read_only != 0, dirty_log != 0);
        let memory = c.vm.create_memory(fd, offset, length, start, read_only, dirty_log)?;
        *out = c.family.hand_out(CrosvmMemory(memory));
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_destroy_memory(
    c: *mut Crosvm,
    memory: *mut *mut CrosvmMemory,
) -> c_int {
    guard(|| {
        let c = input(c)?;
        c.family.take_back(memory, |memory| c.vm.destroy_memory(&memory.0))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_memory_get_dirty_log(
    c: *mut Crosvm,
    memory: *mut CrosvmMemory,
    log: *mut u8,
) -> c_int {
    guard(|| {
        let c = input(c)?;
        let memory = c.family.known(memory)?;
        let log: *mut u8 = output(log)?;
        let bytes = c.vm.dirty_log(&memory.0)?;
        let count = bytes.len().min(memory.0.log_bytes());
        log.copy_from_nonoverlapping(bytes.as_ptr(), count);
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_create_irq_event(
    c: *mut Crosvm,
    irq: u32,
    out: *mut *mut CrosvmIrq,
) -> c_int {
    guard(|| {
        let (c, out) = (input(c)?, output(out)?);
        *out = c.family.hand_out(CrosvmIrq(c.vm.create_irq_event(irq)?));
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_destroy_irq_event(
    c: *mut Crosvm,
    irq: *mut *mut CrosvmIrq,
) -> c_int {
    guard(|| {
        let c = input(c)?;
        c.family.take_back(irq, |irq| c.vm.destroy_irq_event(&irq.0))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_irq_event_get_fd(irq: *const CrosvmIrq) -> c_int {
    guard(|| Ok(input(irq)?.0.fd().as_raw_fd()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_irq_event_get_resample_fd(irq: *const CrosvmIrq) -> c_int {
    guard(|| Ok(input(irq)?.0.resample_fd().as_raw_fd()))
}
