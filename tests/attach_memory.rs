//! Programs that attach and ask what is written to guest memory, beside snapshots and resets that
//! ask for the same.
#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod attach_support;
mod common;

use std::os::fd::AsFd;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;

use attach_support::{attach, kernel};
use cellblock::control::protocol::{Reply, Request};
use cellblock::snapshot::dirty::Tracker;
use cellblock::snapshot::format::Chain;
use cellblock::snapshot::write_logs::WriteLogs;
use cellblock::vm::kvm::Machine;
use cellblock::vm::memory::GuestRam;
use cellblock_devices::protocol::write_log::WriteLog;
use cellblock_plugin_api as api;
use cellblock_plugin_api::{Event, MemoryAccess, Space};
use common::Vm;

const PAGE: usize = 4096;
/// No page.
const NONE: [u64; 0] = [];
/// Asks for an address, and writes a byte there.
const PORT: u64 = 0x510;
/// `mov dx, 0x510`; 4: `in eax, dx`; `mov [rax], ah`; `jmp 4`.
const WRITER: &[u8] = &[0x66, 0xba, 0x10, 0x05, 0xed, 0x88, 0x20, 0xeb, 0xfb];
/// Where it writes: in the middle of nowhere.
const FIRST: u64 = 0x80_0000;

/// An attached program that has the guest write. In between, the guest stands between two
/// instructions.
struct Driver {
    vm: api::Vm,
    vcpu: Arc<api::Vcpu>,
    stands: bool,
}

impl Driver {
    fn new(vm: &Vm) -> Driver {
        let vm = attach(vm);
        vm.reserve_range(Space::Port, PORT, 4).unwrap();
        let vcpu = vm.vcpu(0).unwrap();
        let mut driver = Driver { vm, vcpu, stands: false };
        driver.write(&[0]); // the page tables are as they will be
        driver
    }

    /// Has the guest write a byte to each of these pages.
    fn write(&mut self, pages: &[u64]) {
        if self.stands {
            self.vm.reserve_range(Space::Port, PORT, 4).unwrap();
            self.vcpu.resume().unwrap();
        }
        for page in pages {
            self.asked();
            self.answer(*page as i64);
        }
        // The next question comes behind the last write.
        self.asked();
        self.vm.pause_vcpus(1, 1).unwrap();
        self.answer(-1);
        assert_eq!(self.vcpu.wait().unwrap(), Event::Paused { user: 1 });
        self.stands = true;
        // Who has part of the machine is part of a snapshot, which could not be restored then.
        self.vm.reserve_range(Space::Port, PORT, 0).unwrap();
    }

    fn asked(&self) {
        match self.vcpu.wait().unwrap() {
            Event::Access(access) => assert_eq!(access.address, PORT),
            other => panic!("{other:?}"),
        }
    }

    fn answer(&self, page: i64) {
        let address = FIRST as i64 + page * PAGE as i64;
        self.vcpu.answer(&(address as u32).to_le_bytes()).unwrap();
        self.vcpu.resume().unwrap();
    }
}

/// Pages of a log, counted from [`FIRST`]; others are left out.
fn pages(vm: &api::Vm) -> Vec<u64> {
    let log = vm.memory_log().unwrap();
    assert_eq!(log.len(), (64 << 20) / PAGE / 8);
    let first = FIRST / PAGE as u64;
    let set = |page: &u64| log[(*page / 8) as usize] >> (page % 8) & 1 != 0;
    (first..first + 512).filter(set).map(|page| page - first).collect()
}

#[track_caller]
fn done(output: Output) {
    assert!(output.status.success(), "{output:?}");
}

fn byte(vm: &api::Vm, page: u64) -> u8 {
    let mut byte = [0];
    vm.guest_memory().unwrap().read(FIRST + page * PAGE as u64, &mut byte).unwrap();
    byte[0]
}

fn writing(dir: &Path, options: &str) -> Vm {
    let kernel = kernel(dir, WRITER);
    Vm::with("").kernel(&kernel).arg("--plugin-socket").arg(format!("plugin{options}")).start()
}

#[test]
fn each_who_asks_is_told_of_every_write_once() {
    let dir = tempfile::tempdir().unwrap();
    let vm = writing(dir.path(), "");
    let mut driver = Driver::new(&vm);
    let (one, two) = (attach(&vm), attach(&vm));
    assert_eq!(one.memory_log().unwrap_err().errno(), libc::ENOENT);
    one.log_memory(true).unwrap();
    assert_eq!(pages(&one), NONE);
    driver.write(&[3, 5, 511]);
    two.log_memory(true).unwrap();
    driver.write(&[7]);
    assert_eq!(pages(&one), [3, 5, 7, 511]);
    assert_eq!(pages(&one), NONE);
    driver.write(&[5]);
    assert_eq!(pages(&one), [5]);
    // What the other has read by now is in it as well; not what came before it asked.
    assert_eq!(pages(&two), [5, 7]);
    // From anew.
    driver.write(&[9]);
    one.log_memory(true).unwrap();
    assert_eq!(pages(&one), NONE);
    one.log_memory(false).unwrap();
    assert_eq!(one.memory_log().unwrap_err().errno(), libc::ENOENT);
    drop(one);
    driver.write(&[11]);
    assert_eq!(pages(&two), [9, 11]);
}

/// Snapshots and their differences read the same log.
#[test]
fn a_snapshot_and_a_program_take_nothing_from_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut vm = writing(dir.path(), ",memory=rw");
    let mut driver = Driver::new(&vm);
    let asks = attach(&vm);
    asks.log_memory(true).unwrap();
    driver.write(&[1]);
    done(vm.try_snapshot(&at("full"), &[]));
    driver.write(&[2]);
    assert_eq!(pages(&asks), [1, 2]);
    driver.write(&[3]);
    // Written by us, and told of.
    let memory = asks.guest_memory().unwrap();
    assert_eq!(memory.access(), MemoryAccess::ReadWrite);
    let fault = memory.write((64 << 20) - 1, &[0; 2]).unwrap_err();
    assert_eq!(fault.errno(), libc::EFAULT);
    memory.write(FIRST + 8 * PAGE as u64 - 1, b"XY").unwrap();
    let full = at("full");
    done(vm.try_snapshot(&at("diff"), &["--diff", full.to_str().unwrap()]));
    driver.write(&[4]);
    assert_eq!(pages(&asks), [3, 4, 7, 8]);
    let diff = at("diff");
    done(vm.try_snapshot(&at("live"), &["--diff", diff.to_str().unwrap(), "--live"]));
    assert_eq!(pages(&asks), NONE);
    // Who has all of the memfd need not tell.
    let (fd, _, _) = asks.memory().unwrap();
    let live = at("live");
    let refused = vm.try_snapshot(&at("none"), &["--diff", live.to_str().unwrap()]);
    let line = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && line.contains("writes to its memory untold"), "{line}");
    drop((fd, driver, asks));
    vm.ask(Request::Stop);
    vm.ends_well();

    let mut vm = Vm::restore(&at("live")).arg("--plugin-socket").arg("plugin").start();
    let restored = attach(&vm);
    let seen: Vec<u8> = (1..=8).map(|page| byte(&restored, page)).collect();
    assert_eq!(seen, [0x10, 0x20, 0x30, 0x40, 0, 0, 0, b'Y']);
    assert_eq!(written(&at("diff")), [2, 3, 7, 8]);
    assert_eq!(written(&at("live")), [4]);
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// The pages of a difference, counted from [`FIRST`].
fn written(snapshot: &Path) -> Vec<u64> {
    let chain = Chain::open(snapshot).unwrap();
    let first = FIRST / PAGE as u64;
    let entries = chain.snapshot().entries();
    let speaks = |page: &u64| entries[(page / 64) as usize].own >> (page % 64) & 1 != 0;
    (first..first + 512).filter(speaks).map(|page| page - first).collect()
}

/// A reset writes too, and clears the log.
#[test]
fn what_a_reset_puts_back_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = writing(dir.path(), "");
    let mut driver = Driver::new(&vm);
    driver.write(&[1]);
    done(vm.try_snapshot(&at, &["--stop"]));
    drop(driver);
    vm.wait_exit();
    let mut vm = Vm::restore(&at).arg("--plugin-socket").arg("plugin,memory=rw").start();
    let mut driver = Driver::new(&vm);
    let asks = attach(&vm);
    let memory = asks.guest_memory().unwrap();
    asks.log_memory(true).unwrap();
    // The first compares, those after it know.
    for round in 0..3 {
        driver.write(&[2]);
        memory.write(FIRST + 4 * PAGE as u64, b"A").unwrap();
        assert_eq!(pages(&asks), [2, 4], "round {round}");
        let Reply::Reset { pages: put_back, .. } = vm.ask(Request::Reset) else {
            panic!("{round}")
        };
        assert!(put_back > 0);
        let pages = pages(&asks);
        assert!(pages.contains(&4) && !pages.contains(&5), "round {round}: {pages:?}");
        assert_eq!(byte(&asks, 4), 0, "round {round}");
    }
}

/// KVM logs for as long as somebody wants to know.
#[test]
fn the_log_is_on_while_somebody_asks() {
    let ram = GuestRam::new(32 << 20).unwrap();
    let machine = Machine::new(&ram).unwrap();
    let logs = WriteLogs::new(ram.len());
    assert!(machine.take_dirty_pages().is_err());
    let (one, two) = (logs.join(&machine).unwrap(), logs.join(&machine).unwrap());
    assert_eq!(machine.take_dirty_pages().unwrap(), vec![0; logs.chunks()]);
    logs.leave(&machine, one).unwrap();
    machine.take_dirty_pages().unwrap();
    logs.leave(&machine, one).unwrap();
    machine.take_dirty_pages().unwrap();
    logs.leave(&machine, two).unwrap();
    assert!(machine.take_dirty_pages().is_err());
    logs.wrote(&ram, 0, 5);
    let one = logs.join(&machine).unwrap();
    assert_eq!(logs.read(&machine, one).unwrap(), vec![0; logs.chunks()]);
    logs.wrote(&ram, 4095, 2);
    assert_eq!(logs.read(&machine, one).unwrap()[0], 0b11);
}

/// A device process marks a page before it writes and after: whoever took the first mark gets the
/// second, and what was told once is not told again.
#[test]
fn what_a_device_wrote_is_told_to_everybody() {
    let ram = GuestRam::new(32 << 20).unwrap();
    let machine = Machine::new(&ram).unwrap();
    let logs: &'static WriteLogs = Box::leak(Box::new(WriteLogs::new(ram.len())));
    let (bytes, fd) = logs.issue("disk0").unwrap();
    let device = WriteLog::map(fd.as_fd(), bytes).unwrap();
    let asks = logs.join(&machine).unwrap();
    let read = || logs.read(&machine, asks).unwrap()[0];
    device.mark(5 * PAGE as u64, 1);
    assert_eq!((read(), read()), (1 << 5, 0));
    device.mark(6 * PAGE as u64, 1);
    let mut tracker = Tracker::new(logs);
    tracker.begin(&machine).unwrap();
    device.mark(7 * PAGE as u64, 1);
    assert_eq!((tracker.round(&machine).unwrap()[0], read()), (1 << 7, 3 << 6));
    device.mark(7 * PAGE as u64, 1);
    let (round, since) = tracker.cut(&machine).unwrap();
    assert_eq!((round[0], since[0]), (1 << 7, 1 << 7));
    assert_eq!((read(), read()), (1 << 7, 0));
    assert_eq!(tracker.round(&machine).unwrap()[0], 0);
}

/// Memory that a program adds is the guest's, until the program goes; no snapshot has it, and a
/// disk's process could not reach it.
#[test]
fn added_memory_is_the_guests_alone() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = writing(dir.path(), "");
    let adds = attach(&vm);
    let own = cellblock_wire::sealed_memfd("added", 1 << 20).unwrap();
    let memory = adds.create_memory(&own, 0, 1 << 20, 1 << 30, false, false).unwrap();
    let refused = vm.try_snapshot(&at, &[]);
    let line = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && line.contains("memory of its own"), "{line}");
    adds.destroy_memory(&memory).unwrap();
    done(vm.try_snapshot(&at, &[]));
    adds.create_memory(&own, 0, 1 << 20, 1 << 30, false, false).unwrap();
    drop(adds);
    let other = dir.path().join("other");
    common::poll(common::LIMIT, || vm.try_snapshot(&other, &[]).status.success().then_some(()))
        .unwrap();
    vm.ask(Request::Stop);
    vm.ends_well();

    let mut vm = Vm::with("mode=echo").disk(4).arg("--plugin-socket").arg("plugin").start();
    let adds = attach(&vm);
    let refused = adds.create_memory(&own, 0, 1 << 20, 1 << 30, false, false);
    assert_eq!(refused.unwrap_err().errno(), libc::EOPNOTSUPP);
    vm.wait_for_error("the processes of the VM's disks could not reach it");
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// A disk's process writes to memory too, and the guest by all ways it has: whatever changes from
/// one look to the next is in the log, a snapshot in between or not.
#[test]
fn what_changed_is_in_the_log_whoever_wrote_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::with("mode=pause cpus=2 every=20")
        .cpus(2)
        .disk(4)
        .arg("--plugin-socket")
        .arg("plugin")
        .start();
    vm.wait_for_line("pause: n=20 ");
    let asks = attach(&vm);
    let memory = asks.guest_memory().unwrap();
    asks.log_memory(true).unwrap();
    let mut before = Vec::new();
    for round in 0..6 {
        vm.pause();
        if round % 2 == 1 {
            // Who also reads the logs.
            done(vm.try_snapshot(&dir.path().join(format!("s{round}")), &[]));
        }
        let log = asks.memory_log().unwrap();
        let mut now = vec![0; 64 << 20];
        memory.read(0, &mut now).unwrap();
        let changed: Vec<usize> = before
            .chunks(PAGE)
            .zip(now.chunks(PAGE))
            .enumerate()
            .filter(|(_, (before, now)): &(usize, (&[u8], &[u8]))| before != now)
            .map(|(page, _)| page)
            .collect();
        let missed: Vec<_> =
            changed.iter().filter(|page| log[**page / 8] >> (**page % 8) & 1 == 0).collect();
        assert!(missed.is_empty(), "round {round}: {missed:x?} of {changed:x?}");
        assert!(round == 0 || changed.len() > 2, "round {round}: nothing happened");
        before = now;
        vm.resume();
        // Lines may be there that were printed before: only memory says that the guest went on.
        let went_on = || {
            let mut now = vec![0; 64 << 20];
            memory.read(0, &mut now).unwrap();
            let pages = before.chunks(PAGE).zip(now.chunks(PAGE));
            (pages.filter(|(before, now)| before != now).count() > 4).then_some(())
        };
        common::poll(common::LIMIT, went_on).unwrap();
    }
    // What was told is not told again, what disks wrote neither.
    vm.pause();
    let quiet = || asks.memory_log().unwrap().iter().all(|byte| *byte == 0).then_some(());
    common::poll(common::LIMIT, quiet).unwrap();
    vm.resume();
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// Whoever attaches is no process that the pager knows: it would find zeros where memory has not
/// come, and what it wrote would stay where memory belongs.
#[test]
fn memory_that_is_still_to_come_is_waited_for() {
    const TOUCHED: usize = 100 << 20;
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=20 touch=100").memory("128M").start();
    vm.wait_for_line("pause: n=20 ");
    done(vm.try_snapshot(&at, &["--stop"]));
    vm.wait_exit();
    let mut vm = Vm::restore(&at)
        .arg("--memory-mode")
        .arg("lazy")
        .arg("--plugin-socket")
        .arg("plugin")
        .start();
    let memory = attach(&vm).guest_memory().unwrap();
    let mut all = vec![0; 128 << 20];
    memory.read(0, &mut all).unwrap();
    let used = all.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0)).count();
    assert!(used >= TOUCHED / PAGE, "{used} pages have something in them");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}
