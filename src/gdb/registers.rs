//! KVM's registers as gdb has them, and back.

use gdbstub_arch::x86::reg::{X86_64CoreRegs, X86SegmentRegs, X87FpuInternalRegs};
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_sregs};

pub(super) fn to_gdb(regs: &kvm_regs, sregs: &kvm_sregs, fpu: &kvm_fpu) -> X86_64CoreRegs {
    let mut gdb = X86_64CoreRegs {
        regs: [
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        eflags: regs.rflags as u32,
        rip: regs.rip,
        segments: X86SegmentRegs {
            cs: sregs.cs.selector.into(),
            ss: sregs.ss.selector.into(),
            ds: sregs.ds.selector.into(),
            es: sregs.es.selector.into(),
            fs: sregs.fs.selector.into(),
            gs: sregs.gs.selector.into(),
        },
        fpu: X87FpuInternalRegs {
            fctrl: fpu.fcw.into(),
            fstat: fpu.fsw.into(),
            ftag: fpu.ftwx.into(),
            fop: fpu.last_opcode.into(),
            ..Default::default()
        },
        mxcsr: fpu.mxcsr,
        ..Default::default()
    };
    for (to, from) in gdb.st.iter_mut().zip(&fpu.fpr) {
        to.copy_from_slice(&from[..10]);
    }
    for (to, from) in gdb.xmm.iter_mut().zip(&fpu.xmm) {
        *to = u128::from_le_bytes(*from);
    }
    gdb
}

/// Puts what gdb may have changed into the registers as they are: selectors stay, since one without
/// its descriptor means nothing.
pub(super) fn from_gdb(gdb: &X86_64CoreRegs, regs: &mut kvm_regs, fpu: &mut kvm_fpu) {
    [
        regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ] = gdb.regs;
    regs.rip = gdb.rip;
    regs.rflags = regs.rflags & !0xffff_ffff | u64::from(gdb.eflags);
    for (to, from) in fpu.fpr.iter_mut().zip(&gdb.st) {
        to[..10].copy_from_slice(from);
    }
    for (to, from) in fpu.xmm.iter_mut().zip(&gdb.xmm) {
        *to = from.to_le_bytes();
    }
    fpu.mxcsr = gdb.mxcsr;
    fpu.fcw = gdb.fpu.fctrl as u16;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_gdb_gets_comes_back_the_same() {
        let regs = kvm_regs { rax: 1, r15: 2, rip: 3, rflags: 0x202, ..Default::default() };
        let mut fpu = kvm_fpu { mxcsr: 0x1f80, fcw: 0x37f, ..Default::default() };
        fpu.xmm[15] = [9; 16];
        fpu.fpr[7] = [5; 16];
        let gdb = to_gdb(&regs, &kvm_sregs::default(), &fpu);
        let (mut back, mut back_fpu) = (kvm_regs::default(), fpu);
        back_fpu.xmm[15] = [0; 16];
        from_gdb(&gdb, &mut back, &mut back_fpu);
        assert_eq!((back, back_fpu), (regs, fpu));
    }
}
