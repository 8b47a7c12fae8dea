//! vCPUs in the state a boot protocol expects.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::boot::Entry;
use super::kvm::{KvmError, Machine};
use super::memory::GuestRam;

/// A vCPU that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// It could not be made.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A request failed.
    #[error("{what} of vCPU {vcpu}")]
    Request {
        /// Which vCPU.
        vcpu: u8,
        /// What was being done.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Tables in guest memory.
    #[error("writing the boot page tables")]
    Tables(#[from] vm_memory::GuestMemoryError),
}

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000;

/// Makes and sets up all vCPUs; the first starts at `entry`, the others wait for SIPI.
pub fn create_all(
    machine: &Machine,
    ram: &GuestRam,
    cpus: u8,
    entry: &Entry,
) -> Result<Vec<VcpuFd>, CpuError> {
    let supported = machine
        .kvm()
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| CpuError::Request { vcpu: 0, what: "reading CPUID", source })?;
    write_tables(ram)?;
    (0..cpus)
        .map(|id| {
            let vcpu = machine.create_vcpu(u64::from(id))?;
            configure(&vcpu, id, cpus, &supported, (id == 0).then_some(entry)).map_err(
                |(what, source)| CpuError::Request { vcpu: id, what, source },
            )?;
            Ok(vcpu)
        })
        .collect()
}

type Failed = (&'static str, kvm_ioctls::Error);

fn configure(
    vcpu: &VcpuFd,
    id: u8,
    cpus: u8,
    supported: &CpuId,
    entry: Option<&Entry>,
) -> Result<(), Failed> {
    let mut cpuid = supported.clone();
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => leaf.ebx = leaf.ebx & 0xffff | u32::from(cpus) << 16 | u32::from(id) << 24,
            0xb | 0x1f => leaf.edx = u32::from(id),
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid).map_err(|e| ("setting CPUID", e))?;
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let msrs = Msrs::from_entries(&[msr(0x1a0, 1), msr(0x2ff, 1 << 11 | 6)]).expect("two entries");
    vcpu.set_msrs(&msrs).map_err(|e| ("setting MSRs", e))?;
    let mut lapic = vcpu.get_lapic().map_err(|e| ("reading the local APIC", e))?;
    for (offset, mode) in [(0x350, 7u8), (0x360, 4)] {
        lapic.regs[offset + 1] = mode as _;
    }
    vcpu.set_lapic(&lapic).map_err(|e| ("setting the local APIC", e))?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(|e| ("setting the FPU", e))?;
    if let Some(entry) = entry {
        start_at(vcpu, entry)?;
    }
    Ok(())
}

fn start_at(vcpu: &VcpuFd, entry: &Entry) -> Result<(), Failed> {
    let mut sregs = vcpu.get_sregs().map_err(|e| ("reading system registers", e))?;
    let segment = |selector, type_, long: bool| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        l: long.into(),
        db: (!long).into(),
        ..Default::default()
    };
    let long = matches!(entry, Entry::Linux64 { .. });
    sregs.cs = segment(0x10, 0xb, long);
    let data = segment(0x18, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x20, type_: 0xb, present: 1, ..Default::default() };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = 1 | 1 << 4;
    sregs.cr4 = 0;
    sregs.efer = 0;
    if long {
        sregs.cr0 |= 1 << 31;
        sregs.cr3 = PML4;
        sregs.cr4 = 1 << 5;
        sregs.efer = 1 << 8 | 1 << 10;
    }
    vcpu.set_sregs(&sregs).map_err(|e| ("setting system registers", e))?;
    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    match *entry {
        Entry::Linux64 { rip, zero_page } => (regs.rip, regs.rsi) = (rip, zero_page),
        Entry::Pvh { rip, start_info } => (regs.rip, regs.rbx) = (rip, start_info),
    }
    vcpu.set_regs(&regs).map_err(|e| ("setting registers", e))
}

fn write_tables(ram: &GuestRam) -> Result<(), CpuError> {
    let gdt: [u64; 5] =
        [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    for (n, entry) in gdt.iter().enumerate() {
        ram.memory().write_obj(*entry, GuestAddress(GDT + n as u64 * 8))?;
    }
    ram.memory().write_obj(PDPT | 3, GuestAddress(PML4))?;
    ram.memory().write_obj(PD | 3, GuestAddress(PDPT))?;
    for n in 0..512u64 {
        ram.memory().write_obj(n << 21 | 0x83, GuestAddress(PD + n * 8))?;
    }
    Ok(())
}
