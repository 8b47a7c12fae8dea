//! The disk, from the guest's requests to the image's bytes.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use cellblock::control::protocol::EventKind;
use common::{LIMIT, Vm, poll, proc, send};
use nix::sys::signal::Signal;

const MIB: u64 = 1 << 20;
const SECTOR: usize = 512;

/// One word of a sector as the guest writes it: see `tests/guests/bare/src/pattern.rs`.
fn word(sector: u64, generation: u64, at: usize) -> u64 {
    match at {
        0 => 0x6b63_6f6c_626c_6c65,
        1 => sector,
        2 => generation,
        _ => {
            let mixed = (sector << 6 | at as u64) ^ generation.rotate_left(40);
            mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mixed >> 7
        }
    }
}

/// Checks that a sector of an image is the one that the guest wrote.
#[track_caller]
fn assert_sector(image: &[u8], sector: u64, generation: u64) {
    let bytes = &image[sector as usize * SECTOR..][..SECTOR];
    for (at, found) in bytes.as_chunks::<8>().0.iter().enumerate() {
        let wanted = word(sector, generation, at);
        let found = u64::from_le_bytes(*found);
        assert_eq!(found, wanted, "word {at} of sector {sector}: {found:#x}, not {wanted:#x}");
    }
}

/// Checks that the image has `mib` from its beginning as the guest wrote it, its last
/// sector too, and zeros between.
#[track_caller]
fn assert_image(path: &Path, mib: u64, generation: u64, last_generation: u64) {
    let image = fs::read(path).unwrap();
    let sectors = (image.len() / SECTOR) as u64;
    let written = (mib * MIB / SECTOR as u64).min(sectors - 1);
    for sector in 0..written {
        assert_sector(&image, sector, generation);
    }
    let between = &image[written as usize * SECTOR..image.len() - SECTOR];
    assert!(between.iter().all(|byte| *byte == 0), "what was not written is not zero");
    assert_sector(&image, sectors - 1, last_generation);
}

/// Every way a driver may speak to the device.
#[test]
fn the_guest_writes_and_the_image_has_it() {
    for how in [
        "qd=1",
        "qd=32",
        "qd=64 sectors=1",
        "qd=1 irq",
        "qd=32 irq",
        "qd=16 segments=8",
        "qd=32 indirect",
        "qd=32 indirect segments=16",
        "qd=32 event-idx",
        "qd=1 irq event-idx",
        "qd=32 irq event-idx",
        "qd=32 irq event-idx indirect segments=4",
        "qd=4 irq indirect sectors=256 segments=3",
    ] {
        let mut vm = Vm::with(&format!("mode=blk mib=2 rounds=2 seed=7 {how}")).disk(3).start();
        let line = vm.wait_for_line("blk: capacity=");
        assert_eq!(line, "blk: capacity=6144 ro=0 flush=1 id=disk0", "{how}");
        vm.wait_for("blk: verified=2097152 bytes generation=7");
        vm.wait_for("blk: verified=2097152 bytes generation=8");
        vm.wait_for("blk: last-sector=6143");
        vm.wait_for("blk: ok");
        assert_image(&vm.path("disk0"), 2, 8, 7);
        vm.ends_well();
    }
}

#[test]
fn bad_requests_fail_and_nothing_else_does() {
    for how in ["", "irq", "indirect"] {
        let mut vm = Vm::with(&format!("mode=blk-errors {how}")).disk(3).start();
        vm.wait_for("cellblock guest");
        let events = vm.events();
        vm.wait_for("blk-errors: short-header status=1");
        vm.wait_for("blk-errors: poisoned-queue needs-reset");
        vm.wait_for("blk-errors: after-reset status=0");
        vm.wait_for("blk-errors: ok");
        vm.wait_for_event(
            &events,
            |kind| matches!(kind, EventKind::NeedsReset { id } if id == "disk0"),
        );
        let image = fs::read(vm.path("disk0")).unwrap();
        assert!(image.iter().all(|byte| *byte == 0), "a refused request wrote");
        assert_eq!(image.len() as u64, 3 * MIB, "a refused request changed the size");
        vm.ends_well();
    }
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let mut vm = Vm::with("mode=blk-errors").disk_with(3 * MIB, ",ro").start();
    vm.wait_for("blk-errors: write-to-read-only status=1");
    vm.wait_for("blk-errors: ok");
    let image = fs::read(vm.path("disk0")).unwrap();
    assert!(image.iter().all(|byte| *byte == 0), "a read-only disk was written");
    vm.ends_well();
}

/// What one machine wrote, the next one reads, also where it may only read.
#[test]
fn an_image_outlives_its_machine() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image, with a comma");
    File::create(&image).unwrap().set_len(4 * MIB).unwrap();
    let spec = image.to_str().unwrap().replace(',', ",,");
    let run = |cmdline: &str, options: &str, seen: &[&str]| {
        let options = format!("{spec}{options}");
        let mut vm = Vm::with(cmdline).arg("--disk").arg(options).start();
        seen.iter().for_each(|text| drop(vm.wait_for(text)));
        vm.wait_for("blk: ok");
        assert!(!vm.console.text().contains("wrote=") || !cmdline.contains("keep"));
        vm.ends_well();
    };
    run("mode=blk mib=4 seed=3 qd=8", "", &["ro=0", "wrote=4194304", "verified=4194304"]);
    let before = fs::read(&image).unwrap();
    run("mode=blk mib=4 seed=3 keep", "", &["ro=0", "verified=4194304 bytes generation=3"]);
    run("mode=blk mib=4 seed=3 irq", ",ro", &["ro=1", "verified=4194304 bytes generation=3"]);
    // What another seed would have written is not there.
    let options = format!("{spec},ro");
    let mut vm = Vm::with("mode=blk mib=4 seed=4").arg("--disk").arg(options).start();
    let fault = vm.console.wait_for("FAIL: sector", common::LIMIT);
    assert!(fault.is_some(), "the guest believes anything: {}", vm.console.text());
    vm.wait_exit();
    assert!(before == fs::read(&image).unwrap(), "reading changed the image");
}

#[test]
fn the_guest_reads_the_serial_number() {
    for (options, id) in [
        (",serial=SN-0123456789abcdef!", "SN-0123456789abcdef!"),
        (",serial=x,ro", "x"),
        (",id=data", "data"),
        // As long as an id may be, and cut to what the device may say.
        (",id=abcdefghijklmnopqrstuvwxyz-01234", "abcdefghijklmnopqrst"),
        ("", "disk0"),
    ] {
        let mut vm = Vm::with("mode=blk mib=1").disk_with(MIB, options).start();
        // Not Vm::wait_for_line: on a read-only disk the guest's FAIL may come with it.
        let line = vm.console.wait_for_line("blk: capacity=", common::LIMIT);
        let line = line.unwrap_or_else(|| panic!("{options}: the guest found no disk"));
        assert!(line.ends_with(&format!(" id={id}")), "{options}: {line}");
        if options.ends_with(",ro") {
            vm.console.wait_for("FAIL", common::LIMIT); // nothing was written before
            vm.wait_exit();
        } else {
            vm.wait_for("blk: ok");
            vm.ends_well();
        }
    }
}

/// Not a whole number of pages, nor of the guest's requests.
#[test]
fn an_image_of_an_odd_number_of_sectors_is_used_to_its_end() {
    for bytes in [3 * MIB + 512, 3 * MIB - 512, 9 * 512, 8 * 512 + 4096] {
        for how in ["", "irq qd=8"] {
            let mut vm = Vm::with(&format!("mode=blk mib=4 {how}")).disk_with(bytes, "").start();
            let sectors = bytes / 512;
            vm.wait_for(&format!("blk: capacity={sectors} "));
            vm.wait_for(&format!("blk: last-sector={}", sectors - 1));
            vm.wait_for("blk: ok");
            let image = fs::read(vm.path("disk0")).unwrap();
            assert_eq!(image.len() as u64, bytes);
            // The guest's requests are of 8 sectors, as many as fit.
            for sector in (0..sectors / 8 * 8).chain([sectors - 1]) {
                assert_sector(&image, sector, 1);
            }
            vm.ends_well();
        }
    }
}

/// The last sector alone: one sector is all there is.
#[test]
fn the_smallest_image() {
    let mut vm = Vm::with("mode=blk sectors=1").disk_with(512, "").start();
    vm.wait_for("blk: capacity=1 ");
    vm.wait_for("blk: last-sector=0");
    vm.wait_for("blk: ok");
    assert_sector(&fs::read(vm.path("disk0")).unwrap(), 0, 1);
    vm.ends_well();
}

#[test]
fn a_disk_that_polls_before_it_sleeps_loses_nothing() {
    for how in ["qd=1", "qd=16 irq", "qd=16 irq event-idx", "qd=1 event-idx"] {
        let cmdline = format!("mode=blk mib=2 {how}");
        let mut vm = Vm::with(&cmdline).disk_with(3 * MIB, ",poll-us=50").start();
        vm.wait_for("blk: verified=2097152");
        vm.wait_for("blk: ok");
        assert_image(&vm.path("disk0"), 2, 1, 1);
        vm.ends_well();
    }
}

/// The counters are those of the requests the guest makes, to the byte.
#[test]
fn counters_are_exact() {
    // The guest ends by itself not at all, so that it can be asked when all is done.
    let cmdline = "mode=blk mib=1 rounds=3 qd=16 sectors=16 disk=1 exit=none";
    let mut vm = Vm::with(cmdline).disk(2).disk(2).start();
    vm.wait_for("blk: ok");
    let stats = vm.stats();
    let (idle, busy) = (&stats.disks[0], &stats.disks[1]);
    assert_eq!((idle.id.as_str(), busy.id.as_str()), ("disk0", "disk1"));
    assert_eq!((idle.reads, idle.writes, idle.flushes, idle.errors), (0, 0, 0, 0));
    assert_eq!((idle.counters.bytes_read, idle.counters.bytes_written), (0, 0));
    // 128 requests of 8 KiB in each of three rounds, and one sector at the very end.
    let requests = 3 * 128 + 1;
    let bytes = 3 * MIB + 512;
    assert_eq!((busy.reads, busy.writes), (requests, requests), "{busy:?}");
    assert_eq!((busy.counters.bytes_read, busy.counters.bytes_written), (bytes, bytes), "{busy:?}");
    assert_eq!((busy.flushes, busy.errors), (3, 0), "{busy:?}");
    // The command says the same, and asking does not count.
    let text = vm.cli("stats", &["--json"]);
    for part in [
        format!("\"reads\":{requests}"),
        format!("\"writes\":{requests}"),
        format!("\"bytes_read\":{bytes}"),
        format!("\"bytes_written\":{bytes}"),
        "\"flushes\":3".into(),
    ] {
        assert!(text.contains(&part), "no {part} in {text}");
    }
    vm.cli("stop", &[]);
    vm.ends_well();
}

/// A throttled disk in its jail: as slow as it was told, and as fast as it is told next.
#[test]
fn a_disk_keeps_to_its_limits_and_to_new_ones() {
    // 256 requests of 8 KiB; 128 of them pass at once.
    let cmdline = "mode=blk mib=1 rounds=1 qd=16 sectors=16 exit=none";
    let mut vm = Vm::with(cmdline).disk_with(2 * MIB, ",iops=64,iops-burst=128").start();
    vm.wait_for("blk: capacity=");
    let end = Instant::now() + Duration::from_secs(30);
    while vm.stats().disks[0].counters.currently_throttled_gauge == 0 {
        assert!(Instant::now() < end, "no request waits");
        std::thread::sleep(Duration::from_millis(5));
    }
    let disk = vm.stats().disks.remove(0);
    assert!(disk.reads + disk.writes <= 128 + 64, "{disk:?}");
    assert_eq!((disk.throttle.iops, disk.throttle.bw), (Some(64), None));
    assert!(disk.counters.throttled_count > 0, "{disk:?}");
    assert_eq!(disk.queues, std::slice::from_ref(&disk.counters));

    let text = vm.cli("throttle", &["disk0", "iops=0", "bw=100M", "--json"]);
    let reply = r#"{"reply":"throttle","id":"disk0","bw":104857600,"bw_burst":104857600}"#;
    assert_eq!(text.trim(), reply);
    vm.wait_for("blk: ok");
    let disk = vm.stats().disks.remove(0);
    assert_eq!(disk.counters.currently_throttled_gauge, 0);
    assert_eq!(disk.throttle.iops, None);
    vm.cli("stop", &[]);
    vm.ends_well();
}

/// Each request that fails counts as an error, and as nothing else; one of a type that the
/// device does not know is no failure.
#[test]
fn refused_requests_are_counted_as_errors() {
    let mut vm = Vm::with("mode=blk-errors exit=none").disk(1).start();
    vm.wait_for("blk-errors: ok");
    let stats = vm.stats();
    let disk = &stats.disks[0];
    let text = vm.console.text();
    let with_status = |status| text.lines().filter(|l| l.ends_with(status)).count() as u64;
    let (failed, unknown) = (with_status(" status=1"), with_status(" status=2"));
    assert!(failed >= 15 && unknown == 1, "{text}");
    assert_eq!(disk.errors, failed, "{disk:?}");
    // After each a good read of a sector, and one after the reset.
    let good = failed + unknown + 1;
    assert_eq!((disk.reads, disk.counters.bytes_read), (good, good * 512), "{disk:?}");
    assert_eq!((disk.writes, disk.counters.bytes_written, disk.flushes), (0, 0, 0), "{disk:?}");
    vm.cli("stop", &[]);
    vm.ends_well();
}

/// An image that loses its end under a running guest is an error of the disk, for the
/// guest to deal with.
#[test]
fn an_image_cut_short_is_an_error_to_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(4 * MIB).unwrap();
    let spec = image.to_str().unwrap();
    let mut vm = Vm::with("mode=blk mib=4 seed=3 qd=8").arg("--disk").arg(spec).start();
    vm.wait_for("blk: ok");
    vm.ends_well();

    // Slow enough to be still reading when the end goes.
    let slow = format!("{spec},iops=100,iops-burst=100");
    let mut vm = Vm::with("mode=blk mib=4 seed=3 qd=8 keep").arg("--disk").arg(slow).start();
    vm.wait_for("blk: capacity=");
    File::options().write(true).open(&image).unwrap().set_len(MIB / 2).unwrap();
    let line = vm.console.wait_for_line("FAIL: ", LIMIT).expect("a request that fails");
    assert!(line.contains("request type 0") && line.contains("status 1"), "{line}");
    vm.wait_exit();
    let text = vm.stderr.text();
    assert!(!text.contains("died") && !text.contains("panic"), "{text}");
}

/// What was counted is known, whatever became of who counted.
#[test]
fn counters_are_read_of_the_stopped_and_the_dead() {
    let mut vm = Vm::with("mode=blk mib=1 rounds=100000 seed=7 qd=4").disk(3).start();
    vm.wait_for("blk: verified=");
    let counters = |vm: &mut Vm| vm.stats().disks[0].counters.clone();
    let pid = vm.pid_of("blk", "disk0");
    send(pid, Signal::SIGSTOP);
    poll(LIMIT, || (proc::status(pid, pid)["State"].starts_with('T')).then_some(())).unwrap();
    let stopped = counters(&mut vm);
    assert!(stopped.writes_completed > 0 && stopped.bytes_read > 0, "{stopped:?}");
    std::thread::sleep(Duration::from_millis(50)); // what must not happen gives no notice
    assert_eq!(counters(&mut vm), stopped);
    send(pid, Signal::SIGCONT);
    poll(LIMIT, || (counters(&mut vm).bytes_read > stopped.bytes_read).then_some(())).unwrap();
    send(pid, Signal::SIGSTOP);
    poll(LIMIT, || (proc::status(pid, pid)["State"].starts_with('T')).then_some(())).unwrap();
    let before = counters(&mut vm);
    send(pid, Signal::SIGKILL);
    let after = counters(&mut vm);
    assert!(after.bytes_written >= before.bytes_written, "{before:?} {after:?}");
    assert!(after.bytes_read >= before.bytes_read, "{before:?} {after:?}");
}
