//! Disks on the io_uring engine and past the page cache, jailed, from the guest's requests
//! to the image's bytes.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs;

use common::Vm;

const MIB: u64 = 1 << 20;

/// Runs `how` on a disk with `options`; what the guest verifies has to be in the file.
fn run(mode: &str, how: &str, options: &str, seen: &[&str]) -> Vec<u8> {
    let spec = options;
    let mut vm = Vm::with(&format!("mode={mode} {how}")).cpus(2).disk_with(3 * MIB, spec).start();
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
        ("qd=1", ",engine=io_uring"),
        ("qd=32 irq", ",direct,engine=sync"),
        ("qd=64 queues=2 sectors=1", ",direct"),
        ("qd=32 irq", ",engine=io_uring,poll-us=0"),
        ("qd=64 queues=2 irq event-idx indirect segments=4", ",engine=io_uring"),
        ("qd=64 queues=2 event-idx sectors=1", ",engine=io_uring,poll-us=1000"),
        ("qd=4 irq indirect sectors=256 segments=3", ",engine=io_uring,direct"),
        ("qd=32 queues=32 irq event-idx", ",queues=32,direct"),
        ("qd=32 queues=32", ",queues=32,engine=io_uring"),
    ] {
        let verified = "blk: verified=2097152 bytes generation=2";
        let image = run("blk", &format!("mib=2 rounds=2 seed=1 {how}"), options, &[verified]);
        assert!(image[..2 << 20].chunks(512).all(|sector| sector.iter().any(|b| *b != 0)));
        assert!(image[2 << 20..image.len() - 512].iter().all(|b| *b == 0));
    }
}

#[test]
fn bad_requests_and_other_requests_are_answered_alike() {
    for options in [",engine=io_uring", ",direct", ",direct,engine=sync"] {
        run("blk-errors", "irq", options, &["blk-errors: poisoned-queue needs-reset"]);
        run("blk-features", "irq", options, &["blk-features: clears="]);
    }
}

/// Nothing of a disk with `direct` stays in the page cache.
#[test]
fn direct_is_direct() {
    for options in [",direct", ",direct,engine=sync", ""] {
        let mut vm = Vm::with("mode=blk mib=2 rounds=1").disk_with(3 * MIB, options).start();
        let image = fs::File::open(vm.path("disk0")).unwrap();
        vm.wait_for("blk: ok");
        let cached = cached_pages(&image, 2 * MIB as usize);
        if options.is_empty() {
            assert_eq!(cached, 512, "without it everything does");
        } else {
            assert_eq!(cached, 0, "{options}");
        }
        vm.ends_well();
    }
}

/// Pages of the first `len` bytes of a file that are in the page cache.
#[allow(unsafe_code)] // mincore looks at a mapping made for it
fn cached_pages(file: &fs::File, len: usize) -> usize {
    use std::os::fd::AsRawFd;
    let mut pages = vec![0u8; len / 4096];
    // SAFETY: a new mapping, which is only looked at and given back; `pages` has a byte for
    // each of its pages.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(at, libc::MAP_FAILED);
        assert_eq!(libc::mincore(at, len, pages.as_mut_ptr()), 0);
        assert_eq!(libc::munmap(at, len), 0);
    }
    pages.iter().filter(|page| *page & 1 == 1).count()
}

#[test]
fn what_cannot_be_direct_says_so() {
    let refusal = |spec: &str, remedy: &str| {
        let mut vm = Vm::with("mode=hello").arg("--disk").arg(spec).start();
        let line = vm.wait_for_error(remedy);
        assert_eq!(vm.wait_exit().code(), Some(1));
        line
    };
    // A file system that has nothing of the kind.
    let line = refusal("/proc/version,ro,direct", "leave ',direct' away");
    assert!(line.contains("opening disk /proc/version for direct I/O"), "{line}");
    // Its blocks are pages, or it has none, by the kernel's version.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let image = dir.path().join("image");
    fs::File::create(&image).unwrap().set_len(4096 + 512).unwrap();
    let line = refusal(&format!("{},direct", image.display()), "leave");
    assert!(line.contains("'truncate -s 8192 FILE'") || line.contains("for direct I/O"), "{line}");
}
