//! Guest memory that a plugin makes, as memory slots of KVM.
#![allow(unsafe_code)] // maps a plugin's memory and hands it to the kernel

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;

use super::orders::errno;
use crate::vm::kvm::{KvmError, Machine};

const PAGE: u64 = 4096;
/// The first memory slot that is not the VMM's own.
const FIRST_SLOT: u32 = 64;

/// Numbers of memory slots.
#[derive(Debug, Default)]
pub(super) struct SlotNumbers {
    used: BTreeSet<u32>,
}

impl SlotNumbers {
    fn take(&mut self) -> u32 {
        let free = (FIRST_SLOT..).find(|slot| !self.used.contains(slot));
        let slot = free.unwrap_or(u32::MAX);
        self.used.insert(slot);
        slot
    }

    fn give_back(&mut self, slot: u32) {
        self.used.remove(&slot);
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) start: u64,
    pub(super) read_only: bool,
    pub(super) dirty_log: bool,
}

/// One piece of memory. [`Slab::remove`] takes it from the guest; a drop alone only unmaps it.
#[derive(Debug)]
pub(super) struct Slab {
    slot: u32,
    base: NonNull<c_void>,
    length: usize,
    dirty_log: bool,
}

// SAFETY: the mapping is not accessed by us, only by the guest and unmapped on drop.
unsafe impl Send for Slab {}

impl Slab {
    /// Makes memory of a memfd, after the checks that the interface has, in its order.
    pub(super) fn create(
        machine: &Machine,
        slots: &mut SlotNumbers,
        fd: BorrowedFd<'_>,
        wanted: &Wanted,
    ) -> Result<Slab, Errno> {
        let Wanted { offset, length, start, .. } = *wanted;
        if !offset.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE) {
            return Err(Errno::EINVAL);
        }
        // EINVAL for what cannot have seals: no memfd.
        let seals = SealFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GET_SEALS)?);
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(Errno::EPERM);
        }
        let end = offset.checked_add(length).ok_or(Errno::EOVERFLOW)?;
        if end > fstat(fd)?.st_size as u64 {
            return Err(Errno::EINVAL);
        }
        let size = NonZeroUsize::new(length as usize).ok_or(Errno::EINVAL)?;
        let at = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let map = |prot| {
            // SAFETY: a new shared mapping at an address of the kernel's choice, of a file that
            // cannot become shorter.
            unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, fd, at) }
        };
        let base = match map(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE) {
            // A memfd that may only be read will do where the guest may only read.
            Err(Errno::EACCES | Errno::EPERM) if wanted.read_only => map(ProtFlags::PROT_READ)?,
            other => other?,
        };
        let slab =
            Slab { slot: slots.take(), base, length: size.get(), dirty_log: wanted.dirty_log };
        let mut flags = 0;
        if wanted.read_only {
            flags |= KVM_MEM_READONLY;
        }
        if wanted.dirty_log {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: slab.slot,
            flags,
            guest_phys_addr: start,
            memory_size: length,
            userspace_addr: base.as_ptr() as u64,
        };
        // SAFETY: the range is the mapping just made, which is unmapped after the slot is removed.
        // KVM refuses what overlaps another slot.
        if let Err(error) = unsafe { machine.vm().set_user_memory_region(region) } {
            slots.give_back(slab.slot);
            return Err(errno(error));
        }
        // KVM's log has all pages in it at first.
        if slab.dirty_log
            && let Err(error) = slab.dirty_log(machine)
        {
            slab.remove(machine, slots)?;
            return Err(error);
        }
        Ok(slab)
    }

    /// Takes the memory away from the guest.
    pub(super) fn remove(self, machine: &Machine, slots: &mut SlotNumbers) -> Result<(), Errno> {
        let none = kvm_userspace_memory_region { slot: self.slot, ..Default::default() };
        // SAFETY: a slot of size zero names no memory.
        unsafe { machine.vm().set_user_memory_region(none) }.map_err(errno)?;
        slots.give_back(self.slot);
        Ok(())
    }

    /// A bit for each page written since the last time.
    pub(super) fn dirty_log(&self, machine: &Machine) -> Result<Vec<u8>, Errno> {
        if !self.dirty_log {
            return Err(Errno::ENOENT);
        }
        let words = machine.take_dirty_slot(self.slot, self.length as u64).map_err(kvm_errno)?;
        let bytes = (self.length as u64 / PAGE).div_ceil(8) as usize;
        Ok(words.iter().flat_map(|word| word.to_le_bytes()).take(bytes).collect())
    }
}

pub(super) fn kvm_errno(error: KvmError) -> Errno {
    match error {
        KvmError::Step { source, .. } => super::requests::io_errno(source),
        _ => Errno::EIO,
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: mapped by `create` with this length. Failure leaves it mapped, which is harmless.
        let _ = unsafe { munmap(self.base, self.length) };
    }
}
