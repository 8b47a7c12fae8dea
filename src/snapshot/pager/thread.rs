//! The pager's thread: faults first, then what nobody asked for yet.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cellblock_devices::protocol::{FaultWindow, Registered};
use cellblock_seccomp::filter::FilterError;
use cellblock_wire::{Channel, Uffd};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::record::Record;
use super::{PagerError, Shared, lock, step};
use crate::snapshot::format::{CHUNK, Chain, PAGE};

/// Most mappings of guest memory in one process.
const MAX_WINDOWS: usize = 8;
/// Longest sleep while there is something to do later.
const LOOK: Duration = Duration::from_millis(100);
/// Steps within the time that the watch gives one.
const STEPS: u32 = 16;
/// Most faults taken from one process before others have their turn.
const ROUND: usize = 16;
/// How long what nobody asked for is left alone, unless a record names it: the guest's first
/// steps need the processors. What they touch is recorded, and nothing after them: that is another
/// matter in every VM.
const PREFETCH_DELAY: Duration = Duration::from_millis(150);
/// The longest wait for the guest to run at all.
const START_LIMIT: Duration = Duration::from_secs(2);
/// How long nobody may have waited for anything before it goes on.
const QUIET: Duration = Duration::from_millis(1);
/// How far ahead a guest is served that touches one chunk after the other.
const READ_AHEAD: usize = 4;

/// A process that maps guest memory.
#[derive(Debug)]
pub(super) struct Target {
    uffd: Uffd,
    windows: Vec<FaultWindow>,
}

/// A device process, whether it mapped guest memory yet or not.
#[derive(Debug)]
struct Device {
    channel: Channel,
    target: Option<Target>,
}

/// What the thread has.
pub(super) struct Worker {
    shared: Arc<Shared>,
    chain: Arc<Chain>,
    /// Memory is filled through its mapping.
    vmm: Arc<Target>,
    devices: Vec<Device>,
    buffer: Vec<u8>,
    /// Chunks to bring early, the next last; whether or not anything else is.
    order: Vec<u32>,
    record: Record,
    next: usize,
    started: Instant,
    /// When somebody waited last.
    busy: Instant,
    /// The chunk that is likely to be wanted next, and how many from it on.
    likely: (usize, usize),
    /// Longest sleep while the guest runs: the watch wants to see it live.
    longest: Duration,
}

impl Target {
    pub(super) fn new(uffd: Uffd, windows: Vec<FaultWindow>) -> Target {
        Target { uffd, windows }
    }

    /// Nobody waits for anything of it any more. It fails for a process that is no more.
    pub(super) fn let_go(&self) {
        for window in &self.windows {
            let _ = self.uffd.unregister(window.start, window.len);
        }
    }

    /// The offset in guest memory of an address of the process.
    fn offset(&self, address: u64) -> Option<u64> {
        let window = self.windows.iter().find(|w| address.wrapping_sub(w.start) < w.len)?;
        window.offset.checked_add(address - window.start)
    }

    /// Where the process has the chunk at `offset`: start and length, a whole chunk unless
    /// its mapping ends before.
    fn places(&self, offset: u64) -> impl Iterator<Item = (u64, u64)> {
        self.windows.iter().filter_map(move |w| {
            let from = offset.max(w.offset);
            let to = offset.saturating_add(CHUNK as u64).min(w.offset.saturating_add(w.len));
            let start = w.start.checked_add(from.checked_sub(w.offset)?)?;
            (from < to).then(|| (start, to - from))
        })
    }
}

/// Starts the thread.
pub(super) fn spawn(
    worker: Worker,
    confine: impl FnOnce() -> Result<(), FilterError> + Send + 'static,
) -> Result<(), PagerError> {
    let run = move || {
        let shared = worker.shared.clone();
        let guard = End(&shared);
        let result = confine().map_err(PagerError::from).and_then(|()| worker.run());
        shared.end(result);
        drop(guard);
    };
    let thread = std::thread::Builder::new().name("pager".into()).spawn(run);
    thread.map(drop).map_err(step("starting the pager"))
}

/// However the thread ends, it is noticed.
struct End<'s>(&'s Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
        if std::thread::panicking() {
            self.0.end(Err(PagerError::Died));
        }
    }
}

impl Worker {
    /// `early`: bring what the record names without being asked.
    pub(super) fn new(
        shared: Arc<Shared>,
        chain: Arc<Chain>,
        vmm: Arc<Target>,
        early: bool,
        stall_limit: Duration,
    ) -> Worker {
        let mut record = Record::open(&chain);
        let order = if early { record.take_order() } else { Vec::new() };
        Worker {
            shared,
            chain,
            vmm,
            devices: Vec::new(),
            buffer: vec![0; CHUNK],
            order,
            record,
            next: 0,
            started: Instant::now(),
            busy: Instant::now(),
            likely: (0, 0),
            longest: stall_limit / STEPS,
        }
    }

    fn run(mut self) -> Result<(), PagerError> {
        let result = self.serve().and_then(|()| self.let_go());
        end_record(&self.shared, &mut self.record);
        if result.is_err() {
            // Open to the end of the process: see the module's documentation.
            std::mem::forget((self.vmm, self.devices));
        }
        result
    }

    /// Until everything is there.
    fn serve(&mut self) -> Result<(), PagerError> {
        while self.shared.absent.load(Ordering::Relaxed) > 0 {
            self.shared.steps.fetch_add(1, Ordering::Relaxed);
            if self.shared.stop.load(Ordering::Relaxed) {
                return Err(PagerError::Died);
            }
            let wanted = self.prefetch_next();
            let somebody = self.wait(match wanted {
                Ahead::Now(_) => Some(Duration::ZERO),
                Ahead::In(time) => Some(time.clamp(Duration::from_millis(1), LOOK)),
                Ahead::Never if self.shared.runs.get().is_some() => Some(self.longest),
                // Many wait in a pool like this: none of them is to cost a processor anything.
                Ahead::Never => None,
            })?;
            if somebody {
                self.welcome();
            }
            if !(somebody && self.faults()?)
                && let Ahead::Now(index) = wanted
                && self.bring(index)?
            {
                self.shared.prefetched.fetch_add(1, Ordering::Relaxed);
                self.touched(index);
            }
        }
        Ok(())
    }

    /// Sleeps until somebody waits or joins; false if nobody does in `time`.
    fn wait(&self, time: Option<Duration>) -> Result<bool, PagerError> {
        let watch = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![watch(self.shared.bell.as_fd()), watch(self.vmm.uffd.as_fd())];
        for device in &self.devices {
            fds.push(watch(device.channel.as_fd()));
            fds.extend(device.target.iter().map(|target| watch(target.uffd.as_fd())));
        }
        let limit = match time {
            Some(time) => PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO),
            None => PollTimeout::NONE,
        };
        self.shared.rests.store(time.is_none(), Ordering::Relaxed);
        let woken = poll(&mut fds, limit);
        self.shared.rests.store(false, Ordering::Relaxed);
        match woken {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(e) => Err(step("waiting for accesses to memory")(e.into())),
        }
    }

    /// Takes in processes, and what they say of their mappings.
    fn welcome(&mut self) {
        let _ = self.shared.bell.read();
        let joined = std::mem::take(&mut *lock(&self.shared.joined));
        self.devices.extend(joined.into_iter().map(|channel| Device { channel, target: None }));
        self.devices.retain_mut(Device::listen);
    }

    /// Answers accesses that wait. False if there were none.
    fn faults(&mut self) -> Result<bool, PagerError> {
        let mut any = false;
        for _ in 0..ROUND {
            let next = self.vmm.uffd.next_fault();
            let Some(address) = next.map_err(step("reading accesses to memory"))? else { break };
            any = true;
            self.fault(None, address)?;
        }
        for device in 0..self.devices.len() {
            for _ in 0..ROUND {
                let target = self.devices[device].target.as_ref();
                // A process that is no more waits for nothing.
                let next = target.and_then(|target| target.uffd.next_fault().ok().flatten());
                let Some(address) = next else { break };
                any = true;
                self.fault(Some(device), address)?;
            }
        }
        Ok(any)
    }

    /// An access waits, of a device process or of the VMM.
    fn fault(&mut self, device: Option<usize>, address: u64) -> Result<(), PagerError> {
        self.shared.faults.fetch_add(1, Ordering::Relaxed);
        let target = |worker: &Self| match device {
            Some(n) => worker.devices[n].target.as_ref()?.offset(address),
            None => worker.vmm.offset(address),
        };
        let Some(offset) = target(self) else {
            // Its own fault, by a wrong list of mappings; it waits until it is ended.
            tracing::warn!("a device process waits for memory that it did not register");
            return Ok(());
        };
        let index = (offset / CHUNK as u64) as usize;
        self.busy = Instant::now();
        self.look_ahead(index);
        if self.bring(index)? {
            self.shared.demanded.fetch_add(1, Ordering::Relaxed);
            self.touched(index);
            return Ok(());
        }
        // It came just now; or it is of zeros, between two ranges that are registered.
        let target = device.and_then(|n| self.devices[n].target.as_ref()).unwrap_or(&*self.vmm);
        let page = address & !(PAGE as u64 - 1);
        if self.chain.is_zero(index) {
            let _ = target.uffd.zero(page, PAGE as u64); // there is one, or it was not to be
        }
        let _ = target.uffd.wake(page, PAGE as u64);
        Ok(())
    }

    /// Somebody wants chunk `index`: of one who wants chunks in order the next are known.
    fn look_ahead(&mut self, index: usize) {
        let in_order = index.checked_sub(1).is_some_and(|before| {
            !self.chain.is_zero(before) && self.shared.presence.presence().has(before)
        });
        self.likely = if in_order { (index + 1, READ_AHEAD) } else { (0, 0) };
    }

    /// Fills chunk `index` for everybody; false if it was there.
    fn bring(&mut self, index: usize) -> Result<bool, PagerError> {
        if index >= self.chain.chunks() || self.shared.presence.presence().has(index) {
            return Ok(false);
        }
        self.chain.read_chunk(index, &mut self.buffer)?;
        let there = || self.shared.presence.set(index);
        self.shared.coming.bring(index, || self.fill(index), there)?;
        let offset = index as u64 * CHUNK as u64;
        self.shared.absent.fetch_sub(1, Ordering::Relaxed);
        for target in self.devices.iter().filter_map(|device| device.target.as_ref()) {
            for (start, len) in target.places(offset) {
                // It fails for a process that is no more.
                let _ = target.uffd.wake(start, len);
            }
        }
        Ok(true)
    }

    /// Copies the buffer to where chunk `index` belongs.
    fn fill(&self, index: usize) -> Result<(), PagerError> {
        let offset = index as u64 * CHUNK as u64;
        let vmm = &self.vmm;
        let mut done = 0;
        // A chunk is in one region: their sizes are whole MiB.
        while let Some((start, _)) = vmm.places(offset).next().filter(|_| done < CHUNK) {
            match vmm.uffd.copy(start + done as u64, &self.buffer[done..]) {
                Ok(n) => done += n,
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                    return Err(PagerError::Touched(index));
                }
                Err(e) => return Err(step("filling guest memory")(e)),
            }
        }
        Ok(())
    }

    /// What to bring next if nobody waits.
    fn prefetch_next(&mut self) -> Ahead {
        let presence = self.shared.presence.presence();
        while let Some(index) = self.order.last().map(|index| *index as usize) {
            if index < self.chain.chunks() && !presence.has(index) {
                return Ahead::Now(index);
            }
            self.order.pop();
        }
        self.shared.recorded.store(true, Ordering::Release);
        let now = Instant::now();
        let records = self.records_for(now);
        if records == Some(Duration::ZERO) {
            end_record(&self.shared, &mut self.record);
        }
        if !self.shared.prefetch.load(Ordering::Relaxed) {
            return records.filter(|left| !left.is_zero()).map_or(Ahead::Never, Ahead::In);
        }
        while let (index, more @ 1..) = self.likely {
            if index < self.chain.chunks() && !presence.has(index) {
                return Ahead::Now(index);
            }
            self.likely = (index + 1, more - 1);
        }
        let runs = self.shared.runs.get();
        let due = runs.map_or(self.started + START_LIMIT, |runs| *runs + PREFETCH_DELAY);
        let due = due.max(self.busy + QUIET);
        if now < due && !self.shared.hurry.load(Ordering::Relaxed) {
            return Ahead::In(due - now);
        }
        // From here on it is not the guest who says what comes.
        end_record(&self.shared, &mut self.record);
        while self.next < self.chain.chunks() {
            if !presence.has(self.next) {
                return Ahead::Now(self.next);
            }
            self.next += 1;
        }
        Ahead::Never
    }

    /// How long what is touched is recorded still; nothing where it is not, or for as long as the
    /// guest does not run.
    fn records_for(&self, now: Instant) -> Option<Duration> {
        let runs = self.shared.runs.get().filter(|_| self.record.is_open())?;
        Some((*runs + PREFETCH_DELAY).saturating_duration_since(now))
    }

    fn touched(&mut self, index: usize) {
        if self.record.is_open() && self.records_for(Instant::now()) != Some(Duration::ZERO) {
            self.record.touched(index);
        }
    }

    /// Everything is there: nobody has to wait for anything any more.
    fn let_go(&mut self) -> Result<(), PagerError> {
        self.shared.complete.store(true, Ordering::Release);
        self.welcome();
        for window in &self.vmm.windows {
            let result = self.vmm.uffd.unregister(window.start, window.len);
            result.map_err(step("taking guest memory from userfaultfd"))?;
        }
        self.devices.iter().filter_map(|device| device.target.as_ref()).for_each(Target::let_go);
        Ok(())
    }
}

impl Device {
    /// Takes in what the process says; false once it cannot say more, and maps nothing.
    fn listen(&mut self) -> bool {
        loop {
            match self.channel.try_recv::<Registered>() {
                Ok(Some((Registered { windows }, fds))) => {
                    let uffd = fds.into_iter().next().map(Uffd::received);
                    match uffd {
                        Some(Ok(uffd)) if windows.len() <= MAX_WINDOWS => {
                            self.target = Some(Target::new(uffd, windows));
                        }
                        _ => {
                            tracing::warn!("a device process registered no memory that can be");
                            return false;
                        }
                    }
                }
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }
}

/// What was wanted so far is what the next restore will want, if it was the guest's wish.
fn end_record(shared: &Shared, record: &mut Record) {
    match shared.runs.get() {
        Some(_) => record.keep(),
        None => record.forget(),
    }
}

/// What prefetch has to do.
#[derive(Clone, Copy)]
enum Ahead {
    Now(usize),
    In(Duration),
    Never,
}
