//! The main loop of the serial process.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use cellblock_wire::{Channel, ChannelError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Serial, SerialError};
use crate::protocol::{CellStats, FromCell, ToCell};

/// Accesses taken before everything else is looked at.
const BURST: usize = 1024;
/// How often everything else is looked at while the guest is busy.
const GLANCE: Duration = Duration::from_millis(1);
/// After this long without an access the guest may have forgotten its input.
const REMINDER: Duration = Duration::from_millis(2);
/// What the reader gets to read the end when the VMM has closed the channel.
const FAREWELL: Duration = Duration::from_millis(500);

/// A drain that has not been answered.
pub(super) struct Drain {
    epoch: u64,
    until: Instant,
}

/// When things happened last.
struct Last {
    access: Instant,
    /// Everything but the ring was looked at.
    look: Instant,
}

/// What poll said.
struct Events {
    doorbell: PollFlags,
    cell: PollFlags,
    output: PollFlags,
    endpoint: [PollFlags; 2],
}

impl Serial {
    pub(super) fn run(&mut self, cell: &Channel) -> Result<(), SerialError> {
        let now = Instant::now();
        let mut last = Last { access: now, look: now };
        loop {
            match self.turn(&mut last, cell) {
                Err(SerialError::Channel(ChannelError::Closed)) => return self.leave(),
                result => result?,
            }
        }
    }

    /// Serves the ring; looks at everything else when that is due; sleeps when
    /// there is nothing to do.
    fn turn(&mut self, last: &mut Last, cell: &Channel) -> Result<(), SerialError> {
        if self.is_quiesced() {
            return self.stand_still(cell);
        }
        let busy = self.take_accesses()? > 0;
        let now = Instant::now();
        if busy {
            last.access = now;
        }
        let watching = busy || now - last.access < self.poll;
        if !watching || self.uart.is_worth_taking() {
            self.hand_over();
            self.report_markers(cell)?;
        }
        if watching && now - last.look < GLANCE {
            std::hint::spin_loop();
            return Ok(());
        }
        let asleep = !watching && self.ring.prepare_sleep();
        let limit = if asleep { self.nap(last.access) } else { Some(Duration::ZERO) };
        let events = self.wait(cell, limit)?;
        self.ring.awake(!events.doorbell.is_empty());
        last.look = Instant::now();
        if asleep && events.is_quiet() && self.uart.needs_reminder() {
            self.uart.remind();
        }
        self.handle(&events, cell)
    }

    /// Carries out what is in the ring, up to a burst; returns how much it was.
    pub(super) fn take_accesses(&mut self) -> Result<usize, SerialError> {
        let mut count = 0;
        while count < BURST
            && let Some(access) = self.ring.next()?
        {
            self.uart.access(access, &mut self.ring);
            count += 1;
            self.feed();
        }
        Ok(count)
    }

    /// Gives the guest what input it has room for.
    pub(super) fn feed(&mut self) {
        loop {
            let count = self.uart.receive(self.input.front());
            if count == 0 {
                return;
            }
            self.input.taken(count);
            self.received += count as u64;
        }
    }

    /// Gives `serial-out` what the guest has transmitted.
    pub(super) fn hand_over(&mut self) {
        let bytes = self.uart.transmitted();
        if let Some(output) = &self.output
            && !bytes.is_empty()
        {
            output.push(bytes);
        }
        bytes.clear();
    }

    pub(super) fn report_markers(&mut self, cell: &Channel) -> Result<(), SerialError> {
        for marker in self.uart.markers() {
            let message = FromCell::Marker(marker);
            self.outbox.send(message, cell).map_err(SerialError::Channel)?;
        }
        Ok(())
    }

    /// How long to sleep at most.
    fn nap(&mut self, last_access: Instant) -> Option<Duration> {
        let reminder = self.uart.needs_reminder().then(|| last_access + REMINDER);
        let drains = self.drains.iter().map(|drain| drain.until);
        let until = drains.chain(self.endpoint.retry_at()).chain(reminder).min()?;
        Some(until.saturating_duration_since(Instant::now()))
    }

    /// How long to wait at most for what has to be answered by then.
    pub(super) fn drain_time(&self) -> PollTimeout {
        let until = self.drains.iter().map(|drain| drain.until).min();
        until.map_or(PollTimeout::NONE, |until| {
            milliseconds(until.saturating_duration_since(Instant::now()))
        })
    }

    fn wait(&self, cell: &Channel, limit: Option<Duration>) -> Result<Events, SerialError> {
        let none = PollFlags::empty();
        let to_send = if self.outbox.is_empty() { none } else { PollFlags::POLLOUT };
        let endpoint = self.endpoint.interest(self.input.wants());
        let mut fds = Vec::with_capacity(5);
        fds.push(PollFd::new(self.ring.as_fd(), PollFlags::POLLIN));
        fds.push(PollFd::new(cell.as_fd(), PollFlags::POLLIN | to_send));
        // Where an fd has no place, the doorbell is asked for nothing.
        let blank = || PollFd::new(self.ring.as_fd(), none);
        fds.push(match &self.output {
            Some(output) => PollFd::new(output.as_fd(), PollFlags::POLLIN),
            None => blank(),
        });
        fds.extend(endpoint.into_iter().map(|fd| fd.unwrap_or_else(blank)));
        let timeout = match limit {
            None => PollTimeout::NONE,
            Some(limit) => milliseconds(limit),
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(SerialError::Poll(error)),
        }
        let said = |i: usize| fds[i].revents().unwrap_or(none);
        Ok(Events {
            doorbell: said(0),
            cell: said(1),
            output: said(2),
            endpoint: [said(3), said(4)],
        })
    }

    /// Acts on everything but the ring. `Closed` when the VMM is gone.
    fn handle(&mut self, events: &Events, cell: &Channel) -> Result<(), SerialError> {
        let input = self.endpoint.ready(events.endpoint, self.output.as_ref());
        if self.input.push(&input) {
            self.send(FromCell::Quit, cell)?;
        }
        self.feed();
        if let Some(output) = &self.output
            && !events.output.is_empty()
        {
            output.acknowledge();
            if let Some(reader) = output.lost() {
                self.endpoint.lost(&reader);
            }
        }
        if !events.cell.is_empty() {
            while let Some((message, _)) = cell.try_recv().map_err(SerialError::Channel)? {
                self.obey(message, cell)?;
            }
            self.outbox.flush(cell).map_err(SerialError::Channel)?;
        }
        self.answer_drains(cell)
    }

    pub(super) fn obey(&mut self, message: ToCell, cell: &Channel) -> Result<(), SerialError> {
        match message {
            ToCell::Drain { epoch, limit_ms } => {
                let until = Instant::now() + Duration::from_millis(limit_ms.into());
                self.take_rest(until)?;
                // A guest may report and end in one breath.
                self.report_markers(cell)?;
                self.drains.push(Drain { epoch, until });
                Ok(())
            }
            ToCell::Throttle(_) => Ok(()), // not for a serial line
            ToCell::Quiesce { epoch } => self.quiesce(epoch, cell),
            ToCell::Thaw { epoch } => self.thaw(epoch),
            ToCell::Load(load) => self.load(*load, cell),
            ToCell::Stats => {
                let stats = CellStats::Serial {
                    output: self.uart.total(),
                    input: self.received,
                    dropped: self.dropped(),
                };
                self.send(FromCell::Stats(stats), cell)
            }
        }
    }

    pub(super) fn answer_drains(&mut self, cell: &Channel) -> Result<(), SerialError> {
        if self.drains.is_empty() {
            return Ok(());
        }
        let settled = self.output.as_ref().is_none_or(|output| output.is_settled());
        let now = Instant::now();
        let unread = self.output.as_ref().filter(|_| !settled).map_or(0, |o| o.unread());
        let dropped = self.dropped();
        for drain in std::mem::take(&mut self.drains) {
            if settled || now >= drain.until {
                self.send(FromCell::Drained { epoch: drain.epoch, dropped, unread }, cell)?;
            } else {
                self.drains.push(drain);
            }
        }
        Ok(())
    }

    /// Takes everything out of the ring and hands it over.
    fn take_rest(&mut self, until: Instant) -> Result<(), SerialError> {
        while self.take_accesses()? > 0 && Instant::now() < until {}
        self.hand_over();
        Ok(())
    }

    /// The VMM is gone, perhaps killed: what the guest wrote is still output.
    fn leave(&mut self) -> Result<(), SerialError> {
        let until = Instant::now() + FAREWELL;
        self.take_rest(until)?;
        let Some(output) = &self.output else { return Ok(()) };
        while !output.is_settled() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, milliseconds(left)) {
                Ok(_) | Err(Errno::EINTR) => output.acknowledge(),
                Err(error) => return Err(SerialError::Poll(error)),
            }
        }
        Ok(())
    }

    fn dropped(&self) -> u64 {
        self.output.as_ref().map_or(0, |output| output.dropped())
    }

    pub(super) fn send(&mut self, message: FromCell, cell: &Channel) -> Result<(), SerialError> {
        self.outbox.send(message, cell).map_err(SerialError::Channel)
    }
}

impl Events {
    fn is_quiet(&self) -> bool {
        [self.doorbell, self.cell, self.output, self.endpoint[0], self.endpoint[1]]
            .iter()
            .all(|events| events.is_empty())
    }
}

/// Rounded up, so that the last wait before a deadline is no busy loop.
fn milliseconds(time: Duration) -> PollTimeout {
    PollTimeout::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
}
