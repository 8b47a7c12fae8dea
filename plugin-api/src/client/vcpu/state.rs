//! A vCPU's state, between an event and the resume.

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_cpuid_entry2,
    kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};

use super::Vcpu;
use crate::error::Error;
use crate::plain::Plain;
use crate::slot::{order, registers};
use crate::types::GuestDebug;

impl Vcpu {
    /// General registers. Without a round trip where they came with the event or were set.
    ///
    /// # Errors
    /// [`Error::Protocol`] without an event; KVM's.
    pub fn regs(&self) -> Result<kvm_regs, Error> {
        let mut state = self.held()?;
        self.know(&mut state, registers::REGS, order::GET_REGS, "getting registers")?;
        Ok(state.regs)
    }

    /// Sets general registers, at the resume.
    ///
    /// # Errors
    /// [`Error::Protocol`] without an event.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        let mut state = self.held()?;
        state.regs = *regs;
        state.sets |= registers::REGS;
        state.known |= registers::REGS;
        Ok(())
    }

    /// System registers, as [`Vcpu::regs`].
    ///
    /// # Errors
    /// [`Error::Protocol`] without an event; KVM's.
    pub fn sregs(&self) -> Result<kvm_sregs, Error> {
        let mut state = self.held()?;
        self.know(&mut state, registers::SREGS, order::GET_SREGS, "getting system registers")?;
        Ok(state.sregs)
    }

    /// Sets system registers, at the resume.
    ///
    /// # Errors
    /// [`Error::Protocol`] without an event.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        let mut state = self.held()?;
        state.sregs = *sregs;
        state.sets |= registers::SREGS;
        state.known |= registers::SREGS;
        Ok(())
    }

    /// Debug registers, as [`Vcpu::regs`].
    ///
    /// # Errors
    /// [`Error::Protocol`] without an event; KVM's.
    pub fn debugregs(&self) -> Result<kvm_debugregs, Error> {
        let mut state = self.held()?;
        let what = "getting debug registers";
        self.know(&mut state, registers::DEBUGREGS, order::GET_DEBUGREGS, what)?;
        Ok(state.debugregs)
    }

    /// Sets debug registers, at the resume.
    ///
    /// # Errors
    /// [`Error::Protocol`] without an event.
    pub fn set_debugregs(&self, debugregs: &kvm_debugregs) -> Result<(), Error> {
        let mut state = self.held()?;
        state.debugregs = *debugregs;
        state.sets |= registers::DEBUGREGS;
        state.known |= registers::DEBUGREGS;
        Ok(())
    }

    /// Floating-point state.
    ///
    /// # Errors
    /// [`Error::Protocol`] without an event; KVM's. So it is for all that follow.
    pub fn fpu(&self) -> Result<kvm_fpu, Error> {
        self.get("getting fpu state", order::GET_FPU)
    }

    /// Sets floating-point state, at once.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Error> {
        self.set("setting fpu state", order::SET_FPU, fpu)
    }

    /// Extended control registers.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn xcrs(&self) -> Result<kvm_xcrs, Error> {
        self.get("getting xcrs", order::GET_XCRS)
    }

    /// Sets extended control registers, at once.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Error> {
        self.set("setting xcrs", order::SET_XCRS, xcrs)
    }

    /// The local APIC.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn lapic_state(&self) -> Result<kvm_lapic_state, Error> {
        self.get("getting the local apic", order::GET_LAPIC)
    }

    /// Sets the local APIC, at once.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn set_lapic_state(&self, lapic: &kvm_lapic_state) -> Result<(), Error> {
        self.set("setting the local apic", order::SET_LAPIC, lapic)
    }

    /// Whether it runs, is halted, or waits to be started.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn mp_state(&self) -> Result<kvm_mp_state, Error> {
        self.get("getting the mp state", order::GET_MP_STATE)
    }

    /// Sets whether it runs, at once.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn set_mp_state(&self, state: &kvm_mp_state) -> Result<(), Error> {
        self.set("setting the mp state", order::SET_MP_STATE, state)
    }

    /// Pending exceptions and interrupts.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn vcpu_events(&self) -> Result<kvm_vcpu_events, Error> {
        self.get("getting pending events", order::GET_EVENTS)
    }

    /// Sets pending exceptions and interrupts, at once.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<(), Error> {
        self.set("setting pending events", order::SET_EVENTS, events)
    }

    /// MSRs: those that KVM gives, up to the first it does not.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn msrs(&self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
        let mut state = self.held()?;
        let wanted: Vec<_> = indices
            .iter()
            .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
            .collect();
        let got = self.order(&mut state, "getting msrs", order::GET_MSRS, &all_bytes(&wanted))?;
        Ok(Plain::all_from_bytes(&got))
    }

    /// Sets MSRs, at once; how many of them KVM took.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<usize, Error> {
        let mut state = self.held()?;
        let done = self.order(&mut state, "setting msrs", order::SET_MSRS, &all_bytes(msrs))?;
        Ok(u32::from_bytes(&done).unwrap_or(0) as usize)
    }

    /// Sets what CPUID says. The index of an entry counts where its flags say so.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), Error> {
        let mut state = self.held()?;
        let bytes = all_bytes(entries);
        self.order(&mut state, "setting cpuid", order::SET_CPUID, &bytes).map(drop)
    }

    /// What CPUID can say of Hyper-V.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn hyperv_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        let mut state = self.held()?;
        let what = "listing the hyper-v cpuid";
        let got = self.order(&mut state, what, order::GET_HYPERV_CPUID, &[])?;
        Ok(Plain::all_from_bytes(&got))
    }

    /// Enables a capability: KVM_CAP_HYPERV_SYNIC or _SYNIC2, without flags and arguments.
    ///
    /// # Errors
    /// EINVAL for any other; as [`Vcpu::fpu`].
    pub fn enable_capability(&self, cap: u32, flags: u32, args: [u64; 4]) -> Result<(), Error> {
        let mut state = self.held()?;
        let words = [u64::from(cap), u64::from(flags), args[0], args[1], args[2], args[3]];
        let bytes = all_bytes(&words);
        self.order(&mut state, "enabling a capability", order::ENABLE_CAP, &bytes).map(drop)
    }

    /// Has it stop at breakpoints or after every instruction, with [`Event::Debug`](crate::Event::Debug).
    ///
    /// # Errors
    /// EBUSY while another plugin debugs it; as [`Vcpu::fpu`].
    pub fn set_guest_debug(&self, debug: &GuestDebug) -> Result<(), Error> {
        let mut raw = kvm_guest_debug::default();
        if debug.single_step {
            raw.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        }
        for (n, address) in debug.breakpoints.iter().enumerate() {
            if let Some(address) = address {
                raw.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
                raw.arch.debugreg[n] = *address;
                // Globally enabled, on execution; bit 10 is always one.
                raw.arch.debugreg[7] |= 2 << (2 * n) | 0x400;
            }
        }
        self.set("debugging the vCPU", order::SET_GUEST_DEBUG, &raw)
    }

    /// The guest-physical address behind a linear one; `None` where there is none.
    ///
    /// # Errors
    /// As [`Vcpu::fpu`].
    pub fn translate(&self, linear: u64) -> Result<Option<u64>, Error> {
        let mut state = self.held()?;
        let what = "translating an address";
        let got = self.order(&mut state, what, order::TRANSLATE, linear.bytes())?;
        let words = u64::all_from_bytes(&got);
        Ok(words.first().copied().filter(|_| words.get(1) == Some(&1)))
    }

    fn get<T: Plain>(&self, what: &'static str, number: u32) -> Result<T, Error> {
        let mut state = self.held()?;
        let bytes = self.order(&mut state, what, number, &[])?;
        T::from_bytes(&bytes).ok_or(STRANGE)
    }

    fn set<T: Plain>(&self, what: &'static str, number: u32, value: &T) -> Result<(), Error> {
        let mut state = self.held()?;
        self.order(&mut state, what, number, value.bytes()).map(drop)
    }
}

const STRANGE: Error = Error::Protocol("the VMM gave a structure of another size");

fn all_bytes<T: Plain>(values: &[T]) -> Vec<u8> {
    T::all_bytes(values)
}
