//! Block processes that die while their guest uses them: nothing is lost, nothing
//! happens twice, and a process that dies too often fails its device and not the VM.
//!
//! `CELLBLOCK_STORM=1000000x100 cargo test --release --test replace storm` runs the storms
//! at full length: so many requests, with so many kills.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs;
use std::time::{Duration, Instant};

use cellblock::control::protocol::{DeviceState, EventKind, Request};
use common::deaths::{Dice, kill_and_wait, replaced};
use common::{LIMIT, Options, Vm, poll, proc, send};
use nix::sys::signal::Signal;

/// Requests of a storm, and deaths during it.
fn size() -> (u64, u32) {
    let text = std::env::var("CELLBLOCK_STORM").unwrap_or_else(|_| "60000x12".into());
    let (requests, kills) = text.split_once('x').expect("REQUESTSxKILLS");
    (requests.parse().unwrap(), kills.parse().unwrap())
}

fn storm(words: &str, requests: u64, disk: &str) -> Options {
    Vm::with(&format!("mode=storm n={requests} qd=32 queues=4 mib=16 {words}"))
        .disk_with(16 << 20, &format!(",queues=4{disk}"))
        .arg("--max-deaths")
        .arg("1000")
}

/// Kills disk0's process at random moments, spread over the first half of the storm: it goes on
/// however late the last one is.
fn weather(vm: &mut Vm, kills: u32, requests: u64) {
    let mut dice = Dice::new();
    vm.wait_for("storm: begins");
    let events = vm.events();
    let mut delays = Vec::new();
    for kill in 0..kills {
        // Not before its share of the requests is done.
        let share = requests / 2 * u64::from(kill) / u64::from(kills);
        let share = share + dice.below(requests / u64::from(kills) / 4 + 1);
        let begun = Instant::now();
        while begun.elapsed() < LIMIT {
            let disk = &vm.stats().disks[0];
            if disk.reads + disk.writes + disk.flushes >= share {
                break;
            }
        }
        std::thread::sleep(Duration::from_micros(dice.below(3000)));
        delays.push(kill_and_wait(vm, &events, "blk", "disk0"));
    }
    delays.sort_unstable();
    println!("{kills} kills; delays in us: {delays:?}");
    assert_eq!(vm.stats().disks[0].restarts, u64::from(kills));
}

/// What the guest says at the end: blocks, and how often they were written in all.
fn tally(vm: &mut Vm, limit: Duration) -> (u64, u64, u64) {
    vm.wait_for_within("storm: ok", limit);
    let console = vm.console.text();
    let number = |key: &str| -> u64 {
        let text = console.rsplit_once("storm: n=").unwrap().1;
        let text = text.split_once(&format!("{key}=")).unwrap().1;
        text.split_whitespace().next().unwrap().parse().unwrap()
    };
    (number("blocks"), number("generations"), number("failed"))
}

/// Every block of the image says what it is; how often they say they were written.
fn generations(image: &[u8], blocks: u64) -> u64 {
    let word =
        |bytes: &[u8], n: usize| u64::from_le_bytes(bytes[8 * n..8 * n + 8].try_into().unwrap());
    let mut sum = 0;
    for (block, bytes) in (0..blocks).zip(image.chunks_exact(4096)) {
        let generation = word(bytes, 2);
        for (sector, bytes) in (8 * block..).zip(bytes.chunks_exact(512)) {
            let said = (word(bytes, 1), word(bytes, 2));
            let wanted = if generation == 0 { (0, 0) } else { (sector, generation) };
            assert_eq!(said, wanted, "sector {sector}");
        }
        sum += generation;
    }
    sum
}

fn full_limit(requests: u64) -> Duration {
    LIMIT + Duration::from_millis(requests)
}

#[test]
fn storm_of_writes_loses_nothing_and_answers_once() {
    let (requests, kills) = size();
    let mut vm = storm("", requests, "").start();
    weather(&mut vm, kills, requests);
    let (blocks, sum, failed) = tally(&mut vm, full_limit(requests));
    assert_eq!((sum, failed), (requests, 0));
    let image = fs::read(vm.path("disk0")).unwrap();
    assert_eq!(generations(&image, blocks), requests);
    vm.ends_well();
}

/// The kernel has requests of a killed process in flight: its successor waits for them.
#[test]
fn storm_by_io_uring_and_past_the_page_cache() {
    let (requests, kills) = size();
    for options in [",engine=io_uring", ",direct,engine=io_uring"] {
        let (requests, kills) = (requests / 2, kills / 3);
        let mut vm = storm("", requests, options).start();
        weather(&mut vm, kills, requests);
        let (blocks, sum, failed) = tally(&mut vm, full_limit(requests));
        assert_eq!((sum, failed), (requests, 0), "{options}");
        let image = fs::read(vm.path("disk0")).unwrap();
        assert_eq!(generations(&image, blocks), requests, "{options}");
        vm.ends_well();
    }
}

#[test]
fn storm_of_reads_writes_and_flushes_with_interrupts() {
    let (requests, kills) = size();
    let words = "reads=60 flush=50 irq event-idx indirect";
    let mut vm = storm(words, requests / 4, "").start();
    weather(&mut vm, kills, requests / 4);
    tally(&mut vm, full_limit(requests));
    vm.ends_well();
}

#[test]
fn a_process_that_dies_too_often_fails_its_device_with_errors() {
    let mut vm = Vm::with("mode=storm n=20000000 qd=8 mib=1 errors").disk(1).disk(1).start();
    vm.wait_for("storm: begins");
    let events = vm.events();
    for _ in 0..4 {
        kill_and_wait(&mut vm, &events, "blk", "disk0");
    }
    send(vm.pid_of("blk", "disk0"), Signal::SIGKILL);
    let failed = vm.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceFailed { .. }));
    let (role, id) = ("blk".to_string(), "disk0".to_string());
    assert_eq!(failed.kind, EventKind::DeviceFailed { role, id, deaths: 5 });
    vm.wait_for_error("the device has failed");
    // The guest gets answers, and they are errors.
    let errors = |vm: &mut Vm| vm.stats().disks[0].errors;
    let before = errors(&mut vm);
    assert!(poll(LIMIT, || (errors(&mut vm) > before + 1000).then_some(())).is_some());
    let disks = vm.stats().disks;
    assert_eq!((disks[0].state, disks[1].state), (DeviceState::Failed, DeviceState::Running));
    // So it does after one more death, though not at once.
    send(vm.pid_of("blk", "disk0"), Signal::SIGKILL);
    std::thread::sleep(Duration::from_millis(100));
    let before = errors(&mut vm);
    assert!(poll(LIMIT, || (errors(&mut vm) > before + 1000).then_some(())).is_some());
    vm.pause();
    vm.resume();
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// No successor can use the image: the guest is told so, and does not wait for ever.
#[test]
fn a_disk_whose_image_was_cut_short_gives_errors_after_a_death() {
    let mut vm = Vm::with("mode=storm n=20000000 qd=8 mib=1 errors").disk(1).start();
    vm.wait_for("storm: begins");
    let events = vm.events();
    // A write under way would make the image longer again: the process stands when it is cut.
    let process = vm.pid_of("blk", "disk0");
    send(process, Signal::SIGSTOP);
    let stands = || proc::Identity::of(process)?.state().filter(|letter| *letter == 'T');
    assert!(poll(LIMIT, stands).is_some(), "it does not stop");
    let image = fs::File::options().write(true).open(vm.path("disk0")).unwrap();
    image.set_len(4096).unwrap();
    send(process, Signal::SIGKILL);
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceFailed { .. }));
    let errors = |vm: &mut Vm| vm.stats().disks[0].errors;
    let before = errors(&mut vm);
    assert!(poll(LIMIT, || (errors(&mut vm) > before + 1000).then_some(())).is_some());
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// The driver sets the disk up again and again, and each time its process dies somewhere
/// else on the way.
#[test]
fn deaths_while_the_driver_starts_and_resets() {
    let mut dice = Dice::new();
    let mut vm = Vm::with("mode=storm resets=400 n=100 mib=1 qd=4 queues=2")
        .disk_with(1 << 20, ",queues=2")
        .arg("--max-deaths")
        .arg("1000")
        .start();
    vm.wait_for("storm: resets");
    let events = vm.events();
    let mut kills = 0;
    while !vm.console.text().contains("storm: begins") && kills < 40 {
        std::thread::sleep(Duration::from_micros(dice.below(3000)));
        kill_and_wait(&mut vm, &events, "blk", "disk0");
        kills += 1;
    }
    println!("{kills} kills");
    assert!(kills >= 3);
    vm.wait_for("storm: ok");
    vm.ends_well();
}

#[test]
fn a_death_while_paused_is_repaired_while_paused() {
    let mut vm = storm("", 20_000, "").start();
    vm.wait_for("storm: begins");
    let events = vm.events();
    for round in 0..3 {
        vm.pause();
        kill_and_wait(&mut vm, &events, "blk", "disk0");
        // And one that nothing has been said about yet does not hold a pause up.
        vm.resume();
        send(vm.pid_of("blk", "disk0"), Signal::SIGKILL);
        let (_, took) = vm.pause();
        assert!(took < Duration::from_secs(2), "{took:?}");
        replaced(&mut vm, &events, "disk0", 2 * round + 2);
        vm.resume();
    }
    tally(&mut vm, LIMIT);
    vm.ends_well();
}

#[test]
fn a_process_that_hangs_is_ended_and_replaced() {
    // Nothing moves until the driver's reset has waited long enough.
    let mut vm = Vm::with("mode=storm resets=1000 idle n=1000 mib=1").disk(1).start();
    vm.wait_for("storm: resets");
    // There are resets to come when it stops, however fast the guest is.
    vm.pause();
    assert!(!vm.console.text().contains("storm: begins"), "the resets are over");
    let events = vm.events();
    let pid = vm.pid_of("blk", "disk0");
    send(pid, Signal::SIGSTOP);
    vm.resume();
    replaced(&mut vm, &events, "disk0", 1);
    let gone = proc::Identity::of(pid).is_none_or(|process| !process.is_alive());
    assert!(gone, "the one before is still there");
    tally(&mut vm, 2 * LIMIT);
    vm.ends_well();
}

/// What a process leaves behind says nothing of requests that wait when nobody is there.
#[test]
fn a_process_that_is_gone_is_not_throttled() {
    let mut vm = storm("", 20_000_000, ",iops=1,iops-burst=1").start();
    vm.wait_for("storm: begins");
    let events = vm.events();
    let stalled = |vm: &mut Vm| {
        let disk = vm.stats().disks.remove(0);
        (disk.counters.currently_throttled_gauge > 0).then_some(disk.state)
    };
    assert_eq!(poll(LIMIT, || stalled(&mut vm)), Some(DeviceState::Running));
    // Nobody can be made in its place.
    let (disk, spawner) = (vm.pid_of("blk", "disk0"), vm.pid_of("spawner", ""));
    send(spawner, Signal::SIGSTOP);
    send(disk, Signal::SIGKILL);
    let dead = poll(LIMIT, || {
        let disk = vm.stats().disks.remove(0);
        (disk.state == DeviceState::Dead).then_some(disk.counters)
    });
    let counters = dead.unwrap();
    assert!(counters.throttled_count > 0 && counters.currently_throttled_gauge == 0);
    send(spawner, Signal::SIGCONT);
    replaced(&mut vm, &events, "disk0", 1);
    assert!(poll(LIMIT, || stalled(&mut vm)).is_some(), "its successor takes a token a second");
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// Neither memory nor descriptors for each process that ever was.
#[test]
fn deaths_leave_nothing_in_the_vmm() {
    let mut vm = storm("", 20_000_000, "").start();
    vm.wait_for("storm: begins");
    let events = vm.events();
    let held = |vm: &Vm| {
        let maps = fs::read_to_string(format!("/proc/{}/maps", vm.pid())).unwrap();
        let shared = maps.lines().filter(|line| line.contains("memfd:")).count();
        (shared, proc::files(vm.pid()).len())
    };
    kill_and_wait(&mut vm, &events, "blk", "disk0");
    let before = held(&vm);
    for _ in 0..10 {
        kill_and_wait(&mut vm, &events, "blk", "disk0");
        kill_and_wait(&mut vm, &events, "serial", "com1");
    }
    // The pipe of one that has just died may be there yet.
    assert!(poll(LIMIT, || (held(&vm) <= before).then_some(())).is_some(), "{:?}", held(&vm));
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// The budget is the disk's: each process would otherwise begin with a full bucket.
#[test]
fn a_death_is_no_gift_to_a_throttled_disk() {
    let mut vm = storm("", 4000, ",iops=1000,iops-burst=1000").start();
    vm.wait_for("storm: begins");
    let events = vm.events();
    let begun = Instant::now();
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(150));
        kill_and_wait(&mut vm, &events, "blk", "disk0");
    }
    // A limit that was changed holds for the successor.
    vm.cli("throttle", &["disk0", "iops=2000"]);
    kill_and_wait(&mut vm, &events, "blk", "disk0");
    let limit = vm.stats().disks[0].throttle.iops;
    assert_eq!(limit, Some(2000));
    vm.wait_for("storm: n=");
    let took = begun.elapsed();
    // 4000 and the 4096 reads of the end, less the burst, at no more than 2000 a second.
    assert!(took > Duration::from_millis(2900), "{took:?}");
    vm.ends_well();
}
