//! One vCPU's thread: KVM_RUN, its exits, and its place in the pause protocol.

use super::exit::{self, Access, Exit, MAX_ACCESS};
use super::kick::{self, Kicks};
use super::notice::ExitNotifier;
use super::pause::{self, Ack, Command, PerVcpuState, Seat, Step, Woken};
use super::run_page::RunPage;
use super::state::{StateCell, VcpuState};
use super::{Outstanding, Space, ThreadHook};
use crate::bus::{Bus, Outcome, VmExit};
use crossbeam_channel::{Receiver, Sender};
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
    pub(super) events: Sender<Event>,
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

impl VcpuThread {
    /// The body of the thread.
    pub(super) fn main(mut self, hook: Option<ThreadHook>) {
        let _farewell = Farewell {
            id: self.id,
            kicks: self.kicks.clone(),
            exit: self.exit.clone(),
            cell: self.cell.clone(),
            events: self.events.clone(),
        };
        let result = kick::mask_signals()
            .map_err(|error| format!("setting the signal mask: {error}"))
            .and_then(|()| {
                self.kicks.attach(self.id, self.page.clone());
                hook.map_or(Ok(()), |hook| hook(self.id))
            });
        let failed = result.is_err();
        self.tell(Event::Started { vcpu: self.id, result });
        if failed
            || pause::wait(&mut self, |command| matches!(command, Command::Run)) == Woken::Stop
        {
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
        let mut index = 0;
        while index < access.count {
            match self.serve_element(space, &access, index) {
                Outcome::Done => index += 1,
                Outcome::Exit(end) => return Step::Ended(end),
                Outcome::Retry => {
                    if !self.state().is_requested() {
                        // The pause was given up in between, or the device gives in easily.
                        thread::yield_now();
                    }
                    if pause::look(self, Some(outstanding)) == Woken::Stop {
                        return Step::Stopped;
                    }
                }
            }
        }
        Step::Served
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

    fn enter(&mut self) -> Step<VmExit> {
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
            Exit::Ended(end) => Step::Ended(end),
        }
    }

    fn complete(&mut self) -> Step<VmExit> {
        // One KVM_RUN as a rule. An instruction with several accesses (a string, a page crossed)
        // asks for the next one instead, and that is served like any other.
        while self.pending {
            self.page.set_immediate_exit(true);
            match self.enter() {
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
        self.commands.recv().ok()
    }

    fn work(&mut self, work: Work) {
        work(&mut self.vcpu);
    }
}
