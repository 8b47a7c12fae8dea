//! The main loop of the serial process.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cellblock_wire::{Channel, ChannelError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::journal::{BATCH, RAW, State};
use super::{Serial, SerialError};
use crate::protocol::ring::Reply;
use crate::protocol::state::FIFO;
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
    /// Output was handed over.
    output: Instant,
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
        self.resume(cell)?;
        let now = Instant::now();
        let mut last = Last { access: now, look: now, output: now };
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
        // A line at a time, or what there is of one, for a prompt ends with none. After a silence
        // the first of it goes at once: whoever waits for a sign of life has it that much sooner.
        let is_due = now - last.look >= GLANCE;
        let breaks_silence = self.end != self.handed && now - last.output >= GLANCE;
        if !watching
            || is_due
            || breaks_silence
            || self.line_ended
            || self.end - self.handed >= 1024
        {
            if self.end != self.handed {
                last.output = now;
            }
            self.hand_over();
            self.send_all(cell)?;
        }
        if watching && !is_due {
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
            self.commit();
        }
        self.handle(&events, cell)
    }

    /// Goes on where a process before this one was.
    fn resume(&mut self, cell: &Channel) -> Result<(), SerialError> {
        let mut quit = false;
        if let Some(state) = self.before.take() {
            self.ring.resume(state.position);
            quit = self.input.resume(&state, self.left);
            self.uart.load(state.registers, state.fifo, state.lines);
            self.transmitted = state.transmitted;
            self.received = state.received;
            // A vCPU may wait for it still; one that does not, does not believe it.
            self.answer = state.answer;
            if let Some((vcpu, ticket, value)) = state.answer
                && let Some(reply) = Reply::from_parts(vcpu.into(), ticket)
            {
                self.ring.reply(reply, value);
            }
        }
        while self.left > 0 {
            let part = self.left.min(RAW);
            quit |= self.input.fetch(part);
            self.left -= part;
        }
        self.feed();
        if quit {
            self.marks.quit();
        }
        self.commit();
        self.send_all(cell)
    }

    /// Carries out what is in the ring, up to a burst; returns how much it was.
    pub(super) fn take_accesses(&mut self) -> Result<usize, SerialError> {
        let mut count = 0;
        while count < BURST
            && let Some(access) = self.ring.next()?
        {
            let answer = self.uart.access(access);
            count += 1;
            self.take_transmitted();
            self.feed();
            if let Some((reply, value)) = &answer {
                let (vcpu, ticket) = reply.parts();
                self.answer = Some((vcpu as u8, ticket, *value));
            }
            self.commit();
            if let Some((reply, value)) = answer {
                self.ring.reply(reply, value);
            }
        }
        Ok(count)
    }

    /// From here on a successor knows of all that was done.
    pub(super) fn commit(&mut self) {
        let (registers, fifo, lines) = self.uart.state();
        let mut state = State {
            position: self.ring.position(),
            registers,
            fifo,
            lines: lines.clone(),
            end: self.end,
            transmitted: self.transmitted,
            received: self.received,
            answer: self.answer,
            marks: self.marks.made(),
            ..State::default()
        };
        self.input.keep(&mut state);
        self.journal.commit(&state);
    }

    /// Keeps what the last access transmitted.
    fn take_transmitted(&mut self) {
        let bytes = self.uart.transmitted();
        if bytes.is_empty() {
            return;
        }
        for &byte in bytes.iter() {
            self.line_ended |= byte == b'\n';
            self.journal.put_output(self.end, byte);
            self.end += 1;
        }
        self.transmitted = self.transmitted.wrapping_add(bytes.len() as u64);
        bytes.clear();
        for marker in self.uart.markers() {
            self.marks.marker(marker);
        }
        // What `serial-out` knows of is committed.
        if self.end - self.handed >= BATCH as u64 {
            self.commit();
            self.hand_over();
        }
    }

    /// Gives the guest what input it has room for; true if that was anything.
    pub(super) fn feed(&mut self) -> bool {
        let mut any = false;
        loop {
            let mut bytes = [0; FIFO];
            let waiting = self.input.front(&mut bytes);
            let count = self.uart.receive(&bytes[..waiting]);
            if count == 0 {
                return any;
            }
            self.input.take(count);
            self.received = self.received.wrapping_add(count as u64);
            any = true;
        }
    }

    /// Gives `serial-out` what the guest has transmitted.
    pub(super) fn hand_over(&mut self) {
        if self.end != self.handed {
            if let Some(output) = &self.output {
                output.advance(self.end);
            }
            (self.handed, self.line_ended) = (self.end, false);
        }
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
        let to_send = if self.has_sent_all() { none } else { PollFlags::POLLOUT };
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
        let drawn = self.endpoint.ready(events.endpoint, self.output.as_ref(), &self.pipe);
        let quit = drawn > 0 && self.input.fetch(drawn);
        if quit {
            self.marks.quit();
        }
        if self.feed() || drawn > 0 {
            self.commit();
        }
        if quit {
            self.send_all(cell)?;
        }
        if let Some(client) = self.endpoint.client_news() {
            let fds: Vec<_> = client.into_iter().collect();
            if cell.try_send(&FromCell::Client, &fds).map_err(SerialError::Channel)? {
                self.endpoint.news_told();
            }
        }
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
            self.send_all(cell)?;
        }
        self.answer_drains(cell)
    }

    pub(super) fn obey(&mut self, message: ToCell, cell: &Channel) -> Result<(), SerialError> {
        match message {
            ToCell::Drain { epoch, limit_ms } => {
                let until = Instant::now() + Duration::from_millis(limit_ms.into());
                self.take_rest(until)?;
                self.drains.push(Drain { epoch, until });
                Ok(())
            }
            ToCell::Throttle(_) | ToCell::Serial(_) => Ok(()), // not for a serial line
            ToCell::Quiesce { epoch } => self.quiesce(epoch, cell),
            ToCell::Thaw { epoch } => self.thaw(epoch),
            ToCell::Load(load) => self.load(*load, cell),
            ToCell::Ping => self.send(FromCell::Alive, cell),
            ToCell::Part => self.part(cell),
            ToCell::Stats => {
                let stats = CellStats::Serial {
                    output: self.transmitted,
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
        self.journal.dropped().load(Ordering::Relaxed)
    }

    /// Tells the VMM something, behind all marks there are: a guest may report and end in one
    /// breath.
    pub(super) fn send(&mut self, message: FromCell, cell: &Channel) -> Result<(), SerialError> {
        self.outbox.put(message);
        self.send_all(cell)
    }

    /// Sends what waits, as far as there is room. All of it is committed.
    pub(super) fn send_all(&mut self, cell: &Channel) -> Result<(), SerialError> {
        match self.marks.tell(cell).map_err(SerialError::Channel)? {
            true => self.outbox.flush(cell).map_err(SerialError::Channel),
            false => Ok(()),
        }
    }

    pub(super) fn has_sent_all(&self) -> bool {
        self.marks.is_empty() && self.outbox.is_empty()
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
