//! Disks whose guests keep their writes to themselves.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Options, Vm};

const MIB: u64 = 1 << 20;

/// An image as a guest wrote it, with the pattern of `seed=3`.
fn written_image(dir: &Path, bytes: u64) -> PathBuf {
    let image = dir.join("image");
    fs::File::create(&image).unwrap().set_len(bytes).unwrap();
    let mut vm = on("mode=blk mib=2 seed=3", &image, "").start();
    vm.wait_for("blk: ok");
    vm.ends_well();
    image
}

fn on(cmdline: &str, image: &Path, options: &str) -> Options {
    Vm::with(cmdline).arg("--disk").arg(format!("{}{options}", image.display()))
}

/// Whatever a guest does to its disk, the file stays as it is, and the guest reads what it
/// wrote, and the image where it did not write.
#[test]
fn the_image_stays_as_it_is_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let image = written_image(dir.path(), 4 * MIB + 1536);
    let before = fs::read(&image).unwrap();
    let in_directory = format!(",cow={}", dir.path().display());
    for options in [",cow", in_directory.as_str(), ",cow,queues=4"] {
        let queues = if options.ends_with('4') { " queues=4" } else { "" };
        let ways = [
            "seed=5 qd=32 sectors=7 indirect segments=5 event-idx irq", // parts of blocks
            "keep seed=3",
            "seed=5 qd=32 sectors=1 irq",
            "seed=5 rounds=3 qd=16 sectors=256 segments=3",
        ];
        for how in ways.iter().take(if options == ",cow" { 4 } else { 1 }) {
            let mut vm = on(&format!("mode=blk mib=2 {how}{queues}"), &image, options).start();
            let line = vm.wait_for_line("blk: capacity=");
            assert_eq!(line, "blk: capacity=8195 ro=0 flush=1 id=disk0", "{how}");
            vm.wait_for("blk: verified=209");
            vm.wait_for("blk: ok");
            vm.ends_well();
        }
        let mut vm = on("mode=blk-features irq", &image, options).start();
        vm.wait_for("blk-features: discard-most status=0");
        vm.wait_for("blk-features: after-reset writeback=1");
        vm.wait_for("blk-features: ok");
        vm.ends_well();
        assert!(before == fs::read(&image).unwrap(), "{options}: the image was written");
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(left, ["image"], "an overlay was left behind");
}

/// Machines on one image, at the same time: each reads back what it wrote, while the
/// others write the same sectors.
#[test]
fn two_machines_on_one_image_do_not_see_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let image = written_image(dir.path(), 3 * MIB);
    let before = fs::read(&image).unwrap();
    let mut writers: Vec<Vm> = [100, 200]
        .map(|seed| format!("mode=blk mib=2 rounds=30 qd=8 irq seed={seed}"))
        .iter()
        .map(|cmdline| on(cmdline, &image, ",cow").start())
        .collect();
    for vm in &mut writers {
        vm.wait_for("blk: wrote=2097152");
    }
    // Beside them, others that only read it.
    for options in [",ro", ",cow"] {
        let mut vm = on("mode=blk mib=2 keep seed=3", &image, options).start();
        vm.wait_for("blk: verified=2097152 bytes generation=3");
        vm.ends_well();
    }
    for (mut vm, last) in writers.into_iter().zip([129, 229]) {
        vm.wait_for(&format!("blk: verified=2097152 bytes generation={last}"));
        vm.wait_for("blk: ok");
        vm.ends_well();
    }
    assert!(before == fs::read(&image).unwrap(), "the image was written");
}

/// Nobody writes an image under those that use it with `cow`.
#[test]
fn an_image_in_use_is_not_written_by_another_machine() {
    let dir = tempfile::tempdir().unwrap();
    let image = written_image(dir.path(), 3 * MIB);
    let mut holder = on("mode=halt", &image, ",cow").start();
    holder.wait_for("halt: ready");
    let mut other = on("mode=halt", &image, "").start();
    other.wait_for_error("is in use, by another VM");
    other.wait_for_error("leave the image alone in both with ',ro' or ',cow'");
    assert_eq!(other.wait_exit().code(), Some(1));
    holder.cli("stop", &[]);
    holder.wait_exit();

    let mut nowhere = on("mode=halt", &image, ",cow=/proc/self").start();
    nowhere.wait_for_error("in /proc/self");
    nowhere.wait_for_error("cow=DIR");
    assert_eq!(nowhere.wait_exit().code(), Some(1));
}

/// What is written while a live snapshot is taken is in it, whichever part of it had been copied.
#[test]
fn a_live_snapshot_has_all_of_a_disk_that_is_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm =
        Vm::with("mode=storm n=1000000000 quit qd=16 mib=16").disk_with(16 << 20, ",cow").start();
    vm.wait_for("storm: begins");
    let mut snapshots = Vec::new();
    for n in 0..3 {
        // Some hundred requests further, or many more.
        std::thread::sleep(std::time::Duration::from_millis(30 * n));
        let at = dir.path().join(n.to_string());
        let said = vm.snapshot(&at, &["--live", "--json"]);
        assert!(said.contains(r#""cow":true"#), "{said}");
        snapshots.push(at);
    }
    // Each goes on from where it was, and reads back in the end what was written before and after.
    let mut all = vec![vm];
    all.extend(snapshots.iter().map(|at| Vm::restore(at).start()));
    for mut vm in all {
        vm.say(b"q");
        vm.wait_for("storm: ok");
        vm.ends_well();
    }
}
