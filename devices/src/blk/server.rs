//! The service of one ring: take every available chain, answer what is done, interrupt
//! once, poll for a while, sleep.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::Bytes;

use super::chain::Chain;
use super::clear::{Clear, Range};
use super::engine::{Done, Engine, EngineError, Job, SyncEngine, Uring, UringEngine};
use super::execute::{Disk, ExecuteError};
use super::memory::Slice;
use super::poll::{PollWindow, given_up};
use super::request::{Operation, Parser, Refusal};
use super::ring::{Ring, RingError};
use super::throttle::{Stall, Throttle, now};
use super::view::View;
use super::worker::{Control, Equipment, Start, Stopped, signal};
use crate::protocol::counters::VirtioBlkCounters;

/// What a queue's thread has for as long as it lives.
#[derive(Debug)]
pub(super) struct Server {
    queue: Queue,
    /// Where requests go; without it, they are done by system calls.
    uring: Option<Uring>,
}

/// What the service of a ring needs apart from its engine.
#[derive(Debug)]
struct Queue {
    number: u16,
    control: Arc<Control>,
    disk: Arc<Disk>,
    sync_failed: Arc<AtomicBool>,
    counters: VirtioBlkCounters,
    throttle: Arc<Throttle>,
    poll: Duration,
    /// An unusable image is reported once, not once a request.
    reported: AtomicBool,
}

/// A ring being served.
struct Service<'m, E> {
    ring: Ring<'m>,
    parser: Parser<'m>,
    engine: E,
    /// Something was answered in this round.
    answered: bool,
    /// Rounds with answers since the driver was last thought of.
    unsaid: u32,
    /// The next chain has to wait.
    stall: Option<Stall>,
    /// It had to, and is tried again.
    waited: bool,
    /// Requests left by a process before this one that the throttle has let through.
    paid: u64,
    /// When this round of requests began.
    began: Instant,
}

/// Rounds after which the driver is interrupted although there is more to do.
const ROUNDS: u32 = 8;
/// A round that takes longer is over with the request that did it, and announced: the driver
/// does not wait for answers it could have.
const SLOW: Duration = Duration::from_micros(100);
/// Looks at the ring between two looks at the clock.
const LOOKS: u32 = 32;

/// Why the service of a ring ended.
enum End {
    Stopped,
    Broken(RingError),
    Engine(EngineError),
}

impl From<RingError> for End {
    fn from(error: RingError) -> End {
        End::Broken(error)
    }
}

impl From<EngineError> for End {
    fn from(error: EngineError) -> End {
        End::Engine(error)
    }
}

impl Server {
    pub fn new(control: Arc<Control>, equipment: Equipment, uring: Option<Uring>) -> Server {
        let Equipment { queue: number, disk, sync_failed, counters, throttle, poll, .. } =
            equipment;
        let reported = AtomicBool::new(false);
        let queue =
            Queue { number, control, disk, sync_failed, counters, throttle, poll, reported };
        Server { queue, uring }
    }

    pub fn control(&self) -> &Control {
        &self.queue.control
    }

    /// Serves a ring until told to stop.
    pub fn serve(&mut self, start: &Start) -> Stopped {
        let mut next_avail = start.layout.next_avail;
        let mut broken = start.broken;
        self.queue.counters.excuse(false);
        if broken {
            self.queue.leave_alone(start);
        } else {
            match self.serve_ring(start, &mut next_avail) {
                Ok(never) => match never {},
                Err(End::Stopped) => {}
                Err(End::Broken(error)) => {
                    broken = true;
                    self.queue.give_up(start, &error);
                }
                // What is in flight can neither be waited for nor taken back: only the end
                // of the process does that.
                Err(End::Engine(error)) => panic!("{}", super::chain(&error)),
            }
        }
        self.queue.waits_no_more();
        self.queue.counters.excuse(true);
        Stopped { next_avail, broken }
    }

    fn serve_ring(&mut self, start: &Start, next_avail: &mut u16) -> Result<Infallible, End> {
        let view = View::new(&start.memory).map_err(RingError::Access)?;
        let ring = Ring::new(&view, &start.layout)?;
        let parser = Parser::new(&view, start.limits);
        let paid = self.queue.counters.resume(ring.left() as u64);
        self.queue.begin(start);
        let disk = &*self.queue.disk;
        let write_through = start.write_through && disk.is_durable();
        match &mut self.uring {
            Some(uring) => {
                let engine = UringEngine::new(uring, disk, &view, write_through);
                self.queue.run(start, Service::new(ring, parser, engine, paid), next_avail)
            }
            None => {
                let engine = SyncEngine::new(disk, &view, write_through);
                self.queue.run(start, Service::new(ring, parser, engine, paid), next_avail)
            }
        }
    }
}

impl<'m, E> Service<'m, E> {
    fn new(ring: Ring<'m>, parser: Parser<'m>, engine: E, paid: u64) -> Service<'m, E> {
        let (answered, unsaid, stall, waited) = (false, 0, None, false);
        let began = Instant::now();
        Service { ring, parser, engine, answered, unsaid, stall, waited, paid, began }
    }
}

impl Queue {
    fn begin(&self, start: &Start) {
        // What was written while there was a cache is not to stay in it: a driver that
        // was told that there is none sends no flush. Done here and not in the answer
        // to the front end, which waits for that.
        if start.write_through
            && self.disk.is_durable()
            && let Err(error) = self.on_image(|| self.disk.file.sync_data())
        {
            // The kernel says so once, and the driver may ask no more.
            self.sync_failed.store(true, Ordering::Relaxed);
            tracing::warn!(%error, "writing the image's cached data");
        }
        if start.interrupt {
            signal(start.call.as_ref());
        }
    }

    /// Counts a ring that was found broken, once however often it is started again.
    fn give_up(&self, start: &Start, error: &RingError) {
        if let Some(record) = &start.layout.record {
            record.set_broken();
        }
        if error.is_invalid_avail_idx() {
            self.counters.invalid_avail_idx();
        } else {
            self.counters.failed();
        }
        tracing::warn!(error = %super::chain(error), "ring is stopped until the device is reset");
        self.leave_alone(start);
    }

    /// Leaves a broken ring alone until the front end takes it back.
    fn leave_alone(&self, start: &Start) {
        // The driver may be waiting for what was answered before. Both may have been told
        // already, by a process that died.
        signal(start.call.as_ref());
        signal(start.err.as_ref());
        while !self.stopping() {
            self.sleep();
            self.counters.beat();
        }
    }

    /// What may take as long as the image takes.
    #[inline]
    fn on_image<T>(&self, act: impl FnOnce() -> T) -> T {
        self.counters.excuse(true);
        let result = act();
        self.counters.excuse(false);
        result
    }

    fn run<'m, E: Engine<'m>>(
        &self,
        start: &Start,
        mut service: Service<'m, E>,
        next_avail: &mut u16,
    ) -> Result<Infallible, End> {
        let end = self.rounds(start, &mut service);
        *next_avail = service.ring.next_avail();
        if let Err(End::Broken(_)) = end {
            // What was taken before is answered as far as a broken ring allows it.
            while service.engine.in_flight() > 0 {
                self.on_image(|| service.engine.submit())?;
                let _ = self.reap(&mut service);
                self.on_image(|| service.engine.wait())?;
            }
            let _ = self.publish(&mut service);
        }
        end
    }

    fn rounds<'m, E: Engine<'m>>(
        &self,
        start: &Start,
        service: &mut Service<'m, E>,
    ) -> Result<Infallible, End> {
        let mut window = PollWindow::new(self.poll);
        service.ring.suppress_kicks()?;
        loop {
            self.counters.beat();
            let stopping = self.stopping();
            if service.stall.is_none() {
                self.take(service)?;
                if service.stall.is_none() && std::mem::take(&mut service.waited) {
                    self.waits_no_more();
                }
            }
            self.on_image(|| service.engine.submit())?;
            self.reap(service)?;
            self.publish(service)?;
            if std::mem::take(&mut service.answered) {
                service.unsaid += 1;
                let now = Instant::now();
                let slow = now - std::mem::replace(&mut service.began, now) > SLOW;
                if slow || service.unsaid >= ROUNDS || !service.ring.has_work()? {
                    self.interrupt(start, service)?;
                }
            } else if service.unsaid > 0 {
                self.interrupt(start, service)?;
            } else if stopping {
                if service.engine.in_flight() > 0 {
                    self.on_image(|| service.engine.wait())?;
                } else if service.ring.left() == 0 || service.stall.is_some() {
                    return Err(End::Stopped);
                }
            } else if let Some(stall) = service.stall {
                if self.throttle.is_over(&stall, now()) {
                    service.stall = None;
                    service.began = Instant::now();
                } else {
                    if !service.engine.arm() {
                        self.sleep();
                    }
                    service.engine.disarm();
                }
            } else {
                self.idle(service, &mut window)?;
            }
        }
    }

    /// Shows the driver what was answered.
    #[inline]
    fn publish<E>(&self, service: &mut Service<'_, E>) -> Result<(), RingError> {
        let result = service.ring.publish();
        self.counters.answered(service.ring.take_answered());
        result
    }

    /// No request of this queue waits for tokens: they were taken, or it is not there any more.
    fn waits_no_more(&self) {
        self.throttle.leave(self.number);
        self.counters.flows();
    }

    /// Interrupts once for all that was answered, if the driver wants to know.
    fn interrupt<E>(&self, start: &Start, service: &mut Service<'_, E>) -> Result<(), RingError> {
        service.unsaid = 0;
        if service.ring.wants_interrupt()? {
            signal(start.call.as_ref());
        }
        Ok(())
    }

    /// Takes what is available, up to a ring full, and begins it. When it is to stop, what
    /// a process before this one had taken is taken all the same: the front end is told
    /// that what was taken is answered.
    fn take<'m, E: Engine<'m>>(&self, service: &mut Service<'m, E>) -> Result<(), End> {
        let available = service.ring.available()?;
        // At least one look: it is by taking chains that a broken ring is found out.
        let most = service.engine.together(available).clamp(1, service.ring.size());
        if most > 1 {
            service.ring.look_ahead(most);
        }
        for n in 0..most {
            if !service.engine.has_room() || (self.stopping() && service.ring.left() == 0) {
                return Ok(());
            }
            if n > 0 && service.began.elapsed() > SLOW {
                return Ok(());
            }
            let Some(chain) = service.ring.pop()? else { return Ok(()) };
            if let Err(stall) = self.begin_chain(service, chain)? {
                service.ring.put_back();
                self.counters.stalled();
                self.set_timer(&stall)?;
                (service.stall, service.waited) = (Some(stall), true);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Begins the request of a chain, or answers it at once if it is not to be done.
    /// Nothing was done for one that has to wait.
    #[inline]
    fn begin_chain<'m, E: Engine<'m>>(
        &self,
        service: &mut Service<'m, E>,
        chain: Chain<'m>,
    ) -> Result<Result<(), Stall>, End> {
        let head = chain.head_index();
        let request = match service.parser.parse(chain) {
            Ok(request) => request,
            Err(broken) => {
                tracing::debug!(%broken, "unanswerable request");
                self.counters.failed();
                self.begin_request(&service.ring, &mut service.paid);
                service.answered = true;
                service.ring.push_used(head, 0)?;
                return Ok(Ok(()));
            }
        };
        let (operation, data) = match request.body {
            Ok(body) => body,
            Err(refusal) => {
                let status = self.refuse(refusal);
                let len = answer(&service.ring, request.status, status, 0, request.writable);
                self.begin_request(&service.ring, &mut service.paid);
                service.answered = true;
                service.ring.push_used(head, len)?;
                return Ok(Ok(()));
            }
        };
        let bytes = data.iter().map(|slice| slice.len() as u64).sum();
        // What a process before this one was let begin has paid.
        if !(service.ring.was_taken_before() && service.paid > 0)
            && let Err(stall) = self.take_tokens(operation, bytes, request.ranges)
        {
            return Ok(Err(stall));
        }
        self.begin_request(&service.ring, &mut service.paid);
        let (status, writable) = (request.status, request.writable);
        let job = Job { head, status, writable, operation, bytes };
        let begun = self.on_image(|| service.engine.begin(job, data, request.ranges))?;
        if let Some(done) = begun {
            self.finish(&mut service.ring, done)?;
            service.answered = true;
        }
        Ok(Ok(()))
    }

    /// Notes that a request is begun, if it was not by a process before this one.
    #[inline]
    fn begin_request(&self, ring: &Ring<'_>, paid: &mut u64) {
        if ring.was_taken_before() && *paid > 0 {
            *paid -= 1;
        } else {
            self.counters.begin();
        }
    }

    /// Answers what is over.
    fn reap<'m, E: Engine<'m>>(&self, service: &mut Service<'m, E>) -> Result<(), RingError> {
        let mut result = Ok(());
        while let Some(done) = service.engine.reap() {
            service.answered = true;
            // What came behind it is not lost with it.
            result = result.and(self.finish(&mut service.ring, done));
        }
        result
    }

    /// Answers one request that was carried out, or could not be.
    #[inline]
    fn finish(&self, ring: &mut Ring<'_>, done: Done<'_>) -> Result<(), RingError> {
        let Done { job, filled, mut result } = done;
        if matches!(job.operation, Operation::Write(_) | Operation::Flush)
            && self.sync_failed.load(Ordering::Relaxed)
            && self.sync_failed.swap(false, Ordering::Relaxed)
        {
            result = result.and(Err(ExecuteError::Io(Errno::EIO.into())));
        }
        let status = match result {
            Ok(()) => {
                match job.operation {
                    Operation::Read(_) => self.counters.read(filled),
                    Operation::Write(_) => self.counters.wrote(job.bytes),
                    Operation::Flush => self.counters.flushed(),
                    Operation::GetId | Operation::Clear(_) => {}
                }
                VIRTIO_BLK_S_OK as u8
            }
            Err(error) => {
                self.counters.failed();
                if !self.reported.swap(true, Ordering::Relaxed) {
                    let operation = job.operation;
                    tracing::warn!(error = %super::chain(&error), ?operation, "disk request failed");
                }
                VIRTIO_BLK_S_IOERR as u8
            }
        };
        let len = answer(ring, job.status, status, filled, job.writable);
        ring.push_used(job.head, len)
    }

    #[cold]
    fn refuse(&self, refusal: Refusal) -> u8 {
        tracing::debug!(%refusal, "refused request");
        if refusal.status() != VIRTIO_BLK_S_UNSUPP as u8 {
            self.counters.failed();
        }
        refusal.status()
    }

    /// Takes what a request that passed every check costs.
    #[inline]
    fn take_tokens(&self, operation: Operation, bytes: u64, ranges: &[Range]) -> Result<(), Stall> {
        if self.throttle.is_limited() {
            let bytes = match operation {
                Operation::Read(_) | Operation::Write(_) => bytes,
                // Zeros may have to be written like any others.
                Operation::Clear(Clear::Zero) => ranges.iter().map(|range| range.len).sum(),
                Operation::Clear(Clear::Discard) | Operation::Flush | Operation::GetId => 0,
            };
            self.throttle.take(self.number, bytes, now())?;
        }
        self.counters.flows();
        Ok(())
    }

    /// Has a request that waits for tokens end the thread's sleep in time.
    fn set_timer(&self, stall: &Stall) -> Result<(), RingError> {
        let wait = Expiration::OneShot(TimeSpec::from_duration(stall.wait));
        self.control.timer.set(wait, TimerSetTimeFlags::empty()).map_err(RingError::Timer)
    }

    /// Waits for a chain, or for something in flight: polls for a while, then sleeps.
    fn idle<'m, E: Engine<'m>>(
        &self,
        service: &mut Service<'m, E>,
        window: &mut PollWindow,
    ) -> Result<(), End> {
        if !self.poll.is_zero() {
            let came = self.poll(service, Instant::now() + window.length())?;
            window.observe(came, given_up);
            if came {
                service.began = Instant::now();
                return Ok(());
            }
        }
        if !service.ring.request_kicks()? && !service.engine.arm() {
            self.sleep();
        }
        service.engine.disarm();
        service.ring.suppress_kicks()?;
        service.began = Instant::now();
        Ok(())
    }

    /// Looks at the ring until a time; true if there is work.
    fn poll<'m, E: Engine<'m>>(
        &self,
        service: &mut Service<'m, E>,
        until: Instant,
    ) -> Result<bool, End> {
        loop {
            for _ in 0..LOOKS {
                if service.ring.has_work()? || service.engine.has_done() || self.stopping() {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= until {
                return Ok(false);
            }
        }
    }

    /// Sleeps until a kick, the end of a request, the timer or a request to stop.
    fn sleep(&self) {
        let mut events = [EpollEvent::empty()];
        // Interrupted or failed: the caller looks again, and a stop is always seen.
        let _ = self.control.epoll.wait(&mut events, EpollTimeout::NONE);
    }

    fn stopping(&self) -> bool {
        self.control.stop.load(Ordering::Relaxed)
    }
}

/// Writes a status; returns the length for the used entry: that of a prefix of the
/// writable bytes that was really written.
#[inline]
fn answer(ring: &Ring<'_>, at: Slice<'_>, status: u8, filled: u64, writable: u64) -> u32 {
    if at.write_obj(status, 0).is_err() {
        return 0;
    }
    ring.memory().has_written(&at);
    let len = if filled == writable { filled + 1 } else { filled };
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
