//! Guest memory that comes when it is touched, through whichever mapping and by whomever.
#![allow(unsafe_code, clippy::unwrap_used)] // mappings of guest memory; a test fails by panicking

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cellblock::snapshot::format::{CHUNK, Chain, Contents, PAGE, Writer};
use cellblock::snapshot::pager::{Config, Pager, PagerError, Prefetch, STALL_LIMIT, Source};
use cellblock::vm::memory::GuestRam;
use cellblock_devices::protocol::presence::{self, Presence};
use cellblock_devices::protocol::{FaultWindow, Registered};
use cellblock_wire::{Channel, Uffd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 32 << 20;
/// Chunks with contents: all but every third.
fn has_data(chunk: usize) -> bool {
    chunk % 3 != 2
}

fn byte(page: usize) -> u8 {
    (page % 251) as u8 + 1
}

/// A snapshot in which every page of a chunk with data is of its own byte.
fn snapshot(dir: &Path) -> PathBuf {
    let ram = File::from(cellblock_wire::sealed_memfd("ram", RAM).unwrap());
    for chunk in (0..RAM as usize / CHUNK).filter(|chunk| has_data(*chunk)) {
        for page in chunk * 64..(chunk + 1) * 64 {
            ram.write_all_at(&[byte(page); PAGE], (page * PAGE) as u64).unwrap();
        }
    }
    let target = dir.join("snapshot");
    let contents = Contents { memory: RAM, vcpus: 1, live: false };
    let mut writer = Writer::create(&target, contents, None).unwrap();
    writer.copy_all(ram.as_fd()).unwrap();
    writer.state(b"state").unwrap();
    writer.commit().unwrap();
    target
}

struct Restored {
    ram: GuestRam,
    pager: Pager,
}

fn source(path: &Path) -> Source {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd").unwrap();
    Source::new(Chain::open(path).unwrap().into(), device.into()).unwrap()
}

fn restore(path: &Path, all: bool, stall_limit: Duration) -> Restored {
    let ram = GuestRam::new(RAM).unwrap();
    let prefetch = if all { Prefetch::All } else { Prefetch::Nothing };
    let config = Config { confine: || Ok(()), prefetch, stall_limit, last_resort: None };
    let pager = source(path).start(&ram, config).unwrap();
    Restored { ram, pager }
}

fn expected(page: usize) -> u8 {
    if has_data(page / 64) { byte(page) } else { 0 }
}

fn read_page(ram: &GuestRam, page: usize) -> [u8; PAGE] {
    let mut bytes = [0xee; PAGE];
    ram.memory().read_slice(&mut bytes, GuestAddress((page * PAGE) as u64)).unwrap();
    bytes
}

/// A mapping of guest memory as a device process has it.
struct Mapped {
    start: *mut u8,
    _uffd: Option<Uffd>,
    _channel: Option<Channel>,
}

// SAFETY: it is only an address, used through volatile accesses and system calls.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(ram: &GuestRam) -> Mapped {
        let len = std::num::NonZeroUsize::new(RAM as usize).unwrap();
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, never unmapped.
        let start = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, ram.fd(), 0) }.unwrap();
        Mapped { start: start.as_ptr().cast(), _uffd: None, _channel: None }
    }

    /// As a device process does it.
    fn registered(ram: &GuestRam, pager: &Pager) -> Mapped {
        let invitation = pager.inviter().unwrap().invite().unwrap();
        let uffd = Uffd::new(invitation.device.as_fd()).unwrap();
        let presence = Presence::map(&invitation.presence, invitation.chunks).unwrap();
        let mut mapped = Mapped::new(ram);
        let windows = [FaultWindow { start: mapped.start as u64, len: RAM, offset: 0 }];
        presence::register(&uffd, &windows, &presence).unwrap();
        let channel = Channel::from_fd(invitation.channel);
        channel.send(&Registered { windows: windows.to_vec() }, &[uffd.as_fd()]).unwrap();
        mapped._uffd = Some(uffd);
        mapped._channel = Some(channel);
        mapped
    }

    fn read(&self, page: usize) -> u8 {
        // SAFETY: within the mapping.
        unsafe { self.start.add(page * PAGE).read_volatile() }
    }

    /// Has the kernel write guest memory to a file, as it does for a disk's write request.
    fn read_by_the_kernel(&self, page: usize) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        // SAFETY: within the mapping; the bytes do not change meanwhile.
        let bytes = unsafe { std::slice::from_raw_parts(self.start.add(page * PAGE), PAGE) };
        file.write_all(bytes).unwrap();
        let mut seen = vec![0; PAGE];
        file.read_exact_at(&mut seen, 0).unwrap();
        seen
    }

    /// Has the kernel read 512 bytes from a file to guest memory, as for a read request.
    fn written_by_the_kernel(&self, page: usize) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xdd; 512], 0).unwrap();
        // SAFETY: within the mapping, and nobody else's for the time of the call.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.start.add(page * PAGE), 512) };
        let n = nix::sys::uio::preadv(&file, &mut [IoSliceMut::new(bytes)], 0).unwrap();
        assert_eq!(n, 512);
    }
}

#[track_caller]
fn within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_is_touched_is_there_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let Restored { ram, pager } = restore(&snapshot(dir.path()), false, STALL_LIMIT);
    let all = pager.stats().absent;
    for page in [0, 1, 64 * 51, 64 * 2, 64 * 2 + 1, 64 * 127] {
        assert_eq!(read_page(&ram, page), [expected(page); PAGE], "page {page}");
    }
    // Who waited goes on as soon as its page is there; the pager counts after that.
    within(Duration::from_secs(20), "three chunks", || pager.stats().demanded == 3);
    assert_eq!(pager.stats().absent, all - 3);
    assert!(pager.presence().has(51) && !pager.presence().has(52));
    assert!(pager.take_failure().is_none());
}

#[test]
fn several_threads_find_one_memory_and_then_it_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let Restored { ram, pager } = restore(&snapshot(dir.path()), true, STALL_LIMIT);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let ram = &ram;
            scope.spawn(move || {
                for n in 0..RAM as usize / PAGE {
                    let page = (n * 4099 + thread * 1777) % (RAM as usize / PAGE);
                    assert_eq!(read_page(ram, page), [expected(page); PAGE], "page {page}");
                }
            });
        }
    });
    within(Duration::from_secs(20), "complete", || pager.is_complete());
    assert!(pager.take_failure().is_none());
    assert_eq!(pager.stats().absent, 0);
}

#[test]
fn a_registered_mapping_never_sees_a_hole_by_code_or_by_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let Restored { ram, pager } = restore(&snapshot(dir.path()), false, STALL_LIMIT);
    let device = Mapped::registered(&ram, &pager);
    assert_eq!(device.read(64), byte(64));
    assert_eq!(device.read_by_the_kernel(64 * 6), [byte(64 * 6); PAGE]);
    // A page that is partly overwritten keeps its rest; zeros stay zeros.
    device.written_by_the_kernel(64 * 9);
    device.written_by_the_kernel(64 * 8);
    let mut half = [byte(64 * 9); PAGE];
    half[..512].fill(0xdd);
    assert_eq!(read_page(&ram, 64 * 9), half);
    assert_eq!((device.read(64 * 8), device.read(64 * 8 + 1)), (0xdd, 0));
    assert_eq!(read_page(&ram, 64 * 9 + 1), [byte(64 * 9 + 1); PAGE]);
    // Both sides at once, and it all ends.
    pager.prefetch();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (0..RAM as usize / PAGE).filter(|page| page / 64 > 9).for_each(|page| {
                assert_eq!(device.read(page), expected(page), "page {page}");
            });
        });
        for page in (640..RAM as usize / PAGE).rev() {
            assert_eq!(read_page(&ram, page), [expected(page); PAGE], "page {page}");
        }
    });
    within(Duration::from_secs(20), "complete", || pager.is_complete());
    assert!(pager.take_failure().is_none());
}

/// What the test above would find if the registration were left out: the kernel gives
/// zeros, and the pager says that somebody was there before it.
#[test]
fn without_registration_there_are_holes_and_the_pager_ends_the_vm() {
    let dir = tempfile::tempdir().unwrap();
    let Restored { ram, pager } = restore(&snapshot(dir.path()), false, STALL_LIMIT);
    let stranger = Mapped::new(&ram);
    assert_eq!(stranger.read_by_the_kernel(64), [0; PAGE]);
    pager.prefetch();
    within(Duration::from_secs(20), "failure", || {
        matches!(pager.take_failure(), Some(PagerError::Touched(1)))
    });
}

#[test]
fn a_damaged_chunk_is_never_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let file = File::options().write(true).open(path.join("memory")).unwrap();
    file.write_all_at(b"!", 7 * CHUNK as u64 + 100_000).unwrap();
    let Restored { ram, pager } = restore(&path, false, STALL_LIMIT);
    assert_eq!(read_page(&ram, 64 * 6), [byte(64 * 6); PAGE]);
    // It waits to the end of the process: what it wants must not be there.
    let touch = ram.clone();
    let reader = std::thread::spawn(move || read_page(&touch, 64 * 7));
    let mut failure = None;
    within(Duration::from_secs(20), "failure", || {
        failure = pager.take_failure();
        failure.is_some()
    });
    let line = cellblock::remedy::chain(&failure.unwrap());
    assert!(line.contains("memory chunk 7 is damaged"), "{line}");
    drop(pager);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!reader.is_finished());
}

/// Two restores of one snapshot: the second brings first what the first one needed first.
#[test]
fn the_order_of_first_touch_is_kept_for_the_next_restore() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    // One that never runs has nothing to say.
    drop(restore(&path, false, STALL_LIMIT));
    assert_eq!(std::fs::read(path.join("touch")).unwrap(), b"");
    let first = restore(&path, false, STALL_LIMIT);
    first.pager.guest_runs();
    for chunk in [120, 3, 60] {
        read_page(&first.ram, chunk * 64);
    }
    drop(first);
    assert!(path.join("touch").exists());
    Chain::open(&path).unwrap().verify_all(|_, _| {}).unwrap();

    let second = restore(&path, true, STALL_LIMIT);
    within(Duration::from_secs(20), "prefetch", || second.pager.presence().has(60));
    assert!(second.pager.presence().has(120) && second.pager.presence().has(3));
    within(Duration::from_secs(20), "complete", || second.pager.is_complete());
    assert!(second.pager.take_failure().is_none());
}

/// A device process may say anything, and send any descriptor: it concerns itself only.
#[test]
fn hostile_registrations_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let Restored { ram, pager } = restore(&snapshot(dir.path()), false, STALL_LIMIT);
    let send = |windows: Vec<FaultWindow>, fd: Option<OwnedFd>| {
        let channel = Channel::from_fd(pager.inviter().unwrap().invite().unwrap().channel);
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        let _ = channel.send(&Registered { windows }, &fds);
        channel
    };
    let huge = FaultWindow { start: u64::MAX - 5, len: u64::MAX, offset: u64::MAX - 9 };
    let uffd = || {
        let device = pager.inviter().unwrap().invite().unwrap().device;
        Uffd::new(device.as_fd()).unwrap().as_fd().try_clone_to_owned().unwrap()
    };
    let (pipe, _writer) = std::io::pipe().unwrap();
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    let kept = [
        send(vec![huge], Some(uffd())),
        send(vec![huge; 200], Some(uffd())),
        send(vec![huge], Some(pipe.into())),
        send(vec![huge], Some(event.into())),
        send(vec![huge], Some(File::open("/dev/zero").unwrap().into())),
        send(vec![], None),
    ];
    assert_eq!(read_page(&ram, 0), [byte(0); PAGE]);
    pager.prefetch();
    within(Duration::from_secs(20), "complete", || pager.is_complete());
    assert!(pager.take_failure().is_none());
    drop(kept);
}

/// The thread is stopped by a debugger, as it would be by a file that never answers.
#[test]
fn a_pager_that_stands_still_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    // Nobody may trace a thread of its own process: a child has the pager.
    match std::env::var_os("LAZY_MEMORY_CHILD") {
        None => {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "a_pager_that_stands_still_is_noticed", "--nocapture"])
                .env("LAZY_MEMORY_CHILD", "1")
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            let pid = child.id();
            let mut thread = None;
            within(Duration::from_secs(20), "the pager's thread", || {
                thread = thread_named(pid, "pager");
                thread.is_some()
            });
            let thread = nix::unistd::Pid::from_raw(thread.unwrap());
            nix::sys::ptrace::seize(thread, nix::sys::ptrace::Options::empty()).unwrap();
            nix::sys::ptrace::interrupt(thread).unwrap();
            let flags = nix::sys::wait::WaitPidFlag::__WALL;
            nix::sys::wait::waitpid(thread, Some(flags)).unwrap();
            // The process cannot end before its tracer has seen the thread's end.
            within(Duration::from_secs(20), "the child's end", || {
                use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
                let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
                matches!(
                    waitpid(thread, Some(flags)),
                    Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..))
                )
            });
            assert!(child.wait().unwrap().success());
        }
        Some(_) => {
            let Restored { ram, pager } = restore(&path, false, Duration::from_millis(400));
            // Before that it sleeps, and nobody looks after it.
            pager.guest_runs();
            within(Duration::from_secs(30), "failure", || {
                matches!(pager.take_failure(), Some(PagerError::Stalled(_)))
            });
            drop(ram);
            std::process::exit(0);
        }
    }
}

fn thread_named(pid: u32, name: &str) -> Option<i32> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        let task = task.ok()?;
        let comm = std::fs::read_to_string(task.path().join("comm")).ok()?;
        if comm.trim() == name {
            return task.file_name().to_str()?.parse().ok();
        }
    }
    None
}
