//! What is done with a vCPU on a plugin's behalf, on the vCPU's own thread.
#![allow(unsafe_code)] // one ioctl that kvm-ioctls does not have

use std::sync::Arc;

use cellblock_plugin_api::slot::{at, order};
use cellblock_plugin_api::{Plain, Rights};
use kvm_bindings::{
    CpuId, KVM_CAP_HYPERV_SYNIC, KVM_CAP_HYPERV_SYNIC2, KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_MAX_CPUID_ENTRIES, KVMIO, Msrs,
    kvm_cpuid2, kvm_enable_cap, kvm_fpu, kvm_guest_debug, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;
use vmm_sys_util::ioctl::ioctl_with_mut_ptr;
use vmm_sys_util::ioctl_iowr_nr;

use super::session::Session;

ioctl_iowr_nr!(KVM_GET_SUPPORTED_HV_CPUID, KVMIO, 0xc1, kvm_cpuid2);

/// The most MSRs of one ioctl: fewer than 256.
const MSRS: usize = 255;

/// Carries out one order; what it answers.
pub(super) fn carry_out(
    vcpu: &VcpuFd,
    session: &Arc<Session>,
    debugger: &mut Option<Arc<Session>>,
    id: usize,
    number: u32,
    bytes: &[u8],
) -> Result<Vec<u8>, Errno> {
    if !only_looks(number) && session.rights() != Rights::Control {
        return Err(Errno::EPERM);
    }
    match number {
        // These have places of their own in the slot.
        order::GET_REGS => put(session, id, at::REGS, vcpu.get_regs()),
        order::GET_SREGS => put(session, id, at::SREGS, vcpu.get_sregs()),
        order::GET_DEBUGREGS => put(session, id, at::DEBUGREGS, vcpu.get_debug_regs()),
        order::GET_FPU => got(vcpu.get_fpu()),
        order::SET_FPU => set(bytes, |fpu: &kvm_fpu| vcpu.set_fpu(fpu)),
        order::GET_XCRS => got(vcpu.get_xcrs()),
        order::SET_XCRS => set(bytes, |xcrs: &kvm_xcrs| vcpu.set_xcrs(xcrs)),
        order::GET_LAPIC => got(vcpu.get_lapic()),
        order::SET_LAPIC => set(bytes, |lapic: &kvm_lapic_state| vcpu.set_lapic(lapic)),
        order::GET_MP_STATE => got(vcpu.get_mp_state()),
        order::SET_MP_STATE => set(bytes, |state: &kvm_mp_state| vcpu.set_mp_state(*state)),
        order::GET_EVENTS => got(vcpu.get_vcpu_events()),
        order::SET_EVENTS => set(bytes, |events: &kvm_vcpu_events| vcpu.set_vcpu_events(events)),
        order::GET_MSRS => get_msrs(vcpu, &kvm_msr_entry::all_from_bytes(bytes)),
        order::SET_MSRS => set_msrs(vcpu, &kvm_msr_entry::all_from_bytes(bytes)),
        order::SET_CPUID => {
            let table = CpuId::from_entries(&Plain::all_from_bytes(bytes));
            vcpu.set_cpuid2(&table.map_err(|_| Errno::E2BIG)?).map_err(errno)?;
            Ok(Vec::new())
        }
        order::GET_HYPERV_CPUID => hyperv_cpuid(vcpu),
        order::ENABLE_CAP => enable_cap(vcpu, &u64::all_from_bytes(bytes)),
        order::SET_GUEST_DEBUG => {
            let debug = kvm_guest_debug::from_bytes(bytes).ok_or(Errno::EINVAL)?;
            set_guest_debug(vcpu, session, debugger, &debug)
        }
        order::TRANSLATE => {
            let linear = u64::from_bytes(bytes).ok_or(Errno::EINVAL)?;
            let found = vcpu.translate_gva(linear).map_err(errno)?;
            Ok(u64::all_bytes(&[found.physical_address, found.valid.into()]))
        }
        _ => Err(Errno::ENOSYS),
    }
}

/// Whether an order leaves the vCPU as it is. A debugger's steps do not change what it computes,
/// but they are for those who may.
fn only_looks(number: u32) -> bool {
    matches!(
        number,
        order::GET_REGS
            | order::GET_SREGS
            | order::GET_DEBUGREGS
            | order::GET_FPU
            | order::GET_XCRS
            | order::GET_LAPIC
            | order::GET_MP_STATE
            | order::GET_EVENTS
            | order::GET_MSRS
            | order::GET_HYPERV_CPUID
            | order::TRANSLATE
    )
}

pub(super) fn errno(error: kvm_ioctls::Error) -> Errno {
    Errno::from_raw(error.errno())
}

fn put<T: Plain>(
    session: &Session,
    id: usize,
    at: usize,
    result: Result<T, kvm_ioctls::Error>,
) -> Result<Vec<u8>, Errno> {
    session.seat(id).slot().write(at, result.map_err(errno)?.bytes());
    Ok(Vec::new())
}

fn got<T: Plain>(result: Result<T, kvm_ioctls::Error>) -> Result<Vec<u8>, Errno> {
    result.map(|value| value.bytes().to_vec()).map_err(errno)
}

fn set<T: Plain>(
    bytes: &[u8],
    apply: impl FnOnce(&T) -> Result<(), kvm_ioctls::Error>,
) -> Result<Vec<u8>, Errno> {
    apply(&T::from_bytes(bytes).ok_or(Errno::EINVAL)?).map_err(errno)?;
    Ok(Vec::new())
}

/// As many as KVM gives, up to the first it does not.
fn get_msrs(vcpu: &VcpuFd, wanted: &[kvm_msr_entry]) -> Result<Vec<u8>, Errno> {
    let mut answer = Vec::new();
    for chunk in wanted.chunks(MSRS) {
        let mut msrs = Msrs::from_entries(chunk).map_err(|_| Errno::E2BIG)?;
        let count = vcpu.get_msrs(&mut msrs).map_err(errno)?;
        answer.extend(kvm_msr_entry::all_bytes(&msrs.as_slice()[..count.min(chunk.len())]));
        if count < chunk.len() {
            break;
        }
    }
    Ok(answer)
}

/// As many as KVM takes, up to the first it does not: how many that was.
fn set_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<Vec<u8>, Errno> {
    let mut done = 0;
    for chunk in msrs.chunks(MSRS) {
        let count =
            vcpu.set_msrs(&Msrs::from_entries(chunk).map_err(|_| Errno::E2BIG)?).map_err(errno)?;
        done += count as u32;
        if count < chunk.len() {
            break;
        }
    }
    Ok(done.bytes().to_vec())
}

fn hyperv_cpuid(vcpu: &VcpuFd) -> Result<Vec<u8>, Errno> {
    let mut table = CpuId::new(KVM_MAX_CPUID_ENTRIES).map_err(|_| Errno::ENOMEM)?;
    // SAFETY: the structure says how many entries it has room for, and the kernel writes no more.
    let result = unsafe {
        ioctl_with_mut_ptr(vcpu, KVM_GET_SUPPORTED_HV_CPUID(), table.as_mut_fam_struct_ptr())
    };
    Errno::result(result)?;
    Ok(Plain::all_bytes(table.as_slice()))
}

fn enable_cap(vcpu: &VcpuFd, words: &[u64]) -> Result<Vec<u8>, Errno> {
    let [cap, 0, 0, 0, 0, 0] = *words else { return Err(Errno::EINVAL) };
    let cap = u32::try_from(cap).map_err(|_| Errno::EINVAL)?;
    if !matches!(cap, KVM_CAP_HYPERV_SYNIC | KVM_CAP_HYPERV_SYNIC2) {
        return Err(Errno::EINVAL);
    }
    vcpu.enable_cap(&kvm_enable_cap { cap, ..Default::default() }).map_err(errno)?;
    Ok(Vec::new())
}

/// One plugin at a time debugs a vCPU.
fn set_guest_debug(
    vcpu: &VcpuFd,
    session: &Arc<Session>,
    debugger: &mut Option<Arc<Session>>,
    debug: &kvm_guest_debug,
) -> Result<Vec<u8>, Errno> {
    let known = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP;
    if debug.control & !known != 0 {
        return Err(Errno::EINVAL);
    }
    if debugger.as_ref().is_some_and(|other| other.id() != session.id() && !other.has_ended()) {
        return Err(Errno::EBUSY);
    }
    vcpu.set_guest_debug(debug).map_err(errno)?;
    *debugger = (debug.control != 0).then(|| session.clone());
    Ok(Vec::new())
}
