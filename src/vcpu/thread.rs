//! One vCPU's thread: KVM_RUN, its exits, and its place in the pause protocol.

use super::attendant::{Attendant, GuestAccess, SpecialExit};
use super::exit::{self, Access, Exit, MAX_ACCESS};
use super::kick::{self, Kicks};
use super::notice::ExitNotifier;
use super::pause::{self, Ack, Command, PerVcpuState, Seat, Step, Woken};
use super::run_page::RunPage;
use super::state::{StateCell, VcpuState};
use super::{Outstanding, Space, ThreadHook};
use crate::bus::{Bus, Outcome, VmExit};
use crate::slice;
use crossbeam_channel::{Receiver, Sender, select};
use kvm_ioctls::VcpuFd;
use std::sync::Arc;
use std::thread;

/// Something to do on a parked vCPU's own thread.
pub(super) type Work = Box<dyn FnOnce(&mut VcpuFd) + Send>;

/// What a vCPU thread tells the coordinator.
#[derive(Debug)]
pub(super) enum Event {
    /// Ready for its first command, or not: then the thread ends.
    Started { vcpu: usize, result: Result<(), String> },
    /// Parked.
    Parked(Ack<Outstanding>),
    /// The guest will not run on it any more; it still takes work.
    Ended,
    /// The thread ends.
    Gone { vcpu: usize },
}

/// All a vCPU thread has.
pub(super) struct VcpuThread {
    pub(super) id: usize,
    pub(super) vcpu: VcpuFd,
    pub(super) page: Arc<RunPage>,
    pub(super) kicks: Arc<Kicks>,
    pub(super) pio: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) exit: ExitNotifier,
    pub(super) cell: Arc<StateCell>,
    pub(super) commands: Receiver<Command<Work>>,
    /// The first of them, if it was taken already.
    pub(super) early: Option<Command<Work>>,
    pub(super) events: Sender<Event>,
    /// Plugins.
    pub(super) attendant: Option<Box<dyn Attendant>>,
    /// An access was served that KVM has not completed.
    pub(super) pending: bool,
}

/// Says that the thread ends, on every way out of it.
struct Farewell {
    id: usize,
    kicks: Arc<Kicks>,
    exit: ExitNotifier,
    cell: Arc<StateCell>,
    events: Sender<Event>,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        self.kicks.detach(self.id);
        // Refused when the guest's own end came first.
        let _ = self.cell.advance(VcpuState::Stopped);
        if thread::panicking() {
            let what = "the thread of this vcpu panicked".to_owned();
            self.exit.notify(self.id, VmExit::Error(what));
        }
        // Nobody listens any more when the coordinator went first.
        let _ = self.events.send(Event::Gone { vcpu: self.id });
    }
}

/// A vCPU that comes to its thread later than the thread itself.
pub(super) type Delivery = (VcpuFd, Arc<RunPage>);

/// A thread without its vCPU.
pub(super) struct Recruit {
    pub(super) id: usize,
    pub(super) kicks: Arc<Kicks>,
    pub(super) pio: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) exit: ExitNotifier,
    pub(super) cell: Arc<StateCell>,
    pub(super) commands: Receiver<Command<Work>>,
    pub(super) events: Sender<Event>,
    pub(super) attendant: Option<Box<dyn Attendant>>,
    pub(super) delivery: Receiver<Delivery>,
}

impl Recruit {
    /// The body of the thread.
    pub(super) fn main(self, hook: Option<ThreadHook>) {
        let _farewell = Farewell {
            id: self.id,
            kicks: self.kicks.clone(),
            exit: self.exit.clone(),
            cell: self.cell.clone(),
            events: self.events.clone(),
        };
        // It runs for long, which what starts it need not.
        slice::lengthen_own();
        let result = kick::mask_signals()
            .map_err(|error| format!("setting the signal mask: {error}"))
            .and_then(|()| hook.map_or(Ok(()), |hook| hook(self.id)));
        let failed = result.is_err();
        // A coordinator that is gone has closed the commands as well: the thread ends by those.
        let _ = self.events.send(Event::Started { vcpu: self.id, result });
        if failed {
            return;
        }
        let Some(((vcpu, page), early)) = self.receive() else { return };
        self.kicks.attach(self.id, page.clone());
        let Recruit { id, kicks, pio, mmio, exit, cell, commands, events, attendant, .. } = self;
        let pending = false;
        VcpuThread {
            id,
            vcpu,
            page,
            kicks,
            pio,
            mmio,
            exit,
            cell,
            commands,
            early,
            events,
            attendant,
            pending,
        }
        .main();
    }
}

impl Recruit {
    /// Waits for the vCPU; nothing where the thread is to end without one. A command that came
    /// after the vCPU may be seen before it, and is kept.
    fn receive(&self) -> Option<(Delivery, Option<Command<Work>>)> {
        select! {
            recv(self.delivery) -> delivery => Some((delivery.ok()?, None)),
            // Nothing but an end can be asked of a thread without its vCPU.
            recv(self.commands) -> command => Some((self.delivery.try_recv().ok()?, command.ok())),
        }
    }
}

impl VcpuThread {
    fn main(mut self) {
        if pause::wait(&mut self, |command| matches!(command, Command::Run)) == Woken::Stop {
            return;
        }
        if let Some(end) = pause::run(&mut self) {
            // Running or Pausing: both may end.
            let _ = self.cell.advance(VcpuState::Stopped);
            self.exit.notify(self.id, end);
            self.tell(Event::Ended);
            // The registers can still be asked for.
            pause::wait(&mut self, |_| false);
        }
    }

    fn tell(&self, event: Event) {
        // A coordinator that is gone has closed the commands as well: the thread ends by those.
        let _ = self.events.send(event);
    }

    /// Hands every element of an access to its device, parking where a kick interrupts one.
    fn serve(&mut self, space: Space, access: Access) -> Step<VmExit> {
        let outstanding =
            Outstanding { space, addr: access.addr, len: access.size, is_write: access.is_write };
        let whole = GuestAccess::new(space, access);
        loop {
            match self.attend_access(&whole) {
                None => break,
                Some(Outcome::Done) => return Step::Served,
                Some(Outcome::Exit(end)) => return Step::Ended(end),
                Some(Outcome::Retry) => {
                    if self.give_way(Some(outstanding)) == Woken::Stop {
                        return Step::Stopped;
                    }
                }
            }
        }
        let mut index = 0;
        while index < access.count {
            match self.serve_element(space, &access, index) {
                Outcome::Done => index += 1,
                Outcome::Exit(end) => return Step::Ended(end),
                Outcome::Retry => {
                    if self.give_way(Some(outstanding)) == Woken::Stop {
                        return Step::Stopped;
                    }
                }
            }
        }
        Step::Served
    }

    /// Has the attendant handle an exit that no device can.
    fn special(&mut self, exit: SpecialExit) -> Step<VmExit> {
        loop {
            match self.attend_exit(&exit) {
                None => return Step::Ended(exit.unhandled()),
                Some(Outcome::Done) => return Step::Served,
                Some(Outcome::Exit(end)) => return Step::Ended(end),
                Some(Outcome::Retry) => {
                    if self.give_way(None) == Woken::Stop {
                        return Step::Stopped;
                    }
                }
            }
        }
    }

    /// A wait was given up for a request: takes it.
    fn give_way(&mut self, outstanding: Option<Outstanding>) -> Woken {
        if !self.state().is_requested() {
            // The pause was given up in between, or the device gives in easily.
            thread::yield_now();
        }
        pause::look(self, outstanding)
    }

    /// One KVM_RUN, and what the guest's exit asks for.
    fn visit(&mut self) -> Step<VmExit> {
        match exit::run(&mut self.vcpu) {
            Exit::Interrupted => {
                self.pending = false;
                Step::Interrupted
            }
            Exit::Port(access) => {
                self.pending = true;
                self.serve(Space::Port, access)
            }
            Exit::Mmio(access) => {
                self.pending = true;
                self.serve(Space::Mmio, access)
            }
            Exit::Special(exit) => {
                self.pending = !matches!(exit, SpecialExit::Debug { .. });
                self.special(exit)
            }
            Exit::Ended(end) => Step::Ended(end),
        }
    }

    fn serve_element(&mut self, space: Space, access: &Access, index: usize) -> Outcome {
        let size = access.size.min(MAX_ACCESS);
        if access.is_write {
            let data = exit::load(&mut self.vcpu, access, index);
            return self.bus(space).write(self.id, access.addr, &data[..size]);
        }
        let mut data = [0; MAX_ACCESS];
        let outcome = self.bus(space).read(self.id, access.addr, &mut data[..size]);
        if outcome == Outcome::Done {
            exit::store(&mut self.vcpu, access, index, &data);
        }
        outcome
    }

    fn bus(&self, space: Space) -> &Bus {
        match space {
            Space::Port => &self.pio,
            Space::Mmio => &self.mmio,
        }
    }
}

impl Seat for VcpuThread {
    type Access = Outstanding;
    type End = VmExit;
    type Work = Work;

    #[inline]
    fn state(&self) -> &PerVcpuState {
        self.kicks.state(self.id)
    }

    fn clear(&self) {
        self.page.set_immediate_exit(false);
    }

    #[inline]
    fn wanted(&self) -> bool {
        self.attendant.as_ref().is_some_and(|attendant| attendant.wanted())
    }

    fn attend(&mut self) -> Step<VmExit> {
        match self.attendant.as_mut().map(|attendant| attendant.attend(&mut self.vcpu)) {
            Some(Outcome::Exit(end)) => Step::Ended(end),
            _ => Step::Interrupted,
        }
    }

    fn enter(&mut self) -> Step<VmExit> {
        self.visit()
    }

    fn complete(&mut self) -> Step<VmExit> {
        // One KVM_RUN as a rule. An instruction with several accesses (a string, a page crossed)
        // asks for the next one instead, and that is served like any other.
        while self.pending {
            self.page.set_immediate_exit(true);
            match self.visit() {
                Step::Served => {}
                step => return step,
            }
        }
        Step::Interrupted
    }

    fn ack(&mut self, epoch: u64, outstanding: Option<Outstanding>) {
        self.tell(Event::Parked(Ack { vcpu: self.id, epoch, outstanding }));
        // Tells a guest that uses kvmclock that the time ahead is not its own, so that its
        // watchdogs stay quiet. Refused where the guest has no kvmclock.
        let _ = self.vcpu.kvmclock_ctrl();
    }

    fn command(&mut self) -> Option<Command<Work>> {
        self.early.take().or_else(|| self.commands.recv().ok())
    }

    fn work(&mut self, work: Work) {
        work(&mut self.vcpu);
    }
}
