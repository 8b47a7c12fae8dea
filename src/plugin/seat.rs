//! The VMM's side of a slot: posts events, waits for what the plugin does about them.
//!
//! Only the vCPU's own thread does either; a request to stop comes from anywhere.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cellblock_plugin_api::slot::{ASYNC_ENTRIES, AsyncWrite, MAX_DATA, Slot, at};
use cellblock_plugin_api::{Spin, wait_either, wake_shared};

use super::hub::Hub;

/// How long a vCPU's thread looks for a plugin's answer before it sleeps, at most. Waking a thread
/// on an idle processor costs more than this.
const SPIN: Duration = Duration::from_micros(50);
/// The longest single sleep: the last line of defence against a lost wake-up.
const SLICE: Duration = Duration::from_millis(100);

/// See the module.
pub(super) struct Seat {
    slot: Slot,
    request: Mutex<Option<u64>>,
    requested: AtomicBool,
    line: Mutex<Line>,
}

/// What only the vCPU's thread knows.
pub(super) struct Line {
    /// Number of the last event.
    event: u32,
    /// Number of the last order that was carried out.
    order: u32,
    async_tail: u32,
    /// Failed sets so far.
    errors: u32,
    spin: Spin,
    /// When the thread first slept for the plugin, if it did since the vCPU was last let go.
    slept: Option<Instant>,
}

impl Line {
    /// The vCPU is let go: for how long the thread had nothing to do, from its first sleep on.
    pub(super) fn stood(&mut self) -> Duration {
        self.slept.take().map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// What a plugin did, or why it is not waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    /// It wants something done with the vCPU.
    Order,
    /// It lets the vCPU go.
    Resume,
    /// Nothing: the vCPU is asked to pause.
    Kicked,
    /// Nothing, and it is gone.
    Gone,
}

/// The facts of an event.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Facts {
    pub(super) kind: u32,
    pub(super) flags: u32,
    pub(super) len: u32,
    /// Which registers were sent along.
    pub(super) cached: u32,
    pub(super) words: [u64; 4],
}

impl Seat {
    pub(super) fn new(slot: Slot) -> Seat {
        let line = Line {
            event: 0,
            order: 0,
            async_tail: 0,
            errors: 0,
            spin: Spin::new(SPIN),
            slept: None,
        };
        let requested = AtomicBool::new(false);
        Seat { slot, request: Mutex::new(None), requested, line: Mutex::new(line) }
    }

    pub(super) fn slot(&self) -> &Slot {
        &self.slot
    }

    /// Asks for the vCPU to stop, in place of a request that was not taken yet.
    pub(super) fn request_pause(&self, user: u64) {
        let mut request = self.request.lock().unwrap_or_else(PoisonError::into_inner);
        *request = Some(user);
        self.requested.store(true, Ordering::Release);
    }

    pub(super) fn take_request(&self) -> Option<u64> {
        if !self.requested.load(Ordering::Acquire) {
            return None;
        }
        let mut request = self.request.lock().unwrap_or_else(PoisonError::into_inner);
        self.requested.store(false, Ordering::Release);
        request.take()
    }

    pub(super) fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the plugin of an event. Data and registers are in the slot by now.
    pub(super) fn post(&self, line: &mut Line, facts: &Facts) {
        let word = |at, value| self.slot.word(at).store(value, Ordering::Relaxed);
        word(at::KIND, facts.kind);
        word(at::FLAGS, facts.flags);
        word(at::LEN, facts.len);
        word(at::CACHED, facts.cached);
        for (n, value) in facts.words.iter().enumerate() {
            self.slot.store64(at::WORDS + 8 * n, *value);
        }
        line.event = line.event.wrapping_add(1);
        self.slot.word(at::EVENT_SEQ).store(line.event, Ordering::Release);
        self.slot.ring(at::NEWS, at::PLUGIN_SLEEPS);
    }

    /// Waits until the plugin moves.
    pub(super) fn wait(
        &self,
        line: &mut Line,
        hub: &Hub,
        vcpu: usize,
        gone: &dyn Fn() -> bool,
    ) -> Move {
        let (event, order) = (line.event, line.order);
        let look = || {
            // Orders first: the plugin waits for each before it resumes.
            if self.slot.word(at::ORDER_SEQ).load(Ordering::Acquire) != order {
                Some(Move::Order)
            } else if self.slot.word(at::RESUME_SEQ).load(Ordering::Acquire) == event {
                Some(Move::Resume)
            } else {
                None
            }
        };
        let stop = || {
            if hub.kicked(vcpu) {
                Some(Move::Kicked)
            } else if gone() {
                Some(Move::Gone)
            } else {
                None
            }
        };
        // A plugin that never rests is looked at after the kick.
        if let Some(stopped) = stop() {
            return look().filter(|found| *found == Move::Resume).unwrap_or(stopped);
        }
        if !line.spin.look(|| look().is_some() || stop().is_some()) {
            line.slept.get_or_insert_with(Instant::now);
        }
        self.sleep(&mut line.spin, hub, vcpu, || look().or_else(stop))
    }

    /// Sleeps until `done` gives something.
    fn sleep<R>(&self, spin: &mut Spin, hub: &Hub, vcpu: usize, done: impl Fn() -> Option<R>) -> R {
        if let Some(result) = done() {
            return result;
        }
        let begin = Instant::now();
        let (doorbell, calls) = (self.slot.word(at::CALLS), hub.calls(vcpu));
        self.slot.word(at::VMM_SLEEPS).store(1, Ordering::SeqCst);
        hub.set_sleeps(vcpu, true);
        let result = loop {
            let rung = doorbell.load(Ordering::SeqCst);
            let called = calls.load(Ordering::SeqCst);
            if let Some(result) = done() {
                break result;
            }
            wait_either((doorbell, rung), (calls, called), SLICE);
        };
        hub.set_sleeps(vcpu, false);
        self.slot.word(at::VMM_SLEEPS).store(0, Ordering::Relaxed);
        spin.slept(begin.elapsed());
        result
    }

    /// Waits for something that only other threads of the VMM do.
    pub(super) fn rest<R>(
        &self,
        line: &mut Line,
        hub: &Hub,
        vcpu: usize,
        done: impl Fn() -> Option<R>,
    ) -> R {
        self.sleep(&mut line.spin, hub, vcpu, done)
    }

    /// Reports a write without waiting for more than room: `false` when the vCPU was kicked first.
    pub(super) fn post_async(
        &self,
        line: &mut Line,
        hub: &Hub,
        vcpu: usize,
        gone: &dyn Fn() -> bool,
        write: &AsyncWrite,
    ) -> bool {
        let tail = line.async_tail;
        // A head that cannot be is a full ring: it holds up this plugin's own writes only.
        let room = || {
            let head = self.slot.word(at::ASYNC_HEAD).load(Ordering::Acquire);
            tail.wrapping_sub(head) < ASYNC_ENTRIES
        };
        if !room() {
            let found = self.sleep(&mut line.spin, hub, vcpu, || {
                if room() || gone() { Some(true) } else { hub.kicked(vcpu).then_some(false) }
            });
            if !found {
                return false;
            }
            if !room() {
                return true; // nobody is there to read it
            }
        }
        self.slot.set_async_write(tail, write);
        line.async_tail = tail.wrapping_add(1);
        self.slot.word(at::ASYNC_TAIL).store(line.async_tail, Ordering::Release);
        self.slot.ring(at::NEWS, at::PLUGIN_SLEEPS);
        true
    }

    /// Takes the order that [`Move::Order`] told of: its number and its data, copied.
    pub(super) fn take_order(&self, line: &mut Line) -> (u32, Vec<u8>) {
        line.order = self.slot.word(at::ORDER_SEQ).load(Ordering::Acquire);
        let len = self.slot.word(at::ORDER_LEN).load(Ordering::Relaxed) as usize;
        let mut bytes = vec![0; len.min(cellblock_plugin_api::slot::MAX_ORDER)];
        self.slot.read(at::ORDER_DATA, &mut bytes);
        (self.slot.word(at::ORDER).load(Ordering::Relaxed), bytes)
    }

    /// Answers the order.
    pub(super) fn reply(&self, line: &Line, result: Result<Vec<u8>, i32>) {
        let (errno, bytes) = match result {
            Ok(bytes) => (0, bytes),
            Err(errno) => (errno, Vec::new()),
        };
        self.slot.write(at::ORDER_DATA, &bytes);
        self.slot.word(at::REPLY_LEN).store(bytes.len() as u32, Ordering::Relaxed);
        self.slot.word(at::REPLY_ERRNO).store(errno as u32, Ordering::Relaxed);
        self.slot.word(at::REPLY_SEQ).store(line.order, Ordering::Release);
        self.slot.ring(at::NEWS, at::PLUGIN_SLEEPS);
    }

    /// Tells that registers could not be set.
    pub(super) fn set_failed(&self, line: &mut Line, errno: i32) {
        line.errors = line.errors.wrapping_add(1);
        self.slot.word(at::SET_ERRNO).store(errno as u32, Ordering::Relaxed);
        self.slot.word(at::SET_ERRORS).store(line.errors, Ordering::Release);
        self.slot.ring(at::NEWS, at::PLUGIN_SLEEPS);
    }

    /// Puts an access's data where the plugin sees it.
    pub(super) fn put_data(&self, data: &[u8]) {
        self.slot.write(at::DATA, &data[..data.len().min(MAX_DATA)]);
    }

    /// The data the plugin answers with.
    pub(super) fn take_data(&self, data: &mut [u8]) {
        let len = data.len().min(MAX_DATA);
        self.slot.read(at::DATA, &mut data[..len]);
    }

    /// Nothing comes any more.
    pub(super) fn close(&self) {
        self.take_request();
        self.slot.word(at::CLOSED).store(1, Ordering::Release);
        let news = self.slot.word(at::NEWS);
        news.fetch_add(1, Ordering::SeqCst);
        wake_shared(news);
    }
}
