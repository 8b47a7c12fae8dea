//! vCPU threads, and the coordinator that runs, pauses, resumes and stops them together.
//!
//! ```text
//!  Vcpus (main thread)                                vcpuN (one thread each)
//!   pause ── slot set, immediate_exit, signal ──────▶  leaves the guest, completes its access
//!         ◀───────────── Parked{vcpu, epoch} ────────  waits for a command
//!   with_vcpu ────────── Work ──────────────────────▶  vCPU ioctls, on the thread KVM wants them
//!   resume ───────────── Resume(epoch) ─────────────▶  looks at its slot, enters the guest
//! ```
//! * [`pause`]: the protocol, without KVM, model-checked.
//! * [`VcpuState`]: the life of a vCPU as a table.
//! * [`Kicks`]: what devices need to know of pauses, made before them.
//! * [`exit_notice`]: how the main loop hears that the VM has ended.
//!
//! A pause either holds every vCPU or none: those that arrived are resumed when one does not
//! arrive in time, and the error names the laggards. Nothing sleeps or polls while all goes well;
//! a kick is repeated after [`Config::rekick_after`] as the last line of defence, and the report
//! counts that.

mod attendant;
mod error;
mod exit;
mod kick;
mod notice;
pub mod pause;
mod run_page;
mod settle;
mod state;
mod thread;

pub(crate) use attendant::{Attendant, GuestAccess, SpecialExit, set_hypercall_result};
pub use error::{PauseError, ResumeError, RunError, StartError, StopError, WorkError};
pub use kick::{KickHook, Kicks, kick_signal};
pub use notice::{ExitListener, ExitNotifier, VmEnd, exit_notice};
pub use settle::SettleError;
pub use state::{ForbiddenTransition, VcpuState};

use crate::bus::Bus;
use crate::plugin::Hub;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use kvm_ioctls::VcpuFd;
use pause::Command;
use run_page::RunPage;
use state::StateCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};
use thread::{Delivery, Event, Recruit, VcpuThread, Work};

/// Called first on every vCPU thread, with the vCPU's number: the place to enter a seccomp filter.
/// An error, as text, stops the start.
pub type ThreadHook = Arc<dyn Fn(usize) -> Result<(), String> + Send + Sync>;

/// How long dropping a [`Vcpus`] waits for threads that nobody stopped.
const DROP_DEADLINE: Duration = Duration::from_secs(1);

/// Room in the event channel, so that a vCPU thread sends without allocating. More than a thread
/// can have there at once: its start, an ack that came late, one that did not, and its two ends.
const EVENTS_PER_VCPU: usize = 8;

/// What vCPU threads work with.
#[derive(Clone)]
pub struct Config {
    /// The request slots, one per vCPU.
    pub kicks: Arc<Kicks>,
    /// The devices on I/O ports.
    pub pio: Arc<Bus>,
    /// The devices in memory.
    pub mmio: Arc<Bus>,
    /// Where the end of the VM is reported.
    pub exit: ExitNotifier,
    /// Called first on every vCPU thread.
    pub on_thread_start: Option<ThreadHook>,
    /// How long a vCPU may take to arrive before it is kicked once more.
    pub rekick_after: Duration,
    /// Makes who takes part in the vCPU's run besides devices.
    pub(crate) attendant: Option<MakeAttendant>,
}

/// Makes the attendant of the vCPU with this number.
pub(crate) type MakeAttendant = Arc<dyn Fn(usize) -> Box<dyn Attendant> + Send + Sync>;

impl Config {
    /// A configuration without a thread hook, kicking again every 10 ms.
    pub fn new(kicks: Arc<Kicks>, pio: Arc<Bus>, mmio: Arc<Bus>, exit: ExitNotifier) -> Self {
        let rekick_after = Duration::from_millis(10);
        Self { kicks, pio, mmio, exit, on_thread_start: None, rekick_after, attendant: None }
    }

    /// Has plugins take part.
    pub fn with_plugins(mut self, hub: &Arc<Hub>) -> Self {
        let hub = hub.clone();
        self.attendant = Some(Arc::new(move |vcpu| hub.attendant(vcpu)));
        self
    }
}

/// Which address space an access is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// I/O ports.
    Port,
    /// Memory addresses without RAM.
    Mmio,
}

/// The access a vCPU has begun and its device has not finished. The instruction is not complete:
/// the vCPU's registers are those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outstanding {
    /// The address space.
    pub space: Space,
    /// The port or guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: usize,
    /// Direction.
    pub is_write: bool,
}

/// How one vCPU came to a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Time from the request until the coordinator heard of it.
    pub after: Duration,
    /// The access it parked in the middle of.
    pub outstanding: Option<Outstanding>,
}

/// A pause that holds every vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PauseReport {
    /// The pause's number, rising by one with every request.
    pub epoch: u64,
    /// Time from the request until the last vCPU had parked.
    pub took: Duration,
    /// By vCPU number.
    pub arrivals: Vec<Arrival>,
    /// How many kicks had to be repeated: zero unless the machine is very busy.
    pub rekicks: usize,
}

/// All vCPUs of a VM. Dropping it stops them.
pub struct Vcpus {
    seats: Vec<Desk>,
    events: Receiver<Event>,
    kicks: Arc<Kicks>,
    rekick_after: Duration,
    epoch: u64,
    /// What each is in the middle of, since the last pause.
    outstanding: Vec<Option<Outstanding>>,
    supplied: Arc<AtomicBool>,
}

/// Where vCPUs are given to threads that wait for them.
pub struct Supply {
    places: Vec<Sender<Delivery>>,
    supplied: Arc<AtomicBool>,
}

impl Supply {
    /// Gives every thread its vCPU.
    ///
    /// # Errors
    /// [`StartError`]; no thread has one then.
    pub fn give(&self, fds: Vec<VcpuFd>) -> Result<(), StartError> {
        let (vcpus, slots) = (fds.len(), self.places.len());
        if vcpus != slots {
            return Err(StartError::Slots { vcpus, slots });
        }
        let deliveries: Vec<Delivery> = fds
            .into_iter()
            .enumerate()
            .map(|(vcpu, fd)| match RunPage::map(&fd) {
                Ok(page) => Ok((fd, Arc::new(page))),
                Err(source) => Err(StartError::Mapping { vcpu, source }),
            })
            .collect::<Result<_, _>>()?;
        for (place, delivery) in self.places.iter().zip(deliveries) {
            // A thread that has ended has said so by an event.
            let _ = place.try_send(delivery);
        }
        self.supplied.store(true, Ordering::Release);
        Ok(())
    }
}

/// The coordinator's side of one vCPU.
struct Desk {
    cell: Arc<StateCell>,
    commands: Sender<Command<Work>>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for every vCPU; each waits in state `Created`.
    ///
    /// # Errors
    /// [`StartError`]; no thread is left behind then.
    pub fn start(fds: Vec<VcpuFd>, config: Config) -> Result<Self, StartError> {
        if fds.len() != config.kicks.len() {
            return Err(StartError::Slots { vcpus: fds.len(), slots: config.kicks.len() });
        }
        let (vcpus, supply) = Self::start_later(config)?;
        supply.give(fds)?;
        Ok(vcpus)
    }

    /// Starts a thread for every vCPU before there are any: each waits in state `Created` for
    /// [`Supply::give`], before which [`Vcpus::run`] must not be called.
    ///
    /// # Errors
    /// [`StartError`]; no thread is left behind then.
    pub fn start_later(config: Config) -> Result<(Self, Supply), StartError> {
        let count = config.kicks.len();
        kick::install_handler().map_err(StartError::Handler)?;
        let (events, inbox) = bounded(EVENTS_PER_VCPU * count);
        let supplied = Arc::new(AtomicBool::new(false));
        let mut vcpus = Self {
            seats: Vec::with_capacity(count),
            events: inbox,
            kicks: config.kicks.clone(),
            rekick_after: config.rekick_after,
            epoch: 0,
            outstanding: Vec::new(),
            supplied: supplied.clone(),
        };
        let mut supply = Supply { places: Vec::with_capacity(count), supplied };
        for id in 0..count {
            let (place, delivery) = bounded(1);
            vcpus.seats.push(spawn(id, delivery, &config, events.clone())?);
            supply.places.push(place);
        }
        let mut waiting = vcpus.seats.len();
        while waiting > 0 {
            match vcpus.next_event(None) {
                Next::Event(Event::Started { vcpu, result }) => {
                    result.map_err(|message| StartError::Hook { vcpu, message })?;
                    waiting -= 1;
                }
                Next::Event(Event::Gone { vcpu }) => return Err(StartError::Died { vcpu }),
                _ => {}
            }
        }
        Ok((vcpus, supply))
    }

    /// Lets every vCPU run for the first time.
    ///
    /// # Errors
    /// [`RunError`] when they have run before, or one has ended.
    pub fn run(&mut self) -> Result<(), RunError> {
        self.all_are(VcpuState::Created).map_err(RunError)?;
        for seat in &self.seats {
            if seat.cell.advance(VcpuState::Running).is_ok() {
                seat.tell(Command::Run);
            }
        }
        Ok(())
    }

    /// Brings every vCPU to a halt between two instructions, and returns when the last one is
    /// there. A vCPU that waits for a device halts in the middle of that access, and is reported
    /// as such.
    ///
    /// # Errors
    /// [`PauseError`]; no vCPU is paused then that was not before.
    pub fn pause(&mut self, deadline: Duration) -> Result<PauseReport, PauseError> {
        self.take_late();
        self.all_are(VcpuState::Running).map_err(|wrong| match wrong.from {
            VcpuState::Stopped => PauseError::Ended { vcpus: self.stopped() },
            _ => PauseError::State(wrong),
        })?;
        self.epoch += 1;
        let (epoch, start) = (self.epoch, Instant::now());
        for (id, seat) in self.seats.iter().enumerate() {
            // Refused when it has ended just now: the event says so below.
            if seat.cell.advance(VcpuState::Pausing).is_ok() {
                self.kicks.request(id, epoch);
            }
        }
        let mut arrivals: Vec<Option<Arrival>> = vec![None; self.seats.len()];
        let mut missing = self.seats.len();
        let mut rekicks = 0;
        let until = start.checked_add(deadline);
        while missing > 0 {
            let ended = self.stopped();
            if !ended.is_empty() {
                self.give_up(epoch, &arrivals);
                return Err(PauseError::Ended { vcpus: ended });
            }
            match self.next_event(until) {
                Next::Event(Event::Parked(ack)) if ack.epoch == epoch => {
                    // Refused for none: it is Pausing, and has parked instead of ending.
                    let _ = self.seats[ack.vcpu].cell.advance(VcpuState::Paused);
                    let after = start.elapsed();
                    arrivals[ack.vcpu] = Some(Arrival { after, outstanding: ack.outstanding });
                    missing -= 1;
                }
                // Of a pause that was given up, or an end that the states show as well.
                Next::Event(_) => {}
                Next::Late => {
                    for (id, _) in arrivals.iter().enumerate().filter(|(_, a)| a.is_none()) {
                        rekicks += 1;
                        self.kicks.interrupt(id);
                    }
                }
                Next::Deadline => {
                    let vcpus = absent(&arrivals);
                    self.give_up(epoch, &arrivals);
                    return Err(PauseError::Absent { vcpus, waited: start.elapsed() });
                }
            }
        }
        let took = start.elapsed();
        let arrivals: Vec<Arrival> = arrivals.into_iter().flatten().collect();
        self.outstanding = arrivals.iter().map(|arrival| arrival.outstanding).collect();
        Ok(PauseReport { epoch, took, arrivals, rekicks })
    }

    /// Lets every vCPU run on.
    ///
    /// # Errors
    /// [`ResumeError`] when they are not paused.
    pub fn resume(&mut self) -> Result<(), ResumeError> {
        if self.is_paused() && self.states().contains(&VcpuState::Pausing) {
            self.release_all();
            return Ok(());
        }
        self.all_are(VcpuState::Paused).map_err(ResumeError)?;
        for seat in &self.seats {
            if seat.cell.advance(VcpuState::Running).is_ok() {
                seat.tell(Command::Resume(self.epoch));
            }
        }
        Ok(())
    }

    /// Ends every vCPU's thread, whatever its state. May be called again after an error; once it
    /// has succeeded, it has nothing left to do.
    ///
    /// # Errors
    /// [`StopError`] names the vCPUs whose threads did not end in time. The others have ended.
    pub fn stop(&mut self, deadline: Duration) -> Result<(), StopError> {
        self.epoch += 1;
        let start = Instant::now();
        let until = start.checked_add(deadline);
        for (id, seat) in self.seats.iter().enumerate().filter(|(_, seat)| seat.thread.is_some()) {
            // The command first: it is there when the thread parks.
            seat.tell(Command::Stop);
            self.kicks.request(id, self.epoch);
        }
        while !self.alive().is_empty() {
            match self.next_event(until) {
                Next::Event(_) => {}
                Next::Late => self.alive().into_iter().for_each(|id| self.kicks.interrupt(id)),
                Next::Deadline => {
                    return Err(StopError { vcpus: self.alive(), waited: start.elapsed() });
                }
            }
        }
        Ok(())
    }

    /// Does `work` with a vCPU that is not running, on the vCPU's own thread, where KVM wants
    /// its ioctls. `work` must not run the guest.
    ///
    /// # Errors
    /// [`WorkError`] when the vCPU runs, or its thread has ended (as by a panic in `work`).
    pub fn with_vcpu<R: Send + 'static>(
        &self,
        vcpu: usize,
        work: impl FnOnce(&mut VcpuFd) -> R + Send + 'static,
    ) -> Result<R, WorkError> {
        let answer = self.post(vcpu, work)?;
        answer.recv().map_err(|_| WorkError::Gone { vcpu })
    }

    /// Does `work` with every vCPU, on all their threads at once; the results are by vCPU number.
    ///
    /// # Errors
    /// As [`Vcpus::with_vcpu`], for the first vCPU it cannot be done with.
    pub fn with_each<R: Send + 'static>(
        &self,
        work: impl Fn(usize, &mut VcpuFd) -> R + Send + Sync + 'static,
    ) -> Result<Vec<R>, WorkError> {
        self.with_each_until(None, work)
    }

    /// As [`Vcpus::with_each`], and waits for it until then.
    ///
    /// # Errors
    /// [`WorkError::Late`] too, for the first vCPU that has not done it.
    pub fn with_each_until<R: Send + 'static>(
        &self,
        until: Option<Instant>,
        work: impl Fn(usize, &mut VcpuFd) -> R + Send + Sync + 'static,
    ) -> Result<Vec<R>, WorkError> {
        let work = Arc::new(work);
        let answers: Vec<_> = (0..self.seats.len())
            .map(|id| {
                let work = work.clone();
                self.post(id, move |vcpu| work(id, vcpu))
            })
            .collect::<Result<_, _>>()?;
        answers
            .into_iter()
            .enumerate()
            .map(|(vcpu, answer)| match until {
                None => answer.recv().map_err(|_| WorkError::Gone { vcpu }),
                Some(until) => answer.recv_deadline(until).map_err(|error| match error {
                    RecvTimeoutError::Timeout => WorkError::Late { vcpu },
                    RecvTimeoutError::Disconnected => WorkError::Gone { vcpu },
                }),
            })
            .collect()
    }

    /// The state of every vCPU, by number.
    pub fn states(&self) -> Vec<VcpuState> {
        self.seats.iter().map(|seat| seat.cell.get()).collect()
    }

    /// The number of the last pause, or of the stop.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether a vCPU is asked to leave what it does.
    pub fn kicked(&self, vcpu: usize) -> bool {
        self.kicks.kicked(vcpu)
    }

    fn post<R: Send + 'static>(
        &self,
        vcpu: usize,
        work: impl FnOnce(&mut VcpuFd) -> R + Send + 'static,
    ) -> Result<Receiver<R>, WorkError> {
        let seat = self.seats.get(vcpu).ok_or(WorkError::Unknown { vcpu })?;
        let state = seat.cell.get();
        if !self.supplied.load(Ordering::Acquire) {
            return Err(WorkError::Missing { vcpu });
        }
        if matches!(state, VcpuState::Running | VcpuState::Pausing) {
            return Err(WorkError::Running { vcpu, state });
        }
        let (sender, receiver) = bounded(1);
        seat.tell(Command::Work(Box::new(move |vcpu: &mut VcpuFd| {
            // The asker waits on the other end.
            let _ = sender.send(work(vcpu));
        })));
        Ok(receiver)
    }

    /// Lets everyone go again that `epoch` has asked to pause.
    fn give_up(&self, epoch: u64, arrivals: &[Option<Arrival>]) {
        for (id, (seat, arrival)) in self.seats.iter().zip(arrivals).enumerate() {
            pause::release(self.kicks.state(id), epoch, arrival.is_some(), |command| {
                seat.tell(command);
            });
            // Refused when it has ended.
            let _ = seat.cell.advance(VcpuState::Running);
        }
    }

    /// Waits for an event, until the deadline or the next kick is due. Takes leave of a thread
    /// that says it ends.
    fn next_event(&mut self, until: Option<Instant>) -> Next {
        let rekick = Instant::now().checked_add(self.rekick_after);
        let wait = match (until, rekick) {
            (Some(until), Some(rekick)) => Some(until.min(rekick)),
            (one, other) => one.or(other),
        };
        let event = match wait {
            // recv_deadline spins for a while before it looks at the time.
            Some(wait) if wait <= Instant::now() => {
                self.events.try_recv().map_err(|_| RecvTimeoutError::Timeout)
            }
            Some(wait) => self.events.recv_deadline(wait),
            None => self.events.recv().map_err(RecvTimeoutError::from),
        };
        match event {
            Ok(event) => {
                if let Event::Gone { vcpu } = event
                    && let Some(thread) = self.seats[vcpu].thread.take()
                {
                    // A panic is reported as the end of the VM already.
                    let _ = thread.join();
                }
                Next::Event(event)
            }
            Err(_) if until.is_some_and(|until| until <= Instant::now()) => Next::Deadline,
            Err(_) => Next::Late,
        }
    }

    fn all_are(&self, state: VcpuState) -> Result<(), ForbiddenTransition> {
        let to = match state {
            VcpuState::Running => VcpuState::Pausing,
            _ => VcpuState::Running,
        };
        match self.seats.iter().map(|seat| seat.cell.get()).find(|&from| from != state) {
            Some(from) => Err(ForbiddenTransition { from, to }),
            None => Ok(()),
        }
    }

    fn stopped(&self) -> Vec<usize> {
        let states = self.states().into_iter().enumerate();
        states.filter(|(_, state)| *state == VcpuState::Stopped).map(|(id, _)| id).collect()
    }

    fn alive(&self) -> Vec<usize> {
        let seats = self.seats.iter().enumerate();
        seats.filter(|(_, seat)| seat.thread.is_some()).map(|(id, _)| id).collect()
    }
}

enum Next {
    Event(Event),
    Late,
    Deadline,
}

impl Desk {
    fn tell(&self, command: Command<Work>) {
        // A thread that is gone has said so by an event.
        let _ = self.commands.send(command);
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        if let Err(error) = self.stop(DROP_DEADLINE) {
            tracing::error!("{error}; their threads are left to themselves");
        }
        // A hook may hold the device that holds the kicks.
        self.kicks.forget_hooks();
    }
}

fn absent(arrivals: &[Option<Arrival>]) -> Vec<usize> {
    let arrivals = arrivals.iter().enumerate();
    arrivals.filter(|(_, arrival)| arrival.is_none()).map(|(id, _)| id).collect()
}

fn spawn(
    id: usize,
    delivery: Receiver<Delivery>,
    config: &Config,
    events: Sender<Event>,
) -> Result<Desk, StartError> {
    let cell = Arc::new(StateCell::new(VcpuState::Created));
    let (commands, inbox) = unbounded();
    let body = Recruit {
        id,
        kicks: config.kicks.clone(),
        pio: config.pio.clone(),
        mmio: config.mmio.clone(),
        exit: config.exit.clone(),
        cell: cell.clone(),
        commands: inbox,
        events,
        attendant: config.attendant.as_ref().map(|make| make(id)),
        delivery,
    };
    let hook = config.on_thread_start.clone();
    let thread = Builder::new()
        .name(format!("vcpu{id}"))
        .spawn(move || body.main(hook))
        .map_err(|source| StartError::Thread { vcpu: id, source })?;
    Ok(Desk { cell, commands, thread: Some(thread) })
}
