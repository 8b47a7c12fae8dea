//! A mapping of a vCPU's `kvm_run` of our own, beside the one inside `VcpuFd`.
//!
//! A kick writes `immediate_exit` through it. It keeps the page alive for as long as any kicker
//! holds it, whatever becomes of the `VcpuFd`, and it is accessed by atomics only.
#![allow(unsafe_code)] // maps kernel memory that KVM reads while we write

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use std::io;
use std::mem::offset_of;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// `immediate_exit` lies in the first page.
const LEN: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// The first page of `kvm_run`.
#[derive(Debug)]
pub(super) struct RunPage(NonNull<AtomicU8>);

// SAFETY: the page is reached through an atomic only, and unmapped when the owner is dropped.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(super) fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor belongs to `vcpu`, which outlives this function.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe { mmap(None, LEN, prot, MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Self(page.cast()))
    }

    /// Makes the next KVM_RUN return without entering the guest, or not.
    ///
    /// Relaxed: what orders it is the request slot's lock and the signal (see `pause.rs`).
    pub(super) fn set_immediate_exit(&self, on: bool) {
        // SAFETY: inside the page, which is mapped while `self` lives; KVM reads it as one byte.
        let flag = unsafe { self.0.add(offset_of!(kvm_run, immediate_exit)).as_ref() };
        flag.store(on.into(), Ordering::Relaxed);
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; nobody else has the address.
        if let Err(error) = unsafe { munmap(self.0.cast(), LEN.get()) } {
            tracing::error!(%error, "unmapping a vcpu's run page");
        }
    }
}
