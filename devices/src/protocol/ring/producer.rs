//! The VMM's side of the register ring: vCPU threads that publish and wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cellblock_wire::{Mapping, futex};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{MAX_VCPUS, Page, RingError, SLOTS, TICKETS, read_entry, write_entry};

/// What a read gives when nobody answers: an empty bus.
const NOBODY: u8 = 0xff;

/// How long a reader looks for its answer before it sleeps. An awake device answers
/// in well under a microsecond, one that has to be woken in about twenty.
const SPIN: Duration = Duration::from_micros(4);

/// The longest single sleep: the last line of defence against a lost wake-up.
const SLICE: Duration = Duration::from_millis(50);

/// A kick came before the access was through. Call again with the same arguments
/// once the vCPU runs again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted by a kick")]
pub struct Interrupted;

/// What a device process did to be no longer believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It claims to have finished what was never published, or less than before.
    /// The device counts as dead from then on.
    #[error(
        "device claims entry {claimed} of its register ring, which is not among {from} to {to}"
    )]
    Index {
        /// The head that the page holds.
        claimed: u32,
        /// The head it showed last.
        from: u32,
        /// The tail.
        to: u32,
    },
    /// It left a read unanswered, or the ring full, for too long. Accesses that
    /// would wait are given up at once until it moves again.
    #[error("device has stopped answering register accesses")]
    Stalled,
}

/// What could not be delivered, cumulative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Writes dropped.
    pub writes: u64,
    /// Reads answered 0xff for want of a device.
    pub reads: u64,
}

/// A read that has been published and not answered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadTicket(pub(super) Option<u32>);

/// Published so far, kept where the device cannot reach it.
struct Publish {
    tail: u32,
    /// The head last seen, and believed.
    head: u32,
}

/// What the VMM keeps for a vCPU, away from the device.
#[derive(Default)]
#[repr(align(64))]
struct Vcpu {
    kicks: AtomicU32,
    waits: AtomicBool,
    ticket: AtomicU32,
    /// Microseconds that the access at hand has waited so far.
    waited: AtomicU32,
}

const LIVE: u8 = 0;
const DEAD: u8 = 1;

/// The publishing end of a register ring, shared by all vCPU threads.
///
/// A vCPU index belongs to one thread; calls with the same index do not overlap,
/// [`Producer::kick`] excepted.
pub struct Producer {
    page: Page,
    doorbell: OwnedFd,
    publish: Mutex<Publish>,
    vcpus: Box<[Vcpu]>,
    state: AtomicU8,
    /// The head at which the device stalled, plus 2^32; 0 while it does not.
    stalled: AtomicU64,
    limit: Duration,
    fault: Mutex<Option<Fault>>,
    fault_event: EventFd,
    lost_writes: AtomicU64,
    lost_reads: AtomicU64,
}

impl Producer {
    /// How long one access waits for a device that does not move.
    pub const LIMIT: Duration = Duration::from_secs(5);

    /// Starts a ring in fresh (zero) shared memory. `doorbell` is a non-blocking
    /// eventfd that the device polls.
    pub fn new(mapping: Mapping, doorbell: OwnedFd, vcpus: usize) -> Result<Producer, RingError> {
        Self::with_limit(mapping, doorbell, vcpus, Self::LIMIT)
    }

    /// [`Producer::new`] with another limit than [`Producer::LIMIT`].
    pub fn with_limit(
        mapping: Mapping,
        doorbell: OwnedFd,
        vcpus: usize,
        limit: Duration,
    ) -> Result<Producer, RingError> {
        if vcpus > MAX_VCPUS {
            return Err(RingError::TooManyVcpus(vcpus));
        }
        futex::probe().map_err(RingError::NoFutexWaitv)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Producer {
            page: Page::new(mapping)?,
            doorbell,
            publish: Mutex::new(Publish { tail: 0, head: 0 }),
            vcpus: (0..vcpus).map(|_| Vcpu::default()).collect(),
            state: AtomicU8::new(LIVE),
            stalled: AtomicU64::new(0),
            limit,
            fault: Mutex::new(None),
            fault_event: EventFd::from_flags(flags).map_err(RingError::FaultEvent)?,
            lost_writes: AtomicU64::new(0),
            lost_reads: AtomicU64::new(0),
        })
    }

    /// Publishes a write. Waits only while the ring is full; a write that finds it
    /// full for [`Producer::LIMIT`] without the device moving is dropped and counted.
    ///
    /// `kicked` tells whether `vcpu` has been asked to stop: then the write was not
    /// published, and is to be made again later.
    pub fn post_write(
        &self,
        vcpu: usize,
        offset: u8,
        value: u8,
        kicked: &dyn Fn() -> bool,
    ) -> Result<(), Interrupted> {
        if !self.publish(vcpu, write_entry(vcpu, offset, value), kicked)? {
            self.lost_writes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Publishes a read, whose answer [`Producer::wait_read`] waits for. As with
    /// [`Producer::post_write`], `Interrupted` means that it was not published.
    pub fn begin_read(
        &self,
        vcpu: usize,
        offset: u8,
        kicked: &dyn Fn() -> bool,
    ) -> Result<ReadTicket, Interrupted> {
        let own = &self.vcpus[vcpu];
        let ticket = match (own.ticket.load(Ordering::Relaxed) + 1) % TICKETS {
            0 => 1,
            ticket => ticket,
        };
        // An answer that was given 2^24 reads ago must not pass for this one's.
        self.page.reply(vcpu).store(0, Ordering::Relaxed);
        let published = self.publish(vcpu, read_entry(vcpu, offset, ticket), kicked)?;
        own.ticket.store(ticket, Ordering::Relaxed);
        Ok(ReadTicket(published.then_some(ticket)))
    }

    /// Waits for the answer to a read, or for a kick: then the read stays
    /// outstanding, and is waited for again with the same ticket.
    ///
    /// 0xff where the device is dead or has stalled.
    pub fn wait_read(
        &self,
        vcpu: usize,
        ticket: ReadTicket,
        kicked: &dyn Fn() -> bool,
    ) -> Result<u8, Interrupted> {
        let value = match ticket.0 {
            None => None,
            Some(ticket) => match self.spin(vcpu, ticket) {
                Some(value) => Some(value),
                None => self.sleep_for_reply(vcpu, ticket, kicked)?,
            },
        };
        self.vcpus[vcpu].waited.store(0, Ordering::Relaxed);
        Ok(value.unwrap_or_else(|| {
            self.lost_reads.fetch_add(1, Ordering::Relaxed);
            NOBODY
        }))
    }

    /// Wakes `vcpu` if it waits here. Its `kicked` must be true by now: whoever
    /// asks a vCPU to stop sets the request first and kicks then.
    pub fn kick(&self, vcpu: usize) {
        let own = &self.vcpus[vcpu];
        // The waiter sets `waits`, then reads `kicks`, then calls `kicked`; all of it
        // sequentially consistent. Either `waits` is seen here, or the waiter sees
        // this kick, and with it the request, or the futex finds the word changed.
        own.kicks.fetch_add(1, Ordering::SeqCst);
        if own.waits.load(Ordering::SeqCst) {
            futex::wake_private(&own.kicks);
        }
    }

    /// Marks the device as dead: every waiting and future read gives 0xff, every
    /// write is dropped and counted. `false` is for a successor that is yet to be
    /// made, when the one before can write no more: what the ring still holds is for it
    /// to carry out.
    pub fn set_dead(&self, dead: bool) {
        if dead {
            self.state.store(DEAD, Ordering::SeqCst);
            self.kick_all();
            return;
        }
        let mut publish = self.lock();
        if self.believe_head(&mut publish).is_err() {
            // What the page says of the past is worthless: nothing is outstanding.
            publish.head = publish.tail;
            self.page.head().store(publish.tail, Ordering::SeqCst);
        }
        self.keep_fault(None);
        self.stalled.store(0, Ordering::SeqCst);
        self.state.store(LIVE, Ordering::SeqCst);
    }

    /// Accesses published and not carried out yet; 0 once the device is dead.
    pub fn pending(&self) -> u32 {
        let mut publish = self.lock();
        match self.believe_head(&mut publish) {
            Ok(()) if self.is_live() => publish.tail.wrapping_sub(publish.head),
            Ok(()) => 0,
            Err(_) => {
                drop(publish);
                self.tell();
                0
            }
        }
    }

    /// Whether every access has been carried out.
    pub fn is_idle(&self) -> bool {
        self.pending() == 0
    }

    /// What the device did wrong last, if anything.
    pub fn fault(&self) -> Option<Fault> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An eventfd that is readable once there was a [`Fault`].
    pub fn fault_event(&self) -> BorrowedFd<'_> {
        self.fault_event.as_fd()
    }

    /// The fault that [`Producer::fault_event`] told of, which it then forgets.
    pub fn take_fault(&self) -> Option<Fault> {
        let _ = self.fault_event.read(); // empty is fine: the fault decides
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What could not be delivered so far.
    pub fn counters(&self) -> Counters {
        Counters {
            writes: self.lost_writes.load(Ordering::Relaxed),
            reads: self.lost_reads.load(Ordering::Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Publish> {
        self.publish.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_live(&self) -> bool {
        self.state.load(Ordering::SeqCst) == LIVE
    }

    /// Puts `entry` into the ring, waiting for room. False: given up.
    fn publish(
        &self,
        vcpu: usize,
        entry: u64,
        kicked: &dyn Fn() -> bool,
    ) -> Result<bool, Interrupted> {
        while self.is_live() {
            match self.try_publish(entry) {
                Ok(true) => {
                    self.vcpus[vcpu].waited.store(0, Ordering::Relaxed);
                    self.wake_device();
                    return Ok(true);
                }
                Ok(false) if self.sleep_for_room(vcpu, kicked)? => {}
                Ok(false) => break,
                Err(_) => self.tell(),
            }
        }
        self.vcpus[vcpu].waited.store(0, Ordering::Relaxed);
        Ok(false)
    }

    fn try_publish(&self, entry: u64) -> Result<bool, Fault> {
        let mut publish = self.lock();
        if publish.tail.wrapping_sub(publish.head) == SLOTS {
            self.believe_head(&mut publish)?;
            if publish.tail.wrapping_sub(publish.head) == SLOTS {
                return Ok(false);
            }
        }
        self.page.entry(publish.tail).store(entry, Ordering::Relaxed);
        publish.tail = publish.tail.wrapping_add(1);
        self.page.tail().store(publish.tail, Ordering::Release);
        Ok(true)
    }

    /// Takes over the head from the page if it can be true. If not, the device is dead, by
    /// the time that the lock is released: a successor is let in under it, and does not pay
    /// for what the one before claimed. [`Producer::tell`] is to follow, without the lock.
    fn believe_head(&self, publish: &mut Publish) -> Result<(), Fault> {
        let claimed = self.page.head().load(Ordering::Acquire);
        let (from, to) = (publish.head, publish.tail);
        if claimed.wrapping_sub(from) > to.wrapping_sub(from) {
            let fault = Fault::Index { claimed, from, to };
            self.keep_fault(Some(fault));
            self.state.store(DEAD, Ordering::SeqCst);
            return Err(fault);
        }
        publish.head = claimed;
        Ok(())
    }

    fn wake_device(&self) {
        fence(Ordering::SeqCst);
        let sleeping = self.page.sleeping();
        if sleeping.load(Ordering::Relaxed) != 0 && sleeping.swap(0, Ordering::SeqCst) != 0 {
            // Full or interrupted, the doorbell is readable all the same.
            let _ = nix::unistd::write(&self.doorbell, &1u64.to_ne_bytes());
        }
    }

    fn answer(&self, vcpu: usize, ticket: u32) -> Result<u8, u32> {
        let word = self.page.reply(vcpu).load(Ordering::Acquire);
        if word >> 8 == ticket { Ok(word as u8) } else { Err(word) }
    }

    fn spin(&self, vcpu: usize, ticket: u32) -> Option<u8> {
        let mut end = None;
        loop {
            for _ in 0..32 {
                if let Ok(value) = self.answer(vcpu, ticket) {
                    return Some(value);
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if now >= *end.get_or_insert(now + SPIN) {
                return None;
            }
        }
    }

    fn sleep_for_reply(
        &self,
        vcpu: usize,
        ticket: u32,
        kicked: &dyn Fn() -> bool,
    ) -> Result<Option<u8>, Interrupted> {
        let own = &self.vcpus[vcpu];
        own.waits.store(true, Ordering::SeqCst);
        self.page.reader_sleeps(vcpu).store(1, Ordering::Relaxed);
        let result = loop {
            let kicks = own.kicks.load(Ordering::SeqCst);
            fence(Ordering::SeqCst);
            let word = match self.answer(vcpu, ticket) {
                Ok(value) => break Ok(Some(value)),
                Err(word) => word,
            };
            if !self.is_live() {
                break Ok(None);
            }
            if kicked() {
                break Err(Interrupted);
            }
            let head = self.page.head().load(Ordering::Relaxed);
            if !self.sleep(own, (self.page.reply(vcpu), word), kicks, head) {
                break Ok(None);
            }
        };
        self.page.reader_sleeps(vcpu).store(0, Ordering::Relaxed);
        own.waits.store(false, Ordering::SeqCst);
        result
    }

    /// Waits for the device to make room, once. True: look again; false: it has stalled.
    fn sleep_for_room(&self, vcpu: usize, kicked: &dyn Fn() -> bool) -> Result<bool, Interrupted> {
        let own = &self.vcpus[vcpu];
        own.waits.store(true, Ordering::SeqCst);
        let kicks = own.kicks.load(Ordering::SeqCst);
        self.page.full().store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        // Recorded as believed, so that a device that shows room here and none in
        // `try_publish` is found out instead of keeping this thread in circles.
        let seen = {
            let mut publish = self.lock();
            self.believe_head(&mut publish).map(|()| (publish.head, publish.tail))
        };
        let result = match seen {
            Err(_) => {
                self.tell();
                Ok(true)
            }
            Ok((head, tail)) if tail.wrapping_sub(head) != SLOTS => Ok(true),
            Ok(_) if !self.is_live() => Ok(true),
            Ok(_) if kicked() => Err(Interrupted),
            Ok((head, _)) => Ok(self.sleep(own, (self.page.head(), head), kicks, head)),
        };
        own.waits.store(false, Ordering::SeqCst);
        result
    }

    /// One slice of sleep. False: the device stands at `head` for too long.
    fn sleep(&self, own: &Vcpu, word: (&AtomicU32, u32), kicks: u32, head: u32) -> bool {
        let stalled_here = 1 << 32 | u64::from(head);
        if self.stalled.load(Ordering::Relaxed) == stalled_here {
            return false;
        }
        let waited = Duration::from_micros(own.waited.load(Ordering::Relaxed).into());
        if waited >= self.limit {
            self.stalled.store(stalled_here, Ordering::Relaxed);
            self.keep_fault(Some(Fault::Stalled));
            self.tell();
            return false;
        }
        let begin = Instant::now();
        futex::wait_either(word, (&own.kicks, kicks), SLICE);
        // No more than a slice is counted: a VM that was frozen as a whole, devices
        // included, is not a stalled device.
        let waited = waited + begin.elapsed().min(SLICE);
        own.waited.store(waited.as_micros() as u32, Ordering::Relaxed);
        true
    }

    fn keep_fault(&self, fault: Option<Fault>) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// Says that there is a fault, and wakes who waits for a device that is dead by it.
    fn tell(&self) {
        // Non-blocking and only ever read by the VMM: at worst it is readable already.
        let _ = self.fault_event.write(1);
        if !self.is_live() {
            self.kick_all();
        }
    }

    fn kick_all(&self) {
        (0..self.vcpus.len()).for_each(|vcpu| self.kick(vcpu));
    }
}
