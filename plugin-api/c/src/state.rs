//! State that is got and set as a whole, of the VM and of a vCPU.

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_fpu, kvm_ioapic_state, kvm_lapic_state, kvm_mp_state,
    kvm_pic_state, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use libc::c_int;

use crate::guard::{guard, input, output};
use crate::handles::{Crosvm, CrosvmVcpu};

macro_rules! vm_state {
    ($($kind:ident: $get:ident = $from:ident, $set:ident = $to:ident;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $get(c: *mut Crosvm, state: *mut $kind) -> c_int {
            guard(|| {
                let (c, state) = (input(c)?, output(state)?);
                *state = c.vm.$from()?;
                Ok(0)
            })
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $set(c: *mut Crosvm, state: *const $kind) -> c_int {
            guard(|| {
                input(c)?.vm.$to(input(state)?)?;
                Ok(0)
            })
        }
    )*};
}

vm_state! {
    kvm_ioapic_state:
        crosvm_get_ioapic_state = ioapic_state, crosvm_set_ioapic_state = set_ioapic_state;
    kvm_pit_state2: crosvm_get_pit_state = pit_state, crosvm_set_pit_state = set_pit_state;
    kvm_clock_data: crosvm_get_clock = clock, crosvm_set_clock = set_clock;
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_get_pic_state(
    c: *mut Crosvm,
    primary: u8,
    state: *mut kvm_pic_state,
) -> c_int {
    guard(|| {
        let (c, state) = (input(c)?, output(state)?);
        *state = c.vm.pic_state(primary != 0)?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_set_pic_state(
    c: *mut Crosvm,
    primary: u8,
    state: *const kvm_pic_state,
) -> c_int {
    guard(|| {
        input(c)?.vm.set_pic_state(primary != 0, input(state)?)?;
        Ok(0)
    })
}

macro_rules! vcpu_state {
    ($($kind:ident: $get:ident = $from:ident, $set:ident = $to:ident;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $get(v: *mut CrosvmVcpu, state: *mut $kind) -> c_int {
            guard(|| {
                let (v, state) = (input(v)?, output(state)?);
                *state = v.vcpu.$from()?;
                Ok(0)
            })
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $set(v: *mut CrosvmVcpu, state: *const $kind) -> c_int {
            guard(|| {
                input(v)?.vcpu.$to(input(state)?)?;
                Ok(0)
            })
        }
    )*};
}

vcpu_state! {
    kvm_regs: crosvm_vcpu_get_regs = regs, crosvm_vcpu_set_regs = set_regs;
    kvm_sregs: crosvm_vcpu_get_sregs = sregs, crosvm_vcpu_set_sregs = set_sregs;
    kvm_fpu: crosvm_vcpu_get_fpu = fpu, crosvm_vcpu_set_fpu = set_fpu;
    kvm_debugregs:
        crosvm_vcpu_get_debugregs = debugregs, crosvm_vcpu_set_debugregs = set_debugregs;
    kvm_xcrs: crosvm_vcpu_get_xcrs = xcrs, crosvm_vcpu_set_xcrs = set_xcrs;
    kvm_lapic_state:
        crosvm_vcpu_get_lapic_state = lapic_state, crosvm_vcpu_set_lapic_state = set_lapic_state;
    kvm_mp_state: crosvm_vcpu_get_mp_state = mp_state, crosvm_vcpu_set_mp_state = set_mp_state;
    kvm_vcpu_events:
        crosvm_vcpu_get_vcpu_events = vcpu_events, crosvm_vcpu_set_vcpu_events = set_vcpu_events;
}
