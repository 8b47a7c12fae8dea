//! Kicks: how a request reaches a vCPU thread, wherever it is.
//!
//! | the thread is | and leaves because |
//! |---|---|
//! | in the guest, or halted in KVM | the signal interrupts KVM_RUN |
//! | about to enter KVM_RUN | `immediate_exit` is set |
//! | waiting for a device | the kick hooks wake it, and [`Kicks::kicked`] is true |
#![allow(unsafe_code)] // signal set-up and tgkill have no safe interface for real-time signals

use super::pause::{self, PerVcpuState, Target};
use super::run_page::RunPage;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Called with the number of a vCPU that was kicked.
pub type KickHook = Box<dyn Fn(usize) + Send + Sync>;

/// The request slots of all vCPUs of a VM, and the way to their threads.
///
/// Made before the devices, which ask it whether to give a wait up and register how to be woken,
/// and before the vCPU threads: a request made before a thread exists is kept.
pub struct Kicks {
    vcpus: Box<[Slot]>,
    hooks: RwLock<Vec<KickHook>>,
}

#[derive(Default)]
struct Slot {
    state: PerVcpuState,
    thread: Mutex<Option<Link>>,
}

/// A live vCPU thread. Taken away by the thread itself before it ends, under the lock a kick
/// holds: a kick never reaches a thread that only got the same number later.
pub(super) struct Link {
    pid: libc::pid_t,
    tid: libc::pid_t,
    page: Arc<RunPage>,
}

impl Kicks {
    /// Slots for `vcpus` vCPUs.
    pub fn new(vcpus: usize) -> Arc<Self> {
        let vcpus = (0..vcpus).map(|_| Slot::default()).collect();
        Arc::new(Self { vcpus, hooks: RwLock::default() })
    }

    /// Whether the vCPU is asked to leave what it does: a device that waits on its behalf then
    /// returns `Outcome::Retry`.
    #[inline]
    pub fn kicked(&self, vcpu: usize) -> bool {
        self.vcpus.get(vcpu).is_some_and(|slot| slot.state.is_requested())
    }

    /// Has `hook` called with every kick, after [`Kicks::kicked`] has become true: it wakes the
    /// vCPU if that waits in a device. It runs on the requester's thread, must not block, and must
    /// not register hooks. It is kept until the `Vcpus` that use these slots are dropped.
    pub fn on_kick(&self, hook: impl Fn(usize) + Send + Sync + 'static) {
        self.hooks.write().unwrap_or_else(PoisonError::into_inner).push(Box::new(hook));
    }

    pub(super) fn forget_hooks(&self) {
        self.hooks.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Number of vCPUs.
    pub fn len(&self) -> usize {
        self.vcpus.len()
    }

    /// Whether there are no vCPUs.
    pub fn is_empty(&self) -> bool {
        self.vcpus.is_empty()
    }

    pub(super) fn state(&self, vcpu: usize) -> &PerVcpuState {
        &self.vcpus[vcpu].state
    }

    /// Asks the vCPU to pause and makes it look.
    pub(super) fn request(&self, vcpu: usize, epoch: u64) {
        self.state(vcpu).request_pause(epoch);
        self.interrupt(vcpu);
    }

    /// Makes the vCPU leave the guest and look who wants it.
    pub(crate) fn interrupt(&self, vcpu: usize) {
        if let Some(link) = &*self.thread(vcpu) {
            pause::interrupt(link);
        }
        for hook in &*self.hooks.read().unwrap_or_else(PoisonError::into_inner) {
            hook(vcpu);
        }
    }

    /// Makes the calling thread the one that runs `vcpu`.
    pub(super) fn attach(&self, vcpu: usize, page: Arc<RunPage>) {
        // SAFETY: takes nothing and gives two numbers.
        let (pid, tid) = unsafe { (libc::getpid(), libc::gettid()) };
        *self.thread(vcpu) = Some(Link { pid, tid, page });
    }

    /// The thread that runs `vcpu` is about to end.
    pub(super) fn detach(&self, vcpu: usize) {
        *self.thread(vcpu) = None;
    }

    fn thread(&self, vcpu: usize) -> MutexGuard<'_, Option<Link>> {
        self.vcpus[vcpu].thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Kicks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kicks").field("vcpus", &self.vcpus.len()).finish_non_exhaustive()
    }
}

impl Target for Link {
    fn raise(&self) {
        self.page.set_immediate_exit(true);
    }

    fn signal(&self) {
        // SAFETY: numbers only; the signal has a handler that does nothing.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.tid, kick_signal()) };
        // The queue of real-time signals can be full for a moment; the thread then has some of
        // them before it, and the coordinator kicks again.
        if sent != 0 {
            tracing::debug!(tid = self.tid, error = %io::Error::last_os_error(), "vcpu kick");
        }
    }
}

/// The signal that interrupts KVM_RUN: the first real-time one that the C library leaves free.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn interrupted(_: libc::c_int) {}

/// Gives [`kick_signal`] a handler that does nothing, so that it interrupts and does not kill. No
/// SA_RESTART: an interrupted wait has to return.
pub(super) fn install_handler() -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction; the handler is async-signal-safe.
    let done = unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = interrupted as *const () as usize;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(kick_signal(), &action, ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Leaves the calling thread open to kicks and to the signals of its own faults, and closed to
/// those meant for the process, whose place is the main thread.
pub(super) fn mask_signals() -> io::Result<()> {
    let open = [
        kick_signal(),
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGABRT,
        libc::SIGSYS,
    ];
    // SAFETY: a signal set on our stack, initialised by sigfillset.
    let error = unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigfillset(set.as_mut_ptr());
        for signal in open {
            libc::sigdelset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), ptr::null_mut())
    };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_request_without_a_thread_is_kept_and_runs_the_hooks() {
        let kicks = Kicks::new(2);
        let seen = Arc::new(AtomicUsize::new(0));
        let (hook, asked) = (seen.clone(), Arc::downgrade(&kicks));
        kicks.on_kick(move |vcpu| {
            assert!(asked.upgrade().unwrap().kicked(vcpu), "the slot is set before the hooks run");
            hook.fetch_add(vcpu + 1, Ordering::Relaxed);
        });
        kicks.request(1, 7);
        assert_eq!(seen.load(Ordering::Relaxed), 2);
        assert!(kicks.kicked(1) && !kicks.kicked(0) && !kicks.kicked(2));
        assert_eq!(kicks.state(1).take(), Some(7));
    }
}
