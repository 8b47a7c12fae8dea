//! The serial port's registers, used by several vCPUs at a time.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::arch::cpu;
use crate::boot::Boot;
use crate::heap::Heap;

use super::start_others;

const DATA: u16 = 0x3f8;
/// A byte of storage without effect.
const SCRATCH: u16 = DATA + 7;

static LETTERS: AtomicU64 = AtomicU64::new(0);
static FINISHED: AtomicU64 = AtomicU64::new(0);

/// The other vCPUs write without waiting for the transmitter, so only a device that takes posted
/// writes at any speed passes. The boot vCPU reads after each write, which only gives the written
/// value if the two keep their order.
pub fn run(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let n = boot.cmdline.number("n", 1000);
    LETTERS.store(n, Ordering::Release);
    let cpus = start_others(boot, &mut heap, letters);
    for i in 0..n {
        let value = i as u8;
        cpu::out8(SCRATCH, !value);
        cpu::out8(SCRATCH, value);
        let found = cpu::in8(SCRATCH);
        if found != value {
            crate::exit::fail(format_args!("scratch register is {found:#x}, not {value:#x}"));
        }
    }
    while FINISHED.load(Ordering::Acquire) != cpus as u64 - 1 {
        core::hint::spin_loop();
    }
    say!("\nuart: cpus={cpus} n={n}");
}

fn letters(number: usize) -> ! {
    for _ in 0..LETTERS.load(Ordering::Acquire) {
        cpu::out8(DATA, b'a' + number as u8 % 26);
    }
    FINISHED.fetch_add(1, Ordering::Release);
    loop {
        cpu::wait_for_interrupt();
    }
}
