//! CPU time of processes and cycles of the time stamp counter.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// The time stamp counter.
pub fn cycles() -> u64 {
    #[allow(unsafe_code)] // the intrinsic is an unsafe function
    // SAFETY: reads the time stamp counter, which every x86_64 has.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
}

/// Cycles of the time stamp counter in a second.
pub fn frequency() -> f64 {
    let (start, from) = (Instant::now(), cycles());
    std::thread::sleep(Duration::from_millis(100));
    (cycles() - from) as f64 / start.elapsed().as_secs_f64()
}

/// CPU seconds that the calling thread has used.
pub fn of_this_thread() -> f64 {
    seconds(ClockId::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU seconds that this process has used, its threads in the kernel included.
pub fn of_this_process() -> f64 {
    seconds(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

/// CPU seconds that processes have used, with all threads they ever had.
pub fn of(family: &[u32]) -> f64 {
    let clock = |pid: &u32| clock_getcpuclockid(Pid::from_raw(*pid as i32)).ok();
    family.iter().filter_map(clock).map(seconds).sum()
}

fn seconds(clock: ClockId) -> f64 {
    // A process that ended has no clock any more; one that is measured has not.
    clock_gettime(clock).map_or(0.0, |time| Duration::from(time).as_secs_f64())
}
