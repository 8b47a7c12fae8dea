//! A block process that has died, and whose requests the kernel is still at work on.
#![allow(clippy::unwrap_used)] // a test fails by panicking
#![allow(unsafe_code)] // pidfd_getfd has no wrapper

mod common;

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use cellblock::control::protocol::{EventKind, Request};
use common::deaths::{kill_and_wait, replaced, restarts};
use common::{LIMIT, Vm, poll, send};
use nix::sys::signal::Signal;

/// The kernel may still be at work for a process that has ended, in the guest's memory: nothing
/// is answered meanwhile, not even with errors, and the wait is no death.
#[test]
fn nobody_takes_over_while_requests_of_the_dead_are_under_way() {
    let mut vm = Vm::with("mode=storm n=20000000 qd=8 mib=1 errors")
        .disk_with(1 << 20, ",engine=io_uring")
        .start();
    vm.wait_for("storm: begins");
    let events = vm.events();
    // A ring that is there is one with requests under way, to who waits for them.
    let held = rings(vm.pid_of("blk", "disk0"));
    assert!(!held.is_empty(), "the process has no ring");
    let done = |vm: &mut Vm| {
        let disk = &vm.stats().disks[0];
        let counters = &disk.counters;
        counters.reads_completed + counters.writes_completed + disk.errors
    };
    send(vm.pid_of("blk", "disk0"), Signal::SIGKILL);
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceDied { .. }));
    let before = done(&mut vm);
    std::thread::sleep(Duration::from_millis(300)); // what must not happen gives no notice
    assert_eq!((done(&mut vm), restarts(&mut vm, "disk0")), (before, 0));
    drop(held);
    replaced(&mut vm, &events, "disk0", 1);
    for _ in 0..3 {
        kill_and_wait(&mut vm, &events, "blk", "disk0");
    }
    let held = rings(vm.pid_of("blk", "disk0"));
    send(vm.pid_of("blk", "disk0"), Signal::SIGKILL);
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceFailed { .. }));
    let before = done(&mut vm);
    std::thread::sleep(Duration::from_millis(300)); // as above
    assert_eq!(done(&mut vm), before, "answers while the disk may still be reading");
    drop(held);
    assert!(poll(LIMIT, || (done(&mut vm) > before + 1000).then_some(())).is_some());
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// The io_uring rings of a process, so that they outlive it.
fn rings(pid: i32) -> Vec<OwnedFd> {
    // SAFETY: these calls take numbers only, and what they return is new and ours.
    let own = |fd: i64| unsafe {
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    };
    // SAFETY: as above.
    let process = own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) });
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let rings = fds.filter(|fd| {
        fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy() == "anon_inode:[io_uring]")
    });
    rings
        .map(|fd| {
            let number: i32 = fd.file_name().to_string_lossy().parse().unwrap();
            let call = libc::SYS_pidfd_getfd;
            // SAFETY: as above.
            own(unsafe { libc::syscall(call, process.as_raw_fd(), number, 0) })
        })
        .collect()
}
