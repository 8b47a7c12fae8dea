//! Lazy restore: guest memory is brought when it is touched.
//!
//! ```text
//!  vCPUs, VMM ── missing page ──► userfaultfd of the VMM ──┐
//!  blk process ─ missing page ──► its own userfaultfd ─────┤
//!                                                          ▼
//!  snapshot ── chunk, checksum checked ──► pager ── UFFDIO_COPY ──► memfd, wake everyone
//! ```
//!
//! Guest memory is one memfd that several processes map. A userfaultfd sees the accesses
//! through one mapping only, and a page that is missing in an unregistered mapping is
//! zeros, for ever and for everybody. So every process registers its mapping before it
//! uses it, and the pager fills the memfd once for all: through the VMM's mapping, a page
//! at a time with its contents, so that nobody sees half of one.
//!
//! Chunks of zeros are not registered: the kernel makes them as for a new VM.
//!
//! The pager is a thread that waits for nobody but the snapshot's file: it shares no lock
//! with vCPUs, touches no guest mapping, and is watched. If it fails, ends or stalls the VM
//! ends; it must not go on with memory that is not there, nor hang. Its userfaultfd then
//! stays open to the end of the process: closed, missing pages would become zeros. Only when
//! nobody is left who could use them is memory given up ([`Pager::let_go`]).

mod coming;
mod record;
mod thread;
mod watch;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cellblock_devices::protocol::FaultWindow;
use cellblock_devices::protocol::presence::{self, Presence, PresenceOwner};
use cellblock_seccomp::filter::FilterError;
use cellblock_wire::{Channel, ChannelError, ShmError, Uffd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::format::{Chain, FormatError};
use crate::vm::memory::GuestRam;
use coming::Coming;
use thread::{Target, Worker};
use watch::Watch;

/// A pager that does not get on with a fault for so long is given up.
pub const STALL_LIMIT: Duration = Duration::from_secs(10);

/// How long a VM whose memory does not come may take to end.
pub const LAST_RESORT: Duration = Duration::from_secs(15);
/// How long the end of a VM waits for its pager.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Memory that does not come any more.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// A part of the snapshot could not be read, or is damaged.
    #[error("bringing memory")]
    Snapshot(#[from] FormatError),
    /// userfaultfd refused.
    #[error("{step}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// The kernel's reason.
        #[source]
        source: std::io::Error,
    },
    /// The bitmap could not be made.
    #[error("making the map of memory that is there")]
    Shm(#[from] ShmError),
    /// A channel for a device process could not be made.
    #[error("connecting a device process with the pager")]
    Channel(#[source] ChannelError),
    /// The thread could not be confined.
    #[error("confining the pager")]
    Confine(#[from] FilterError),
    /// A page was there before it was brought: somebody's mapping is not registered.
    #[error("memory chunk {0} was touched before it was there")]
    Touched(usize),
    /// The snapshot is of another amount of memory.
    #[error("the snapshot has {snapshot} bytes of memory, the VM {vm}")]
    Size {
        /// Of the snapshot.
        snapshot: u64,
        /// Of the VM.
        vm: u64,
    },
    /// An access has waited for too long.
    #[error("bringing memory took more than {} s", .0.as_secs())]
    Stalled(Duration),
    /// The thread ended, by a panic.
    #[error("the pager ended")]
    Died,
}

pub(super) fn step(step: &'static str) -> impl FnOnce(std::io::Error) -> PagerError {
    move |source| PagerError::Step { step, source }
}

/// What the pager did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagerStats {
    /// Accesses that had to wait.
    pub faults: u64,
    /// Chunks brought because somebody waited for them.
    pub demanded: u64,
    /// Chunks brought before anybody did.
    pub prefetched: u64,
    /// Chunks still to come.
    pub absent: u64,
}

/// Shared by the pager's thread, its watch and whoever asks.
#[derive(Debug)]
struct Shared {
    presence: PresenceOwner,
    /// Connections of processes, not yet seen by the thread.
    joined: Mutex<Vec<Channel>>,
    /// Rung for the thread to look at what joined, or to end.
    bell: EventFd,
    /// Rung when the pager has ended.
    notice: EventFd,
    failure: Mutex<Option<PagerError>>,
    /// The same in one line, which stays.
    why: Mutex<String>,
    /// It never will be.
    failed: AtomicBool,
    /// All is there.
    complete: AtomicBool,
    /// No thread any more.
    ended: AtomicBool,
    stop: AtomicBool,
    prefetch: AtomicBool,
    /// What the record names is there.
    recorded: AtomicBool,
    /// Somebody waits for all of it.
    hurry: AtomicBool,
    /// When the guest began to run.
    runs: OnceLock<Instant>,
    /// Counts every step of the thread, for the watch.
    steps: AtomicU64,
    /// It sleeps until somebody waits, as it may before the guest runs.
    rests: AtomicBool,
    coming: Coming,
    faults: AtomicU64,
    demanded: AtomicU64,
    prefetched: AtomicU64,
    absent: AtomicU64,
}

/// What memory will come from, before there is memory.
#[derive(Debug)]
pub struct Source {
    shared: Arc<Shared>,
    chain: Arc<Chain>,
    device: OwnedFd,
}

/// The same before it is known which snapshot that is: processes can be invited already.
#[derive(Debug)]
pub struct Prospect {
    shared: Arc<Shared>,
    device: OwnedFd,
}

/// Brings the memory of a restored VM.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    chain: Arc<Chain>,
    device: OwnedFd,
    /// The VMM's mapping.
    target: Arc<Target>,
}

/// What a device process needs to take part: it goes with the fds of its hello.
#[derive(Debug)]
pub struct Invitation {
    /// An open `/dev/userfaultfd`.
    pub device: OwnedFd,
    /// For [`Presence::map`].
    pub presence: OwnedFd,
    /// The process's end of a channel, on which it sends its userfaultfd with a
    /// [`cellblock_devices::protocol::Registered`] whenever it has mapped guest memory.
    pub channel: OwnedFd,
    /// Number of chunks.
    pub chunks: usize,
}

/// Invites processes that will map guest memory, before and while it comes.
#[derive(Debug)]
pub struct Inviter {
    shared: Arc<Shared>,
    device: OwnedFd,
}

impl Invitation {
    /// In the order of the hello.
    pub fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.device.as_fd(), self.presence.as_fd(), self.channel.as_fd()]
    }
}

/// What a pager brings that nobody asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefetch {
    /// Nothing.
    Nothing,
    /// What was asked for in an earlier restore; the rest from [`Pager::prefetch`] on.
    Recorded,
    /// Everything.
    All,
}

/// How a pager is to work.
pub struct Config<C> {
    /// Runs first on each of its threads.
    pub confine: C,
    /// Bring what nobody asks for as well.
    pub prefetch: Prefetch,
    /// Give up after so long without a step: [`STALL_LIMIT`].
    pub stall_limit: Duration,
    /// Ends the process, if a failure, which it is told, has not ended it [`LAST_RESORT`]
    /// later.
    pub last_resort: Option<fn(&str)>,
}

impl Prospect {
    /// For memory of so many chunks. `device` is an open `/dev/userfaultfd`.
    pub fn new(chunks: usize, device: OwnedFd) -> Result<Prospect, PagerError> {
        let presence = PresenceOwner::new(chunks)?;
        let event = || {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            EventFd::from_flags(flags).map_err(|e| step("creating an event")(e.into()))
        };
        let shared = Arc::new(Shared {
            presence,
            joined: Mutex::default(),
            bell: event()?,
            notice: event()?,
            failure: Mutex::default(),
            why: Mutex::default(),
            failed: AtomicBool::new(false),
            complete: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            prefetch: AtomicBool::new(false),
            recorded: AtomicBool::new(false),
            hurry: AtomicBool::new(false),
            runs: OnceLock::new(),
            steps: AtomicU64::new(0),
            rests: AtomicBool::new(false),
            coming: Coming::new(),
            faults: AtomicU64::new(0),
            demanded: AtomicU64::new(0),
            prefetched: AtomicU64::new(0),
            absent: AtomicU64::new(0),
        });
        Ok(Prospect { shared, device })
    }

    /// Who invites processes that will map guest memory.
    pub fn inviter(&self) -> Result<Inviter, PagerError> {
        inviter(&self.shared, &self.device)
    }

    /// It is this snapshot. No process has mapped guest memory yet.
    pub fn settle(self, chain: Arc<Chain>) -> Source {
        let Prospect { shared, device } = self;
        let mut absent = 0;
        for index in 0..chain.chunks() {
            match chain.is_zero(index) {
                true => shared.presence.set(index),
                false => absent += 1,
            }
        }
        shared.absent.store(absent, Ordering::Relaxed);
        Source { shared, chain, device }
    }

    /// It is none: memory is there before any process maps it.
    pub fn nothing_to_come(self) {
        let presence = self.shared.presence.presence();
        (0..presence.chunks()).for_each(|index| self.shared.presence.set(index));
    }
}

impl Source {
    /// `device` is an open `/dev/userfaultfd`.
    pub fn new(chain: Arc<Chain>, device: OwnedFd) -> Result<Source, PagerError> {
        Ok(Prospect::new(chain.chunks(), device)?.settle(chain))
    }

    /// Who invites processes that will map guest memory.
    pub fn inviter(&self) -> Result<Inviter, PagerError> {
        inviter(&self.shared, &self.device)
    }

    /// The snapshot.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// For who may use memory only when all of it has come.
    pub fn completion(&self) -> impl Fn() -> bool + Send + use<> {
        let shared = self.shared.clone();
        move || shared.complete.load(Ordering::Acquire)
    }

    /// Registers `ram`, in which nothing may be yet, and starts the pager.
    pub fn start<C>(self, ram: &GuestRam, config: Config<C>) -> Result<Pager, PagerError>
    where
        C: Fn() -> Result<(), FilterError> + Clone + Send + 'static,
    {
        let Source { shared, chain, device } = self;
        let (snapshot, vm) = (chain.manifest().memory, ram.len());
        if snapshot != vm {
            return Err(PagerError::Size { snapshot, vm });
        }
        let uffd = Uffd::new(device.as_fd()).map_err(step("making a userfaultfd"))?;
        let windows: Vec<FaultWindow> = ram
            .regions()
            .iter()
            .map(|region| FaultWindow { start: region.hva, len: region.len, offset: region.offset })
            .collect();
        presence::register(&uffd, &windows, shared.presence.presence())
            .map_err(step("registering guest memory with userfaultfd"))?;
        shared.prefetch.store(config.prefetch == Prefetch::All, Ordering::Relaxed);
        let target = Arc::new(Target::new(uffd, windows));
        let record = config.prefetch != Prefetch::Nothing;
        let (stall, own) = (config.stall_limit, target.clone());
        let worker = Worker::new(shared.clone(), chain.clone(), own, record, stall);
        thread::spawn(worker, config.confine.clone())?;
        let watch = Watch { limit: config.stall_limit, last_resort: config.last_resort };
        watch::spawn(shared.clone(), watch, config.confine)?;
        Ok(Pager { shared, chain, device, target })
    }
}

fn inviter(shared: &Arc<Shared>, device: &OwnedFd) -> Result<Inviter, PagerError> {
    Ok(Inviter { shared: shared.clone(), device: copy(device.as_fd())? })
}

fn copy(fd: BorrowedFd<'_>) -> Result<OwnedFd, PagerError> {
    fd.try_clone_to_owned().map_err(step("copying a descriptor"))
}

impl Inviter {
    /// Invites a process.
    pub fn invite(&self) -> Result<Invitation, PagerError> {
        let (near, far) = Channel::pair().map_err(PagerError::Channel)?;
        let mut joined = lock(&self.shared.joined);
        // Nobody takes them out any more once all memory is there.
        joined.retain(|channel| !is_closed(channel));
        joined.push(near);
        drop(joined);
        // It fails only when it is rung already.
        let _ = self.shared.bell.write(1);
        Ok(Invitation {
            device: copy(self.device.as_fd())?,
            presence: copy(self.shared.presence.fd())?,
            channel: far.into_fd(),
            chunks: self.shared.presence.presence().chunks(),
        })
    }
}

/// Whether the process at the other end is gone.
fn is_closed(channel: &Channel) -> bool {
    let mut fds = [PollFd::new(channel.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO) == Ok(1)
}

impl Pager {
    /// Who invites processes that will map guest memory.
    pub fn inviter(&self) -> Result<Inviter, PagerError> {
        inviter(&self.shared, &self.device)
    }

    /// What is there.
    pub fn presence(&self) -> &Presence {
        self.shared.presence.presence()
    }

    /// The snapshot that memory comes from: what is not there yet is as it says.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Waits until a chunk that is on its way is there: before that, parts of it may be, and may
    /// have been written to. What is absent afterwards was so when this was called, all of it.
    /// False where a part of one will be missing for ever: the VM is about to end.
    #[must_use]
    pub fn settle(&self) -> bool {
        self.shared.coming.settle(|| self.shared.ended.load(Ordering::Acquire))
    }

    /// Whether it ended by itself, and something is missing for ever.
    pub fn has_failed(&self) -> bool {
        self.shared.failed.load(Ordering::Acquire)
    }

    /// The kernel need not wait for what is missing any more, and finds zeros: a vCPU in the
    /// middle of an instruction that KVM emulates, and KVM itself, which has memory brought beside
    /// a vCPU and whose end waits for that, in a state in which nobody can be killed. To be called
    /// when nobody is left who could take the zeros for what they are not: no device process
    /// lives, and no vCPU is to run again.
    pub fn let_go(mut self) {
        self.stop();
        self.target.let_go();
    }

    fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let _ = self.shared.bell.write(1);
        // It has a record to keep. One that hangs is not waited for.
        let end = Instant::now() + LAST_WORD;
        while !self.shared.ended.load(Ordering::Acquire) && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Whether everything is there.
    pub fn is_complete(&self) -> bool {
        self.shared.complete.load(Ordering::Acquire)
    }

    /// Readable once the pager has ended: complete, or by a failure.
    pub fn notice(&self) -> BorrowedFd<'_> {
        self.shared.notice.as_fd()
    }

    /// Why it ended, if it failed; once.
    pub fn take_failure(&self) -> Option<PagerError> {
        lock(&self.shared.failure).take()
    }

    /// The guest runs from now on: it is left alone for its first steps.
    pub fn guest_runs(&self) {
        self.shared.runs.get_or_init(Instant::now);
    }

    /// Brings everything at once, also what nobody asked for yet.
    pub fn prefetch(&self) {
        self.shared.hurry.store(true, Ordering::Relaxed);
        self.shared.prefetch.store(true, Ordering::Relaxed);
        let _ = self.shared.bell.write(1);
    }

    /// Whether all that the record of an earlier restore names is there; it is at once where
    /// there is none.
    pub fn has_recorded(&self) -> bool {
        self.shared.recorded.load(Ordering::Acquire) || self.is_complete()
    }

    /// What it did so far.
    pub fn stats(&self) -> PagerStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PagerStats {
            faults: get(&self.shared.faults),
            demanded: get(&self.shared.demanded),
            prefetched: get(&self.shared.prefetched),
            absent: get(&self.shared.absent),
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    /// The pager is over. The first reason stays.
    fn end(&self, result: Result<(), PagerError>) {
        if let Err(error) = result {
            *lock(&self.why) = crate::remedy::chain(&error);
            self.failed.store(!self.stop.load(Ordering::Relaxed), Ordering::Release);
            lock(&self.failure).get_or_insert(error);
        } else {
            self.complete.store(true, Ordering::Release);
        }
        let _ = self.notice.write(1);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
