//! The code behind the interrupt gates, all of what runs at privilege level 0 after start-up.
//!
//! An interrupt is counted and acknowledged, in three instructions. A privileged instruction at
//! level 3 is carried out on its behalf, so that the body can simply say `hlt`, `cli`, `sti`,
//! `wrmsr`, `xsetbv` or `mov cr4, rax`. Any other exception ends the guest with a report, written at level 3.
#![allow(unsafe_code)] // assembly, and the record it leaves

use core::arch::global_asm;
use core::cell::UnsafeCell;

use super::entry::USER_STACK_BYTES;
use super::tables::{HIGH_ALIAS, USER_CODE, USER_DATA};

/// What the gate noted of an exception.
#[repr(C)]
#[derive(Clone, Copy)]
struct Fault {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rsp: u64,
    cr2: u64,
}

#[repr(transparent)]
struct Record(UnsafeCell<Fault>);

// SAFETY: written by a gate, read by the report that the gate then jumps to.
unsafe impl Sync for Record {}

#[unsafe(no_mangle)]
static FAULT: Record =
    Record(UnsafeCell::new(Fault { vector: 0, error: 0, rip: 0, cs: 0, rsp: 0, cr2: 0 }));

#[repr(C, align(16))]
struct Stack(UnsafeCell<[u8; USER_STACK_BYTES]>);

// SAFETY: only used as a stack, by one vCPU.
unsafe impl Sync for Stack {}

#[unsafe(no_mangle)]
static BOOT_STACK: Stack = Stack(UnsafeCell::new([0; USER_STACK_BYTES]));
#[unsafe(no_mangle)]
static FAULT_STACK: Stack = Stack(UnsafeCell::new([0; USER_STACK_BYTES]));

global_asm!(
    ".section .vectors, \"ax\", @progbits",
    ".set vector, 0",
    ".rept 32",
    ".balign 32",
    // Exceptions for which the processor pushes no error code get a zero in its place.
    ".if (0x60227d00 >> vector) & 1 == 0",
    "push 0",
    ".endif",
    ".if vector == 13",
    "jmp privileged",
    ".else",
    "push vector",
    "jmp exception",
    ".endif",
    ".set vector, vector + 1",
    ".endr",
    ".rept 32",
    ".balign 32",
    "inc qword ptr [VECTOR_COUNTS + 8 * vector]",
    "mov dword ptr [{lapic} + 0xb0], 0", // end of interrupt
    "iretq",
    ".set vector, vector + 1",
    ".endr",

    ".section .text",
    // Stack: saved RAX, error code, RIP, CS, RFLAGS, RSP, SS.
    "privileged:",
    "push rax",
    "test byte ptr [rsp + 24], 3",
    "jz 9f",
    "mov rax, [rsp + 16]",
    "movzx eax, word ptr [rax]",
    "cmp al, 0xf4",
    "je 2f",
    "cmp al, 0xfa",
    "je 3f",
    "cmp al, 0xfb",
    "je 4f",
    "cmp ax, 0x300f",
    "je 5f",
    "cmp ax, 0x220f",
    "je 6f",
    "cmp ax, 0x010f",
    "je 7f",
    "9:",
    "pop rax",
    "push 13",
    "jmp exception",
    // hlt: interrupts open and the wait begins in one step, whatever the flag was before; on
    // return the flag is what it was.
    "2:",
    "mov eax, 0x10", // the frame of an interrupt in here needs a stack segment to return to
    "mov ss, eax",
    "pop rax",
    "add rsp, 8",
    "inc qword ptr [rsp]",
    "sti",
    "hlt",
    "cli",
    "iretq",
    // cli
    "3:",
    "and qword ptr [rsp + 32], ~0x200",
    "pop rax",
    "add rsp, 8",
    "inc qword ptr [rsp]",
    "iretq",
    // sti
    "4:",
    "or qword ptr [rsp + 32], 0x200",
    "pop rax",
    "add rsp, 8",
    "inc qword ptr [rsp]",
    "iretq",
    // wrmsr
    "5:",
    "pop rax",
    "add rsp, 8",
    "add qword ptr [rsp], 2",
    "wrmsr",
    "iretq",
    // mov cr4, rax
    "6:",
    "pop rax",
    "add rsp, 8",
    "add qword ptr [rsp], 3",
    "mov cr4, rax",
    "iretq",
    // xsetbv
    "7:",
    "pop rax",
    "add rsp, 8",
    "add qword ptr [rsp], 3",
    "xsetbv",
    "iretq",

    // Stack: vector, error code, RIP, CS, RFLAGS, RSP, SS. Nothing returns, so registers may go.
    "exception:",
    "pop qword ptr [FAULT]",
    "pop qword ptr [FAULT + 8]",
    "pop qword ptr [FAULT + 16]",
    "pop qword ptr [FAULT + 24]",
    "pop rax",
    "pop qword ptr [FAULT + 32]",
    "mov rax, cr2",
    "mov qword ptr [FAULT + 40], rax",
    "push {user_data}",
    "push offset FAULT_STACK + {stack_bytes} - 8",
    "push 2",
    "push {user_code}",
    "push offset report_fault",
    "iretq",
    lapic = const (HIGH_ALIAS | 0xfee0_0000) as i64,
    user_code = const USER_CODE,
    user_data = const USER_DATA,
    stack_bytes = const USER_STACK_BYTES,
);

#[unsafe(no_mangle)]
extern "C" fn report_fault() -> ! {
    // SAFETY: the gate has written the record and no other exception can follow on this vCPU.
    let fault = unsafe { *FAULT.0.get() };
    crate::exit::fail(format_args!(
        "exception {} at {:#x} (level {}), error {:#x}, address {:#x}, stack {:#x}",
        fault.vector,
        fault.rip,
        fault.cs & 3,
        fault.error,
        fault.cr2,
        fault.rsp
    ))
}
