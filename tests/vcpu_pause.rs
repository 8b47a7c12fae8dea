//! Pausing and resuming real vCPUs: nothing lost, nothing hung, nothing half done.

#![allow(clippy::unwrap_used)] // a failure in a helper is a failed test

mod vcpu_support;

use cellblock::bus::{Bus, BusDevice, Outcome, VmExit};
use cellblock::vcpu::{
    ForbiddenTransition, PauseError, PauseReport, StartError, VcpuState, WorkError, kick_signal,
};
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED, kvm_msi};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use vcpu_support::*;

const CYCLES: usize = 10_000;

/// Lets the guest run, each time a little longer than before, so that the pauses meet it at every
/// point of its way in and out.
fn linger(cycle: usize) {
    let until = Instant::now() + Duration::from_micros(cycle as u64 % 80);
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

/// [`linger`], and now and then until the guest has shown that it really goes on.
fn go_on<T: PartialEq>(cycle: usize, progress: impl Fn() -> T) {
    if cycle.is_multiple_of(20) {
        let held = progress();
        wait_for("the guest to go on", || (progress() != held).then_some(()));
    } else {
        linger(cycle);
    }
}

/// Pauses and resumes `vcpus` counting vCPUs over and over.
fn cycles(vcpus: usize, native: bool) {
    let _alone = alone();
    let lab = Lab::new(vcpus, false);
    for id in 0..vcpus {
        if native { lab.user_mode(id, &COUNT) } else { lab.real_mode(id, &COUNT_REAL) }
    }
    let mut vm = lab.start(Bus::default(), Bus::default());
    let count = |vm: &Running, id| {
        if native { vm.counter(id) } else { vm.counter_real(id).into() }
    };
    vm.vcpus.run().unwrap();
    let mut took = Vec::with_capacity(CYCLES);
    for cycle in 0..CYCLES {
        let report = vm.vcpus.pause(PATIENCE).unwrap_or_else(|e| panic!("cycle {cycle}: {e}"));
        assert_eq!(report.epoch, cycle as u64 + 1);
        assert_eq!((report.arrivals.len(), report.rekicks), (vcpus, 0));
        took.push(report.took);
        let held: Vec<u64> = (0..vcpus).map(|id| count(&vm, id)).collect();
        if cycle % 100 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        } else {
            std::thread::yield_now();
        }
        for (id, &held) in held.iter().enumerate() {
            assert_eq!(count(&vm, id), held, "vcpu {id} ran while it was paused");
        }
        vm.vcpus.resume().unwrap();
        if cycle % 50 == 0 {
            for (id, &held) in held.iter().enumerate() {
                wait_for("the guest to go on", || (count(&vm, id) != held).then_some(()));
            }
        } else {
            linger(cycle);
        }
    }
    let (median, p99) = percentiles(&mut took);
    let kind = if native { "native" } else { "real mode" };
    println!("{vcpus} vcpus, {kind}: request to all parked, median {median:?}, 99% {p99:?}");
    vm.vcpus.stop(PATIENCE).unwrap();
    assert_eq!(vm.vcpus.states(), vec![VcpuState::Stopped; vcpus]);
    no_vcpu_threads();
}

#[test]
fn ten_thousand_pauses_of_one_vcpu() {
    cycles(1, true);
}

#[test]
fn ten_thousand_pauses_of_two_vcpus() {
    cycles(2, true);
}

#[test]
fn ten_thousand_pauses_of_four_vcpus() {
    cycles(4, true);
}

#[test]
fn ten_thousand_pauses_in_real_mode() {
    cycles(2, false);
}

/// The time a pause takes when the guest has been running for a while: no test, a measurement.
#[test]
fn latency_of_a_pause_from_within_the_guest() {
    let _alone = alone();
    for vcpus in [1, 2, 4] {
        let lab = Lab::new(vcpus, false);
        (0..vcpus).for_each(|id| lab.user_mode(id, &COUNT));
        let mut vm = lab.start(Bus::default(), Bus::default());
        vm.vcpus.run().unwrap();
        let mut took: Vec<Duration> = (0..1000)
            .map(|_| {
                std::thread::sleep(Duration::from_micros(300));
                let report = vm.vcpus.pause(PATIENCE).unwrap();
                vm.vcpus.resume().unwrap();
                report.took
            })
            .collect();
        let (median, p99) = percentiles(&mut took);
        println!(
            "{vcpus} vcpus in the guest: request to all parked, median {median:?}, 99% {p99:?}"
        );
    }
}

/// Answers reads with a number and wants it back before the next one.
#[derive(Default)]
struct Echo(Mutex<EchoState>);

#[derive(Default, Clone, Copy)]
struct EchoState {
    last: u64,
    waits_for_write: bool,
}

impl Echo {
    fn state(&self) -> EchoState {
        *self.0.lock().unwrap()
    }
}

impl BusDevice for Echo {
    fn read(&self, _: usize, _: u64, data: &mut [u8]) -> Outcome {
        let mut state = self.0.lock().unwrap();
        assert!(!state.waits_for_write, "read twice");
        state.waits_for_write = true;
        state.last = state.last.wrapping_add(0x0101_0101_0101_0101);
        data.copy_from_slice(&state.last.to_le_bytes()[..data.len()]);
        Outcome::Done
    }
    fn write(&self, _: usize, _: u64, data: &[u8]) -> Outcome {
        let mut state = self.0.lock().unwrap();
        assert!(state.waits_for_write, "written twice");
        assert_eq!(data, &state.last.to_le_bytes()[..data.len()]);
        state.waits_for_write = false;
        Outcome::Done
    }
}

#[test]
fn port_accesses_are_complete_before_the_ack() {
    let _alone = alone();
    let lab = Lab::new(1, false);
    lab.real_mode(0, &ECHO);
    let echo = Arc::new(Echo::default());
    let mut vm = lab.start(bus(ECHO_PORT, 1, echo.clone()), Bus::default());
    vm.vcpus.run().unwrap();
    for cycle in 0..CYCLES {
        vm.vcpus.pause(PATIENCE).unwrap();
        let regs = vm.vcpus.with_vcpu(0, |vcpu| vcpu.get_regs().unwrap()).unwrap();
        let state = echo.state();
        if state.waits_for_write {
            assert!([4, 9].contains(&regs.rip), "the read is done, rip {:#x}", regs.rip);
            assert_eq!(regs.rax as u8, state.last as u8);
        } else {
            assert!([0, 3, 0xa].contains(&regs.rip), "the write is done, rip {:#x}", regs.rip);
        }
        vm.vcpus.resume().unwrap();
        go_on(cycle, || vm.counter_real(0));
    }
    assert_eq!(vm.exit.end(), None);
}

#[test]
fn memory_accesses_are_complete_before_the_ack() {
    let _alone = alone();
    let lab = Lab::new(1, false);
    // mov rcx, [rbx]; inc qword [rax]; mov [rbx], rcx; jmp
    let code = [0x48, 0x8b, 0x0b, 0x48, 0xff, 0x00, 0x48, 0x89, 0x0b, 0xeb, 0xf5];
    lab.user_mode(0, &code);
    let echo = Arc::new(Echo::default());
    let mut vm = lab.start(Bus::default(), bus(HOLE, 8, echo.clone()));
    vm.vcpus.run().unwrap();
    for cycle in 0..CYCLES {
        vm.vcpus.pause(PATIENCE).unwrap();
        let regs = vm.vcpus.with_vcpu(0, |vcpu| vcpu.get_regs().unwrap()).unwrap();
        let (state, at) = (echo.state(), regs.rip - CODE);
        if state.waits_for_write {
            assert!([3, 6].contains(&at), "the read is done, offset {at:#x}");
            assert_eq!(regs.rcx, state.last);
        } else {
            assert!([0, 9].contains(&at), "the write is done, offset {at:#x}");
        }
        vm.vcpus.resume().unwrap();
        go_on(cycle, || vm.counter(0));
    }
}

/// Counts the accesses, which a page boundary makes two of each.
#[derive(Default)]
struct Halves(Mutex<Vec<(u64, usize, bool)>>);

impl BusDevice for Halves {
    fn read(&self, _: usize, offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(offset as u8);
        self.0.lock().unwrap().push((offset, data.len(), false));
        Outcome::Done
    }
    fn write(&self, _: usize, offset: u64, data: &[u8]) -> Outcome {
        let want = if offset == 0xffc { 0xfc } else { 0x00 };
        assert!(data.iter().all(|&byte| byte == want), "{data:x?} at {offset:#x}");
        self.0.lock().unwrap().push((offset, data.len(), true));
        Outcome::Done
    }
}

#[test]
fn no_pause_falls_between_the_halves_of_an_access() {
    let _alone = alone();
    let lab = Lab::new(1, false);
    // mov rcx, [rbx+0xffc]; mov [rbx+0xffc], rcx; jmp
    let code = [0x48, 0x8b, 0x8b, 0xfc, 0x0f, 0, 0, 0x48, 0x89, 0x8b, 0xfc, 0x0f, 0, 0, 0xeb, 0xf0];
    lab.user_mode(0, &code);
    let halves = Arc::new(Halves::default());
    let mut vm = lab.start(Bus::default(), bus(HOLE, 0x2000, halves.clone()));
    vm.vcpus.run().unwrap();
    for cycle in 0..CYCLES {
        vm.vcpus.pause(PATIENCE).unwrap();
        let seen = std::mem::take(&mut *halves.0.lock().unwrap());
        for pair in seen.chunks(2) {
            assert_eq!(pair, [(0xffc, 4, pair[0].2), (0x1000, 4, pair[0].2)]);
        }
        vm.vcpus.resume().unwrap();
        go_on(cycle, || halves.0.lock().unwrap().len());
    }
}

#[test]
fn a_halted_vcpu_arrives() {
    let _alone = alone();
    let lab = Lab::new(1, true);
    lab.real_mode(0, &[0xf4, 0xeb, 0xfd]); // hlt; jmp
    let mut vm = lab.start(Bus::default(), Bus::default());
    vm.vcpus.run().unwrap();
    let mut halted = 0;
    for cycle in 0..1000 {
        vm.vcpus.pause(PATIENCE).unwrap();
        let (mp, regs) = vm
            .vcpus
            .with_vcpu(0, |vcpu| (vcpu.get_mp_state().unwrap(), vcpu.get_regs().unwrap()))
            .unwrap();
        if mp.mp_state == KVM_MP_STATE_HALTED {
            assert_eq!(regs.rip, 1);
            halted += 1;
        } else {
            assert_eq!((halted, regs.rip), (0, 0), "it has not got that far");
        }
        vm.vcpus.resume().unwrap();
        if cycle % 10 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(halted > 0);
}

#[test]
fn a_vcpu_that_waits_to_be_started_arrives_and_can_still_be_started() {
    let _alone = alone();
    let lab = Lab::new(2, true);
    lab.user_mode(0, &COUNT);
    // At 0x12000: inc dword cs:[0x100]; jmp
    lab.place(2, &[0x2e, 0x66, 0xff, 0x06, 0x00, 0x01, 0xeb, 0xf8]);
    let mut vm = lab.start(Bus::default(), Bus::default());
    vm.vcpus.run().unwrap();
    let state =
        |vm: &Running| vm.vcpus.with_vcpu(1, |vcpu| vcpu.get_mp_state().unwrap().mp_state).unwrap();
    for cycle in 0..1000 {
        vm.vcpus.pause(PATIENCE).unwrap();
        assert_eq!(state(&vm), KVM_MP_STATE_UNINITIALIZED);
        vm.vcpus.resume().unwrap();
        if cycle % 10 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    // INIT and start-up to APIC id 1, as message-signalled interrupts.
    for data in [0x4500, 0x4612] {
        let msi = kvm_msi { address_lo: 0xfee0_1000, data, ..Default::default() };
        assert_eq!(vm.vm.signal_msi(msi).unwrap(), 1);
    }
    wait_for("the second vcpu to count", || (vm.counter_real(2) > 0).then_some(()));
    vm.vcpus.pause(PATIENCE).unwrap();
    assert_ne!(state(&vm), KVM_MP_STATE_UNINITIALIZED);
    vm.vcpus.resume().unwrap();
}

/// Answers once it is allowed to; gives in to a kick or does not.
#[derive(Default)]
struct Slow {
    open: Mutex<bool>,
    changed: Condvar,
    waiting: AtomicBool,
    /// Asked whether to give in.
    kicked: Option<Box<dyn Fn(usize) -> bool + Send + Sync>>,
}

impl Slow {
    /// A device that gives in to kicks.
    fn patient(lab: &Lab) -> Arc<Self> {
        let kicks = lab.kicks.clone();
        let kicked: Box<dyn Fn(usize) -> bool + Send + Sync> = Box::new(move |v| kicks.kicked(v));
        let slow = Arc::new(Self { kicked: Some(kicked), ..Self::default() });
        let hook = slow.clone();
        lab.kicks.on_kick(move |_| {
            drop(hook.open.lock().unwrap());
            hook.changed.notify_all();
        });
        slow
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn waited_for(&self) {
        wait_for("the guest to wait", || self.waiting.load(Ordering::Acquire).then_some(()));
    }
}

/// Lets the vCPU go even if the test fails.
struct OpenAtLast(Arc<Slow>);

impl Drop for OpenAtLast {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl BusDevice for Slow {
    fn read(&self, vcpu: usize, _: u64, data: &mut [u8]) -> Outcome {
        let mut open = self.open.lock().unwrap();
        while !*open {
            if self.kicked.as_ref().is_some_and(|kicked| kicked(vcpu)) {
                return Outcome::Retry;
            }
            self.waiting.store(true, Ordering::Release);
            open = self.changed.wait(open).unwrap();
        }
        data.fill(0x5a);
        Outcome::Done
    }
    fn write(&self, _: usize, _: u64, data: &[u8]) -> Outcome {
        assert_eq!(data, [0x5a]);
        Outcome::Exit(VmExit::Shutdown)
    }
}

#[test]
fn a_vcpu_that_waits_for_a_device_parks_in_the_middle_of_its_access() {
    let _alone = alone();
    let lab = Lab::new(2, false);
    lab.real_mode(0, &ECHO);
    lab.user_mode(1, &COUNT);
    let slow = Slow::patient(&lab);
    let mut vm = lab.start(bus(ECHO_PORT, 1, slow.clone()), Bus::default());
    vm.vcpus.run().unwrap();
    slow.waited_for();
    for _ in 0..1000 {
        let report = vm.vcpus.pause(PATIENCE).unwrap();
        let access = report.arrivals[0].outstanding.expect("the read is outstanding");
        assert_eq!((access.addr, access.len, access.is_write), (ECHO_PORT, 1, false));
        assert_eq!(report.arrivals[1].outstanding, None);
        let regs = vm.vcpus.with_vcpu(0, |vcpu| vcpu.get_regs().unwrap()).unwrap();
        assert_eq!(regs.rip, 3, "the instruction is not complete");
        vm.vcpus.resume().unwrap();
    }
    slow.open();
    assert_eq!((vm.end().vcpu, &vm.end().exit), (0, &VmExit::Shutdown));
    assert_eq!(vm.counter_real(0), 1, "the read was completed once");
}

#[test]
fn a_stop_ends_a_vcpu_that_waits_for_a_device() {
    let _alone = alone();
    let lab = Lab::new(1, false);
    lab.real_mode(0, &ECHO);
    let slow = Slow::patient(&lab);
    let mut vm = lab.start(bus(ECHO_PORT, 1, slow.clone()), Bus::default());
    vm.vcpus.run().unwrap();
    slow.waited_for();
    vm.vcpus.stop(PATIENCE).unwrap();
    no_vcpu_threads();
    drop(vm);
    assert_eq!(Arc::strong_count(&slow), 1, "no hook keeps the device of a VM that is gone");
}

#[test]
fn a_vcpu_that_cannot_arrive_is_named_and_the_others_run_on() {
    let _alone = alone();
    let lab = Lab::new(3, false);
    lab.user_mode(0, &COUNT);
    lab.real_mode(1, &ECHO);
    lab.user_mode(2, &COUNT);
    let deaf = Arc::new(Slow::default());
    let _opened_at_last = OpenAtLast(deaf.clone());
    let mut vm = lab.start_with(bus(ECHO_PORT, 1, deaf.clone()), Bus::default(), |_| {});
    vm.vcpus.run().unwrap();
    deaf.waited_for();
    for _ in 0..5 {
        let start = Instant::now();
        let error = vm.vcpus.pause(Duration::from_millis(50)).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(1));
        assert!(matches!(&error, PauseError::Absent { vcpus, .. } if *vcpus == [1]), "{error}");
        assert!(error.to_string().starts_with("vcpu 1 did not pause within 0."), "{error}");
        assert_eq!(vm.vcpus.states(), vec![VcpuState::Running; 3]);
        for id in [0, 2] {
            let held = vm.counter(id);
            wait_for("the others to run on", || (vm.counter(id) != held).then_some(()));
        }
        assert!(!vm.vcpus.kicked(1), "the request was taken back");
    }
    let error = vm.vcpus.stop(Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.vcpus, [1]);
    wait_for("only vcpu 1 to be left", || (vcpu_threads() == ["vcpu1"]).then_some(()));
    deaf.open();
    vm.vcpus.stop(PATIENCE).unwrap();
    no_vcpu_threads();
}

#[test]
fn a_laggard_that_comes_after_all_is_not_left_parked() {
    let _alone = alone();
    let lab = Lab::new(2, false);
    (0..2).for_each(|id| lab.user_mode(id, &COUNT));
    let mut vm = lab.start(Bus::default(), Bus::default());
    vm.vcpus.run().unwrap();
    let mut given_up = 0;
    for cycle in 0..3000u64 {
        // Deadlines around the time a pause takes: given up at every point of the way.
        let deadline = if cycle % 4 == 0 { 0 } else { cycle % 100 };
        match vm.vcpus.pause(Duration::from_micros(deadline)) {
            Ok(_) => vm.vcpus.resume().unwrap(),
            Err(PauseError::Absent { .. }) => given_up += 1,
            Err(error) => panic!("{error}"),
        }
        if cycle % 50 == 0 {
            for id in 0..2 {
                let held = vm.counter(id);
                wait_for("the guest to go on", || (vm.counter(id) != held).then_some(()));
            }
        }
    }
    assert!(given_up > 100, "only {given_up} of 3000 were given up");
    vm.vcpus.pause(PATIENCE).unwrap();
}

#[test]
fn a_pause_and_the_guests_end_at_once_have_one_clear_result() {
    let _alone = alone();
    let (mut paused, mut ended) = (0, 0);
    for round in 0..400u16 {
        let lab = Lab::new(2, false);
        lab.user_mode(0, &COUNT);
        // mov cx, n; loop; out 0x7f, al
        let [low, high] = (round % 100 * 2 + 1).to_le_bytes();
        lab.real_mode(1, &[&[0xb9, low, high, 0xe2, 0xfe], &END[..]].concat());
        let mut vm = lab.start(bus(END_PORT, 1, Arc::new(PowerButton)), Bus::default());
        vm.vcpus.run().unwrap();
        match vm.vcpus.pause(PATIENCE) {
            Ok(PauseReport { .. }) => {
                paused += 1;
                assert_eq!(vm.vcpus.states(), [VcpuState::Paused; 2]);
                vm.vcpus.resume().unwrap();
            }
            Err(PauseError::Ended { vcpus }) => {
                ended += 1;
                assert_eq!(vcpus, [1]);
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!((vm.end().vcpu, vm.end().exit), (1, VmExit::Shutdown));
        vm.vcpus.stop(PATIENCE).unwrap();
    }
    println!("{paused} pauses came first, {ended} ends");
    no_vcpu_threads();
}

#[test]
fn a_command_out_of_turn_is_an_error_and_changes_nothing() {
    use VcpuState::{Created, Paused, Pausing, Running as Runs, Stopped};
    let _alone = alone();
    let lab = Lab::new(1, false);
    lab.user_mode(0, &COUNT);
    let mut vm = lab.start(Bus::default(), Bus::default());
    let wrong = |from, to| ForbiddenTransition { from, to };
    let cannot_pause = |vm: &mut Running| match vm.vcpus.pause(PATIENCE).unwrap_err() {
        PauseError::State(wrong) => wrong,
        other => panic!("{other}"),
    };

    assert_eq!(vm.vcpus.states(), [Created]);
    assert_eq!(cannot_pause(&mut vm), wrong(Created, Pausing));
    assert_eq!(vm.vcpus.resume().unwrap_err().0, wrong(Created, Runs));
    let rip = vm.vcpus.with_vcpu(0, |vcpu| vcpu.get_regs().unwrap().rip).unwrap();
    assert_eq!(rip, CODE, "a vcpu that has not run can be worked with");

    vm.vcpus.run().unwrap();
    assert_eq!(vm.vcpus.run().unwrap_err().0, wrong(Runs, Runs));
    assert_eq!(vm.vcpus.resume().unwrap_err().0, wrong(Runs, Runs));
    let busy = vm.vcpus.with_vcpu(0, |_| ()).unwrap_err();
    assert_eq!(busy, WorkError::Running { vcpu: 0, state: Runs });
    assert_eq!(vm.vcpus.with_vcpu(1, |_| ()).unwrap_err(), WorkError::Unknown { vcpu: 1 });

    vm.vcpus.pause(PATIENCE).unwrap();
    assert_eq!(cannot_pause(&mut vm), wrong(Paused, Pausing));
    assert_eq!(vm.vcpus.run().unwrap_err().0, wrong(Paused, Runs));
    let held = vm.counter(0);
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(vm.counter(0), held, "still parked");
    vm.vcpus.resume().unwrap();

    vm.vcpus.stop(PATIENCE).unwrap();
    vm.vcpus.stop(PATIENCE).unwrap();
    assert_eq!(vm.vcpus.states(), [Stopped]);
    assert!(matches!(vm.vcpus.pause(PATIENCE), Err(PauseError::Ended { vcpus }) if vcpus == [0]));
    assert_eq!(vm.vcpus.with_vcpu(0, |_| ()).unwrap_err(), WorkError::Gone { vcpu: 0 });
}

#[test]
fn a_pause_right_after_run_is_kept() {
    let _alone = alone();
    for _ in 0..200 {
        let lab = Lab::new(2, false);
        (0..2).for_each(|id| lab.user_mode(id, &COUNT));
        let mut vm = lab.start(Bus::default(), Bus::default());
        vm.vcpus.run().unwrap();
        vm.vcpus.pause(PATIENCE).unwrap();
        drop(vm);
        // Dropping stops, also when paused.
        no_vcpu_threads();
    }
}

#[test]
fn work_runs_on_every_vcpus_own_thread() {
    let _alone = alone();
    let lab = Lab::new(3, false);
    (0..3).for_each(|id| lab.user_mode(id, &COUNT));
    let mut vm = lab.start(Bus::default(), Bus::default());
    vm.vcpus.run().unwrap();
    vm.vcpus.pause(PATIENCE).unwrap();
    let names =
        vm.vcpus.with_each(|id, _| (id, std::thread::current().name().map(str::to_owned))).unwrap();
    let want: Vec<_> = (0..3).map(|id| (id, Some(format!("vcpu{id}")))).collect();
    assert_eq!(names, want);
    // What is changed there is what the guest goes on with.
    vm.vcpus
        .with_vcpu(1, |vcpu| {
            let mut regs = vcpu.get_regs().unwrap();
            regs.rax += 0x400;
            vcpu.set_regs(&regs).unwrap();
        })
        .unwrap();
    let held = vm.counter(1);
    vm.vcpus.resume().unwrap();
    wait_for("the other counter", || (vm.counter(1 + 0x400 / 64) > 0).then_some(()));
    assert_eq!(vm.counter(1), held);
}

#[test]
fn a_panic_in_work_ends_the_vm_and_not_the_process() {
    let _alone = alone();
    let lab = Lab::new(2, false);
    (0..2).for_each(|id| lab.user_mode(id, &COUNT));
    let mut vm = lab.start(Bus::default(), Bus::default());
    vm.vcpus.run().unwrap();
    vm.vcpus.pause(PATIENCE).unwrap();
    let gone = vm.vcpus.with_vcpu(1, |_| panic!("on purpose")).unwrap_err();
    assert_eq!(gone, WorkError::Gone { vcpu: 1 });
    assert!(matches!(vm.end().exit, VmExit::Error(what) if what.contains("panicked")));
    assert!(vm.vcpus.resume().is_err());
    vm.vcpus.stop(PATIENCE).unwrap();
    no_vcpu_threads();
}

#[test]
fn the_thread_hook_runs_first_on_every_thread_and_can_refuse() {
    let _alone = alone();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let start = |refused: Option<usize>| {
        let lab = Lab::new(3, false);
        let seen = seen.clone();
        let (notifier, _listener) = cellblock::vcpu::exit_notice().unwrap();
        let none = Arc::new(Bus::default());
        let mut config = cellblock::vcpu::Config::new(lab.kicks, none.clone(), none, notifier);
        config.on_thread_start = Some(Arc::new(move |vcpu| {
            let name = std::thread::current().name().unwrap().to_owned();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            seen.lock().unwrap().push((vcpu, name, status));
            if refused == Some(vcpu) { Err("not today".to_owned()) } else { Ok(()) }
        }));
        cellblock::vcpu::Vcpus::start(lab.fds, config)
    };
    drop(start(None).unwrap());
    let mut seen_now = std::mem::take(&mut *seen.lock().unwrap());
    seen_now.sort();
    for (id, (vcpu, name, status)) in seen_now.iter().enumerate() {
        assert_eq!((*vcpu, name.as_str()), (id, format!("vcpu{id}").as_str()));
        let line = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        let blocked = u64::from_str_radix(line.trim(), 16).unwrap();
        let is_blocked = |signal: i32| blocked >> (signal - 1) & 1 == 1;
        assert!(is_blocked(15) && is_blocked(2), "SIGTERM and SIGINT are for the main thread");
        assert!(!is_blocked(kick_signal()) && !is_blocked(31), "kicks and SIGSYS come in");
    }
    assert_eq!(seen_now.len(), 3);
    let error = start(Some(1)).err().unwrap();
    assert!(matches!(&error, StartError::Hook { vcpu: 1, message } if message == "not today"));
    no_vcpu_threads();
}
