//! vCPUs: events, and lists of state.
//!
//! A vCPU is driven by one thread at a time, as the header says, so that what belongs to its
//! event needs no lock.

use cellblock_plugin_api::Event;
use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use libc::c_int;

use crate::guard::{fill, guard, input, inputs, output};
use crate::handles::CrosvmVcpu;
use crate::layout::{HypervCall, HypervSynic, IoAccess, Payload, VcpuEvent, space_number};

const INIT: u32 = 0;
const IO_ACCESS: u32 = 1;
const PAUSED: u32 = 2;
const HYPERV_HCALL: u32 = 3;
const HYPERV_SYNIC: u32 = 4;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_vcpu_wait(v: *mut CrosvmVcpu, out: *mut VcpuEvent) -> c_int {
    guard(|| {
        let (v, out) = (input(v)?, output(out)?);
        *out = loop {
            if let Some(event) = event(v, v.vcpu.wait()?)? {
                break event;
            }
        };
        Ok(0)
    })
}

/// None for events that the C interface does not have: the vCPU goes on.
///
/// # Safety
/// No other thread is in a call for `v`: what the last event left in its cells is replaced.
unsafe fn event(v: &CrosvmVcpu, event: Event) -> crate::guard::Result<Option<VcpuEvent>> {
    // SAFETY: by the caller's word no other thread is in a call for it.
    unsafe { *v.in_call.get() = false };
    let mut payload = Payload { reserved: [0; 8] };
    let kind = match event {
        Event::Init => INIT,
        Event::Access(access) => {
            let data = if access.no_resume {
                let place = &mut *v.data.get();
                place.clear();
                place.extend_from_slice(&access.data);
                place.as_mut_ptr()
            } else {
                v.vcpu.data_address()
            };
            payload.io_access = IoAccess {
                address_space: space_number(access.space),
                _padding: 0,
                address: access.address,
                data,
                length: access.data.len() as u32,
                is_write: access.is_write.into(),
                no_resume: access.no_resume.into(),
            };
            IO_ACCESS
        }
        Event::Paused { user } => {
            payload.user = user as *mut _;
            PAUSED
        }
        Event::HypervCall { input, params } => {
            *v.result.get() = 0;
            *v.in_call.get() = true;
            payload.hyperv_call = HypervCall { input, result: v.result.get(), params };
            HYPERV_HCALL
        }
        Event::HypervSynic { msr, control, evt_page, msg_page } => {
            payload.hyperv_synic = HypervSynic { msr, _reserved: 0, control, evt_page, msg_page };
            HYPERV_SYNIC
        }
        Event::Debug { .. } | Event::Watched(_) => {
            v.vcpu.resume()?;
            return Ok(None);
        }
    };
    Ok(Some(VcpuEvent { kind, _padding: 0, payload }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_vcpu_resume(v: *mut CrosvmVcpu) -> c_int {
    guard(|| {
        let v = input(v)?;
        if std::mem::take(&mut *v.in_call.get()) {
            v.vcpu.set_hypercall_result(*v.result.get())?;
        }
        v.vcpu.resume()?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_vcpu_get_msrs(
    v: *mut CrosvmVcpu,
    count: u32,
    entries: *mut kvm_msr_entry,
    out_count: *mut u32,
) -> c_int {
    guard(|| {
        let (v, out_count) = (input(v)?, output(out_count)?);
        let indices: Vec<u32> = inputs(entries, count)?.iter().map(|entry| entry.index).collect();
        let mut found = v.vcpu.msrs(&indices)?;
        found.truncate(indices.len());
        *out_count = 0;
        fill(&found, count, entries, out_count)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_vcpu_set_msrs(
    v: *mut CrosvmVcpu,
    count: u32,
    entries: *const kvm_msr_entry,
) -> c_int {
    guard(|| {
        input(v)?.vcpu.set_msrs(inputs(entries, count)?)?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_vcpu_set_cpuid(
    v: *mut CrosvmVcpu,
    count: u32,
    entries: *const kvm_cpuid_entry2,
) -> c_int {
    guard(|| {
        input(v)?.vcpu.set_cpuid(inputs(entries, count)?)?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_get_hyperv_cpuid(
    v: *mut CrosvmVcpu,
    count: u32,
    entries: *mut kvm_cpuid_entry2,
    out_count: *mut u32,
) -> c_int {
    guard(|| fill(&input(v)?.vcpu.hyperv_cpuid()?, count, entries, out_count))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_vcpu_enable_capability(
    v: *mut CrosvmVcpu,
    capability: u32,
    flags: u32,
    args: *const [u64; 4],
) -> c_int {
    guard(|| {
        let args = args.as_ref().copied().unwrap_or_default();
        input(v)?.vcpu.enable_capability(capability, flags, args)?;
        Ok(0)
    })
}
