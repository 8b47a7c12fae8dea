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

use super::{StateError, compat, msrs, raw};

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
    ///
    /// # Errors
    /// [`StateError::Host`] where its TSC cannot run as this one's did.
    pub fn identify(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| StateError::Malformed("more CPUID entries than there can be"))?;
        vcpu.set_cpuid2(&cpuid).map_err(step("setting a vCPU's CPUID"))?;
        let here = vcpu.get_tsc_khz().map_err(step("reading a vCPU's TSC frequency"))?;
        compat::tsc(self.tsc_khz, here, || vcpu.set_tsc_khz(self.tsc_khz).is_ok())
            .map_err(StateError::Host)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::state::compat::Host;
    use crate::vm::cpu::CpuModel;
    use crate::vm::kvm::Machine;
    use crate::vm::memory::GuestRam;

    const CR4_OSFXSR: u64 = 1 << 9;
    const CR4_OSXSAVE: u64 = 1 << 18;
    /// XCR0: x87, SSE, AVX.
    const XCR0: u64 = 7;
    /// Where the standard format of XSAVE has the lower and the upper halves of YMM0.
    const XMM: usize = 160;
    const YMM_HIGH: usize = 576;
    /// XSTATE_BV, which parts are in use.
    const IN_USE: usize = 512;

    fn machine() -> (GuestRam, Machine, Host, CpuModel) {
        let ram = GuestRam::new(32 << 20).unwrap();
        let machine = Machine::new(&ram).unwrap();
        let model = CpuModel::new(machine.kvm(), 1).unwrap();
        let host = Host::new(machine.kvm(), &model).unwrap();
        (ram, machine, host, model)
    }

    /// All sixteen vector registers, in full width, go from one machine to another.
    #[test]
    fn vector_registers_go_along() {
        let (_ram, machine, host, model) = machine();
        let facts = host.facts();
        let vcpu = machine.create_vcpu(0).unwrap();
        model.configure(&vcpu, 0, None).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cr4 |= CR4_OSFXSR | CR4_OSXSAVE;
        vcpu.set_sregs(&sregs).unwrap();
        let mut xcrs = vcpu.get_xcrs().unwrap();
        (xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) = (1, 0, XCR0);
        vcpu.set_xcrs(&xcrs).unwrap();
        let mut area = raw::xsave(&vcpu, facts.xsave_size).unwrap();
        for (n, byte) in area[XMM..XMM + 256].iter_mut().enumerate() {
            *byte = n as u8;
        }
        for (n, byte) in area[YMM_HIGH..YMM_HIGH + 256].iter_mut().enumerate() {
            *byte = !(n as u8);
        }
        area[IN_USE] |= XCR0 as u8;
        raw::set_xsave(&vcpu, &area, facts.xsave_size).unwrap();

        let saved = capture(0, &vcpu, &facts).unwrap();
        assert_eq!(saved.xsave[XMM..XMM + 256], area[XMM..XMM + 256]);
        let (_ram, other, _, _) = self::machine();
        let vcpu = other.create_vcpu(0).unwrap();
        saved.identify(&vcpu).unwrap();
        saved.load(&vcpu, &facts, saved.tsc_offset).unwrap();
        let again = capture(0, &vcpu, &facts).unwrap();
        assert_eq!(again.xsave[XMM..XMM + 256], area[XMM..XMM + 256]);
        assert_eq!(again.xsave[YMM_HIGH..YMM_HIGH + 256], area[YMM_HIGH..YMM_HIGH + 256]);
        assert_eq!(again.xcrs.xcrs[0].value, XCR0);
        assert_eq!((again.regs, again.sregs.cr4), (saved.regs, saved.sregs.cr4));
        assert_eq!(again.cpuid, saved.cpuid);
        // Clocks go on.
        let moves = |index: u32| (0x10..=0x11).contains(&index) || index == 0x6e0;
        let fixed = |state: &VcpuState| {
            state.msrs.iter().copied().filter(|(index, _)| !moves(*index)).collect::<Vec<_>>()
        };
        assert_eq!(fixed(&again), fixed(&saved));
    }

    /// The TSC runs as it did, or its vCPU is refused; and never are both passed over.
    #[test]
    fn a_tsc_of_another_frequency_is_set_or_refused() {
        let (_ram, machine, host, model) = machine();
        let vcpu = machine.create_vcpu(0).unwrap();
        model.configure(&vcpu, 0, None).unwrap();
        let saved = capture(0, &vcpu, &host.facts()).unwrap();
        let slow = VcpuState { tsc_khz: saved.tsc_khz / 2, ..saved.clone() };
        let (_ram, other, _, _) = self::machine();
        let vcpu = other.create_vcpu(0).unwrap();
        match slow.identify(&vcpu) {
            Ok(()) => assert_eq!(vcpu.get_tsc_khz().unwrap(), slow.tsc_khz),
            Err(error) => {
                let text = error.to_string();
                assert!(matches!(error, StateError::Host(_)), "{text}");
                for khz in [saved.tsc_khz, slow.tsc_khz] {
                    assert!(text.contains(&khz.to_string()), "{text}");
                }
            }
        }
        saved.identify(&other.create_vcpu(1).unwrap()).unwrap();
    }

    /// A register that this host's KVM refuses with that value is named.
    #[test]
    fn a_refused_register_is_named() {
        let (_ram, machine, host, model) = machine();
        let vcpu = machine.create_vcpu(0).unwrap();
        model.configure(&vcpu, 0, None).unwrap();
        let mut saved = capture(0, &vcpu, &host.facts()).unwrap();
        saved.msrs.push((0xdead_beef, 1));
        let error = saved.load(&vcpu, &host.facts(), saved.tsc_offset).unwrap_err();
        assert!(error.to_string().contains("0xdeadbeef"), "{error}");
        let short = VcpuState { xsave: vec![0; 64], ..capture(0, &vcpu, &host.facts()).unwrap() };
        assert!(short.load(&vcpu, &host.facts(), None).is_err());
    }
}
