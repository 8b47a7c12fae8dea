//! Plugins that stop vCPUs, in all races; and plugins that do not play by the rules.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod plugin_support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use cellblock_plugin_api::{Event, Space, Vcpu, Vm};
use plugin_support::*;

/// `inc dword [0xf000]` for ever, now and then with an access to port 0x50.
const BUSY: &[u8] = &[0x66, 0xff, 0x06, 0x00, 0xf0, 0xe4, 0x50, 0xeb, 0xf7];

fn busy(vcpus: usize) -> (Vmm, Vm, Vec<Arc<Vcpu>>, Memory) {
    let mut vmm = Vmm::new(vcpus);
    let vm = vmm.connect();
    let memory = guest(&vm, &vec![BUSY; vcpus]);
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    let all: Vec<_> = (0..vcpus as u32).map(|id| vm.vcpu(id).unwrap()).collect();
    vm.start().unwrap();
    all.iter().for_each(|vcpu| enter(vcpu));
    (vmm, vm, all, memory)
}

const LAST: u64 = u64::MAX;

#[test]
fn a_hundred_thousand_pauses_by_four_threads_of_four_busy_vcpus() {
    const EACH: u64 = 25_000;
    let (vmm, vm, vcpus, _memory) = busy(4);
    // The last cookie of each requester that each vCPU reported.
    let seen: Vec<[AtomicU64; 4]> = (0..4).map(|_| Default::default()).collect();
    let pauses = AtomicU64::new(0);
    let meeting = Barrier::new(4);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for (vcpu, seen) in vcpus.iter().zip(&seen) {
            let pauses = &pauses;
            scope.spawn(move || {
                loop {
                    match vcpu.wait_timeout(PATIENCE).unwrap().expect("a vCPU that reports") {
                        Event::Paused { user: LAST } => break vcpu.resume().unwrap(),
                        Event::Paused { user } => {
                            pauses.fetch_add(1, Ordering::Relaxed);
                            let before = seen[(user >> 32) as usize].swap(user, Ordering::AcqRel);
                            assert!(user > before, "{user:#x} after {before:#x}");
                        }
                        Event::Access(_) => vcpu.answer(&[1]).unwrap(),
                        other => panic!("{other:?}"),
                    }
                    vcpu.resume().unwrap();
                }
            });
        }
        let requesters: Vec<_> = (0..4u64)
            .map(|id| {
                let (vm, seen, meeting) = (vm.new_connection().unwrap(), &seen, &meeting);
                scope.spawn(move || {
                    for n in 1..=EACH {
                        let user = id << 32 | n;
                        if n % 50 != 0 {
                            vm.pause_vcpus(!0, user).unwrap();
                            continue;
                        }
                        // A request can take the place of another that was not taken yet. Now and
                        // then each asks its own vCPU alone, and all that was asked before is older:
                        // then just this one has to be answered, and is waited for.
                        meeting.wait();
                        vm.pause_vcpus(1 << id, user).unwrap();
                        wait_for("an answer to the very last request", || {
                            let last = seen[id as usize][id as usize].load(Ordering::Acquire);
                            (last == user).then_some(())
                        });
                        meeting.wait();
                    }
                })
            })
            .collect();
        // The VM is paused and resumed through it all.
        let done = AtomicBool::new(false);
        std::thread::scope(|inner| {
            inner.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    vmm.pause().unwrap();
                    vmm.resume().unwrap();
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            for requester in requesters {
                requester.join().unwrap();
            }
            done.store(true, Ordering::Release);
        });
        vm.pause_vcpus(!0, LAST).unwrap();
    });
    println!("100000 requests, {} pauses, {:?}", pauses.into_inner(), begin.elapsed());
    assert_eq!(vmm.end(), None);
}

#[test]
fn every_single_request_of_one_thread_is_answered() {
    let (_vmm, vm, vcpus, _memory) = busy(1);
    let vcpu = &vcpus[0];
    let mut took = Vec::new();
    for n in 0..3000 {
        let begin = Instant::now();
        vm.pause_vcpus(1, n).unwrap();
        loop {
            match vcpu.wait_timeout(PATIENCE).unwrap().expect("an answer") {
                Event::Paused { user } => break assert_eq!(user, n),
                _ => vcpu.resume().unwrap(),
            }
        }
        took.push(begin.elapsed());
        if n % 3 == 0 {
            // During the pause: it is answered after it. The last user wins.
            vm.pause_vcpus(1, 7).unwrap();
            vm.pause_vcpus(!0, 8).unwrap();
            vcpu.resume().unwrap();
            assert_eq!(vcpu.wait_timeout(PATIENCE).unwrap(), Some(Event::Paused { user: 8 }));
        }
        vcpu.resume().unwrap();
    }
    took.sort_unstable();
    println!(
        "request to PAUSED: median {:?}, 99% {:?}",
        took[took.len() / 2],
        took[took.len() * 99 / 100]
    );
}

#[test]
fn a_pause_before_the_vcpus_exist_is_kept() {
    let mut vmm = Vmm::new(2);
    let vm = vmm.connect();
    let _memory = guest(&vm, &[BUSY, BUSY]);
    vm.pause_vcpus(!0, 1).unwrap();
    vm.pause_vcpus(!0, 2).unwrap();
    assert!(vmm.pause().unwrap_err().contains("pausing"), "the VM has not started");
    vm.start().unwrap();
    for id in 0..2 {
        let vcpu = vm.vcpu(id).unwrap();
        enter(&vcpu);
        assert_eq!(vcpu.wait_timeout(PATIENCE).unwrap(), Some(Event::Paused { user: 2 }));
        vcpu.resume().unwrap();
    }
}

#[test]
fn a_pause_finds_the_access_complete() {
    let (_vmm, vm, vcpus, _memory) = busy(1);
    let vcpu = &vcpus[0];
    for _ in 0..100 {
        let Event::Access(access) = vcpu.wait().unwrap() else { panic!() };
        assert!(!access.is_write);
        vm.pause_vcpus(1, 3).unwrap();
        vcpu.answer(&[0x77]).unwrap();
        vcpu.resume().unwrap();
        assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 3 });
        let regs = vcpu.regs().unwrap();
        assert_eq!((regs.rax, regs.rip), (0x77, 7), "between two instructions");
        vcpu.resume().unwrap();
    }
}

#[test]
fn a_plugin_that_does_nothing_hangs_no_pause_and_no_stop() {
    let (mut vmm, _vm, vcpus, _memory) = busy(2);
    // Both wait for an answer that does not come.
    for vcpu in &vcpus {
        assert!(matches!(vcpu.wait().unwrap(), Event::Access(_)));
    }
    for _ in 0..50 {
        let report = vmm.pause().unwrap();
        assert!(report.took < Duration::from_secs(1), "{report:?}");
        assert!(report.arrivals.iter().all(|arrival| arrival.outstanding.is_some()), "{report:?}");
        vmm.resume().unwrap();
    }
    // What was outstanding is outstanding still.
    vcpus[0].answer(&[9]).unwrap();
    vcpus[0].resume().unwrap();
    assert!(matches!(vcpus[0].wait().unwrap(), Event::Access(_)));
    assert!(vmm.stop() < PATIENCE);
}

#[test]
fn a_flood_of_calls_hangs_no_pause_and_no_stop() {
    let (mut vmm, vm, vcpus, _memory) = busy(2);
    for vcpu in &vcpus {
        assert!(matches!(vcpu.wait().unwrap(), Event::Access(_)));
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for vcpu in &vcpus {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) && vcpu.fpu().is_ok() {
                    std::hint::spin_loop()
                }
            });
        }
        for _ in 0..2 {
            let vm = vm.new_connection().unwrap();
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed)
                    && vm.reserve_range(Space::Port, 0x90, 1).is_ok()
                {
                    let _ = vm.reserve_range(Space::Port, 0x90, 0);
                }
            });
        }
        for _ in 0..20 {
            let report = vmm.pause().unwrap();
            assert!(report.took < Duration::from_secs(2), "{report:?}");
            vmm.resume().unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(vmm.stop() < PATIENCE);
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn connections_have_a_limit() {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    let mut more = Vec::new();
    let error = loop {
        match vm.new_connection() {
            Ok(connection) => more.push(connection),
            Err(error) => break error,
        }
        assert!(more.len() < 1000);
    };
    assert_eq!(error.errno(), libc::EMFILE);
    more.clear();
    wait_for("room", || vm.new_connection().ok());
}
