//! How soon a thread gets a processor that wakes on a busy machine.
//!
//! A thread that asks for a **short slice** gets no more of the processors than others, but gets
//! them as soon as it wakes, in the middle of another's slice (`sched_setattr(2)`: `sched_runtime`
//! of an ordinary thread, from Linux 6.12 on; older ones take no such wish). Everybody may ask.
//! What a thread starts, threads and processes, has the same slice.
#![allow(unsafe_code)] // asking the scheduler

/// A short slice in nanoseconds: the least that the kernel knows.
const SHORT: u64 = 100_000;

/// Asks for a short slice for the calling thread and whatever it starts from now on. False if it
/// had one, or can have none.
pub(crate) fn shorten_own() -> bool {
    let Some(now) = attributes(0).filter(|now| now.sched_policy == 0) else { return false };
    now.sched_runtime != SHORT && set(0, now, SHORT)
}

/// Takes that back for the calling thread, if it has a short slice: many turns are dear for one
/// that runs for long.
pub(crate) fn lengthen_own() {
    lengthen(0);
}

/// The same for another thread.
pub(crate) fn lengthen(thread: libc::pid_t) {
    let short = |now: &libc::sched_attr| (now.sched_policy, now.sched_runtime) == (0, SHORT);
    if let Some(now) = attributes(thread).filter(short) {
        set(thread, now, 0);
    }
}

/// What a thread is scheduled by.
fn attributes(thread: libc::pid_t) -> Option<libc::sched_attr> {
    // SAFETY: plain numbers, of which zero is one.
    let mut found: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>();
    // SAFETY: the kernel writes no more than `size` bytes to `found`, which outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, thread, &raw mut found, size, 0) };
    (result == 0).then_some(found)
}

/// Asks for so much at a time; zero for what is usual.
fn set(thread: libc::pid_t, mut wish: libc::sched_attr, ns: u64) -> bool {
    wish.size = size_of::<libc::sched_attr>() as u32;
    (wish.sched_flags, wish.sched_runtime) = (0, ns);
    (wish.sched_deadline, wish.sched_period) = (0, 0);
    // SAFETY: reads `wish`, which outlives the call. It is refused for a thread that is no more.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, thread, &raw const wish, 0) };
    result == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice() -> u64 {
        attributes(0).expect("there").sched_runtime
    }

    #[test]
    fn a_short_slice_is_inherited_and_taken_back() {
        let usual = slice();
        let knows = usual != 0; // a kernel that knows no slices says nothing of them
        let threads = std::thread::scope(|scope| {
            let body = || {
                assert_eq!(shorten_own() && slice() == SHORT, knows);
                assert!(!shorten_own(), "it has one");
                let child = || {
                    let inherited = slice();
                    lengthen_own();
                    (inherited, slice())
                };
                let child = std::thread::scope(|scope| scope.spawn(child).join());
                let own = slice();
                // SAFETY: takes nothing, and returns a number.
                let thread = unsafe { libc::gettid() };
                std::thread::scope(|scope| scope.spawn(move || lengthen(thread)).join()).unwrap();
                (child.expect("no panic"), own, slice())
            };
            scope.spawn(body).join().expect("no panic")
        });
        let short = if knows { SHORT } else { 0 };
        assert_eq!(threads, ((short, usual), short, usual));
        assert_eq!(slice(), usual);
    }
}
