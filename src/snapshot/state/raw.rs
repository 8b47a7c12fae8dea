//! The vCPU ioctls for which `kvm-ioctls` has no safe wrapper.
#![allow(unsafe_code)] // ioctls that read and write buffers of ours

use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_ioctls::VcpuFd;

// Numbers of <linux/kvm.h>: direction, size, type 0xae, number.
const KVM_GET_XSAVE: libc::c_ulong = 0x9000_aea4;
const KVM_GET_XSAVE2: libc::c_ulong = 0x9000_aecf;
const KVM_SET_XSAVE: libc::c_ulong = 0x5000_aea5;
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

/// Bytes of `struct kvm_xsave` as it was before KVM_GET_XSAVE2.
pub const XSAVE_LEGACY: usize = 4096;

/// The XSAVE area. `size` is what KVM_CAP_XSAVE2 says, or 0 where KVM does not have it.
pub fn xsave(vcpu: &VcpuFd, size: usize) -> io::Result<Vec<u8>> {
    let request = if size == 0 { KVM_GET_XSAVE } else { KVM_GET_XSAVE2 };
    let mut area = vec![0; size.max(XSAVE_LEGACY)];
    // SAFETY: KVM writes 4096 bytes with the first request, and with the second as many
    // as KVM_CAP_XSAVE2 says, which no later request of ours makes more.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), request, area.as_mut_ptr()) };
    check(result).map(|()| area)
}

/// Sets the XSAVE area, which has to be as long as KVM's own: `size` as for [`xsave`].
pub fn set_xsave(vcpu: &VcpuFd, area: &[u8], size: usize) -> io::Result<()> {
    if area.len() != size.max(XSAVE_LEGACY) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: KVM reads as many bytes as the check above established.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_XSAVE, area.as_ptr()) })
}

/// What is added to the host's TSC; `None` where KVM does not say (before Linux 5.16).
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attr = offset_attr(ptr::from_mut(&mut offset).addr());
    // SAFETY: KVM writes one u64 to `addr`, which is that of `offset`.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &raw const attr) };
    (result == 0).then_some(offset)
}

/// Sets what is added to the host's TSC.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attr = offset_attr(ptr::from_ref(&offset).addr());
    // SAFETY: KVM reads one u64 from `addr`, which is that of `offset`.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attr) })
}

/// The host's TSC.
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has it, and it touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn offset_attr(addr: usize) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: addr as u64,
        flags: 0,
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
