//! Disks on the io_uring engine, jailed, from the guest's requests to the image's bytes.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs;

use common::Vm;

const MIB: u64 = 1 << 20;

/// Runs `how` on a disk with `options`; what the guest verifies has to be in the file.
fn run(mode: &str, how: &str, options: &str, seen: &[&str]) -> Vec<u8> {
    let spec = format!(",engine=io_uring{options}");
    let mut vm = Vm::with(&format!("mode={mode} {how}")).cpus(2).disk_with(3 * MIB, &spec).start();
    for text in seen {
        vm.wait_for(text);
    }
    vm.wait_for(&format!("{mode}: ok"));
    let image = fs::read(vm.path("disk0")).unwrap();
    vm.ends_well();
    image
}

#[test]
fn every_way_to_drive_it_works() {
    for (how, options) in [
        ("qd=1", ""),
        ("qd=32 irq", ",poll-us=0"),
        ("qd=64 queues=2 irq event-idx indirect segments=4", ""),
        ("qd=64 queues=2 event-idx sectors=1", ",poll-us=1000"),
        ("qd=4 irq indirect sectors=256 segments=3", ""),
    ] {
        let verified = "blk: verified=2097152 bytes generation=2";
        let image = run("blk", &format!("mib=2 rounds=2 seed=1 {how}"), options, &[verified]);
        assert!(image[..2 << 20].chunks(512).all(|sector| sector.iter().any(|b| *b != 0)));
        assert!(image[2 << 20..image.len() - 512].iter().all(|b| *b == 0));
    }
}

#[test]
fn bad_requests_and_other_requests_are_answered_alike() {
    run("blk-errors", "irq", "", &["blk-errors: poisoned-queue needs-reset"]);
    run("blk-features", "irq", "", &["blk-features: clears="]);
}
