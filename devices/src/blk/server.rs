//! The service of one ring: take every available chain, answer it, interrupt
//! once, poll for a while, sleep.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::epoll::{EpollEvent, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::Bytes;

use super::chain::Chain;
use super::execute::{Disk, Engine};
use super::memory::Slice;
use super::poll::PollWindow;
use super::request::{Operation, Parser, Request};
use super::ring::{Ring, RingError};
use super::throttle::{Stall, Throttle, now};
use super::view::View;
use super::worker::{Control, Start, signal};
use crate::protocol::counters::VirtioBlkCounters;

/// What a queue's thread has for as long as it lives.
#[derive(Debug)]
pub(super) struct Server {
    control: Arc<Control>,
    disk: Arc<Disk>,
    counters: VirtioBlkCounters,
    throttle: Arc<Throttle>,
    poll: Duration,
    /// An unusable image is reported once, not once a request.
    reported: AtomicBool,
}

/// What became of the chains that were available.
struct Batch {
    served: bool,
    /// The first of the rest has to wait.
    stall: Option<Stall>,
}

/// Why the service of a ring ended.
enum End {
    Stopped,
    Broken(RingError),
}

impl From<RingError> for End {
    fn from(error: RingError) -> End {
        End::Broken(error)
    }
}

impl Server {
    pub fn new(
        control: Arc<Control>,
        disk: Arc<Disk>,
        counters: VirtioBlkCounters,
        throttle: Arc<Throttle>,
        poll: Duration,
    ) -> Server {
        Server { control, disk, counters, throttle, poll, reported: AtomicBool::new(false) }
    }

    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Serves a ring until told to stop; returns the first available entry not taken.
    pub fn serve(&self, start: &Start) -> u16 {
        let mut next_avail = start.layout.next_avail;
        match self.serve_ring(start, &mut next_avail) {
            Ok(never) => match never {},
            Err(End::Stopped) => {}
            Err(End::Broken(error)) => self.give_up(start, &error),
        }
        self.counters.flows();
        next_avail
    }

    fn serve_ring(&self, start: &Start, next_avail: &mut u16) -> Result<Infallible, End> {
        let view = View::new(&start.memory).map_err(RingError::Access)?;
        let mut ring = Ring::new(&view, &start.layout)?;
        // What was written while there was a cache is not to stay in it: a driver that
        // was told that there is none sends no flush. Done here and not in the answer
        // to the front end, which waits for that.
        if start.write_through
            && self.disk.is_durable()
            && let Err(error) = self.disk.file.sync_data()
        {
            tracing::warn!(%error, "writing the image's cached data");
        }
        if start.interrupt {
            signal(start.call.as_ref());
        }
        let parser = Parser::new(&view, start.limits);
        let end = self.run(start, &mut ring, parser);
        *next_avail = ring.next_avail();
        end
    }

    /// Leaves a broken ring alone until the front end takes it back.
    fn give_up(&self, start: &Start, error: &RingError) {
        if error.is_invalid_avail_idx() {
            self.counters.invalid_avail_idx();
        } else {
            self.counters.failed();
        }
        tracing::warn!(error = %super::chain(error), "ring is stopped until the device is reset");
        // The driver may be waiting for what was answered before.
        signal(start.call.as_ref());
        signal(start.err.as_ref());
        while !self.stopping() {
            self.wait();
        }
    }

    fn run<'m>(
        &self,
        start: &Start,
        ring: &mut Ring<'m>,
        mut parser: Parser<'m>,
    ) -> Result<Infallible, End> {
        let mut engine = Engine::new(start.write_through && self.disk.is_durable());
        let mut window = PollWindow::new(self.poll);
        ring.suppress_kicks()?;
        loop {
            loop {
                let batch = self.batch(ring, &mut parser, &mut engine)?;
                if batch.served && ring.wants_interrupt()? {
                    signal(start.call.as_ref());
                }
                match batch.stall {
                    Some(stall) => self.wait_for_tokens(&stall)?,
                    None if batch.served => {}
                    None => break,
                }
            }
            let idle = (!self.poll.is_zero()).then(Instant::now);
            let until = idle.map(|since| since + window.length());
            if !self.poll(ring, until)? {
                if !ring.request_kicks()? {
                    self.sleep(ring)?;
                }
                ring.suppress_kicks()?;
            }
            if let Some(since) = idle {
                window.observe(since.elapsed());
            }
        }
    }

    /// Serves what is available, up to a ring full.
    fn batch<'m>(
        &self,
        ring: &mut Ring<'m>,
        parser: &mut Parser<'m>,
        engine: &mut Engine,
    ) -> Result<Batch, End> {
        for served in 0..ring.size() {
            let so_far = |stall| Batch { served: served > 0, stall };
            if self.stopping() {
                // What was served still has its interrupt to come.
                return if served > 0 { Ok(so_far(None)) } else { Err(End::Stopped) };
            }
            let Some(chain) = ring.pop()? else { return Ok(so_far(None)) };
            let head = chain.head_index();
            match self.answer(chain, parser, engine) {
                Ok(len) => ring.push_used(head, len)?,
                Err(stall) => {
                    ring.put_back();
                    self.counters.stalled();
                    return Ok(so_far(Some(stall)));
                }
            }
        }
        Ok(Batch { served: true, stall: None })
    }

    /// Sleeps until the request that was put back has a reason to be tried again.
    fn wait_for_tokens(&self, stall: &Stall) -> Result<(), End> {
        let wait = Expiration::OneShot(TimeSpec::from_duration(stall.wait));
        let timer = &self.control.timer;
        timer.set(wait, TimerSetTimeFlags::empty()).map_err(RingError::Timer)?;
        loop {
            self.wait();
            if self.stopping() {
                return Err(End::Stopped);
            }
            if self.throttle.is_over(stall, now()) {
                return Ok(());
            }
        }
    }

    /// Executes one chain and writes its status; returns the length for its used entry.
    /// Nothing was done for one that has to wait.
    fn answer<'m>(
        &self,
        chain: Chain<'m>,
        parser: &mut Parser<'m>,
        engine: &mut Engine,
    ) -> Result<u32, Stall> {
        let request = match parser.parse(chain) {
            Ok(request) => request,
            Err(broken) => {
                tracing::debug!(%broken, "unanswerable request");
                self.counters.failed();
                return Ok(0);
            }
        };
        if let Ok((operation, data)) = request.body {
            self.take_tokens(operation, data)?;
        }
        let mut filled = 0;
        let status = self.execute(&request, engine, &mut filled);
        if request.status.write_obj(status, 0).is_err() {
            return Ok(0);
        }
        // The length covers a prefix of the writable bytes that was really written.
        if filled == request.writable {
            filled += 1;
        }
        Ok(u32::try_from(filled).unwrap_or(u32::MAX))
    }

    /// Takes what a request that passed every check costs.
    fn take_tokens(&self, operation: Operation, data: &[Slice<'_>]) -> Result<(), Stall> {
        if self.throttle.is_limited() {
            let bytes = match operation {
                Operation::Read(_) | Operation::Write(_) => {
                    data.iter().map(|slice| slice.len() as u64).sum()
                }
                _ => 0,
            };
            self.throttle.take(bytes, now())?;
        }
        self.counters.flows();
        Ok(())
    }

    fn execute(&self, request: &Request<'_, '_>, engine: &mut Engine, filled: &mut u64) -> u8 {
        let (operation, data) = match request.body {
            Ok(body) => body,
            Err(refusal) => {
                tracing::debug!(%refusal, "refused request");
                if refusal.status() != VIRTIO_BLK_S_UNSUPP as u8 {
                    self.counters.failed();
                }
                return refusal.status();
            }
        };
        if let Err(error) = engine.execute(&self.disk, operation, data, request.ranges, filled) {
            self.counters.failed();
            if !self.reported.swap(true, Ordering::Relaxed) {
                tracing::warn!(error = %super::chain(&error), ?operation, "disk request failed");
            }
            return VIRTIO_BLK_S_IOERR as u8;
        }
        let bytes = || data.iter().map(|slice| slice.len() as u64).sum();
        match operation {
            Operation::Read(_) => self.counters.read(*filled),
            Operation::Write(_) => self.counters.wrote(bytes()),
            Operation::Flush => self.counters.flushed(),
            Operation::GetId | Operation::Clear(_) => {}
        }
        VIRTIO_BLK_S_OK as u8
    }

    /// Looks at the ring until a time; true if there is work.
    fn poll(&self, ring: &Ring<'_>, until: Option<Instant>) -> Result<bool, End> {
        let Some(until) = until else { return Ok(false) };
        loop {
            if ring.has_work()? {
                return Ok(true);
            }
            if self.stopping() {
                return Err(End::Stopped);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// Sleeps until there is work. Kicks have been asked for.
    fn sleep(&self, ring: &Ring<'_>) -> Result<(), End> {
        loop {
            self.wait();
            if self.stopping() {
                return Err(End::Stopped);
            }
            if ring.has_work()? {
                return Ok(());
            }
        }
    }

    /// Sleeps until a kick or a request to stop.
    fn wait(&self) {
        let mut events = [EpollEvent::empty()];
        // Interrupted or failed: the caller looks again, and a stop is always seen.
        let _ = self.control.epoll.wait(&mut events, EpollTimeout::NONE);
    }

    fn stopping(&self) -> bool {
        self.control.stop.load(Ordering::Relaxed)
    }
}
