//! Pausing and resuming whole machines over the control socket: none lost, none hung,
//! the guest unharmed, whatever its vCPUs and its devices are doing.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::Read;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cellblock::control::client::Client;
use cellblock::control::protocol::{Reply, Request, State};
use common::proc::{self, Identity};
use common::{LIMIT, Vm, poll, send};
use nix::libc;
use nix::sys::signal::Signal;

const CYCLES: u64 = 10_000;
/// A pause that takes this long waited for something it must not wait for. What it
/// usually takes is printed; here is room for a host that is busy elsewhere.
const PROMPT: Duration = Duration::from_secs(2);

/// One at a time: their vCPUs spin, and would only wait for each other's.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All of the guest's memory, as a number.
fn memory(vm: &Vm) -> u64 {
    let files = proc::files(vm.pid());
    let (fd, _) = files.iter().find(|(_, name)| name.contains("guest-ram")).unwrap();
    let mut ram = File::open(format!("/proc/{}/fd/{fd}", vm.pid())).unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut hash = DefaultHasher::new();
    loop {
        match ram.read(&mut buffer).unwrap() {
            0 => return hash.finish(),
            count => hash.write(&buffer[..count]),
        }
    }
}

/// Nothing happens in a paused machine: its memory, its console, its counters of disk
/// requests stay as they are, once devices have done what they were asked before.
#[track_caller]
fn stands_still(vm: &mut Vm) {
    let disks =
        |vm: &mut Vm| -> Vec<u64> { vm.stats().disks.iter().map(|d| d.reads + d.writes).collect() };
    // The counters first: what is done between is counted after.
    let look = |vm: &mut Vm| (disks(vm), memory(vm), vm.console.len());
    // The thread of a queue that goes to sleep notes in its ring that it wants to be kicked, which
    // it may only come to now.
    let mut notes: usize = vm.stats().disks.iter().map(|disk| disk.queues.len()).sum();
    let mut last = look(vm);
    let end = Instant::now() + LIMIT;
    loop {
        std::thread::sleep(Duration::from_millis(20));
        let now = look(vm);
        if now == last {
            break;
        }
        // A block process that had to wait for a CPU may have done its last requests only now, and
        // counts them after it has written.
        let counted = poll(Duration::from_secs(1), || (disks(vm) != last.0).then_some(()));
        let explained = counted.is_some() || now.2 != last.2;
        if Instant::now() > end || (!explained && notes == 0) {
            vm.fail(&format!("it moved while it was paused: {last:x?}, then {now:x?}"));
        }
        notes -= usize::from(!explained);
        last = look(vm);
    }
    let stats = vm.stats();
    assert!(stats.vcpus.iter().all(|vcpu| vcpu.state == State::Paused), "{stats:?}");
}

/// Lets the guest run a little, each time for another while, so that pauses meet it at
/// every point of what it does.
fn linger(cycle: u64) {
    if cycle.is_multiple_of(50) {
        // Rather long sometimes, to get on.
        std::thread::sleep(Duration::from_millis(2));
    }
    let until = Instant::now() + Duration::from_micros(cycle * 7 % 120);
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

/// Number of the round in a line `pause: n=1234 others=...`.
fn round(line: &str) -> u64 {
    line.split("n=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

/// Pauses and resumes a guest that uses disk and console, over and over. It checks
/// itself that no counter and no clock steps back and that it reads what it wrote.
fn cycles(cpus: usize, words: &str) {
    let _alone = alone();
    let mut vm =
        Vm::with(&format!("mode=pause cpus={cpus} every=20 {words}")).cpus(cpus).disk(8).start();
    vm.wait_for(&format!("pause: ready cpus={cpus} disk=yes clock=yes"));
    let events = vm.events();
    let mut last = round(&vm.wait_for_line("pause: n="));
    let mut took = Vec::new();
    let begin = Instant::now();
    for cycle in 1..=CYCLES {
        let (epoch, time) = vm.pause();
        assert_eq!(epoch, cycle, "a pause was lost");
        took.push(time);
        if cycle.is_multiple_of(500) {
            stands_still(&mut vm);
        }
        assert_eq!(vm.resume(), cycle, "a resume was lost");
        if cycle % 500 == 250 {
            // What came meanwhile counts as well: the guest gets on between pauses.
            let line = vm.wait_for_line("pause: n=");
            assert!(round(&line) > last, "round {last}, then {line}");
            last = round(&line);
        }
        linger(cycle);
    }
    let whole = begin.elapsed();

    // It goes on as if nothing had been.
    let printed = vm.console.text().lines().filter(|line| line.starts_with("pause: n=")).count();
    let goes_on = poll(LIMIT, || {
        let lines = vm.console.text().lines().filter(|l| l.starts_with("pause: n=")).count();
        (lines > printed + 5).then_some(())
    });
    if goes_on.is_none() {
        vm.fail("the guest does not go on after the last resume");
    }
    // Every one of them was told, in order.
    let epochs: Vec<u64> = events
        .all()
        .iter()
        .filter_map(|event| match event.kind {
            cellblock::control::protocol::EventKind::Pause { epoch, .. } => Some(epoch),
            _ => None,
        })
        .collect();
    assert!(epochs.windows(2).all(|pair| pair[0] < pair[1]), "events out of order");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    let rounds = round(vm.console.text().lines().rfind(|l| l.contains("pause: n=")).unwrap());
    vm.ends_well();

    took.sort_unstable();
    let at = |share: usize| took[(took.len() - 1) * share / 1000];
    println!(
        "{cpus} vCPUs: {CYCLES} pauses in {whole:?}, request to all parked: median {:?}, \
         99% {:?}, longest {:?}; {rounds} rounds in the guest",
        at(500),
        at(990),
        at(1000)
    );
    assert!(at(990) < PROMPT, "pauses take {:?}", at(990));
}

#[test]
fn ten_thousand_pauses_of_one_vcpu() {
    cycles(1, "irq");
}

#[test]
fn ten_thousand_pauses_of_two_vcpus() {
    cycles(2, "");
}

#[test]
fn ten_thousand_pauses_of_four_vcpus() {
    cycles(4, "irq");
}

/// Pauses now: promptly, completely, and once more.
#[track_caller]
fn parks(vm: &mut Vm) {
    for _ in 0..2 {
        let begin = Instant::now();
        let (epoch, _) = vm.pause();
        let took = begin.elapsed();
        if took > PROMPT {
            vm.fail(&format!("the pause took {took:?}"));
        }
        let stats = vm.stats();
        assert!(stats.vcpus.iter().all(|vcpu| vcpu.state == State::Paused), "{stats:?}");
        assert_eq!(vm.resume(), epoch);
    }
}

#[test]
fn halted_vcpus_pause() {
    let _alone = alone();
    let mut vm = Vm::with("mode=halt cpus=4").cpus(4).start();
    vm.wait_for("halt: ready cpus=4");
    for _ in 0..200 {
        parks(&mut vm);
    }
    // What is typed meanwhile waits for the guest.
    vm.pause();
    vm.say(b"q");
    stands_still(&mut vm);
    vm.resume();
    vm.wait_for("halt: ok");
    vm.ends_well();
}

#[test]
fn vcpus_that_were_never_started_pause() {
    let _alone = alone();
    // They wait for their SIPI; the guest does not know that they are there.
    let mut vm = Vm::with("mode=spin cpus=1").cpus(4).start();
    vm.wait_for("spin: ready cpus=1");
    for _ in 0..200 {
        parks(&mut vm);
    }
    vm.pause();
    stands_still(&mut vm);
    vm.resume();
    vm.say(b"q");
    vm.wait_for("spin: ok");
    vm.ends_well();

    // And they start when the guest wants them, pauses or not.
    let mut vm = Vm::with("mode=pause cpus=4").cpus(4).start();
    let mut client = early(&vm);
    for cycle in 0..200 {
        for request in [Request::Pause, Request::Resume] {
            if let Err(error) = client.ask(request.clone()) {
                vm.fail(&format!("{request:?} while the guest boots: {error}"));
            }
        }
        linger(cycle);
    }
    vm.wait_for("pause: ready cpus=4");
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// A connection to a machine whose guest has not run yet, or hardly.
fn early(vm: &Vm) -> Client {
    poll(LIMIT, || Client::connect(&vm.path("control")).ok()).expect("no control socket")
}

/// Stops a device process; on return it is stopped.
#[track_caller]
fn stop(vm: &mut Vm, role: &str, id: &str) -> i32 {
    let process = Identity::of(vm.pid_of(role, id)).unwrap();
    send(process.pid, Signal::SIGSTOP);
    if poll(LIMIT, || (process.state() == Some('T')).then_some(())).is_none() {
        vm.fail(&format!("{role} {id} does not stop"));
    }
    process.pid
}

/// Waits until the boot vCPU sleeps in the system call `number`, for good.
#[track_caller]
fn wait_stuck(vm: &mut Vm, number: i64) {
    const LOOKS: u32 = 20;
    let vcpu = proc::thread(vm.pid(), "vcpu0").unwrap();
    let mut same = 0;
    let stuck = poll(LIMIT, || {
        same = if proc::sleeps_in(vm.pid(), vcpu) == Some(number) { same + 1 } else { 0 };
        (same == LOOKS).then_some(())
    });
    if stuck.is_none() {
        let now = proc::sleeps_in(vm.pid(), vcpu);
        vm.fail(&format!("the vCPU does not wait for the device, but is in {now:?}"));
    }
}

#[test]
fn a_vcpu_that_waits_for_a_stopped_serial_process_pauses() {
    let _alone = alone();
    // In the middle of a read of the UART.
    let mut vm = Vm::with("mode=pause cpus=2 every=20").cpus(2).disk(8).start();
    vm.wait_for("pause: n=");
    let serial = stop(&mut vm, "serial", "com1");
    wait_stuck(&mut vm, libc::SYS_futex_waitv);
    for _ in 0..4 {
        parks(&mut vm);
    }
    wait_stuck(&mut vm, libc::SYS_futex_waitv);
    vm.pause();
    stands_still(&mut vm);
    // The answer comes while it is paused.
    send(serial, Signal::SIGCONT);
    stands_still(&mut vm);
    vm.resume();
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

#[test]
fn output_outlives_pauses_of_a_guest_whose_serial_process_is_stopped() {
    let _alone = alone();
    // The ring fills with what the guest writes; every byte of it arrives in the end.
    const LINES: usize = 1500;
    let mut vm = Vm::with(&format!("mode=print lines={LINES}")).start();
    vm.wait_for("cellblock guest");
    for cycle in 0..4 {
        let serial = stop(&mut vm, "serial", "com1");
        wait_stuck(&mut vm, libc::SYS_futex_waitv);
        parks(&mut vm);
        send(serial, Signal::SIGCONT);
        linger(cycle);
    }
    vm.wait_for_within("print: ok", 4 * LIMIT);
    let text = vm.console.text();
    let mut lines = text.lines().skip_while(|line| !line.starts_with("00000000 "));
    for n in 0..LINES {
        let expected = format!("{n:08} {:.<54}", "");
        assert_eq!(lines.next(), Some(&*expected), "line {n} of\n{text}");
    }
    assert_eq!(lines.next(), Some("print: ok"));
    vm.ends_well();
}

#[test]
fn a_vcpu_that_waits_for_a_stopped_block_process_pauses() {
    let _alone = alone();
    // In the driver's first access to the disk, a reset, which the VMM passes on to the
    // process and waits for. To get there first, the machine is paused as it starts.
    for attempt in 0..20 {
        let mut vm = Vm::with("mode=pause cpus=1 every=20").disk(8).start();
        if let Err(error) = early(&vm).ask(Request::Pause) {
            vm.fail(&format!("the first pause: {error}"));
        }
        let blk = stop(&mut vm, "blk", "disk0");
        vm.resume();
        if vm.console.wait_for("pause: ready", Duration::from_millis(100)).is_some() {
            eprintln!("attempt {attempt} came too late");
            send(blk, Signal::SIGCONT);
            continue;
        }
        wait_stuck(&mut vm, libc::SYS_futex);
        for _ in 0..4 {
            parks(&mut vm);
        }
        wait_stuck(&mut vm, libc::SYS_futex);
        vm.pause();
        send(blk, Signal::SIGCONT);
        stands_still(&mut vm);
        vm.resume();
        vm.wait_for("pause: ready cpus=1 disk=yes");
        vm.wait_for("pause: n=");
        vm.say(b"q");
        vm.wait_for("pause: ok");
        vm.ends_well();
        return;
    }
    panic!("the guest was never paused before it used its disk");
}

#[test]
fn requests_in_flight_in_a_stopped_block_process_survive_pauses() {
    let _alone = alone();
    for words in ["", "irq"] {
        let mut vm = Vm::with(&format!("mode=pause every=20 {words}")).disk(8).start();
        vm.wait_for("pause: n=");
        let blk = stop(&mut vm, "blk", "disk0");
        for _ in 0..4 {
            parks(&mut vm);
        }
        vm.pause();
        send(blk, Signal::SIGCONT);
        stands_still(&mut vm);
        vm.resume();
        vm.wait_for("pause: n=");
        vm.say(b"q");
        vm.wait_for("pause: ok");
        vm.ends_well();
    }
}

#[test]
fn pause_and_resume_out_of_turn_are_refused_and_harmless() {
    let _alone = alone();
    let mut vm = Vm::with("mode=pause cpus=2 every=20").cpus(2).start();
    vm.wait_for("pause: n=");
    assert!(vm.try_ask(Request::Resume).is_err(), "resumed what ran");
    let (epoch, _) = vm.pause();
    assert!(vm.try_ask(Request::Pause).is_err(), "paused twice");
    stands_still(&mut vm);
    // Another connection sees the same machine.
    let mut other = Client::connect(&vm.path("control")).unwrap();
    let reply = other.ask(Request::Resume).unwrap().0;
    assert!(matches!(reply, Reply::Resume { epoch: e, .. } if e == epoch), "{reply:?}");
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}
