//! The pause core under loom: every interleaving of requesters, vCPU thread and signals.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release --lib vcpu::pause
//! ```
//! The model's KVM keeps what matters of the real one: `immediate_exit` is looked at when KVM_RUN
//! begins; a signal interrupts a KVM_RUN in progress and does nothing otherwise; the guest never
//! exits by itself unless a test says so. A request that got lost therefore leaves a thread
//! waiting for ever, and loom reports the deadlock. The tests that must panic break the order, one
//! step each, and show that the model notices.

use super::*;
use loom::sync::Condvar;
use loom::sync::atomic::AtomicU8;
use loom::sync::mpsc::{Receiver, Sender, channel};
use loom::thread;
use std::mem::ManuallyDrop;
// Not loom's: its drop takes part in the schedule, as that of a receiver does, and a test that ends
// in a deadlock has no schedule any more.
use std::sync::Arc;

/// The thread inside KVM_RUN.
#[derive(Default)]
struct Run {
    inside: bool,
    signalled: bool,
    /// The guest ends the VM.
    ends: bool,
}

/// The answer of a device that takes its time.
#[derive(Default)]
struct Device {
    answered: bool,
}

#[derive(Default)]
struct Shared {
    state: PerVcpuState,
    immediate_exit: AtomicU8,
    run: Mutex<Run>,
    left: Condvar,
    device: Mutex<Device>,
    woken: Condvar,
    /// An attendant's slot, and how often it was served.
    wanted: AtomicBool,
    attended: Mutex<usize>,
    served: Condvar,
}

impl Target for Shared {
    fn raise(&self) {
        self.immediate_exit.store(1, Ordering::Relaxed);
    }
    fn signal(&self) {
        let mut run = self.run.lock().unwrap();
        run.signalled = run.inside;
        self.left.notify_one();
    }
}

impl Shared {
    fn request(&self, data: u64) {
        self.state.request_pause(data);
        interrupt(self);
    }

    /// What an attendant does that wants the vCPU.
    fn want(&self) {
        self.wanted.swap(true, Ordering::AcqRel);
        interrupt(self);
    }

    /// Waits until the attendant has had the vCPU.
    fn wait_attended(&self) {
        let mut attended = self.attended.lock().unwrap();
        while *attended == 0 {
            attended = self.served.wait(attended).unwrap();
        }
    }

    fn end_guest(&self) {
        self.run.lock().unwrap().ends = true;
        self.left.notify_one();
    }

    /// The kick hook of the device, and its answer, wake a waiter alike.
    fn wake_device(&self, answer: bool) {
        self.device.lock().unwrap().answered |= answer;
        self.woken.notify_one();
    }

    fn kvm_run(&self) -> Step<()> {
        {
            let mut run = self.run.lock().unwrap();
            (run.inside, run.signalled) = (true, false);
        }
        let immediate = self.immediate_exit.load(Ordering::Relaxed) != 0;
        let mut run = self.run.lock().unwrap();
        while !immediate && !run.signalled && !run.ends {
            run = self.left.wait(run).unwrap();
        }
        run.inside = false;
        if run.ends { Step::Ended(()) } else { Step::Interrupted }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Event {
    Ack(u64, bool),
    Over { ended: bool },
}

/// The vCPU thread's side of the model.
struct Model {
    shared: Arc<Shared>,
    commands: ManuallyDrop<Receiver<Command<()>>>,
    events: Sender<Event>,
    /// The guest's first visit waits for the device.
    reads_device: bool,
    worked: usize,
}

impl Seat for Model {
    type Access = ();
    type End = ();
    type Work = ();

    fn state(&self) -> &PerVcpuState {
        &self.shared.state
    }
    fn clear(&self) {
        self.shared.immediate_exit.store(0, Ordering::Relaxed);
    }
    fn wanted(&self) -> bool {
        self.shared.wanted.fetch_or(false, Ordering::AcqRel)
    }
    fn attend(&mut self) -> Step<()> {
        // Taken first, so that whoever wants it from here on has it attended once more.
        self.shared.wanted.swap(false, Ordering::AcqRel);
        *self.shared.attended.lock().unwrap() += 1;
        self.shared.served.notify_one();
        Step::Served
    }
    fn enter(&mut self) -> Step<()> {
        while self.reads_device {
            let shared = self.shared.clone();
            let mut device = shared.device.lock().unwrap();
            while !device.answered && !shared.state.is_requested() {
                device = shared.woken.wait(device).unwrap();
            }
            if device.answered {
                self.reads_device = false;
                return Step::Ended(());
            }
            drop(device);
            if look(self, Some(())) == Woken::Stop {
                return Step::Stopped;
            }
        }
        self.shared.kvm_run()
    }
    fn complete(&mut self) -> Step<()> {
        self.shared.raise();
        Step::Interrupted
    }
    fn ack(&mut self, epoch: u64, outstanding: Option<()>) {
        self.events.send(Event::Ack(epoch, outstanding.is_some())).unwrap();
    }
    fn command(&mut self) -> Option<Command<()>> {
        self.commands.recv().ok()
    }
    fn work(&mut self, (): ()) {
        self.worked += 1;
    }
}

/// The coordinator's side.
struct Desk {
    shared: Arc<Shared>,
    commands: Sender<Command<()>>,
    events: ManuallyDrop<Receiver<Event>>,
    thread: thread::JoinHandle<usize>,
}

impl Desk {
    fn start(reads_device: bool, body: impl Fn(&mut Model) -> Option<()> + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let (commands, inbox) = channel();
        let (outbox, events) = channel();
        let theirs = shared.clone();
        let thread = thread::spawn(move || {
            let mut model = Model {
                shared: theirs,
                commands: ManuallyDrop::new(inbox),
                events: outbox.clone(),
                reads_device,
                worked: 0,
            };
            let ended = body(&mut model).is_some();
            outbox.send(Event::Over { ended }).unwrap();
            model.worked
        });
        Self { shared, commands, events: ManuallyDrop::new(events), thread }
    }

    fn tell(&self, command: Command<()>) {
        self.commands.send(command).unwrap();
    }

    fn pause(&self, epoch: u64) {
        self.shared.request(epoch);
        assert_eq!(self.events.recv().unwrap(), Event::Ack(epoch, false));
    }

    fn ack_and_stop(self, epoch: u64) {
        assert_eq!(self.events.recv().unwrap(), Event::Ack(epoch, false));
        self.tell(Command::Stop);
        assert_eq!(self.events.recv().unwrap(), Event::Over { ended: false });
        self.thread.join().unwrap();
    }

    /// Stops it as the coordinator does: the command first, then a pause to make it look.
    fn stop(self, epoch: u64) -> usize {
        self.tell(Command::Stop);
        self.shared.request(epoch);
        self.shared.wake_device(false);
        loop {
            match self.events.recv().unwrap() {
                Event::Over { ended } => break assert!(!ended),
                Event::Ack(..) => {}
            }
        }
        self.thread.join().unwrap()
    }
}

fn check(preemptions: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(model);
}

#[test]
fn no_pause_and_no_resume_is_lost() {
    check(Some(4), || {
        let desk = Desk::start(false, run);
        desk.pause(1);
        desk.tell(Command::Work(()));
        desk.tell(Command::Resume(1));
        desk.pause(2);
        desk.tell(Command::Resume(2));
        assert_eq!(desk.stop(3), 1);
    });
}

#[test]
fn a_request_before_the_thread_runs_the_guest_is_kept() {
    check(None, || {
        let desk = Desk::start(false, |model| {
            assert_eq!(wait(model, |command| matches!(command, Command::Run)), Woken::Run);
            run(model)
        });
        desk.shared.request(1);
        desk.tell(Command::Run);
        desk.ack_and_stop(1);
    });
}

#[test]
fn the_last_request_wins() {
    check(Some(4), || {
        let desk = Desk::start(false, run);
        desk.shared.request(1);
        desk.shared.request(2);
        let mut acks = Vec::new();
        while acks.last() != Some(&2) {
            let Event::Ack(epoch, false) = desk.events.recv().unwrap() else { panic!() };
            acks.push(epoch);
            desk.tell(Command::Resume(epoch));
        }
        assert!(acks == [1, 2] || acks == [2]);
        desk.stop(3);
    });
}

#[test]
fn two_requesters_at_once_lose_nothing() {
    check(Some(3), || {
        let desk = Desk::start(false, run);
        let shared = desk.shared.clone();
        let other = thread::spawn(move || shared.request(1));
        desk.shared.request(2);
        other.join().unwrap();
        // Both are in, in either order: at least the later one is answered.
        let Event::Ack(first, false) = desk.events.recv().unwrap() else { panic!() };
        desk.tell(Command::Resume(first));
        desk.shared.request(3);
        let mut acks = vec![first];
        while acks.last() != Some(&3) {
            let Event::Ack(epoch, false) = desk.events.recv().unwrap() else { panic!() };
            assert!(!acks.contains(&epoch), "answered twice: {epoch} after {acks:?}");
            acks.push(epoch);
            desk.tell(Command::Resume(epoch));
        }
        assert!(matches!(first, 1 | 2) && acks.len() <= 3, "{acks:?}");
        assert!(!desk.shared.state.is_requested());
        desk.stop(4);
    });
}

#[test]
fn a_pause_that_is_given_up_leaves_the_vcpu_free_for_the_next() {
    check(Some(3), || {
        let desk = Desk::start(false, run);
        desk.shared.request(1);
        let arrived = matches!(desk.events.try_recv(), Ok(Event::Ack(1, false)));
        release(&desk.shared.state, 1, arrived, |command| desk.tell(command));
        desk.shared.request(2);
        loop {
            match desk.events.recv().unwrap() {
                Event::Ack(2, false) => break,
                Event::Ack(1, false) => assert!(!arrived, "acked twice"),
                other => panic!("{other:?}"),
            }
        }
        desk.tell(Command::Resume(2));
        desk.stop(3);
    });
}

#[test]
fn a_pause_racing_with_the_guests_end_is_answered_by_one_of_them() {
    check(Some(4), || {
        let desk = Desk::start(false, run);
        let shared = desk.shared.clone();
        let guest = thread::spawn(move || shared.end_guest());
        desk.shared.request(1);
        match desk.events.recv().unwrap() {
            Event::Ack(1, false) => {
                desk.tell(Command::Resume(1));
                assert_eq!(desk.events.recv().unwrap(), Event::Over { ended: true });
            }
            Event::Over { ended } => assert!(ended),
            other => panic!("{other:?}"),
        }
        guest.join().unwrap();
        desk.thread.join().unwrap();
    });
}

#[test]
fn a_vcpu_that_waits_for_a_device_parks_and_takes_the_wait_up_again() {
    check(Some(4), || {
        let desk = Desk::start(true, run);
        desk.shared.request(1);
        desk.shared.wake_device(false);
        assert!(matches!(desk.events.recv().unwrap(), Event::Ack(1, _)));
        desk.tell(Command::Resume(1));
        desk.shared.wake_device(true);
        assert_eq!(desk.events.recv().unwrap(), Event::Over { ended: true });
        desk.thread.join().unwrap();
    });
}

#[test]
fn a_stop_reaches_a_vcpu_that_waits_for_a_device() {
    check(Some(4), || {
        Desk::start(true, run).stop(1);
    });
}

#[test]
fn an_attendant_and_a_pause_at_once_both_have_the_vcpu() {
    check(Some(3), || {
        let desk = Desk::start(false, run);
        let shared = desk.shared.clone();
        let attendant = thread::spawn(move || {
            shared.want();
            shared.wait_attended();
        });
        desk.pause(1);
        desk.tell(Command::Resume(1));
        attendant.join().unwrap();
        desk.stop(2);
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_attending_without_looking_again_loses_a_request() {
    check(Some(3), || {
        let desk = Desk::start(false, |model| {
            loop {
                if model.wanted() {
                    // Clears immediate_exit as look does, and enters the guest at once.
                    model.clear();
                    model.attend();
                } else if model.state().is_requested() && look(model, None) == Woken::Stop {
                    return None;
                }
                match model.enter() {
                    Step::Ended(()) => return Some(()),
                    _ if look(model, None) == Woken::Stop => return None,
                    _ => {}
                }
            }
        });
        let shared = desk.shared.clone();
        let attendant = thread::spawn(move || shared.want());
        desk.pause(1);
        desk.tell(Command::Resume(1));
        attendant.join().unwrap();
        desk.stop(2);
    });
}

/// [`run`] with its look replaced.
fn run_with(model: &mut Model, look: impl Fn(&mut Model) -> Woken) -> Option<()> {
    loop {
        if !model.state().is_requested() && matches!(model.enter(), Step::Ended(())) {
            return Some(());
        }
        if look(model) == Woken::Stop {
            return None;
        }
    }
}

fn park(model: &mut Model, taken: Option<u64>) -> Woken {
    let Some(epoch) = taken else { return Woken::Run };
    model.ack(epoch, None);
    wait(model, |command| matches!(command, Command::Resume(to) if *to == epoch))
}

fn pause_twice(body: impl Fn(&mut Model) -> Option<()> + Copy + Sync + Send + 'static) {
    check(Some(3), move || {
        let desk = Desk::start(false, body);
        desk.pause(1);
        desk.tell(Command::Resume(1));
        desk.pause(2);
        desk.tell(Command::Resume(2));
        desk.stop(3);
    });
}

#[test]
fn the_order_written_out_is_sound() {
    pause_twice(|model| {
        run_with(model, |model| {
            model.clear();
            let taken = model.state().take();
            park(model, taken)
        })
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_taking_before_clearing_loses_a_request() {
    pause_twice(|model| {
        run_with(model, |model| {
            let taken = model.state().take();
            model.clear();
            park(model, taken)
        })
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_a_request_without_immediate_exit_is_lost() {
    check(Some(3), || {
        let desk = Desk::start(false, run);
        desk.shared.state.request_pause(1);
        desk.shared.signal();
        desk.ack_and_stop(1);
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_interrupting_before_the_slot_is_set_loses_a_request() {
    check(Some(3), || {
        let desk = Desk::start(false, run);
        interrupt(&*desk.shared);
        desk.shared.state.request_pause(1);
        desk.ack_and_stop(1);
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn broken_signalling_before_immediate_exit_loses_a_request() {
    check(Some(3), || {
        let desk = Desk::start(false, run);
        desk.shared.state.request_pause(1);
        desk.shared.signal();
        desk.shared.raise();
        desk.ack_and_stop(1);
    });
}
