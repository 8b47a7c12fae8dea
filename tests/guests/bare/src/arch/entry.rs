//! From the boot loader's hands to Rust at privilege level 3.
//!
//! Three ways in: the 64-bit entry of the Linux boot protocol (RSI: the zero page), the 32-bit
//! entry of PVH (EBX: the start information; found by the ELF note), and the real-mode start of
//! the other vCPUs. None of them does more than load tables and leave level 0, because level 0 may
//! be emulated: a few dozen instructions in all, no loops.
#![allow(unsafe_code)] // assembly

use core::arch::global_asm;

use super::tables::{
    GDT_AT, GDT_LIMIT, HIGH_ALIAS, IDT_AT, IDT_LIMIT, KERNEL_CODE, KERNEL_STACK_BYTES, PML4_AT,
    SPURIOUS_VECTOR, TSS_SELECTOR, USER_CODE, USER_DATA, bitmap_offset, kernel_stack_top,
    task_state_at,
};

/// Where the start-up code of the other vCPUs is copied to; below 1 MiB, as real mode needs.
pub const TRAMPOLINE_AT: u64 = 0x8000;
/// Bytes of stack at level 3, for each vCPU.
pub const USER_STACK_BYTES: usize = 32 * 1024;

/// How the guest was started.
pub const BOOTED_BY_LINUX64: u32 = 0;
/// How the guest was started.
pub const BOOTED_BY_PVH: u32 = 1;

/// Paging, write protection, native FPU errors, protection.
const CR0: u32 = 0x8001_0033;
/// PAE; and OSFXSR with OSXMMEXCPT, because the compiler uses SSE registers for copies.
pub const CR4: u32 = 0x620;
const EFER: u32 = 0xc000_0080;
const EFER_LME: u32 = 1 << 8;
/// Interrupts enabled, and the bit that is always one.
const RFLAGS: u32 = 0x202;

global_asm!(
    // The note: name size, description size, type 18 (32-bit physical entry), name, description.
    ".section .note.pvh, \"a\", @note",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad start_pvh",

    ".section .text.boot, \"ax\", @progbits",
    ".global start_linux64, start_pvh",

    ".code32",
    "start_pvh:",
    "mov eax, {cr4}",
    "mov cr4, eax",
    "mov eax, {pml4}",
    "mov cr3, eax",
    "mov ecx, {efer}",
    "mov eax, {efer_lme}",
    "xor edx, edx",
    "wrmsr",
    "mov eax, {cr0}",
    "mov cr0, eax",
    "lgdt [gdt_pointer]",
    "mov edi, ebx",
    "mov esi, {pvh}",
    ".byte 0xea",
    ".long leave_level_0",
    ".word {kernel_code}",

    ".code64",
    "start_linux64:",
    "mov eax, {pml4}",
    "mov cr3, rax",
    "mov eax, {cr4}",
    "mov cr4, rax",
    "mov eax, {cr0}",
    "mov cr0, rax",
    "lgdt [gdt_pointer]",
    "mov rdi, rsi",
    "mov esi, {linux64}",
    // RDI and ESI are the arguments of boot_main. CS may still be the loader's: it is 64-bit code
    // at level 0 all the same, and the iretq replaces it.
    "leave_level_0:",
    "lidt [idt_pointer]",
    // The legacy interrupt controller, and the local APIC's pin for it, would deliver interrupts
    // nobody asked for.
    "mov al, 0xff",
    "out 0x21, al",
    "out 0xa1, al",
    "mov dword ptr [{lapic} + 0x350], 0x10000",
    "mov dword ptr [{lapic} + 0xf0], 0x100 + {spurious}",
    "mov qword ptr [{tss} + 4], {kernel_stack}",
    "mov word ptr [{tss} + 0x66], {bitmap}",
    "mov eax, {tss_selector}",
    "ltr ax",
    "lea rsp, [rip + boot_frame]",
    "iretq",

    // The other vCPUs, from here to trampoline_end copied to TRAMPOLINE_AT; addresses are relative
    // to the copy, and the data segment starts at 0.
    ".code16",
    ".global trampoline, trampoline_end",
    "trampoline:",
    "xor ax, ax",
    "mov ds, ax",
    ".byte 0x66, 0x0f, 0x01, 0x16", // lgdt with a 32-bit base; assemblers disagree on the syntax
    ".word {trampoline_at} + trampoline_gdt - trampoline",
    "mov eax, {cr4}",
    "mov cr4, eax",
    "mov eax, {pml4}",
    "mov cr3, eax",
    "mov ecx, {efer}",
    "mov eax, {efer_lme}",
    "xor edx, edx",
    "wrmsr",
    "mov eax, {cr0}",
    "mov cr0, eax",
    ".byte 0x66, 0xea",
    ".long start_other",
    ".word {kernel_code}",
    "trampoline_gdt:",
    ".word {gdt_limit}",
    ".long {gdt}",
    "trampoline_end:",

    ".code64",
    "start_other:",
    "lidt [idt_pointer]",
    "mov dword ptr [{lapic} + 0xf0], 0x100 + {spurious}",
    "mov edi, dword ptr [{lapic} + 0x20]",
    "shr edi, 24", // the vCPU's number is its APIC id
    "lea eax, [rdi * 8]",
    "lea eax, [rax * 2 + {tss_selector}]",
    "ltr ax",
    "mov rax, qword ptr [OTHER_STACKS + rdi * 8]",
    "mov esp, edi",
    "shl esp, {kernel_stack_shift}",
    "add esp, {kernel_stack}",
    "push {user_data}",
    "push rax",
    "push {rflags}",
    "push {user_code}",
    "push offset other_main",
    "iretq",

    ".section .data.boot, \"aw\", @progbits",
    ".balign 8",
    "boot_frame:",
    ".quad boot_main, {user_code}, {rflags}, BOOT_STACK + {stack_bytes} - 8, {user_data}",
    "gdt_pointer:",
    ".word {gdt_limit}",
    ".quad {gdt}",
    "idt_pointer:",
    ".word {idt_limit}",
    ".quad {idt}",
    ".section .text",
    cr0 = const CR0,
    cr4 = const CR4,
    efer = const EFER,
    efer_lme = const EFER_LME,
    pml4 = const PML4_AT,
    gdt = const GDT_AT,
    gdt_limit = const GDT_LIMIT,
    idt = const IDT_AT,
    idt_limit = const IDT_LIMIT,
    kernel_code = const KERNEL_CODE,
    user_code = const USER_CODE,
    user_data = const USER_DATA,
    rflags = const RFLAGS,
    lapic = const (HIGH_ALIAS | 0xfee0_0000) as i64,
    spurious = const SPURIOUS_VECTOR,
    tss = const task_state_at(0),
    tss_selector = const TSS_SELECTOR,
    bitmap = const bitmap_offset(0),
    kernel_stack = const kernel_stack_top(0),
    kernel_stack_shift = const KERNEL_STACK_BYTES.ilog2(),
    stack_bytes = const USER_STACK_BYTES,
    trampoline_at = const TRAMPOLINE_AT,
    linux64 = const BOOTED_BY_LINUX64,
    pvh = const BOOTED_BY_PVH,
);
