//! Values that are in registers only, for monitors that have to keep them.
#![allow(unsafe_code)] // inline assembly

use core::arch::asm;

use crate::arch::cpu;
use crate::boot::Boot;
use crate::{console, exit};

/// Everything that is put into registers, and read back from them.
#[repr(C, align(32))]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Registers {
    ymm: [[u64; 4]; 16],
    /// Whole numbers: x87 has 64 bits for them.
    st: [i64; 8],
    mxcsr: u32,
    /// Control word of x87.
    fcw: u16,
    rest: u16,
}

/// MXCSR and control word of the compiler's code.
#[repr(C)]
struct Usual(u32, u16);

/// All exceptions masked, and each way to round in turn.
const MXCSR: u32 = 0x1f80;
const FCW: u16 = 0x037f;

/// Each round has values of its own, in registers for so long as `spins=` takes. Every `every=`
/// rounds it prints a line; `q` ends it.
pub fn run(boot: &Boot) {
    cpu::enable_avx();
    let (every, spins) =
        (boot.cmdline.number("every", 20), boot.cmdline.number("spins", 1_000_000));
    say!("vector: ready");
    for round in 1.. {
        let wanted = values(round);
        let found = keep(&wanted, spins);
        for (n, (wanted, found)) in wanted.ymm.iter().zip(&found.ymm).enumerate() {
            if wanted != found {
                exit::fail(format_args!("ymm{n} is {found:x?} in round {round}, not {wanted:x?}"));
            }
        }
        if wanted != found {
            let Registers { st, mxcsr, fcw, .. } = found;
            exit::fail(format_args!("round {round}: st {st:x?} mxcsr {mxcsr:#x} fcw {fcw:#x}"));
        }
        if round % every == 0 {
            say!("vector: n={round}");
            if console::poll() == Some(b'q') {
                break;
            }
        }
    }
}

fn values(round: u64) -> Registers {
    let word = |n: usize| (round << 32 | n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut values = Registers {
        ymm: [[0; 4]; 16],
        st: [0; 8],
        mxcsr: MXCSR | ((round as u32 & 3) << 13),
        fcw: FCW | ((round as u16 >> 1 & 3) << 10),
        rest: 0,
    };
    values.ymm.iter_mut().flatten().enumerate().for_each(|(n, value)| *value = word(n));
    values.st.iter_mut().enumerate().for_each(|(n, value)| *value = word(64 + n) as i64);
    values
}

/// Puts them into registers, waits there, and gives what is in the registers then.
fn keep(values: &Registers, spins: u64) -> Registers {
    let mut found = Registers { ymm: [[0; 4]; 16], st: [0; 8], mxcsr: 0, fcw: 0, rest: 0 };
    let usual = Usual(MXCSR, FCW);
    // SAFETY: reads the one structure and writes the other, whose offsets these are; all registers
    // that change are named, and the control words are put back.
    unsafe {
        asm!(
            "fninit",
            "fldcw [rsi + 580]",
            "ldmxcsr [rsi + 576]",
            "fild qword ptr [rsi + 568]",
            "fild qword ptr [rsi + 560]",
            "fild qword ptr [rsi + 552]",
            "fild qword ptr [rsi + 544]",
            "fild qword ptr [rsi + 536]",
            "fild qword ptr [rsi + 528]",
            "fild qword ptr [rsi + 520]",
            "fild qword ptr [rsi + 512]",
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "vmovdqa ymm\\n, [rsi + 32 * \\n]",
            ".endr",
            "2:",
            "dec rcx",
            "jnz 2b",
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "vmovdqa [rdi + 32 * \\n], ymm\\n",
            ".endr",
            "vzeroupper",
            "fistp qword ptr [rdi + 512]",
            "fistp qword ptr [rdi + 520]",
            "fistp qword ptr [rdi + 528]",
            "fistp qword ptr [rdi + 536]",
            "fistp qword ptr [rdi + 544]",
            "fistp qword ptr [rdi + 552]",
            "fistp qword ptr [rdi + 560]",
            "fistp qword ptr [rdi + 568]",
            "stmxcsr [rdi + 576]",
            "fnstcw [rdi + 580]",
            "ldmxcsr [r8]",
            "fldcw [r8 + 4]",
            in("rsi") values,
            in("rdi") &mut found,
            in("r8") &usual,
            inout("rcx") spins.max(1) => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            options(nostack),
        );
    }
    found
}

const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(Registers, ymm) == 0 && offset_of!(Registers, st) == 512);
    assert!(offset_of!(Registers, mxcsr) == 576 && offset_of!(Registers, fcw) == 580);
};
