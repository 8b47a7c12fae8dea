//! Whether this host can go on where another one stopped.

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use super::{HostFacts, StateError, msrs};
use crate::vm::cpu::CpuModel;

/// What a guest may have come to rely on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// The CPUID table that a boot vCPU of ours gets.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Bytes of the XSAVE area; 0 where KVM does not say.
    pub xsave_size: u32,
    /// Model-specific registers that hold state.
    pub msrs: Vec<u32>,
    /// Frequency of its vCPUs' TSC, in the host of a state. KVM does not tell it without a vCPU:
    /// `tsc` compares it as each gets its identity.
    pub tsc_khz: u32,
    /// Whether a vCPU's TSC can have another frequency than the host's.
    pub tsc_scaling: bool,
    /// Capabilities of KVM, by name, with what KVM says of each.
    pub capabilities: Vec<(String, i32)>,
}

/// Those that a state depends on.
const CAPABILITIES: [(Cap, &str); 6] = [
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
];

impl Host {
    /// This host, as it presents itself to a VM with so many vCPUs.
    pub fn new(kvm: &Kvm, model: &CpuModel) -> Result<Host, StateError> {
        let capability =
            |(cap, name): &(Cap, &str)| (name.to_string(), kvm.check_extension_int(*cap));
        Ok(Host {
            cpuid: model.cpuid(0).as_slice().to_vec(),
            xsave_size: u32::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0),
            msrs: msrs::list(kvm)?,
            tsc_khz: 0,
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            capabilities: CAPABILITIES.iter().map(capability).collect(),
        })
    }

    /// What capturing and setting vCPUs needs to know.
    pub fn facts(&self) -> HostFacts {
        HostFacts { xsave_size: self.xsave_size as usize, msrs: self.msrs.clone() }
    }
}

/// One thing that is not as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The processor is another vendor's.
    Vendor,
    /// Feature bits that are missing: leaf, index, register, bits.
    Cpuid(u32, u32, &'static str, u32),
    /// The XSAVE area has another size: then, here.
    Xsave(u32, u32),
    /// A model-specific register that this host does not have.
    Msr(u32),
    /// The TSC had another frequency, which this host cannot give: then, here, in kHz.
    Tsc(u32, u32),
    /// A capability that is missing or says less: its name, then, here.
    Capability(String, i32, i32),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::Vendor => write!(f, "the processor is another vendor's"),
            Difference::Cpuid(leaf, index, register, bits) => {
                write!(f, "CPUID {leaf:#x}.{index} {register} lacks {bits:#x}")
            }
            Difference::Xsave(then, here) => {
                write!(f, "the XSAVE area has {here} bytes, not {then}")
            }
            Difference::Msr(index) => write!(f, "there is no MSR {index:#x}"),
            Difference::Tsc(then, here) => write!(f, "the TSC runs at {here} kHz, not {then}"),
            Difference::Capability(name, then, here) => {
                write!(f, "{name} is {here:#x}, not {then:#x}")
            }
        }
    }
}

/// This host cannot go on where that of the state was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this host differs from the snapshot's: {}", list(.0))]
pub struct Incompatible(pub Vec<Difference>);

fn list(differences: &[Difference]) -> String {
    const MOST: usize = 8;
    let mut text: Vec<String> = differences.iter().take(MOST).map(ToString::to_string).collect();
    if differences.len() > MOST {
        text.push(format!("and {} more", differences.len() - MOST));
    }
    text.join(", ")
}

/// Leaves whose bits are features, by leaf and index, and which of EAX, EBX, ECX, EDX.
const FEATURES: [(u32, u32, [u32; 4]); 13] = [
    // Without OSXSAVE, which follows the guest's CR4.
    (0x1, 0, [0, 0, !(1 << 27), !0]),
    (0x6, 0, [1 << 2, 0, 0, 0]),
    // Without OSPKE.
    (0x7, 0, [0, !0, !(1 << 4), !0]),
    (0x7, 1, [!0, !0, !0, !0]),
    (0x7, 2, [0, 0, 0, !0]),
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, !0, !0]),
    (0x4000_0001, 0, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0007, 0, [0, 0, 0, !0]),
    (0x8000_0008, 0, [0, !0, 0, 0]),
    (0x8000_000a, 0, [0, 0, 0, !0]),
    (0x8000_0021, 0, [!0, 0, 0, 0]),
];

/// Two clocks that differ by less than this, in millionths, are one: KVM's own tolerance.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Has a vCPU's TSC, which runs at `here` kHz, run as it did `then`: by `set`, which is false where
/// KVM refuses. That is no matter where the two are one clock.
pub(super) fn tsc(then: u32, here: u32, set: impl FnOnce() -> bool) -> Result<(), Incompatible> {
    if then == 0 || then == here || set() {
        return Ok(());
    }
    let apart = u64::from(then.abs_diff(here)) * 1_000_000;
    match apart <= u64::from(here) * TSC_TOLERANCE_PPM {
        true => Ok(()),
        false => Err(Incompatible(vec![Difference::Tsc(then, here)])),
    }
}

/// Compares the host a state is `from` with the one it is to go on at.
pub(super) fn verify(from: &Host, here: &Host) -> Result<(), Incompatible> {
    let mut found = cpuid(&from.cpuid, &here.cpuid);
    if from.xsave_size != here.xsave_size {
        found.push(Difference::Xsave(from.xsave_size, here.xsave_size));
    }
    let missing = from.msrs.iter().filter(|msr| here.msrs.binary_search(msr).is_err());
    found.extend(missing.map(|msr| Difference::Msr(*msr)));
    for (name, then) in &from.capabilities {
        let now = here.capabilities.iter().find(|(other, _)| other == name).map_or(0, |c| c.1);
        // One is a mask of what can be done, the others are numbers.
        if then & !now != 0 && (now == 0 || name == "KVM_CAP_ADJUST_CLOCK") {
            let name = crate::remedy::printable(name);
            found.push(Difference::Capability(name, *then, now));
        }
    }
    if found.is_empty() { Ok(()) } else { Err(Incompatible(found)) }
}

fn cpuid(from: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Vec<Difference> {
    let of = |table: &[kvm_cpuid_entry2], leaf, index| {
        let entry = table.iter().find(|e| e.function == leaf && e.index == index);
        entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    };
    let mut found = Vec::new();
    if of(from, 0, 0)[1..] != of(here, 0, 0)[1..] {
        found.push(Difference::Vendor);
    }
    for (leaf, index, masks) in FEATURES {
        let (then, now) = (of(from, leaf, index), of(here, leaf, index));
        for (n, register) in ["EAX", "EBX", "ECX", "EDX"].into_iter().enumerate() {
            let lost = then[n] & !now[n] & masks[n];
            if lost != 0 {
                found.push(Difference::Cpuid(leaf, index, register, lost));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        let entry = |function, index, regs: [u32; 4]| {
            let [eax, ebx, ecx, edx] = regs;
            kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
        };
        Host {
            cpuid: vec![
                entry(0, 0, [0x1f, 1, 2, 3]),
                entry(1, 0, [5, 6, 1 << 28 | 1 << 27, 7]),
                entry(7, 0, [2, 1 << 5, 0, 0]),
            ],
            xsave_size: 4096,
            msrs: vec![0x10, 0x1b, 0x6e0],
            tsc_khz: 2_600_000,
            tsc_scaling: false,
            capabilities: vec![("KVM_CAP_ADJUST_CLOCK".into(), 0xe), ("KVM_CAP_XCRS".into(), 1)],
        }
    }

    fn differences(change: impl FnOnce(&mut Host)) -> Vec<Difference> {
        let mut here = host();
        change(&mut here);
        verify(&host(), &here).map_or_else(|error| error.0, |()| Vec::new())
    }

    #[test]
    fn every_difference_is_named_and_more_is_fine() {
        assert_eq!(differences(|_| {}), []);
        assert_eq!(differences(|h| h.cpuid[1].ecx &= !(1 << 27)), [], "OSXSAVE is the guest's");
        assert_eq!(differences(|h| h.cpuid[2].ebx |= 0xff00), []);
        assert_eq!(differences(|h| h.msrs.push(0x700)), []);
        let avx = differences(|h| h.cpuid[1].ecx = 0);
        assert_eq!(avx, [Difference::Cpuid(1, 0, "ECX", 1 << 28)]);
        assert_eq!(differences(|h| h.cpuid[0].ebx = 9), [Difference::Vendor]);
        assert_eq!(differences(|h| h.xsave_size = 11008), [Difference::Xsave(4096, 11008)]);
        assert_eq!(differences(|h| h.msrs.retain(|m| *m != 0x1b)), [Difference::Msr(0x1b)]);
        let clock = differences(|h| h.capabilities[0].1 = 2);
        assert_eq!(clock, [Difference::Capability("KVM_CAP_ADJUST_CLOCK".into(), 0xe, 2)]);
        let all = differences(|h| {
            (h.cpuid[0].edx, h.xsave_size) = (0, 0);
            (h.msrs, h.capabilities) = (Vec::new(), Vec::new());
        });
        assert_eq!(all.len(), 1 + 1 + 3 + 2);
        let text = Incompatible(all).to_string();
        assert!(text.contains("no MSR 0x6e0") && text.contains("0 bytes, not 4096"), "{text}");
    }

    #[test]
    fn a_tsc_that_cannot_be_what_it_was_is_refused() {
        let same = |then, here| tsc(then, here, || false);
        // Not asked for where it is that already, or where nothing is known.
        assert_eq!(tsc(2_600_000, 2_600_000, || panic!("set")), Ok(()));
        assert_eq!(tsc(0, 2_600_000, || panic!("set")), Ok(()));
        // KVM can: by scaling, or by catching up.
        assert_eq!(tsc(2_600_000, 2_000_000, || true), Ok(()));
        assert_eq!(same(2_600_000, 2_600_650), Ok(()));
        assert_eq!(same(2_600_650, 2_600_000), Ok(()));
        for (then, here) in [(2_600_000, 2_000_000), (2_600_000, 2_600_700), (2_600_000, 0)] {
            let error = same(then, here).unwrap_err();
            assert_eq!(error.0, [Difference::Tsc(then, here)]);
            assert!(error.to_string().contains(&format!("{here} kHz, not {then}")), "{error}");
        }
    }
}
