//! The pause core: how a vCPU thread is stopped from outside without ever losing a request.
//!
//! No KVM in here, so that the whole protocol is model-checked (`pause/model.rs`, which has the
//! command). Its pieces:
//!
//! * [`PerVcpuState`]: one request slot per vCPU, shared by everyone who may ask. A request does
//!   not stop anything by itself, and a later one overwrites it.
//! * [`interrupt`]: brings the thread out of the guest, so that it looks at its slot.
//! * [`run`], [`look`], [`wait`]: what the vCPU thread does.
//! * [`release`]: lets a vCPU go again, whether it has parked or not.
//!
//! # The order that loses nothing
//! ```text
//! requester                            vCPU thread
//! 1 set the slot                       a clear immediate_exit
//! 2 set immediate_exit                 b take the slot: if full, ack, wait for a command, go to a
//! 3 signal the thread                  c look at the slot: if full, go to a
//!                                      d KVM_RUN; interrupted: go to a
//! ```
//! A request that step b misses has its step 2 after step a, so that KVM_RUN returns at once, or
//! its step 3 during d. Were a after b, it could erase the trace of a request that b did not see.
//! That step a cannot drift behind b in the processor's store buffer is the work of the slot's
//! lock, which b takes even when the slot is empty: `immediate_exit` itself needs no ordering.

use std::sync::PoisonError;

#[cfg(loom)]
use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};
#[cfg(not(loom))]
use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};

/// The request slot of one vCPU.
#[derive(Debug)]
pub struct PerVcpuState {
    pause_request: Mutex<Option<u64>>,
    /// Whether the slot is full, for looks without the lock. Written under the lock only.
    requested: AtomicBool,
}

impl Default for PerVcpuState {
    fn default() -> Self {
        Self { pause_request: Mutex::new(None), requested: AtomicBool::new(false) }
    }
}

impl PerVcpuState {
    /// Asks the vCPU to pause, with a value that comes back in its ack; overwrites a request that
    /// was not taken yet. The thread notices when it next looks: [`interrupt`] makes that soon.
    pub fn request_pause(&self, data: u64) {
        let mut slot = self.slot();
        *slot = Some(data);
        self.requested.store(true, Ordering::Release);
    }

    /// Whether a request waits. One load: this is on the path of every entry into the guest.
    #[inline]
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }

    /// Empties the slot.
    pub fn take(&self) -> Option<u64> {
        let mut slot = self.slot();
        self.requested.store(false, Ordering::Release);
        slot.take()
    }

    /// Takes the request back, if it is still this one that waits. `false` means that the vCPU
    /// has taken it, and parks, or that another request took its place.
    pub fn withdraw(&self, data: u64) -> bool {
        let mut slot = self.slot();
        let ours = *slot == Some(data);
        if ours {
            *slot = None;
            self.requested.store(false, Ordering::Release);
        }
        ours
    }

    fn slot(&self) -> MutexGuard<'_, Option<u64>> {
        // Nothing between lock and unlock can leave the slot half-written.
        self.pause_request.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A vCPU thread as a requester reaches it.
pub trait Target {
    /// Sets `kvm_run.immediate_exit`: the next KVM_RUN does not enter the guest.
    fn raise(&self);
    /// Interrupts the KVM_RUN in progress; has no effect on a thread that is not in one.
    fn signal(&self);
}

/// Makes the vCPU look at its slot, which the caller has filled. May be repeated at any time: too
/// many cost one empty look each.
pub fn interrupt(target: &impl Target) {
    target.raise();
    target.signal();
}

/// A vCPU has parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack<A> {
    /// Which vCPU.
    pub vcpu: usize,
    /// The value of the request it answers.
    pub epoch: u64,
    /// The access it waits for a device to finish, if it parked in the middle of one. That
    /// instruction is then not complete, and is taken up again after the resume.
    pub outstanding: Option<A>,
}

/// What a parked vCPU is told.
#[derive(Debug)]
pub enum Command<W> {
    /// Run for the first time.
    Run,
    /// Run on from the pause with this epoch. One for another pause is left over from a pause
    /// that was given up, and has no effect.
    Resume(u64),
    /// Do this work and stay parked.
    Work(W),
    /// Never run again.
    Stop,
}

/// How one visit to the guest ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<E> {
    /// The guest was left without anything to handle (`EINTR`, `EAGAIN`).
    Interrupted,
    /// The guest's access was served: it can go on.
    Served,
    /// The guest ended the VM, or cannot go on.
    Ended(E),
    /// A command to stop came in while an access was outstanding.
    Stopped,
}

/// What follows a wait for a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Woken {
    /// Go on.
    Run,
    /// End.
    Stop,
}

/// A vCPU as its own thread sees it.
pub trait Seat {
    /// An access outstanding.
    type Access;
    /// Why the guest ended.
    type End;
    /// Work to be done while parked.
    type Work;

    /// The vCPU's request slot.
    fn state(&self) -> &PerVcpuState;
    /// Clears `kvm_run.immediate_exit`.
    fn clear(&self);
    /// Whether somebody but the requester of a pause wants the vCPU before it enters the guest. Who
    /// does says so first, and then interrupts the vCPU as a requester would.
    fn wanted(&self) -> bool;
    /// Gives the vCPU, which is between two instructions, to whoever wants it, until they are done
    /// or the vCPU is asked to pause.
    fn attend(&mut self) -> Step<Self::End>;
    /// One KVM_RUN, and what the guest's exit asks for.
    fn enter(&mut self) -> Step<Self::End>;
    /// Completes the access that the last [`Seat::enter`] served, without the guest going on:
    /// afterwards the vCPU's registers are those between two instructions. Leaves
    /// `immediate_exit` set.
    fn complete(&mut self) -> Step<Self::End>;
    /// Says that the vCPU has parked.
    fn ack(&mut self, epoch: u64, outstanding: Option<Self::Access>);
    /// Waits for the next command; `None` when nobody can send one any more.
    fn command(&mut self) -> Option<Command<Self::Work>>;
    /// Does one piece of work.
    fn work(&mut self, work: Self::Work);
}

/// Runs the guest until it ends the VM (the reason is given) or the vCPU is told to stop.
pub fn run<S: Seat>(seat: &mut S) -> Option<S::End> {
    loop {
        // Nobody is attended on the way into the guest: whatever came meanwhile is looked for again,
        // after immediate_exit is cleared.
        let step = if seat.state().is_requested() {
            interrupted(seat.complete())
        } else if seat.wanted() {
            match interrupted(seat.complete()) {
                Step::Interrupted => interrupted(seat.attend()),
                ended => ended,
            }
        } else {
            seat.enter()
        };
        match step {
            Step::Served => {}
            Step::Interrupted => {
                if look(seat, None) == Woken::Stop {
                    return None;
                }
            }
            Step::Ended(end) => return Some(end),
            Step::Stopped => return None,
        }
    }
}

/// Where the guest is not to be entered although it could be.
fn interrupted<E>(step: Step<E>) -> Step<E> {
    match step {
        Step::Served => Step::Interrupted,
        step => step,
    }
}

/// Takes the request, if there is one, and then stays parked until told to go on. The caller has
/// to look at the slot again before it enters the guest.
pub fn look<S: Seat>(seat: &mut S, outstanding: Option<S::Access>) -> Woken {
    seat.clear();
    match seat.state().take() {
        None => Woken::Run,
        Some(epoch) => {
            seat.ack(epoch, outstanding);
            wait(seat, |command| matches!(command, Command::Resume(to) if *to == epoch))
        }
    }
}

/// Serves commands until one `wakes` the vCPU, or ends it.
pub fn wait<S: Seat>(seat: &mut S, wakes: impl Fn(&Command<S::Work>) -> bool) -> Woken {
    loop {
        match seat.command() {
            None | Some(Command::Stop) => return Woken::Stop,
            Some(Command::Work(work)) => seat.work(work),
            Some(command) if wakes(&command) => return Woken::Run,
            Some(Command::Run | Command::Resume(_)) => {}
        }
    }
}

/// Lets a vCPU go that was asked to pause: one that has `arrived` is resumed, from one that has
/// not the request is taken back. If it is just on its way in, the command meets it there.
pub fn release<W>(state: &PerVcpuState, epoch: u64, arrived: bool, send: impl FnOnce(Command<W>)) {
    if arrived || !state.withdraw(epoch) {
        send(Command::Resume(epoch));
    }
}

#[cfg(all(test, loom))]
mod model;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::PerVcpuState;

    #[test]
    fn the_slot_holds_the_last_request() {
        let state = PerVcpuState::default();
        assert!(!state.is_requested());
        assert_eq!(state.take(), None);
        state.request_pause(1);
        state.request_pause(u64::MAX);
        assert!(state.is_requested());
        assert_eq!(state.take(), Some(u64::MAX));
        assert!(!state.is_requested());
    }

    #[test]
    fn only_the_request_that_waits_can_be_taken_back() {
        let state = PerVcpuState::default();
        assert!(!state.withdraw(1));
        state.request_pause(1);
        state.request_pause(2);
        assert!(!state.withdraw(1));
        assert!(state.is_requested());
        assert!(state.withdraw(2));
        assert!(!state.is_requested());
        assert_eq!(state.take(), None);
    }
}
