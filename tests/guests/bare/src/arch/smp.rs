//! The other vCPUs.
#![allow(unsafe_code)] // the trampoline is copied, and its symbols are assembly's

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::apic;
use super::cpu::cycles;
use super::entry::{TRAMPOLINE_AT, USER_STACK_BYTES};
use super::tables::{MAX_CPUS, prepare_task_state};
use crate::heap::Heap;

/// What every other vCPU runs.
pub type Body = fn(cpu: usize) -> !;

/// The tops of their stacks, for the entry code.
#[unsafe(no_mangle)]
static OTHER_STACKS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static BODY: AtomicUsize = AtomicUsize::new(0);
static STARTED: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

/// Starts the vCPUs 1 to `cpus` - 1 and waits until all of them run `body`.
///
/// # Errors
/// The number of the first vCPU that has not arrived within some seconds.
pub fn start(cpus: usize, heap: &mut Heap, body: Body) -> Result<(), usize> {
    assert!((1..=MAX_CPUS).contains(&cpus), "cpus must be between 1 and {MAX_CPUS}");
    if cpus == 1 {
        return Ok(());
    }
    BODY.store(body as usize, Ordering::Release);
    // SAFETY: the symbols delimit the code; the page is low memory nobody uses once the command
    // line has been copied, and it is mapped.
    unsafe {
        let length = (&raw const trampoline_end).offset_from(&raw const trampoline) as usize;
        (&raw const trampoline).copy_to(TRAMPOLINE_AT as *mut u8, length);
    }
    for (cpu, top) in OTHER_STACKS.iter().enumerate().take(cpus).skip(1) {
        let stack = heap.bytes(USER_STACK_BYTES, 16);
        // As after a call, for a function's idea of alignment.
        top.store(stack.as_ptr_range().end as u64 - 8, Ordering::Release);
        prepare_task_state(cpu);
        apic::start_cpu(cpu, TRAMPOLINE_AT);
    }
    const PATIENCE: u64 = 40_000_000_000; // cycles: many seconds on any machine
    let begin = cycles();
    for (cpu, started) in STARTED.iter().enumerate().take(cpus).skip(1) {
        while started.load(Ordering::Acquire) == 0 {
            if cycles().wrapping_sub(begin) > PATIENCE {
                return Err(cpu);
            }
        }
    }
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn other_main(cpu: usize) -> ! {
    STARTED[cpu].store(1, Ordering::Release);
    let body = BODY.load(Ordering::Acquire);
    // SAFETY: `start` stored a `Body` before it started this vCPU.
    let body: Body = unsafe { core::mem::transmute::<usize, Body>(body) };
    body(cpu)
}
