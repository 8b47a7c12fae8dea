//! What each vCPU is and how it starts: CPUID, MSRs, local APIC, registers.
//!
//! The boot vCPU starts where the kernel's protocol says; the others wait for its
//! INIT and SIPI, as processors do. KVM's own reset state is relied on for all that
//! is not set here (FPU, debug registers, wait-for-SIPI), and a test holds KVM to it.

mod cpuid;
mod regs;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::boot::Entry;
use super::kvm::{KvmError, step};

pub(super) use regs::write_boot_tables;

/// A vCPU that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// KVM refused a request.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM refused a model-specific register.
    #[error("setting model-specific register {0:#x}: KVM refused it")]
    Msr(u32),
}

/// The processor model of one VM: computed once, applied to each vCPU.
#[derive(Clone, Debug)]
pub struct CpuModel {
    base: CpuId,
    cpus: u8,
    deadline_timer: bool,
}

impl CpuModel {
    /// The host's processor as KVM can present it, as one package of `cpus` cores.
    pub fn new(kvm: &Kvm, cpus: u8) -> Result<CpuModel, CpuError> {
        let base = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(step("asking KVM for its CPUID table"))?;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(CpuModel { base, cpus, deadline_timer })
    }

    /// How many vCPUs the model describes.
    pub fn cpus(&self) -> u8 {
        self.cpus
    }

    /// The CPUID table of vCPU `id`.
    pub fn cpuid(&self, id: u8) -> CpuId {
        cpuid::personal(&self.base, id, self.cpus, self.deadline_timer)
    }

    /// Makes `vcpu` the processor with index (and APIC id) `id`. The boot vCPU, 0,
    /// gets the kernel's `entry`; for the others it is `None`.
    pub fn configure(&self, vcpu: &VcpuFd, id: u8, entry: Option<&Entry>) -> Result<(), CpuError> {
        vcpu.set_cpuid2(&self.cpuid(id)).map_err(step("setting a vCPU's CPUID"))?;
        set_msrs(vcpu)?;
        set_local_interrupts(vcpu)?;
        if let Some(entry) = entry {
            let mut sregs = vcpu.get_sregs().map_err(step("reading a vCPU's system registers"))?;
            regs::system(&mut sregs, entry);
            vcpu.set_sregs(&sregs).map_err(step("setting a vCPU's system registers"))?;
            vcpu.set_regs(&regs::general(entry)).map_err(step("setting a vCPU's registers"))?;
        }
        Ok(())
    }
}

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// The registers firmware would have set; KVM's reset leaves the rest (system call
/// entry points among them) zero already.
const BOOT_MSRS: [(u32, u64); 2] = [
    (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
    (MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
];

fn set_msrs(vcpu: &VcpuFd) -> Result<(), CpuError> {
    let entries =
        BOOT_MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).expect("two entries fit");
    let set = vcpu.set_msrs(&msrs).map_err(step("setting a vCPU's model-specific registers"))?;
    match BOOT_MSRS.get(set) {
        Some((refused, _)) => Err(CpuError::Msr(*refused)),
        None => Ok(()),
    }
}

const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTINT: u32 = 7 << 8;

/// Wires LINT0 to the PIC and LINT1 to NMI, as firmware does.
///
/// On the others than the boot vCPU this is undone by their INIT, but without it
/// they might not get one: KVM looks up destinations in a map of the APICs, which
/// it makes anew when an APIC is set, not when a vCPU is created.
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), CpuError> {
    let mut lapic = vcpu.get_lapic().map_err(step("reading a vCPU's local APIC"))?;
    write_apic(&mut lapic, APIC_LVT0, DELIVER_EXTINT);
    write_apic(&mut lapic, APIC_LVT1, DELIVER_NMI);
    vcpu.set_lapic(&lapic).map_err(step("setting a vCPU's local APIC"))?;
    Ok(())
}

fn write_apic(lapic: &mut kvm_lapic_state, register: usize, value: u32) {
    for (byte, new) in lapic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
        *byte = new as _;
    }
}
