//! Every way a guest starts, every size it comes in, every way it ends.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use cellblock::control::protocol::{EventKind, Shutdown};
use cellblock::guest::{BARE_GUEST, BARE_GUEST_LINUX64};
use common::Vm;

const MIB: u64 = 1 << 20;
/// Most virtio devices of a machine: the IOAPIC's pins that nothing else has.
const MOST_DISKS: usize = 17;

/// The number behind `key` in a line of the guest's.
#[track_caller]
fn number(line: &str, key: &str) -> u64 {
    let word = line.split_whitespace().find_map(|word| word.strip_prefix(key));
    let Some(text) = word else { panic!("no {key} in {line:?}") };
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
        None => text.parse().unwrap(),
    }
}

#[test]
fn both_entries() {
    for (kernel, protocol) in [(BARE_GUEST, "pvh"), (BARE_GUEST_LINUX64, "linux64")] {
        let mut vm = Vm::with("mode=hello").image(kernel).start();
        let line = vm.wait_for_line("hello: protocol=");
        assert!(line.starts_with(&format!("hello: protocol={protocol} ")), "{line}");
        vm.wait_for("hello: ok");
        vm.ends_well();
    }
}

/// What both protocols tell the guest of its memory: all of it, but for the PC's hole.
#[test]
fn memory_of_every_size_is_described() {
    for kernel in [BARE_GUEST, BARE_GUEST_LINUX64] {
        for mib in [32, 33, 512, 3071, 3072, 3073, 4096, 6144] {
            let mut vm = Vm::with("mode=hello").image(kernel).memory(&format!("{mib}M")).start();
            let line = vm.wait_for_line("hello: protocol=");
            vm.wait_for("hello: ok");
            let missing = mib * MIB - number(&line, "memory=");
            // 640 KiB, less 1, up to 1 MiB.
            assert_eq!(missing, 385 * 1024, "of {mib} MiB: {line}");
            vm.ends_well();
        }
    }
}

/// All of the smallest machine's memory can be used, by either entry.
#[test]
fn the_least_memory_is_all_there() {
    for kernel in [BARE_GUEST, BARE_GUEST_LINUX64] {
        let mut vm = Vm::with("mode=touch mib=29").image(kernel).memory("32M").start();
        let line = vm.wait_for_line("touch: start=");
        assert_eq!(number(&line, "pages="), 29 * 256);
        vm.wait_for("touch: ok");
        vm.ends_well();
    }
}

/// What lies above the hole. Only the pages that the guest touches cost the host memory.
#[test]
fn memory_above_4_gib_is_reachable() {
    for kernel in [BARE_GUEST, BARE_GUEST_LINUX64] {
        // All there is above, and the beginning of much.
        for (memory, mib) in [("3073M", 1), ("3100M", 28), ("8G", 64)] {
            let cmdline = format!("mode=touch high mib={mib}");
            let mut vm = Vm::with(&cmdline).image(kernel).memory(memory).start();
            let line = vm.wait_for_line("touch: start=");
            assert_eq!(number(&line, "start="), 4 << 30, "-m {memory}: {line}");
            assert_eq!(number(&line, "pages="), mib * 256, "-m {memory}: {line}");
            vm.wait_for("touch: ok");
            vm.ends_well();
        }
    }
}

#[test]
fn no_more_memory_than_asked_for() {
    for memory in ["3072M", "3073M"] {
        let mut vm = Vm::with("mode=touch high mib=2").memory(memory).start();
        if vm.console.wait_for("bytes more than there is memory", common::LIMIT).is_none() {
            vm.fail("the guest should miss memory above 4 GiB");
        }
        assert_eq!(vm.wait_exit().code(), Some(0));
    }
}

#[test]
fn one_to_32_vcpus() {
    for cpus in [1, 2, 3, 8, 17, 32] {
        let mut vm = Vm::with(&format!("mode=smp cpus={cpus}")).cpus(cpus).start();
        vm.wait_for(&format!("smp: cpus={cpus}\n"));
        vm.wait_for("smp: ok");
        vm.ends_well();
    }
}

/// The guest would start a vCPU more than there is: the one that is missing is missing.
#[test]
fn no_more_vcpus_than_asked_for() {
    let mut vm = Vm::with("mode=smp cpus=3").cpus(2).start();
    let line = vm.console.wait_for("FAIL: ", 2 * common::LIMIT);
    if line.is_none() {
        vm.fail("the guest found a third vCPU, or hangs");
    }
    let line = vm.console.wait_for("vCPU 2 does not start", common::LIMIT);
    if line.is_none() {
        vm.fail("the guest should miss vCPU 2");
    }
    assert_eq!(vm.wait_exit().code(), Some(0));
}

#[test]
fn every_end_of_a_guest_ends_the_vm_well() {
    for (how, reason) in
        [("reset", Shutdown::Reset), ("acpi", Shutdown::PowerOff), ("triple", Shutdown::Reset)]
    {
        for cpus in [1, 2] {
            let cmdline = format!("mode=echo exit={how}");
            let mut vm = Vm::with(&cmdline).cpus(cpus).start();
            vm.wait_for("echo: ready");
            let events = vm.events();
            vm.say(b"quit");
            vm.wait_for("echo: ok");
            let event =
                vm.wait_for_event(&events, |kind| matches!(kind, EventKind::Shutdown { .. }));
            let expected = EventKind::Shutdown { reason, message: None };
            assert_eq!(event.kind, expected, "exit={how} with {cpus} vCPUs");
            vm.ends_well();
        }
    }
}

/// Disks are where the command line says, each under the name it was given.
#[test]
fn disks_are_found_each_with_its_own_id() {
    for (count, number) in
        [(4, 0), (4, 1), (4, 3), (MOST_DISKS, 0), (MOST_DISKS, 8), (MOST_DISKS, 16)]
    {
        // Interrupts, so that each disk's line is proved too.
        let cmdline = format!("mode=blk mib=1 irq disk={number}");
        let mut options = Vm::with(&cmdline);
        for n in 0..count {
            // Sizes that differ, in sectors.
            options = options.disk_with(MIB + 512 * n as u64, &format!(",id=the-{n}"));
        }
        let mut vm = options.start();
        let line = vm.wait_for_line("blk: capacity=");
        assert_eq!(line, format!("blk: capacity={} ro=0 flush=1 id=the-{number}", 2048 + number));
        vm.wait_for("blk: ok");
        for n in 0..count {
            let written = std::fs::read(vm.path(&format!("disk{n}"))).unwrap();
            let blank = written.iter().all(|byte| *byte == 0);
            assert_eq!(blank, n != number, "disk {n} of {count}, disk {number} was written");
        }
        vm.ends_well();
    }
}

#[test]
fn one_disk_too_many_is_refused() {
    let mut options = Vm::with("mode=hello");
    for _ in 0..=MOST_DISKS {
        options = options.disk(1);
    }
    let mut vm = options.start();
    assert_eq!(vm.wait_exit().code(), Some(1));
    vm.wait_for_error("18 disks are more than the 17 a VM can have");
}
