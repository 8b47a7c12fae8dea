//! What the filters refuse, and how it is reported.

use std::io::Read;

use cellblock_seccomp::filter::{self, Mode, Policy};
use cellblock_seccomp::spawner::ExitStatus;
use cellblock_seccomp::violation;
use cellblock_wire::{Access, Mapping};
use nix::sys::wait::waitpid;

use crate::Test;
use crate::cell::Ask;
use crate::host::{Cell, code, exit_of, hello, spawner, start_process};

pub const TESTS: &[Test] = &[
    ("a refused call ends the cell and is named", refused_calls_are_named),
    ("the report names the thread", the_thread_is_named),
    ("some calls get an errno instead", errno_answers),
    ("log mode lets through", log_mode),
    ("a cell lives under its filter", life),
    ("a cell starts no new threads", no_new_threads),
    ("a panic with backtrace gets out", panics),
    ("a fault ends the cell", faults),
    ("a 32-bit call is refused", call32),
    ("VMM threads have their own policies", vmm_threads),
];

const NEWUSER: u64 = 0x1000_0000;

fn refused_calls_are_named() {
    let mut spawner = spawner();
    for policy in ["blk", "serial"] {
        for (name, number, arguments) in [
            ("unshare", libc::SYS_unshare, [NEWUSER, 0, 0, 0, 0, 0]),
            ("setns", libc::SYS_setns, [0; 6]),
            // A fork, and a thread in a new user namespace.
            ("clone", libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]),
            ("clone", libc::SYS_clone, [NEWUSER | 0x10100, 0, 0, 0, 0, 0]),
            ("socket", libc::SYS_socket, [libc::AF_INET as u64, 1, 0, 0, 0, 0]),
            ("connect", libc::SYS_connect, [0; 6]),
            ("sendto", libc::SYS_sendto, [3, 0, 0, 0, 8, 16]),
            ("ptrace", libc::SYS_ptrace, [0; 6]),
            ("execve", libc::SYS_execve, [0; 6]),
            ("kill", libc::SYS_kill, [1, 9, 0, 0, 0, 0]),
            ("tgkill", libc::SYS_tgkill, [1, 1, 9, 0, 0, 0]),
            ("mmap", libc::SYS_mmap, [0, 4096, 7, 0x22, u64::MAX, 0]),
            // Shared anonymous memory, and a stack: beyond the limit on private memory.
            ("mmap", libc::SYS_mmap, [0, 4096, 3, 0x21, u64::MAX, 0]),
            ("mmap", libc::SYS_mmap, [0, 4096, 3, 0x23, u64::MAX, 0]),
            ("mmap", libc::SYS_mmap, [0, 4096, 3, 0x122, u64::MAX, 0]),
            ("mprotect", libc::SYS_mprotect, [0, 4096, 5, 0, 0, 0]),
            ("ioctl", libc::SYS_ioctl, [0, libc::TIOCSTI, 0, 0, 0, 0]),
            // Taking non-blocking mode away from what the VMM shares.
            ("fcntl", libc::SYS_fcntl, [0, libc::F_SETFL as u64, libc::O_RDWR as u64, 0, 0, 0]),
            ("ioctl", libc::SYS_ioctl, [0, libc::FIONBIO, 0, 0, 0, 0]),
            ("fcntl", libc::SYS_fcntl, [0, libc::F_SETOWN as u64, 0, 0, 0, 0]),
            ("prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0]),
            ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0, 0, 0, 0]),
            ("userfaultfd", libc::SYS_userfaultfd, [0; 6]),
            ("bpf", libc::SYS_bpf, [0; 6]),
            ("keyctl", libc::SYS_keyctl, [0; 6]),
            ("mount", libc::SYS_mount, [0; 6]),
            ("seccomp", libc::SYS_seccomp, [0; 6]),
        ] {
            let cell = Cell::start(&mut spawner, &hello(policy));
            let report = cell.violate(&mut spawner, &Ask::Call(number, arguments));
            let expected = format!("system call {name} ({number}) by thread ");
            assert!(report.starts_with(&expected), "{policy}: {report}");
        }
    }
}

fn the_thread_is_named() {
    let mut spawner = spawner();
    let cell = Cell::start(&mut spawner, &hello("blk"));
    let report = cell.violate(&mut spawner, &Ask::CallInThread(libc::SYS_getppid));
    // 1 is the process, 2 the thread from before the filter.
    assert_eq!(report, "system call getppid (110) by thread worker (2)");
}

fn errno_answers() {
    let mut spawner = spawner();
    let cell = Cell::start(&mut spawner, &hello("blk"));
    let path = c"/".as_ptr() as u64;
    for (number, arguments, errno) in [
        (libc::SYS_clone3, [0; 6], libc::ENOSYS),
        (libc::SYS_openat, [0, path, 0, 0, 0, 0], libc::EACCES),
        (libc::SYS_open, [path, 0, 0, 0, 0, 0], libc::EACCES),
        (libc::SYS_openat2, [0; 6], libc::EACCES),
        (libc::SYS_readlink, [0; 6], libc::EACCES),
        (libc::SYS_statx, [0; 6], libc::EACCES),
        (libc::SYS_newfstatat, [0; 6], libc::EACCES),
        (libc::SYS_rt_sigaction, [libc::SIGSYS as u64, 0, 0, 8, 0, 0], libc::EPERM),
        (libc::SYS_rt_sigaction, [libc::SIGTERM as u64, 0, 0, 8, 0, 0], libc::EPERM),
    ] {
        let got = cell.value(&Ask::Call(number, arguments));
        assert_eq!(got, -i64::from(errno), "call {number}");
    }
    // Only looking at SIGSEGV's handler, which may be put back.
    let segv = [libc::SIGSEGV as u64, 0, 0, 8, 0, 0];
    assert_eq!(cell.value(&Ask::Call(libc::SYS_rt_sigaction, segv)), 0);
    // fstat by its newer name fails for another reason than the filter.
    let empty = [3, c"".as_ptr() as u64, 0, libc::AT_EMPTY_PATH as u64, 0, 0];
    assert_eq!(cell.value(&Ask::Call(libc::SYS_newfstatat, empty)), -i64::from(libc::EFAULT));
    assert_eq!(cell.value(&Ask::Open("/".into())), -i64::from(libc::EACCES));
    assert_eq!(violation::read(&cell.page), None);
}

fn log_mode() {
    let mut spawner = spawner();
    let mut hello = hello("blk");
    hello.log = true;
    let cell = Cell::start(&mut spawner, &hello);
    assert_eq!(cell.value(&Ask::Call(libc::SYS_getppid, [0; 6])), 0);
    // Through the filter, refused by the rest of the jail.
    let mount = cell.value(&Ask::Call(libc::SYS_mount, [0; 6]));
    assert!(mount < 0, "{mount}");
    assert_eq!(violation::read(&cell.page), None);
    assert!(crate::host::alive(cell.pid));
}

fn life() {
    let mut spawner = spawner();
    for policy in ["blk", "serial"] {
        let cell = Cell::start(&mut spawner, &hello(policy));
        for _ in 0..20 {
            assert!(cell.value(&Ask::Thread) > 0);
        }
        drop(cell.channel);
        let status = exit_of(&mut spawner, cell.pid);
        assert_eq!(status, ExitStatus::Code(0), "{:?}", violation::read(&cell.page));
    }
}

/// glibc blocks signals while it starts a thread, so the refusal ends the process by
/// SIGSYS itself and leaves no report.
fn no_new_threads() {
    let mut spawner = spawner();
    for policy in ["blk", "serial"] {
        let cell = Cell::start(&mut spawner, &hello(policy));
        cell.channel.send(&Ask::NewThread, &[]).expect("ask");
        let status = exit_of(&mut spawner, cell.pid);
        assert_eq!(status, ExitStatus::Signal(libc::SIGSYS));
    }
}

fn panics() {
    let mut spawner = spawner();
    for policy in ["blk", "serial"] {
        let cell = Cell::start(&mut spawner, &hello(policy));
        cell.channel.send(&Ask::Panic, &[]).expect("send");
        let status = exit_of(&mut spawner, cell.pid);
        assert_eq!(status, ExitStatus::Code(101), "{:?}", violation::read(&cell.page));
    }
}

fn faults() {
    let mut spawner = spawner();
    let cell = Cell::start(&mut spawner, &hello("blk"));
    cell.channel.send(&Ask::Fault, &[]).expect("send");
    assert_eq!(exit_of(&mut spawner, cell.pid), ExitStatus::Signal(libc::SIGSEGV));
}

fn call32() {
    let mut spawner = spawner();
    let mut free = hello("blk");
    free.policy = None;
    let cell = Cell::start(&mut spawner, &free);
    cell.channel.send(&Ask::Call32, &[]).expect("send");
    if cell.channel.recv_timeout::<crate::cell::Answer>(crate::host::LIMIT).is_err() {
        // A kernel without the 32-bit entry: the instruction itself faults.
        exit_of(&mut spawner, cell.pid);
        print!("[no 32-bit calls here] ");
        return;
    }
    let cell = Cell::start(&mut spawner, &hello("blk"));
    let report = cell.violate(&mut spawner, &Ask::Call32);
    assert!(report.starts_with("system call of another architecture (20)"), "{report}");
}

/// One VMM thread of each kind in one process; the call is refused in one of them.
fn vmm_threads() {
    for (policy, name) in [
        (Policy::VmmMain, "main-loop"),
        (Policy::VmmVcpu, "vcpu0"),
        (Policy::VmmDevice, "vu-disk0"),
    ] {
        let (line, status) = vmm_violation(policy, name);
        assert_eq!(status, violation::EXIT_STATUS, "{line}");
        assert!(
            line.starts_with(&format!("cellblock: process cellblock, thread {name} ("))
                && line.contains("): system call socket (41) is not in its seccomp policy"),
            "{line:?}"
        );
    }
}

fn vmm_violation(policy: Policy, name: &'static str) -> (String, i32) {
    let (read, write) = nix::unistd::pipe().expect("pipe");
    let child = start_process(|| {
        nix::unistd::dup2_stderr(&write).expect("dup2");
        let page = violation::new_page().expect("page");
        let page = Mapping::new(page, violation::PAGE, Access::ReadWrite).expect("map");
        violation::install(page, "cellblock").expect("install");
        let free = std::thread::spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            // Not under the other thread's filter.
            std::os::unix::net::UnixDatagram::unbound().expect("socket");
        });
        free.join().expect("free thread");
        let (connection, _peer) = std::os::unix::net::UnixStream::pair().expect("pair");
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            filter::apply(policy, Mode::Kill).expect("filter");
            // Every kind may have to cut a silent device process off.
            connection.shutdown(std::net::Shutdown::Both).expect("shutdown");
            let block = vec![1u8; 1 << 20];
            assert_eq!(std::fs::File::open("/").expect_err("no").raw_os_error(), Some(13));
            drop(block);
            std::os::unix::net::UnixDatagram::unbound().expect("unreachable");
        });
        let _ = thread.expect("thread").join();
    });
    drop(write);
    let mut line = String::new();
    std::fs::File::from(read).read_to_string(&mut line).expect("read");
    (line, code(waitpid(child, None).expect("wait")))
}
