//! The CPUID table: what KVM supports, plus who this vCPU is.
//!
//! The topology is one package with one thread per core: APIC ids are the vCPU
//! indices, the last-level cache is shared by all, the inner ones by none.
//! Every place a kernel may look says the same (Intel SDM vol. 2, CPUID; AMD APM
//! vol. 3, appendix E): leaves 1, 4, 0xb and 0x1f, 0x8000_0008, 0x8000_001d and
//! 0x8000_001e.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The processor's name, in leaves 0x8000_0002 to 0x8000_0004, which KVM leaves
/// empty. The host's own would tell guests apart by where they run.
const BRAND: &[u8; 48] = b"Cellblock virtual processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const EXT_ECX_CMP_LEGACY: u32 = 1 << 1;

/// `base` made the table of vCPU `id` of `cpus`.
pub fn personal(base: &CpuId, id: u8, cpus: u8, deadline_timer: bool) -> CpuId {
    let topology = Topology::new(id, cpus);
    let amd = is_amd(base);
    let mut entries = Vec::with_capacity(base.as_slice().len() + 9);
    let mut extended_leaves = 0; // a mask: bit 0 for 0xb, bit 1 for 0x1f
    let max = base.as_slice().iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    for entry in base.as_slice() {
        let mut entry = *entry;
        match entry.function {
            1 => {
                let logical = u32::from(cpus).next_power_of_two();
                entry.ebx = entry.ebx & 0xffff | logical << 16 | topology.id << 24;
                entry.ecx |= ECX_HYPERVISOR;
                set(&mut entry.ecx, ECX_TSC_DEADLINE, deadline_timer);
                set(&mut entry.edx, EDX_HTT, cpus > 1);
            }
            4 => topology.cache(&mut entry, true),
            0xb => {
                extended_leaves |= 1;
                continue; // rebuilt below
            }
            0x1f => {
                extended_leaves |= 2;
                continue;
            }
            0x8000_0001 => set(&mut entry.ecx, EXT_ECX_CMP_LEGACY, amd && cpus > 1),
            0x8000_0002..=0x8000_0004 => continue, // rebuilt below
            0x8000_0008 if amd => entry.ecx = topology.bits << 12 | (topology.cpus - 1),
            0x8000_001d => topology.cache(&mut entry, false),
            0x8000_001e => {
                entry.eax = topology.id;
                entry.ebx = topology.id; // core id, one thread each
                entry.ecx = 0; // node 0 of one
                entry.edx = 0;
            }
            _ => {}
        }
        entries.push(entry);
    }
    if max >= 0xb || extended_leaves & 1 != 0 {
        topology.extended(&mut entries, 0xb);
    }
    if extended_leaves & 2 != 0 {
        topology.extended(&mut entries, 0x1f);
    }
    entries.extend((0x8000_0002..).zip(BRAND.chunks_exact(16)).map(brand));
    CpuId::from_entries(&entries).expect("KVM's table and a few more stay below the limit")
}

fn brand((function, text): (u32, &[u8])) -> kvm_cpuid_entry2 {
    let word = |n: usize| u32::from_le_bytes([text[n], text[n + 1], text[n + 2], text[n + 3]]);
    let (eax, ebx, ecx, edx) = (word(0), word(4), word(8), word(12));
    kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

fn is_amd(base: &CpuId) -> bool {
    let vendor = base.as_slice().iter().find(|e| e.function == 0);
    vendor.is_some_and(|e| {
        e.ebx == u32::from_le_bytes(*b"Auth") || e.ebx == u32::from_le_bytes(*b"Hygo")
    })
}

struct Topology {
    id: u32,
    cpus: u32,
    /// Width of the core part of an APIC id.
    bits: u32,
}

impl Topology {
    fn new(id: u8, cpus: u8) -> Topology {
        let cpus = u32::from(cpus.max(1));
        Topology { id: u32::from(id), cpus, bits: cpus.next_power_of_two().trailing_zeros() }
    }

    /// Sets who shares a cache (leaves 4 and 0x8000_001d have the same layout;
    /// Intel's also counts the cores of the package).
    fn cache(&self, entry: &mut kvm_cpuid_entry2, count_cores: bool) {
        const TYPE_MASK: u32 = 0x1f;
        const SHARING: u32 = 0xfff << 14;
        const CORES: u32 = 0x3f << 26;
        if entry.eax & TYPE_MASK == 0 {
            return; // the list's end
        }
        let last_level = (entry.eax >> 5) & 7 >= 3;
        let sharers = if last_level { self.cpus } else { 1 };
        entry.eax = entry.eax & !SHARING | (sharers - 1) << 14;
        if count_cores {
            let ids = 1 << self.bits; // addressable ids, a power of two
            entry.eax = entry.eax & !CORES | (u32::min(ids, 64) - 1) << 26;
        }
    }

    /// Leaf 0xb or 0x1f: a thread level, a core level, the end.
    fn extended(&self, entries: &mut Vec<kvm_cpuid_entry2>, function: u32) {
        const THREADS: u32 = 1 << 8;
        const CORES: u32 = 2 << 8;
        for (index, eax, ebx, level) in
            [(0, 0, 1, THREADS), (1, self.bits, self.cpus, CORES), (2, 0, 0, 0)]
        {
            entries.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx: level | index,
                edx: self.id,
                ..Default::default()
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn base() -> CpuId {
        let amd = u32::from_le_bytes(*b"Auth");
        CpuId::from_entries(&[
            entry(0, 0, [0x1f, amd, 0, 0]),
            entry(1, 0, [0, 0x0510_0800, ECX_TSC_DEADLINE, EDX_HTT]),
            entry(4, 0, [0x1fff_c121, 1, 2, 3]), // L1
            entry(4, 3, [0x1fff_c163, 1, 2, 3]), // L3
            entry(4, 4, [0, 0, 0, 0]),
            entry(0xb, 0, [0, 0, 0, 77]),
            entry(0x1f, 0, [0, 0, 0, 77]),
            entry(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, 0, 0]),
            entry(0x8000_0008, 0, [0x3030, 0, 0xffff, 0]),
            entry(0x8000_001e, 0, [9, 9, 9, 9]),
        ])
        .unwrap()
    }

    fn get(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_leaf_tells_the_same_topology() {
        let table = personal(&base(), 5, 6, true);
        let one = get(&table, 1, 0);
        assert_eq!(one.ebx, 5 << 24 | 8 << 16 | 0x0800);
        assert_eq!(one.edx & EDX_HTT, EDX_HTT);
        assert_eq!(one.ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE);
        for leaf in [0xb, 0x1f] {
            assert_eq!((get(&table, leaf, 0).eax, get(&table, leaf, 0).ebx), (0, 1));
            assert_eq!((get(&table, leaf, 1).eax, get(&table, leaf, 1).ebx), (3, 6));
            assert_eq!(get(&table, leaf, 1).ecx, 0x201);
            assert_eq!(get(&table, leaf, 1).edx, 5);
            assert_eq!(get(&table, leaf, 2).ecx, 2);
            assert_eq!(table.as_slice().iter().filter(|e| e.function == leaf).count(), 3);
        }
        assert_eq!(get(&table, 0x8000_0008, 0).ecx, 3 << 12 | 5);
        assert_eq!(get(&table, 0x8000_001e, 0).eax, 5);
        assert_eq!(get(&table, 0x8000_001e, 0).ebx, 5);
        assert_eq!(get(&table, 0x8000_0001, 0).ecx, EXT_ECX_CMP_LEGACY);
    }

    #[test]
    fn caches_are_shared_at_the_last_level_only() {
        let table = personal(&base(), 0, 6, true);
        let sharing = |index| (get(&table, 4, index).eax >> 14 & 0xfff) + 1;
        assert_eq!((sharing(0), sharing(3)), (1, 6));
        assert_eq!((get(&table, 4, 0).eax >> 26) + 1, 8);
        assert_eq!(get(&table, 4, 4).eax, 0);
    }

    #[test]
    fn a_single_cpu_has_no_siblings() {
        let table = personal(&base(), 0, 1, false);
        assert_eq!(get(&table, 1, 0).edx & EDX_HTT, 0);
        assert_eq!(get(&table, 1, 0).ecx & ECX_TSC_DEADLINE, 0);
        assert_eq!(get(&table, 0xb, 1).eax, 0);
        assert_eq!(get(&table, 0x8000_0008, 0).ecx, 0);
        assert_eq!(get(&table, 0x8000_0001, 0).ecx, 0);
    }

    #[test]
    fn the_processor_has_a_name() {
        let table = personal(&base(), 0, 1, true);
        let name: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .map(|leaf| get(&table, leaf, 0))
            .flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx])
            .flat_map(u32::to_le_bytes)
            .collect();
        assert_eq!(name, BRAND);
    }

    #[test]
    fn kvm_leaves_pass_through() {
        let table = personal(&base(), 1, 2, true);
        assert_eq!(get(&table, 0x4000_0000, 0).ebx, 0x4b4d_564b);
    }
}
