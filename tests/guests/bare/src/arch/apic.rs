//! The interrupt controllers: IOAPIC pins routed to vCPU 0, the local timer, and start-up of the
//! other vCPUs.

use core::sync::atomic::Ordering;

use super::cpu::{mmio_read32, mmio_write32};
use super::tables::{IRQ_BASE, TIMER_VECTOR, VECTOR_COUNTS};

const LOCAL: u64 = 0xfee0_0000;
const IO: u64 = 0xfec0_0000;
const COMMAND_LOW: u64 = LOCAL + 0x300;
const COMMAND_HIGH: u64 = LOCAL + 0x310;
const DELIVERY_PENDING: u32 = 1 << 12;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
/// Pins of the one IOAPIC the guest drives.
pub const PINS: u32 = 24;

/// Routes a pin to vCPU 0, edge-triggered and active high, and lets it through.
pub fn enable_pin(pin: u32) {
    assert!(pin < PINS, "interrupt line {pin} is not on the first IOAPIC");
    io_write(0x11 + 2 * pin, 0);
    io_write(0x10 + 2 * pin, u32::from(IRQ_BASE) + pin);
}

fn io_write(register: u32, value: u32) {
    mmio_write32(IO, register);
    mmio_write32(IO + 0x10, value);
}

/// Interrupts taken so far from a pin.
pub fn pin_count(pin: u32) -> u64 {
    VECTOR_COUNTS[usize::from(IRQ_BASE) + pin as usize].load(Ordering::Acquire)
}

/// Interrupts taken so far from the local timer.
pub fn ticks() -> u64 {
    VECTOR_COUNTS[usize::from(TIMER_VECTOR)].load(Ordering::Acquire)
}

/// Starts the local timer, one tick every `microseconds`. KVM's timer counts nanoseconds.
pub fn start_timer(microseconds: u32) {
    const PERIODIC: u32 = 1 << 17;
    const DIVIDE_BY_ONE: u32 = 0b1011;
    mmio_write32(LOCAL + 0x3e0, DIVIDE_BY_ONE);
    mmio_write32(LOCAL + 0x320, PERIODIC | u32::from(TIMER_VECTOR));
    mmio_write32(LOCAL + 0x380, microseconds * 1000);
}

/// Stops the local timer.
pub fn stop_timer() {
    mmio_write32(LOCAL + 0x380, 0);
}

/// Sends a vCPU from its reset to the real-mode page at `address`.
pub fn start_cpu(id: usize, address: u64) {
    send(id, INIT);
    send(id, STARTUP | (address >> 12) as u32);
}

fn send(id: usize, command: u32) {
    while mmio_read32(COMMAND_LOW) & DELIVERY_PENDING != 0 {}
    mmio_write32(COMMAND_HIGH, (id as u32) << 24);
    mmio_write32(COMMAND_LOW, command);
}
