//! Who takes part in a vCPU's run besides the devices on its buses: plugins.
//!
//! An attendant is given the vCPU on the vCPU's own thread, between two instructions or in the
//! middle of an access, and may keep it for as long as it likes: where it waits, it gives up with
//! [`Outcome::Retry`] as soon as the vCPU is kicked, and is called again once it runs on.
#![allow(unsafe_code)] // writes the union in kvm_run that the exit reason names

use super::exit::{self, Access};
use super::{Space, VcpuThread};
use crate::bus::{Outcome, VmExit};
use kvm_ioctls::VcpuFd;

/// See the module.
pub(crate) trait Attendant: Send {
    /// Whether it wants the vCPU before that enters the guest. On the path of every entry.
    fn wanted(&self) -> bool;

    /// Takes the vCPU, which is between two instructions.
    fn attend(&mut self, vcpu: &mut VcpuFd) -> Outcome;

    /// An access; `None` leaves it to the bus.
    fn access(&mut self, vcpu: &mut VcpuFd, access: &GuestAccess) -> Option<Outcome>;

    /// Another exit that only plugins handle; `None` when nobody does.
    fn exit(&mut self, vcpu: &mut VcpuFd, exit: &SpecialExit) -> Option<Outcome>;
}

/// An exit that means something to plugins only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SpecialExit {
    /// KVM_EXIT_HYPERV of a hypercall.
    HypervCall { input: u64, params: [u64; 2] },
    /// KVM_EXIT_HYPERV of the interrupt controller.
    HypervSynic { msr: u32, control: u64, evt_page: u64, msg_page: u64 },
    /// KVM_EXIT_DEBUG.
    Debug { pc: u64, dr6: u64, dr7: u64 },
}

impl SpecialExit {
    /// What it says when nobody handles it.
    pub(super) fn unhandled(&self) -> VmExit {
        VmExit::Error(format!("an exit nobody handles: {self:x?}"))
    }
}

/// An access with all of its elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestAccess {
    pub(crate) space: Space,
    pub(crate) addr: u64,
    pub(crate) is_write: bool,
    /// Bytes an element.
    pub(crate) size: usize,
    /// Bytes of all elements.
    pub(crate) len: usize,
    access: Access,
}

impl GuestAccess {
    pub(super) fn new(space: Space, access: Access) -> Self {
        let Access { addr, is_write, size, count, .. } = access;
        GuestAccess { space, addr, is_write, size, len: size * count, access }
    }

    /// What the guest writes: as many bytes as `data` has, at most [`GuestAccess::len`].
    pub(crate) fn load(&self, vcpu: &mut VcpuFd, data: &mut [u8]) {
        exit::load_all(vcpu, &self.access, data);
    }

    /// Answers the guest's read.
    pub(crate) fn store(&self, vcpu: &mut VcpuFd, data: &[u8]) {
        exit::store_all(vcpu, &self.access, data);
    }
}

/// What the hypercall at hand returns.
pub(crate) fn set_hypercall_result(vcpu: &mut VcpuFd, result: u64) {
    // Stores into a union: harmless whatever it holds, and it holds the hypercall.
    vcpu.get_kvm_run().__bindgen_anon_1.hyperv.u.hcall.result = result;
}

impl VcpuThread {
    /// Asks the attendant until it is through with an access; `None` leaves it to the bus.
    pub(super) fn attend_access(&mut self, access: &GuestAccess) -> Option<Outcome> {
        self.attendant.as_mut()?.access(&mut self.vcpu, access)
    }

    pub(super) fn attend_exit(&mut self, exit: &SpecialExit) -> Option<Outcome> {
        self.attendant.as_mut()?.exit(&mut self.vcpu, exit)
    }
}
