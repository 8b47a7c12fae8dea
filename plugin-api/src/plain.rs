//! The kernel's state structures as bytes.
#![allow(unsafe_code)] // reads and writes structures of plain numbers as bytes

use std::ptr;
use std::slice;

/// A structure of numbers without padding the compiler may choose, all of whose bit patterns are
/// values.
///
/// # Safety
/// As the first sentence says.
pub unsafe trait Plain: Copy + Default + Send + 'static {
    /// Its bytes.
    fn bytes(&self) -> &[u8] {
        // SAFETY: no padding, as the trait promises: every byte is initialised.
        unsafe { slice::from_raw_parts(ptr::from_ref(self).cast(), size_of::<Self>()) }
    }

    /// The value these bytes are; `None` where they are too few or too many.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (bytes.len() == size_of::<Self>()).then(|| {
            // SAFETY: as many bytes as the value has, and any of them are a value.
            unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) }
        })
    }

    /// The bytes of all of them, one behind the other.
    fn all_bytes(values: &[Self]) -> Vec<u8> {
        values.iter().flat_map(|value| value.bytes().iter().copied()).collect()
    }

    /// The values these bytes are; a rest that is none is left out.
    fn all_from_bytes(bytes: &[u8]) -> Vec<Self> {
        bytes.chunks_exact(size_of::<Self>()).filter_map(Self::from_bytes).collect()
    }
}

macro_rules! plain {
    ($($name:ident $size:literal),* $(,)?) => { $(
        const _: () = assert!(size_of::<kvm_bindings::$name>() == $size);
        // SAFETY: generated from a C structure of integers (and unions of such) that names its
        // padding; the size is the one the kernel's ABI has.
        unsafe impl Plain for kvm_bindings::$name {}
    )* };
}

plain! {
    kvm_regs 144, kvm_sregs 312, kvm_fpu 416, kvm_debugregs 128, kvm_xcrs 392,
    kvm_lapic_state 1024, kvm_mp_state 4, kvm_vcpu_events 64, kvm_msr_entry 16,
    kvm_cpuid_entry2 40, kvm_pic_state 16, kvm_ioapic_state 216, kvm_pit_state2 112,
    kvm_clock_data 48, kvm_guest_debug 72,
}

// SAFETY: integers.
unsafe impl Plain for u32 {}
// SAFETY: integers.
unsafe impl Plain for u64 {}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{kvm_msr_entry, kvm_regs};

    #[test]
    fn values_survive_their_bytes() {
        let regs = kvm_regs { rax: 1, rflags: 2, ..Default::default() };
        assert_eq!(kvm_regs::from_bytes(regs.bytes()), Some(regs));
        assert_eq!(kvm_regs::from_bytes(&regs.bytes()[1..]), None);
        let msrs = [kvm_msr_entry { index: 7, data: 8, ..Default::default() }; 3];
        let mut bytes = kvm_msr_entry::all_bytes(&msrs);
        bytes.push(0);
        assert_eq!(kvm_msr_entry::all_from_bytes(&bytes), msrs);
    }
}
