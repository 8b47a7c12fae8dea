//! From a running VM to a directory and back, generation after generation.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use cellblock::control::client::Client;
use cellblock::control::protocol::{EventKind, State};
use common::snapshot::{cellblock, refused_restore};
use common::{LIMIT, Vm};
use nix::sys::signal::Signal;

/// Generations of the standing test; `CELLBLOCK_GENERATIONS` has it do more, as 1000.
const GENERATIONS: u64 = 12;

fn generations() -> u64 {
    std::env::var("CELLBLOCK_GENERATIONS").map_or(GENERATIONS, |n| n.parse().unwrap())
}

/// The numbers behind each `key`.
fn numbers(text: &str, key: &str) -> Vec<u64> {
    let digits = |rest: &str| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok();
    text.split(key).skip(1).filter_map(digits).collect()
}

/// Each VM goes on from the snapshot of the one before. The guest counts without a gap, reads
/// back what it wrote, and neither its TSC nor its clock ever steps back.
#[test]
fn a_guest_lives_on_through_generations() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: u64| dir.path().join(format!("g{n}"));
    let mut vm = Vm::with("mode=pause cpus=2 every=20").cpus(2).disk(4).start();
    vm.wait_for_line("pause: n=40 ");
    let image = vm.path("disk0").to_path_buf();
    let kept = dir.path().join("disk0");
    let mut said = String::new();
    for n in 0..generations() {
        vm.snapshot(&at(n), &["--stop"]);
        said.push_str(&vm.console.finished(LIMIT));
        assert!(!said.contains("FAIL"), "{said}");
        if n == 0 {
            // The first VM's directory goes with it.
            fs::copy(&image, &kept).unwrap();
        }
        let named = format!("id=disk0,path={}", kept.display());
        vm = Vm::restore(&at(n)).arg("--disk").arg(named).start();
        vm.wait_for_line("pause: n=");
        if n > 0 {
            fs::remove_dir_all(at(n - 1)).unwrap();
        }
    }
    vm.say(b"q");
    vm.wait_for("pause: ok");
    said.push_str(&vm.console.text());
    vm.ends_well();
    // What all of them said, one after the other, is what one guest would have said: a line
    // that was cut in two by a snapshot goes on in the next life.
    let counts = numbers(&said, "pause: n=");
    let want: Vec<u64> = (1..=counts.len() as u64).map(|n| n * 20).collect();
    assert_eq!(counts, want);
    for clock in [" tsc=", " ns="] {
        assert!(numbers(&said, clock).is_sorted(), "{clock} stepped back");
    }
}

/// A restored VM is a VM: control, statistics, pauses, snapshots; its disk is its own copy.
#[test]
fn a_restored_vm_can_do_what_any_can() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut vm = Vm::with("mode=pause every=20").disk_with(4 << 20, ",iops=100000").start();
    vm.wait_for_line("pause: n=40 ");
    let before = vm.stats().disks[0].counters.clone();
    let said = vm.snapshot(&at("one"), &["--disks", "copy", "--json"]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(said["still_us"].as_u64().unwrap() > 0 && said["id"].is_string(), "{said}");
    vm.wait_for_line("pause: n=");
    let mut restored = Vm::restore(&at("one")).start();
    restored.wait_for_line("pause: n=");
    let stats = restored.stats();
    assert_eq!((stats.state, stats.vcpus.len(), stats.memory), (State::Running, 1, 64 << 20));
    assert_eq!(stats.disks[0].throttle.iops, Some(100_000));
    assert!(stats.disks[0].counters.writes_completed >= before.writes_completed);
    restored.pause();
    restored.resume();
    restored.wait_for_line("pause: n=");
    restored.snapshot(&at("two"), &["--disks", "copy"]);
    let mut again = Vm::restore(&at("two")).start();
    for vm in [&mut vm, &mut restored, &mut again] {
        vm.wait_for_line("pause: n=");
        vm.say(b"q");
        vm.wait_for("pause: ok");
    }
    vm.ends_well();
    restored.ends_well();
    again.ends_well();
}

/// What has the image's name by now, and is another file, is not taken for it: neither to copy it,
/// nor to refer to it when the VM, which has the image, ends.
#[test]
fn another_file_in_the_place_of_an_image_is_not_in_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=20").disk(4).start();
    vm.wait_for_line("pause: n=40 ");
    let (image, aside) = (vm.path("disk0"), vm.path("aside"));
    fs::rename(&image, &aside).unwrap();
    let other: [&dyn Fn(); 2] =
        [&|| File::create(&image).unwrap().set_len(4 << 20).unwrap(), &|| {
            nix::unistd::mkfifo(&image, nix::sys::stat::Mode::S_IRUSR).unwrap()
        }];
    for make in other {
        make();
        for options in [["--disks", "copy"].as_slice(), &["--stop"]] {
            let ended = vm.try_snapshot(&at, options);
            let line = String::from_utf8(ended.stderr).unwrap();
            assert_eq!((ended.status.code(), line.lines().count()), (Some(1), 1), "{line}");
            assert!(line.contains("is not the image that disk 'disk0' has"), "{line}");
            assert!(!at.exists());
            vm.wait_for_line("pause: n=");
        }
        fs::remove_file(&image).unwrap();
    }
    fs::rename(&aside, &image).unwrap();
    vm.snapshot(&at, &["--stop"]);
    assert_eq!(vm.wait_exit().code(), Some(0));
    let mut again = Vm::restore(&at).start();
    again.wait_for_line("pause: n=");
    again.say(b"q");
    again.wait_for("pause: ok");
    again.ends_well();
}

/// Two VMs from one snapshot at once: neither sees what the other writes, nor does the image.
#[test]
fn clones_share_a_snapshot_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=20").disk_with(4 << 20, ",cow").start();
    vm.wait_for_line("pause: n=40 ");
    let image = vm.path("disk0").to_path_buf();
    vm.snapshot(&at, &[]);
    let mut clones = [Vm::restore(&at).start(), Vm::restore(&at).start()];
    for clone in &mut clones {
        clone.wait_for_line("pause: n=");
    }
    vm.wait_for_line("pause: n=");
    let second = dir.path().join("second");
    clones[0].snapshot(&second, &[]);
    assert!(fs::read(&image).unwrap().iter().all(|byte| *byte == 0), "the image was written to");
    let grandchild = Vm::restore(&second).start();
    let [one, two] = clones;
    for mut vm in [vm, one, two, grandchild] {
        vm.wait_for_line("pause: n=");
        vm.say(b"q");
        vm.wait_for("pause: ok");
        if vm.path("disk0").exists() {
            drop(vm); // the others need the image
        } else {
            vm.ends_well();
        }
    }
}

#[test]
fn what_cannot_be_restored_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=20").disk(4).start();
    vm.wait_for_line("pause: n=40 ");
    vm.snapshot(&at, &[]);
    vm.wait_for_line("pause: n="); // the disk is written to
    vm.pause();
    let refused = |args: &[&str]| {
        let words = [&["restore", at.to_str().unwrap(), "--serial", "null"], args].concat();
        let ended = cellblock(&words);
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        let text = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    };
    assert!(refused(&[]).contains("in use"));
    let disk = vm.path("disk0").to_path_buf();
    let short = dir.path().join("short");
    fs::write(&short, vec![0; 512]).unwrap();
    let named = format!("id=disk0,path={}", short.display());
    assert!(refused(&["--disk", &named]).contains("has 512 bytes"));
    assert!(refused(&["--disk", "id=other,path=x"]).contains("its disks are disk0"));
    // Neither of the two is what is left out silently.
    let twice = refused(&["--disk", "id=disk0,cow", "--disk", "id=disk0,path=x"]);
    assert!(twice.contains("disk 'disk0' is changed twice"), "{twice}");
    // Once it is free, it shows that it was written to.
    let kept = fs::read(&disk).unwrap();
    vm.resume();
    vm.say(b"q");
    vm.wait_for("pause: ok");
    drop(kept);
    let ended = {
        let words = ["restore", at.to_str().unwrap(), "--serial", "null"];
        vm.wait_exit();
        cellblock(&words)
    };
    let text = String::from_utf8(ended.stderr).unwrap();
    assert!(text.contains("was changed since") && text.contains("--disk id=disk0"), "{text}");
    // A place that is taken disturbs nobody.
    let mut vm = Vm::with("mode=spin").start();
    vm.wait_for("spin");
    let control = vm.path("control");
    let ended = cellblock(&["snapshot", control.to_str().unwrap(), at.to_str().unwrap()]);
    assert_eq!(ended.status.code(), Some(1));
    assert_eq!(vm.stats().epoch, 0);
    std::thread::sleep(Duration::from_millis(1));
}

/// A restore that reads everything checks what it has of the disks, and every restore what it reads.
#[test]
fn damaged_disks_are_refused_before_the_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::with("mode=pause every=20").disk(4).start();
    vm.wait_for_line("pause: n=40 ");
    let copied = dir.path().join("copied");
    vm.snapshot(&copied, &["--disks", "copy"]);
    vm.say(b"q");
    vm.wait_for("pause: ok");
    let mut vm = Vm::with("mode=pause every=20").disk_with(4 << 20, ",cow").start();
    vm.wait_for_line("pause: n=40 ");
    let cow = dir.path().join("cow");
    vm.snapshot(&cow, &["--stop"]);
    for (snapshot, modes) in [(&copied, &["eager"][..]), (&cow, &["eager", "lazy"])] {
        // Where there is something, so that it is of a block that the guest wrote.
        let path = snapshot.join("disk-disk0");
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.iter().position(|byte| *byte != 0).unwrap();
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        for mode in modes {
            let line = refused_restore(snapshot, &["--memory-mode", mode]);
            assert!(line.contains("the image 'disk-disk0' is damaged"), "{mode}: {line}");
        }
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let mut vm = Vm::restore(snapshot).arg("--memory-mode").arg("eager").start();
        vm.wait_for_line("pause: n=");
    }
}

/// How often a process may die is for the restored VM to say.
#[test]
fn a_restored_vm_has_its_own_limit_of_deaths() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=20").disk_with(4 << 20, ",cow").start();
    vm.wait_for_line("pause: n=20 ");
    let image = vm.path("disk0").to_path_buf();
    vm.snapshot(&at, &["--disks", "copy"]);
    let restored = Vm::restore(&at).arg("--disk").arg(format!("id=disk0,path={}", image.display()));
    let mut restored = restored.arg("--max-deaths").arg("1").start();
    restored.wait_for_line("pause: n=");
    let events = restored.events();
    common::send(restored.pid_of("blk", "disk0"), Signal::SIGKILL);
    let failed =
        restored.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceFailed { .. }));
    let (role, id) = ("blk".to_string(), "disk0".to_string());
    assert_eq!(failed.kind, EventKind::DeviceFailed { role, id, deaths: 1 });
    let output = cellblock(&["restore", at.to_str().unwrap(), "--max-deaths", "0"]);
    assert_eq!(output.status.code(), Some(2));
}

/// An image that was used past the page cache goes on as a `cow` disk, whose blocks come from two
/// files.
#[test]
fn a_direct_disk_goes_on_as_a_cow_disk() {
    // Where a block is a page, as it is in memory, sectors are parts of blocks.
    let pages = tempfile::tempdir_in("/dev/shm").unwrap();
    let direct = |dir: &Path| {
        let path = dir.join("image");
        fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
        fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(&path).is_ok()
    };
    let dir = if direct(pages.path()) { pages } else { tempfile::tempdir().unwrap() };
    direct(dir.path());
    let at = |name: &str| dir.path().join(name);
    let spec = format!("{},direct,engine=io_uring,id=disk0", at("image").display());
    let mut vm = Vm::with("mode=pause every=20 sectors=1").arg("--disk").arg(spec).start();
    vm.wait_for_line("pause: n=40 ");
    vm.snapshot(&at("copied"), &["--disks", "copy"]);
    vm.wait_for_line("pause: n=");
    vm.snapshot(&at("referred"), &["--stop"]);
    let named = Vm::restore(&at("referred")).arg("--disk").arg("id=disk0,cow");
    for vm in [Vm::restore(&at("copied")), named] {
        let mut vm = vm.start();
        vm.wait_for_line("pause: n=");
        vm.wait_for_line("pause: n=");
        vm.say(b"q");
        vm.wait_for("pause: ok");
        vm.ends_well();
    }
}

/// The process of a disk hangs when it is to go on after a cut: with the next one the disk is as
/// good as before, also to whoever takes a snapshot.
#[test]
fn a_disk_whose_process_hung_at_a_thaw_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = Vm::with("mode=pause every=20").disk(4).start();
    vm.wait_for_line("pause: n=20 ");
    let events = vm.events();
    let process = vm.pid_of("blk", "disk0");
    let mut holder = Client::connect(&vm.path("control")).unwrap();
    holder.snapshot(true, false, Duration::from_secs(5), "test", LIMIT).unwrap();
    common::send(process, Signal::SIGSTOP);
    drop(holder);
    common::deaths::replaced(&mut vm, &events, "disk0", 1);
    vm.snapshot(&at, &["--stop"]);
    let mut restored = Vm::restore(&at).start();
    restored.wait_for_line("pause: n=");
    restored.wait_for_line("pause: n=");
    restored.say(b"q");
    restored.wait_for("pause: ok");
    restored.ends_well();
}
