//! A vCPU as its plugin sees it: events, and how its thread is asked between an event and the
//! resume; `state` has what is asked for.

mod state;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cellblock_wire::futex::wait_shared;
use kvm_bindings::{kvm_debugregs, kvm_regs, kvm_sregs};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Error, refused};
use crate::plain::Plain;
use crate::slot::{MAX_DATA, MAX_ORDER, Slot, at, flag, kind, registers};
use crate::spin::Spin;
use crate::types::{Access, Data, Event, Space};

/// How long a plugin looks for news before it sleeps, unless it says otherwise.
const SPIN: Duration = Duration::from_micros(30);
/// The longest single sleep, after which it is checked that the VMM is there.
const SLICE: Duration = Duration::from_millis(200);

/// A vCPU.
#[derive(Debug)]
pub struct Vcpu {
    id: u32,
    slot: Slot,
    life: Arc<OwnedFd>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Number of the last event.
    event: u32,
    /// That event has not been resumed.
    held: bool,
    order: u32,
    async_head: u32,
    /// Failed sets that were told of.
    set_errors: u32,
    /// Which registers are known, from the VMM or as they were set.
    known: u32,
    sets: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    debugregs: kvm_debugregs,
    spin: Spin,
}

impl Vcpu {
    pub(super) fn new(id: u32, slot: Slot, life: Arc<OwnedFd>) -> Vcpu {
        let state = State {
            event: 0,
            held: false,
            order: 0,
            async_head: 0,
            set_errors: 0,
            known: 0,
            sets: 0,
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            debugregs: kvm_debugregs::default(),
            spin: Spin::new(SPIN),
        };
        Vcpu { id, slot, life, state: Mutex::new(state) }
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// How long [`Vcpu::wait`] looks for an event before it sleeps, at most. Longer answers the
    /// guest sooner and costs processor time.
    pub fn set_spin(&self, limit: Duration) {
        self.state().spin = Spin::new(limit);
    }

    /// Waits for the next event.
    ///
    /// # Errors
    /// What KVM had against registers that were set before the last resume: the event is then for
    /// the next call. [`Error::Closed`] when the VMM has let go of the vCPU; [`Error::Protocol`]
    /// while the last event has not been resumed.
    pub fn wait(&self) -> Result<Event, Error> {
        match self.wait_until(None)? {
            Some(event) => Ok(event),
            None => Err(Error::Closed), // not reached: there is no deadline
        }
    }

    /// As [`Vcpu::wait`], for a limited time: `None` when nothing came.
    ///
    /// # Errors
    /// As [`Vcpu::wait`].
    pub fn wait_timeout(&self, limit: Duration) -> Result<Option<Event>, Error> {
        self.wait_until(Instant::now().checked_add(limit))
    }

    fn wait_until(&self, deadline: Option<Instant>) -> Result<Option<Event>, Error> {
        let mut state = self.state();
        if state.held {
            return Err(Error::Protocol("the last event of the vCPU has not been resumed"));
        }
        let (event, head, errors) = (state.event, state.async_head, state.set_errors);
        let there = || {
            let new_event = self.slot.word(at::EVENT_SEQ).load(Ordering::Acquire) != event;
            let word = |at| self.slot.word(at).load(Ordering::Acquire);
            new_event || word(at::ASYNC_TAIL) != head || word(at::SET_ERRORS) != errors
        };
        if !self.wait_for(&mut state, deadline, there)? {
            return Ok(None);
        }
        // The event before what came before it: what this load sees, the next ones see too.
        let seq = self.slot.word(at::EVENT_SEQ).load(Ordering::Acquire);
        let errors = self.slot.word(at::SET_ERRORS).load(Ordering::Acquire);
        if errors != state.set_errors {
            state.set_errors = errors;
            let errno = self.slot.word(at::SET_ERRNO).load(Ordering::Relaxed);
            let errno = Errno::from_raw(errno as i32);
            return Err(refused("setting registers at the last resume")(errno));
        }
        if self.slot.word(at::ASYNC_TAIL).load(Ordering::Acquire) != state.async_head {
            return Ok(Some(self.next_async(&mut state)));
        }
        state.event = seq;
        state.held = true;
        state.sets = 0;
        state.known = 0;
        let cached = self.slot.word(at::CACHED).load(Ordering::Relaxed);
        self.learn(&mut state, cached);
        self.slot.store64(at::RESULT, 0);
        Ok(Some(self.event()))
    }

    fn next_async(&self, state: &mut State) -> Event {
        let write = self.slot.async_write(state.async_head);
        state.async_head = state.async_head.wrapping_add(1);
        self.slot.word(at::ASYNC_HEAD).store(state.async_head, Ordering::Release);
        // A vCPU that found the ring full waits for room.
        self.slot.ring(at::CALLS, at::VMM_SLEEPS);
        Event::Access(Access {
            space: if write.mmio { Space::Mmio } else { Space::Port },
            address: write.address,
            is_write: true,
            no_resume: true,
            data: Data::new(&write.data[..write.len as usize]),
        })
    }

    fn event(&self) -> Event {
        let word = |n: usize| self.slot.load64(at::WORDS + 8 * n);
        let facts = |at| self.slot.word(at).load(Ordering::Relaxed);
        match facts(at::KIND) {
            kind::INIT => Event::Init,
            kind::PAUSED => Event::Paused { user: word(0) },
            kind::HYPERV_CALL => Event::HypervCall { input: word(0), params: [word(1), word(2)] },
            kind::HYPERV_SYNIC => Event::HypervSynic {
                msr: word(0) as u32,
                control: word(1),
                evt_page: word(2),
                msg_page: word(3),
            },
            kind::DEBUG => Event::Debug { pc: word(0), dr6: word(1), dr7: word(2) },
            other => {
                let flags = facts(at::FLAGS);
                let len = (facts(at::LEN) as usize).min(MAX_DATA);
                let mut data = [0; 8];
                let data = match data.get_mut(..len) {
                    Some(few) => {
                        self.slot.read(at::DATA, few);
                        Data::new(few)
                    }
                    None => {
                        let mut many = vec![0; len];
                        self.slot.read(at::DATA, &mut many);
                        Data::new(&many)
                    }
                };
                let access = Access {
                    space: if flags & flag::MMIO == 0 { Space::Port } else { Space::Mmio },
                    address: word(0),
                    is_write: flags & flag::WRITE != 0,
                    no_resume: false,
                    data,
                };
                if other == kind::WATCHED { Event::Watched(access) } else { Event::Access(access) }
            }
        }
    }

    /// Answers a read: the bytes the guest gets. Fewer than it reads leave zeroes at the end.
    ///
    /// # Errors
    /// [`Error::Protocol`] without an event.
    pub fn answer(&self, data: &[u8]) -> Result<(), Error> {
        let _state = self.held()?;
        self.slot.write(at::DATA, &data[..data.len().min(MAX_DATA)]);
        Ok(())
    }

    /// The value a Hyper-V hypercall returns.
    ///
    /// # Errors
    /// [`Error::Protocol`] without an event.
    pub fn set_hypercall_result(&self, result: u64) -> Result<(), Error> {
        let _state = self.held()?;
        self.slot.store64(at::RESULT, result);
        Ok(())
    }

    /// Where the data of the event lies until the resume, for the C interface. The VMM takes it
    /// from there as well.
    pub fn data_address(&self) -> *mut u8 {
        self.slot.data_address()
    }

    /// Lets the vCPU run on from its event.
    ///
    /// # Errors
    /// [`Error::Protocol`] without an event.
    pub fn resume(&self) -> Result<(), Error> {
        let mut state = self.held()?;
        for (bit, at, bytes) in [
            (registers::REGS, at::SET_REGS, state.regs.bytes()),
            (registers::SREGS, at::SET_SREGS, state.sregs.bytes()),
            (registers::DEBUGREGS, at::SET_DEBUGREGS, state.debugregs.bytes()),
        ] {
            if state.sets & bit != 0 {
                self.slot.write(at, bytes);
            }
        }
        state.held = false;
        self.slot.word(at::SETS).store(state.sets, Ordering::Relaxed);
        self.slot.word(at::RESUME_SEQ).store(state.event, Ordering::Release);
        self.slot.ring(at::CALLS, at::VMM_SLEEPS);
        Ok(())
    }

    /// Makes registers known that are not.
    fn know(
        &self,
        state: &mut State,
        bit: u32,
        number: u32,
        what: &'static str,
    ) -> Result<(), Error> {
        if state.known & bit == 0 {
            self.order(state, what, number, &[])?;
            self.learn(state, bit);
        }
        Ok(())
    }

    /// Copies registers that the VMM has put into the slot.
    fn learn(&self, state: &mut State, bits: u32) {
        fn copy<T: Plain>(slot: &Slot, at: usize, to: &mut T) {
            let mut bytes = [0; size_of::<kvm_sregs>()];
            let bytes = &mut bytes[..size_of::<T>()];
            slot.read(at, bytes);
            *to = T::from_bytes(bytes).unwrap_or_default();
        }
        if bits & registers::REGS != 0 {
            copy(&self.slot, at::REGS, &mut state.regs);
        }
        if bits & registers::SREGS != 0 {
            copy(&self.slot, at::SREGS, &mut state.sregs);
        }
        if bits & registers::DEBUGREGS != 0 {
            copy(&self.slot, at::DEBUGREGS, &mut state.debugregs);
        }
        state.known |= bits;
    }

    /// Has the vCPU's thread do something, and waits for the result.
    fn order(
        &self,
        state: &mut State,
        what: &'static str,
        number: u32,
        bytes: &[u8],
    ) -> Result<Vec<u8>, Error> {
        if bytes.len() > MAX_ORDER {
            return Err(refused(what)(Errno::E2BIG));
        }
        self.slot.write(at::ORDER_DATA, bytes);
        self.slot.word(at::ORDER_LEN).store(bytes.len() as u32, Ordering::Relaxed);
        self.slot.word(at::ORDER).store(number, Ordering::Relaxed);
        state.order = state.order.wrapping_add(1);
        let seq = state.order;
        self.slot.word(at::ORDER_SEQ).store(seq, Ordering::Release);
        self.slot.ring(at::CALLS, at::VMM_SLEEPS);
        let done = || self.slot.word(at::REPLY_SEQ).load(Ordering::Acquire) == seq;
        self.wait_for(state, None, done)?;
        let errno = self.slot.word(at::REPLY_ERRNO).load(Ordering::Relaxed);
        if errno != 0 {
            return Err(refused(what)(Errno::from_raw(errno as i32)));
        }
        let len = self.slot.word(at::REPLY_LEN).load(Ordering::Relaxed) as usize;
        let mut answer = vec![0; len.min(MAX_ORDER)];
        self.slot.read(at::ORDER_DATA, &mut answer);
        Ok(answer)
    }

    /// Waits until the slot is `ready`, at most until the deadline: then `false`.
    fn wait_for(
        &self,
        state: &mut State,
        deadline: Option<Instant>,
        ready: impl Fn() -> bool,
    ) -> Result<bool, Error> {
        if state.spin.look(&ready) {
            return Ok(true);
        }
        let begin = Instant::now();
        let sleeps = self.slot.word(at::PLUGIN_SLEEPS);
        sleeps.store(1, Ordering::SeqCst);
        let result = loop {
            let news = self.slot.word(at::NEWS).load(Ordering::SeqCst);
            if ready() {
                break Ok(true);
            }
            if self.slot.word(at::CLOSED).load(Ordering::Acquire) != 0 {
                break Err(Error::Closed);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break Ok(false);
            }
            let limit = left.unwrap_or(SLICE).min(SLICE);
            let slept = Instant::now();
            wait_shared(self.slot.word(at::NEWS), news, limit);
            if slept.elapsed() >= SLICE && self.hung_up() && !ready() {
                break Err(Error::Closed);
            }
        };
        sleeps.store(0, Ordering::Relaxed);
        state.spin.slept(begin.elapsed());
        result
    }

    /// Whether the VMM has died: its end of a pipe is gone then.
    fn hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.life.as_fd(), PollFlags::empty())];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
    }

    fn held(&self) -> Result<MutexGuard<'_, State>, Error> {
        let state = self.state();
        if !state.held {
            return Err(Error::Protocol("the vCPU has no event that could be resumed"));
        }
        Ok(state)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
