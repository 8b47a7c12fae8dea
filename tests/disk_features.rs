//! What a disk can do beyond reads and writes, asked for by the guest.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

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
