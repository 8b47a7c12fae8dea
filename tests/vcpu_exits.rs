//! What a guest can do to leave: accesses of every shape, and every way to end.
#![allow(clippy::unwrap_used)] // a failure in a helper is a failed test

mod vcpu_support;

use cellblock::bus::{Bus, BusDevice, Outcome, VmExit};
use cellblock::vcpu::{Kicks, PauseError, VcpuState};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vcpu_support::*;

/// Runs one vCPU in real mode to its end.
fn run(code: &[u8], pio: Bus) -> (VmExit, Running) {
    let lab = Lab::new(1, false);
    lab.real_mode(0, code);
    let mut vm = lab.start(pio, Bus::default());
    vm.vcpus.run().unwrap();
    let end = vm.end();
    assert_eq!(end.vcpu, 0);
    (end.exit, vm)
}

/// Keeps what is written, with the size of each write; reads give a rising count.
#[derive(Default)]
struct Tape {
    written: Mutex<Vec<u8>>,
    sizes: Mutex<Vec<usize>>,
    count: Mutex<u8>,
    /// Refuses every write while its vCPU is kicked.
    reluctant: Option<Arc<Kicks>>,
}

impl BusDevice for Tape {
    fn read(&self, _: usize, _: u64, data: &mut [u8]) -> Outcome {
        let mut count = self.count.lock().unwrap();
        for byte in data {
            *byte = *count;
            *count = count.wrapping_add(1);
        }
        Outcome::Done
    }
    fn write(&self, vcpu: usize, _: u64, data: &[u8]) -> Outcome {
        if self.reluctant.as_ref().is_some_and(|kicks| kicks.kicked(vcpu)) {
            return Outcome::Retry;
        }
        self.written.lock().unwrap().extend_from_slice(data);
        self.sizes.lock().unwrap().push(data.len());
        Outcome::Done
    }
}

fn tape_and_button(tape: &Arc<Tape>) -> Bus {
    Bus::builder()
        .add(ECHO_PORT, 1, tape.clone())
        .unwrap()
        .add(END_PORT, 1, Arc::new(PowerButton))
        .unwrap()
        .build()
}

#[test]
fn string_instructions_are_served_element_by_element() {
    let _alone = alone();
    let code = [
        &[0xfc, 0xba, 0x00, 0x05][..],         // cld; mov dx, 0x500
        &[0xbf, 0x00, 0x03, 0xb9, 0x00, 0x01], // mov di, 0x300; mov cx, 256
        &[0xf3, 0x6c],                         // rep insb
        &[0xbe, 0x00, 0x03, 0xb9, 0x00, 0x01], // mov si, 0x300; mov cx, 256
        &[0xf3, 0x6e],                         // rep outsb
        &[0xbe, 0x00, 0x03, 0xb9, 0x80, 0x00], // mov si, 0x300; mov cx, 128
        &[0xf3, 0x6f],                         // rep outsw
        &END,
    ]
    .concat();
    let tape = Arc::new(Tape::default());
    let (exit, _vm) = run(&code, tape_and_button(&tape));
    assert_eq!(exit, VmExit::Shutdown);
    let once: Vec<u8> = (0..=255).collect();
    assert_eq!(*tape.written.lock().unwrap(), [once.clone(), once].concat());
    let sizes = tape.sizes.lock().unwrap();
    assert_eq!((&sizes[..256], &sizes[256..]), (&[1; 256][..], &[2; 128][..]));
}

#[test]
fn a_string_instruction_can_be_paused_at_any_element() {
    let _alone = alone();
    let lab = Lab::new(1, false);
    // cld; mov dx, 0x500; again: mov si, 0x300; mov cx, 256; rep outsb; jmp again
    let mut code = vec![0xfc, 0xba, 0x00, 0x05];
    code.extend([0xbe, 0x00, 0x03, 0xb9, 0x00, 0x01, 0xf3, 0x6e, 0xeb, 0xf6]);
    code.resize(0x300, 0x90);
    code.extend(0..=255u8);
    lab.real_mode(0, &code);
    let tape = Arc::new(Tape { reluctant: Some(lab.kicks.clone()), ..Tape::default() });
    let mut vm = lab.start(tape_and_button(&tape), Bus::default());
    vm.vcpus.run().unwrap();
    let mut in_the_middle = 0;
    for cycle in 0..3000 {
        let report = vm.vcpus.pause(PATIENCE).unwrap();
        in_the_middle += usize::from(report.arrivals[0].outstanding.is_some());
        vm.vcpus.resume().unwrap();
        std::thread::sleep(Duration::from_micros(cycle % 100));
    }
    vm.vcpus.stop(PATIENCE).unwrap();
    let written = tape.written.lock().unwrap();
    assert!(written.len() > 1000, "{} elements", written.len());
    assert!(in_the_middle > 100, "{in_the_middle} pauses in the middle");
    let wrong = written.iter().enumerate().find(|&(at, &byte)| byte != at as u8);
    assert_eq!(wrong, None, "an element was lost or came twice");
}

#[test]
fn nobody_home_reads_all_ones() {
    let _alone = alone();
    // mov dx, 0x600; in ax, dx; mov [0x100], ax; out dx, ax; the end
    let code = [&[0xba, 0x00, 0x06, 0xed, 0xa3, 0x00, 0x01, 0xef][..], &END].concat();
    let (exit, vm) = run(&code, tape_and_button(&Arc::default()));
    assert_eq!(exit, VmExit::Shutdown);
    assert_eq!(vm.counter_real(0), 0xffff);
}

#[test]
fn a_triple_fault_is_a_reset() {
    let _alone = alone();
    let lab = Lab::new(1, false);
    lab.user_mode(0, &[0x0f, 0x0b]); // ud2, and no interrupt table to go through
    let mut vm = lab.start(Bus::default(), Bus::default());
    vm.vcpus.run().unwrap();
    assert_eq!(vm.end().exit, VmExit::Reset);
}

#[test]
fn code_where_no_memory_is_names_the_place() {
    let _alone = alone();
    let lab = Lab::new(1, false);
    lab.user_mode(0, &[0xff, 0xe3]); // jmp rbx
    let mut sregs = lab.fds[0].get_sregs().unwrap();
    // At CPL 0: KVM gives a user's fault to the guest's own kernel.
    for segment in [&mut sregs.cs, &mut sregs.ss] {
        (segment.dpl, segment.selector) = (0, segment.selector & !3);
    }
    lab.fds[0].set_sregs(&sregs).unwrap();
    let mut vm = lab.start(Bus::default(), Bus::default());
    vm.vcpus.run().unwrap();
    let VmExit::Error(facts) = vm.end().exit else { panic!("{:?}", vm.end()) };
    assert!(facts.contains("suberror 1") && facts.ends_with("rip 0x200000"), "{facts}");
    // What is left of it can be looked at.
    assert_eq!(vm.vcpus.states(), [VcpuState::Stopped]);
    let rip = vm.vcpus.with_vcpu(0, |vcpu| vcpu.get_regs().unwrap().rip).unwrap();
    assert_eq!(rip, HOLE);
}

#[test]
fn a_halt_that_nothing_could_end_is_an_error() {
    let _alone = alone();
    let (exit, _vm) = run(&[0xf4], Bus::default());
    let VmExit::Error(facts) = exit else { panic!("{exit:?}") };
    assert!(facts.starts_with("halted") && facts.ends_with("rip 0x1"), "{facts}");
}

#[test]
fn the_first_end_wins_and_is_heard_by_poll() {
    let _alone = alone();
    let lab = Lab::new(3, false);
    lab.real_mode(0, &END);
    lab.real_mode(1, &[0xf4]);
    lab.user_mode(2, &COUNT);
    let mut vm = lab.start(bus(END_PORT, 1, Arc::new(PowerButton)), Bus::default());
    let heard = |vm: &Running, patience: u16| {
        let mut fds = [nix::poll::PollFd::new(vm.exit.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, patience).unwrap() == 1
    };
    assert!(!heard(&vm, 0) && vm.exit.end().is_none());
    vm.vcpus.run().unwrap();
    assert!(heard(&vm, 5000));
    let first = vm.end();
    wait_for("both ends", || (vm.vcpus.states()[..2] == [VcpuState::Stopped; 2]).then_some(()));
    assert_eq!(vm.end(), first, "a later end changes nothing");
    assert!(matches!((first.vcpu, &first.exit), (0, VmExit::Shutdown) | (1, VmExit::Error(_))));
    let held = vm.counter(2);
    wait_for("the third to run on", || (vm.counter(2) != held).then_some(()));
    let error = vm.vcpus.pause(PATIENCE).unwrap_err();
    assert!(matches!(&error, PauseError::Ended { vcpus } if *vcpus == [0, 1]), "{error}");
    vm.vcpus.stop(PATIENCE).unwrap();
    no_vcpu_threads();
}

/// Fails as no device should.
struct Broken;

impl BusDevice for Broken {
    fn read(&self, _: usize, _: u64, _: &mut [u8]) -> Outcome {
        panic!("on purpose")
    }
    fn write(&self, _: usize, _: u64, _: &[u8]) -> Outcome {
        panic!("on purpose")
    }
}

#[test]
fn a_panic_in_a_device_ends_the_vm_and_not_the_process() {
    let _alone = alone();
    let (exit, mut vm) = run(&END, bus(END_PORT, 1, Arc::new(Broken)));
    assert!(matches!(&exit, VmExit::Error(what) if what.contains("panicked")), "{exit:?}");
    vm.vcpus.stop(PATIENCE).unwrap();
    no_vcpu_threads();
}
