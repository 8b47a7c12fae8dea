//! vCPUs that do nothing, in the two ways there are.

use crate::arch::cpu;
use crate::boot::Boot;
use crate::console;
use crate::heap::Heap;

use super::start_others;

/// Every vCPU spins, until `q` on the console.
pub fn spin(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let cpus = start_others(boot, &mut heap, |_| {
        loop {
            core::hint::spin_loop();
        }
    });
    say!("spin: ready cpus={cpus}");
    // Rarely, so that the vCPU is in guest code nearly all the time.
    const CYCLES_BETWEEN_LOOKS: u64 = 50_000_000;
    while console::poll() != Some(b'q') {
        let begin = cpu::cycles();
        while cpu::cycles().wrapping_sub(begin) < CYCLES_BETWEEN_LOOKS {
            core::hint::spin_loop();
        }
    }
}

/// Every vCPU halts; only the console's interrupt wakes the first one, and `q` ends it.
pub fn halt(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let cpus = start_others(boot, &mut heap, |_| {
        loop {
            cpu::wait_for_interrupt();
        }
    });
    console::enable_interrupt();
    say!("halt: ready cpus={cpus}");
    while console::wait() != Some(b'q') {}
}
