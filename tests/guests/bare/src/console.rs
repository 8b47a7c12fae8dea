//! COM1: output in bursts as long as the transmit FIFO, input polled or by interrupt.
//!
//! A read of a register is a round trip to the device, a write is not. So the line status is read
//! once per FIFO's worth of output, and not at all before the first, which a reset leaves empty.

use core::fmt;
use core::sync::atomic::{AtomicU8, Ordering};

use crate::arch::{apic, cpu};

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_STATUS: u16 = DATA + 5;
const RECEIVED: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
const FIFO_BYTES: u8 = 16;
/// COM1's interrupt line.
pub const LINE: u32 = 4;

const FIFO_NOT_ENABLED: u8 = u8::MAX;
/// Bytes the transmit FIFO is known to have room for.
static ROOM: AtomicU8 = AtomicU8::new(FIFO_NOT_ENABLED);

/// Prints a line.
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::console::print(format_args!($($argument)*))
    };
}

/// Writes a line of text.
pub fn print(text: fmt::Arguments<'_>) {
    // Writing to this console cannot fail.
    let _ = fmt::write(&mut Console, text);
    write(b"\n");
}

struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write(text.as_bytes());
        Ok(())
    }
}

/// Writes bytes. One vCPU at a time, which is the boot vCPU except when another fails.
pub fn write(bytes: &[u8]) {
    let mut room = ROOM.load(Ordering::Relaxed);
    if room == FIFO_NOT_ENABLED {
        cpu::out8(FIFO_CONTROL, 1);
        room = FIFO_BYTES;
    }
    for &byte in bytes {
        if room == 0 {
            while cpu::in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
            room = FIFO_BYTES;
        }
        cpu::out8(DATA, byte);
        room -= 1;
    }
    ROOM.store(room, Ordering::Relaxed);
}

/// The next byte of input, if there is one.
pub fn poll() -> Option<u8> {
    (cpu::in8(LINE_STATUS) & RECEIVED != 0).then(|| cpu::in8(DATA))
}

/// Lets the console interrupt when input arrives.
pub fn enable_interrupt() {
    apic::enable_pin(LINE);
    cpu::out8(INTERRUPT_ENABLE, 1);
}

/// The next byte of input, waiting for it with the vCPU halted. Other interrupts wake it too: then
/// the answer is `None`.
pub fn wait() -> Option<u8> {
    cpu::interrupts_off();
    let mut byte = poll();
    if byte.is_none() {
        cpu::wait_for_interrupt();
        byte = poll();
    }
    cpu::interrupts_on();
    byte
}
