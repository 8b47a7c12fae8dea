//! One vCPU, in the order that KVM wants.
//!
//! | saved | why in this order |
//! |---|---|
//! | MP state | reading it takes up a pending INIT or SIPI, which changes registers |
//! | registers, XSAVE, XCRs, debug registers, local APIC, MSRs | |
//! | events | last: they are what is on its way in |
//!
//! Set in the same order, but for the TSC's offset, which comes before the MSRs, and these
//! after the local APIC, which has to be in the mode that the deadline timer belongs to.

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use super::{StateError, msrs, raw};

/// What capturing and setting a vCPU needs to know of the host.
#[derive(Clone, Debug)]
pub struct HostFacts {
    /// Bytes of the XSAVE area (KVM_CAP_XSAVE2); 0 where KVM does not say.
    pub xsave_size: usize,
    /// The model-specific registers to be saved.
    pub msrs: Vec<u32>,
}

/// Everything KVM knows of one vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// Its index, which is its APIC id as well.
    pub id: u8,
    /// The processor it is.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of its TSC.
    pub tsc_khz: u32,
    /// What is added to the host's TSC.
    pub tsc_offset: Option<u64>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// The XSAVE area.
    pub xsave: Vec<u8>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Model-specific registers, by rising index.
    pub msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

fn step(step: &'static str) -> impl FnOnce(errno::Error) -> StateError {
    move |source| StateError::Kvm { step, source: source.into() }
}

/// Reads a vCPU that does not run.
pub fn capture(id: u8, vcpu: &VcpuFd, host: &HostFacts) -> Result<VcpuState, StateError> {
    let mp_state = vcpu.get_mp_state().map_err(step("reading a vCPU's run state"))?;
    let regs = vcpu.get_regs().map_err(step("reading a vCPU's registers"))?;
    let sregs = vcpu.get_sregs().map_err(step("reading a vCPU's system registers"))?;
    let xsave = raw::xsave(vcpu, host.xsave_size)
        .map_err(|source| StateError::Kvm { step: "reading a vCPU's XSAVE area", source })?;
    let xcrs = vcpu.get_xcrs().map_err(step("reading a vCPU's extended control registers"))?;
    let debug_regs = vcpu.get_debug_regs().map_err(step("reading a vCPU's debug registers"))?;
    let lapic = vcpu.get_lapic().map_err(step("reading a vCPU's local APIC"))?;
    let tsc_offset = raw::tsc_offset(vcpu);
    let tsc_khz = vcpu.get_tsc_khz().map_err(step("reading a vCPU's TSC frequency"))?;
    let cpuid = vcpu
        .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(step("reading a vCPU's CPUID"))?
        .as_slice()
        .to_vec();
    let msrs = msrs::save(vcpu, &host.msrs)?;
    let events = vcpu.get_vcpu_events().map_err(step("reading a vCPU's events"))?;
    Ok(VcpuState {
        id,
        cpuid,
        tsc_khz,
        tsc_offset,
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug_regs,
        lapic,
        msrs,
        events,
    })
}

impl VcpuState {
    /// Makes a new vCPU the processor this one was. Before any other state.
    pub fn identify(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| StateError::Malformed("more CPUID entries than there can be"))?;
        vcpu.set_cpuid2(&cpuid).map_err(step("setting a vCPU's CPUID"))?;
        if self.tsc_khz != 0 && vcpu.get_tsc_khz().is_ok_and(|khz| khz != self.tsc_khz) {
            // Refused where the difference is too small to be worth scaling: see `compat`.
            let _ = vcpu.set_tsc_khz(self.tsc_khz);
        }
        Ok(())
    }

    /// Sets everything else. `tsc_offset` is what the vCPU is to have, where it is known.
    pub fn load(
        &self,
        vcpu: &VcpuFd,
        host: &HostFacts,
        tsc_offset: Option<u64>,
    ) -> Result<(), StateError> {
        vcpu.set_mp_state(self.mp_state).map_err(step("setting a vCPU's run state"))?;
        vcpu.set_regs(&self.regs).map_err(step("setting a vCPU's registers"))?;
        vcpu.set_sregs(&self.sregs).map_err(step("setting a vCPU's system registers"))?;
        // XCR0 says which parts of the XSAVE area count, but KVM takes the area in full.
        raw::set_xsave(vcpu, &self.xsave, host.xsave_size)
            .map_err(|source| StateError::Kvm { step: "setting a vCPU's XSAVE area", source })?;
        vcpu.set_xcrs(&self.xcrs).map_err(step("setting a vCPU's extended control registers"))?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(step("setting a vCPU's debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(step("setting a vCPU's local APIC"))?;
        let by_offset = match tsc_offset {
            Some(offset) => raw::set_tsc_offset(vcpu, offset)
                .map(|()| true)
                .map_err(|source| StateError::Kvm { step: "setting a vCPU's TSC", source })?,
            None => false,
        };
        let msrs: Vec<_> = self
            .msrs
            .iter()
            .copied()
            .filter(|(index, _)| !(by_offset && *index == msrs::IA32_TSC))
            .collect();
        if let Some(index) = msrs::load(vcpu, &msrs)?.first() {
            return Err(StateError::Msr(*index));
        }
        vcpu.set_vcpu_events(&self.events).map_err(step("setting a vCPU's events"))
    }
}
