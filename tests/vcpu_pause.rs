//! Pausing and resuming real vCPUs: nothing lost, nothing hung, nothing half done.

mod vcpu_support;

use cellblock::bus::Bus;
use cellblock::vcpu::VcpuState;
use std::time::Duration;
use vcpu_support::*;

const CYCLES: usize = 10_000;

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
        }
    }
    let (median, p99) = percentiles(&mut took);
    let kind = if native { "native" } else { "real mode" };
    println!("{vcpus} vcpus, {kind}: request to all parked, median {median:?}, 99% {p99:?}");
    vm.vcpus.stop(PATIENCE).unwrap();
    assert_eq!(vm.vcpus.states(), vec![VcpuState::Stopped; vcpus]);
    assert_eq!(vcpu_threads(), Vec::<String>::new());
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
