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
            ftag: tag_word(fpu).into(),
            fiseg: segment(fpu.last_ip),
            fioff: fpu.last_ip as u32,
            foseg: segment(fpu.last_dp),
            fooff: fpu.last_dp as u32,
            fop: fpu.last_opcode.into(),
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

/// Bits 32 to 47 of an address: gdb has it where there was a selector once.
fn segment(address: u64) -> u32 {
    (address >> 32) as u16 as u32
}

/// The address with those bits of it that gdb has.
fn address(was: u64, segment: u32, offset: u32) -> u64 {
    was & !0xffff_ffff_ffff | u64::from(segment & 0xffff) << 32 | u64::from(offset)
}

const EMPTY: u16 = 3;

/// Two bits for each register of the x87, as FSAVE has them: KVM has one, whether it is in use, as
/// FXSAVE does. Which register is meant counts from the first; what is in it, from the top.
fn tag_word(fpu: &kvm_fpu) -> u16 {
    let top = usize::from(fpu.fsw >> 11 & 7);
    let tag = |n: usize| {
        if fpu.ftwx >> n & 1 == 0 {
            return EMPTY;
        }
        let value = &fpu.fpr[(n + 8 - top) % 8];
        let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
        match (exponent, value[7] & 0x80 != 0) {
            (0, _) if value[..8] == [0; 8] => 1,
            (1..0x7fff, true) => 0,
            _ => 2, // denormal, infinite, or no number
        }
    };
    (0..8).map(|n| tag(n) << (2 * n)).fold(0, |word, tag| word | tag)
}

/// Which registers of the x87 are in use by a tag word.
fn in_use(tag_word: u16) -> u8 {
    (0..8).filter(|n| tag_word >> (2 * n) & 3 != EMPTY).fold(0, |bits, n| bits | 1 << n)
}

/// Whether gdb left the selectors as they are: one without its descriptor means nothing.
pub(super) fn same_segments(gdb: &X86_64CoreRegs, sregs: &kvm_sregs) -> bool {
    let was = to_gdb(&kvm_regs::default(), sregs, &kvm_fpu::default());
    gdb.segments == was.segments
}

/// Puts what gdb may have changed into the registers as they are.
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
    fpu.fsw = gdb.fpu.fstat as u16;
    fpu.ftwx = in_use(gdb.fpu.ftag as u16);
    fpu.last_ip = address(fpu.last_ip, gdb.fpu.fiseg, gdb.fpu.fioff);
    fpu.last_dp = address(fpu.last_dp, gdb.fpu.foseg, gdb.fpu.fooff);
    fpu.last_opcode = gdb.fpu.fop as u16;
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
        (fpu.fsw, fpu.ftwx, fpu.last_opcode) = (0x3801, 0xc1, 0x51e);
        (fpu.last_ip, fpu.last_dp) = (0xffff_8123_4567_89ab, 0x7fff_0000_1000);
        let gdb = to_gdb(&regs, &kvm_sregs::default(), &fpu);
        let (mut back, mut back_fpu) = (kvm_regs::default(), fpu);
        back_fpu.xmm[15] = [0; 16];
        (back_fpu.fsw, back_fpu.ftwx, back_fpu.last_opcode) = (0, 0, 0);
        (back_fpu.last_ip, back_fpu.last_dp) = (0xffff_0000_0000_0000, 0);
        from_gdb(&gdb, &mut back, &mut back_fpu);
        assert_eq!((back, back_fpu), (regs, fpu));
    }
    #[test]
    fn the_tag_word_is_that_of_fsave() {
        let number = |exponent: u16, mantissa: u64| {
            let mut value = [0; 16];
            value[..8].copy_from_slice(&mantissa.to_le_bytes());
            value[8..10].copy_from_slice(&exponent.to_le_bytes());
            value
        };
        let mut fpu = kvm_fpu::default();
        assert_eq!(tag_word(&fpu), 0xffff); // fninit
        // fld1; fldz; fld infinity: the last is on the top, which is register 5.
        (fpu.fsw, fpu.ftwx) = (5 << 11, 0xe0);
        fpu.fpr[0] = number(0x7fff, 1 << 63);
        fpu.fpr[2] = number(0x3fff, 1 << 63);
        assert_eq!(tag_word(&fpu), 0x1bff);
        assert_eq!(in_use(0x1bff), 0xe0);
        fpu.fpr[0] = number(0x8000, 1); // a denormal, below zero
        assert_eq!(tag_word(&fpu), 0x1bff);
    }

    #[test]
    fn a_changed_selector_is_noticed() {
        let mut sregs = kvm_sregs::default();
        sregs.cs.selector = 0x10;
        let mut gdb = to_gdb(&kvm_regs::default(), &sregs, &kvm_fpu::default());
        assert!(same_segments(&gdb, &sregs));
        gdb.segments.fs = 8;
        assert!(!same_segments(&gdb, &sregs));
    }
}
