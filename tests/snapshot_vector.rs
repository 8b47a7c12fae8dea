//! Values that a guest has in vector and floating-point registers only, through snapshots, restores
//! and resets.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use cellblock::control::protocol::Request;
use common::Vm;

/// Far more rounds than a snapshot could hit between two of them.
#[track_caller]
fn goes_on(vm: &mut Vm) {
    vm.wait_for_line("vector: n=");
    vm.wait_for_line("vector: n=");
}

#[track_caller]
fn ends(mut vm: Vm) {
    goes_on(&mut vm);
    vm.say(b"q");
    vm.wait_for("vector: ok");
    vm.ends_well();
}

#[test]
fn vector_and_floating_point_registers_are_what_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut vm = Vm::with("mode=vector every=5").start();
    goes_on(&mut vm);
    for n in 0..4 {
        let options: &[&str] = if n % 2 == 0 { &[] } else { &["--live"] };
        vm.snapshot(&at(&n.to_string()), options);
        goes_on(&mut vm);
    }
    vm.pause();
    vm.resume();
    vm.snapshot(&at("last"), &["--stop"]);
    vm.wait_exit();
    // All of them, since each was taken at another place in a round.
    for name in ["0", "1", "2", "3", "last"] {
        let mut vm = Vm::restore(&at(name)).start();
        for _ in 0..3 {
            goes_on(&mut vm);
            vm.ask(Request::Reset);
        }
        goes_on(&mut vm);
        let next = at(&format!("{name}-next"));
        vm.snapshot(&next, &[]);
        ends(vm);
        ends(Vm::restore(&next).arg("--memory-mode").arg("eager").start());
    }
}
