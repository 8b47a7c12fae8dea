//! KVM's paravirtual clock, the one a Linux guest would keep time by.
#![allow(unsafe_code)] // a page the hypervisor writes, and CPUID

use core::arch::x86_64::__cpuid;
use core::ptr;
use core::sync::atomic::{Ordering, fence};

use crate::arch::cpu;
use crate::heap::Heap;

const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// struct pvclock_vcpu_time_info: Documentation/virt/kvm/x86/msr.rst of the Linux kernel.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
struct TimeInfo {
    version: u32,
    pad: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    pad2: [u8; 2],
}

/// The clock of the vCPU that made it.
pub struct Clock {
    info: *const TimeInfo,
}

impl Clock {
    /// Turns the clock on; `None` without a KVM underneath.
    pub fn new(heap: &mut Heap) -> Option<Self> {
        let leaf = __cpuid(0x4000_0000);
        if [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).as_flattened() != b"KVMKVMKVM\0\0\0"
        {
            return None;
        }
        let page = heap.words(512).as_ptr();
        cpu::write_msr(MSR_SYSTEM_TIME, page as u64 | 1);
        Some(Self { info: page.cast() })
    }

    /// Nanoseconds on the clock.
    pub fn nanoseconds(&self) -> u64 {
        loop {
            // SAFETY: the page is ours for ever; the hypervisor writes it only between two odd
            // versions, seen below.
            let before = unsafe { ptr::read_volatile(self.info) };
            fence(Ordering::SeqCst);
            let delta = cpu::cycles().wrapping_sub(before.tsc_timestamp);
            fence(Ordering::SeqCst);
            // SAFETY: as above.
            let version = unsafe { ptr::read_volatile(&raw const (*self.info).version) };
            if before.version & 1 == 1 || before.version != version {
                continue;
            }
            let shifted = match before.tsc_shift {
                shift @ 0.. => delta << shift,
                shift => delta >> -i32::from(shift),
            };
            let scaled = (u128::from(shifted) * u128::from(before.tsc_to_system_mul)) >> 32;
            return before.system_time.wrapping_add(scaled as u64);
        }
    }
}
