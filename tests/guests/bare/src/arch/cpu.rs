//! Single instructions.
#![allow(unsafe_code)] // inline assembly

use core::arch::asm;

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: a port write reaches devices only; drivers here hand devices memory they own.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// Reads a byte from an I/O port.
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as for `out8`.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nostack, preserves_flags)) }
    value
}

/// The time stamp counter, read after everything before it has completed.
pub fn cycles() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: changes registers only.
    unsafe {
        asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Waits for an interrupt, which is taken even if interrupts are off: "look, then wait" between
/// [`interrupts_off`] and [`interrupts_on`] loses none. (Carried out by src/arch/gates.rs.)
pub fn wait_for_interrupt() {
    // SAFETY: the trap behind it changes no register.
    unsafe { asm!("hlt") }
}

/// Holds interrupts back.
pub fn interrupts_off() {
    // SAFETY: as above.
    unsafe { asm!("cli") }
}

/// Lets interrupts in.
pub fn interrupts_on() {
    // SAFETY: as above.
    unsafe { asm!("sti") }
}

/// Writes a model-specific register.
pub fn write_msr(msr: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: used for registers whose meaning is to write memory we name, or none.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") low, in("edx") high) }
}

/// Makes the registers of AVX usable. (Both are carried out by src/arch/gates.rs.)
pub fn enable_avx() {
    let cr4 = u64::from(super::entry::CR4) | 1 << 18; // OSXSAVE
    // SAFETY: adds registers to those there are.
    unsafe {
        asm!("mov cr4, rax", in("rax") cr4);
        // x87, SSE and AVX.
        asm!("xsetbv", in("ecx") 0, in("eax") 7, in("edx") 0);
    }
}

/// Raises an invalid-opcode exception.
pub fn undefined_instruction() -> ! {
    // SAFETY: the exception does not return here.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// Reads a device register.
pub fn mmio_read32(address: u64) -> u32 {
    let value;
    // SAFETY: callers pass device addresses, mapped by src/arch/tables.rs. Assembly, so that the
    // access is one plain move, which every emulator of instructions knows.
    unsafe {
        asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) address,
             options(nostack, preserves_flags));
    }
    value
}

/// Reads a byte of a device.
pub fn mmio_read8(address: u64) -> u8 {
    let value;
    // SAFETY: as for `mmio_read32`.
    unsafe {
        asm!("mov {0}, byte ptr [{1}]", out(reg_byte) value, in(reg) address,
             options(nostack, preserves_flags));
    }
    value
}

/// Writes a byte of a device.
pub fn mmio_write8(address: u64, value: u8) {
    // SAFETY: as for `mmio_write32`.
    unsafe {
        asm!("mov byte ptr [{1}], {0}", in(reg_byte) value, in(reg) address,
             options(nostack, preserves_flags));
    }
}

/// Writes a device register; all earlier writes to memory are visible before it.
pub fn mmio_write32(address: u64, value: u32) {
    // SAFETY: as for `mmio_read32`; x86 keeps stores in order and the block is a compiler barrier.
    unsafe {
        asm!("mov dword ptr [{1}], {0:e}", in(reg) value, in(reg) address,
             options(nostack, preserves_flags));
    }
}
