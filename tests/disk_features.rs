//! What a disk can do beyond reads and writes, asked for by the guest.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;

use common::{LIMIT, Vm};

const MIB: u64 = 1 << 20;

/// Requests over many queues at once, each with a worker and a doorbell of its own.
#[test]
fn every_queue_is_served() {
    for (cpus, options, how) in [
        (2, "", "queues=2 qd=32"),
        (2, "", "queues=2 qd=32 irq event-idx"),
        (1, ",queues=4", "queues=4 qd=64 irq indirect event-idx segments=4"),
        (1, ",queues=4", "queues=3 qd=4 irq"),
        (1, ",queues=32", "queues=32 qd=64 sectors=16"),
        (1, ",queues=32,poll-us=0", "queues=32 qd=64 irq event-idx"),
        (4, ",queues=1", "queues=1 qd=8"),
    ] {
        let mut vm = Vm::with(&format!("mode=blk mib=2 rounds=2 {how}"))
            .cpus(cpus)
            .disk_with(3 * MIB, options)
            .start();
        vm.wait_for("blk: verified=2097152 bytes generation=2");
        vm.wait_for("blk: ok");
        vm.ends_well();
    }
}

/// The guest is told how many queues there are: one for each vCPU, unless asked for.
#[test]
fn the_guest_sees_as_many_queues_as_the_disk_has() {
    for (cpus, options, offered) in
        [(1, "", 1), (3, "", 3), (2, ",queues=5", 5), (2, ",queues=1", 1)]
    {
        let mut vm = Vm::with(&format!("mode=blk queues={}", offered + 1))
            .cpus(cpus)
            .disk_with(3 * MIB, options)
            .start();
        let refusal =
            vm.console.wait_for(&format!("FAIL: the disk has {offered} queues only"), LIMIT);
        assert!(refusal.is_some(), "{cpus}{options}: {}", vm.console.text());
        vm.wait_exit();
    }
}

/// Ranges given up or zeroed by the guest: they read as zeros, and give space back.
#[test]
fn the_guest_discards_zeroes_and_chooses_the_cache_mode() {
    for how in ["", "irq", "indirect segments=3"] {
        let mut vm = Vm::with(&format!("mode=blk-features {how}")).disk(4).start();
        let limits = vm.wait_for_line("blk-features: clears=");
        let block = fs::metadata(vm.path("disk0")).unwrap().blksize() / 512;
        assert_eq!(
            limits,
            format!(
                "blk-features: clears=1 discard=32x4194304 align={block} zeroes=4x65536 unmap=1 \
                 physical={} min={block}",
                block.ilog2()
            )
        );
        vm.wait_for("blk-features: zero-too-many status=1");
        vm.wait_for("blk-features: zero-unmap status=0");
        vm.wait_for("blk-features: discard-most status=0");
        vm.wait_for("blk-features: writeback=0");
        vm.wait_for("blk-features: after-reset writeback=1");
        vm.wait_for("blk-features: ok");
        assert_eq!(fs::metadata(vm.path("disk0")).unwrap().len(), 4 * MIB);
        vm.ends_well();
    }
}

#[test]
fn a_read_only_disk_is_not_cleared() {
    let mut vm = Vm::with("mode=blk-features").disk_with(4 * MIB, ",ro").start();
    vm.wait_for("blk-features: clears=0 discard=0x0 align=0 zeroes=0x0 unmap=0");
    vm.wait_for("blk-features: discard-of-read-only status=1");
    vm.wait_for("blk-features: zero-of-read-only status=1");
    vm.wait_for("blk-features: ok");
    vm.ends_well();
}
