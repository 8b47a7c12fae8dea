//! Text policies against the kernel: each row is a policy, installed in a process of its
//! own, and a system call made there.
#![allow(unsafe_code, clippy::expect_used)] // fork, raw system calls; tests

use std::path::Path;

use cellblock_seccomp::minijail::{Filter, Policy, Violation};

/// Allowed, it always fails with ENOSYS, whatever its arguments.
const CALL: i64 = 183; // afs_syscall
const ALLOWED: Outcome = Outcome::Errno(libc::ENOSYS);
const KILLED: Outcome = Outcome::Signal(libc::SIGSYS);

#[derive(Debug, PartialEq)]
enum Outcome {
    Errno(i32),
    Signal(i32),
}

/// Makes a call under `filter` in a new process.
fn call(filter: &Filter, number: i64, args: [u64; 6]) -> Outcome {
    // SAFETY: the child makes system calls only, and ends.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // No core files of what is meant to be killed.
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the calls take numbers, and one struct that lives.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
            if filter.apply().is_err() {
                libc::_exit(255);
            }
            let [a, b, c, d, e, f] = args;
            let result = libc::syscall(number, a, b, c, d, e, f);
            libc::_exit(if result < 0 { *libc::__errno_location() } else { 0 });
        }
    }
    let mut status = 0;
    // SAFETY: `status` lives; the child is ours.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFSIGNALED(status) {
        Outcome::Signal(libc::WTERMSIG(status))
    } else {
        Outcome::Errno(libc::WEXITSTATUS(status))
    }
}

fn filter(text: &str, violation: Violation) -> Filter {
    let policy = Policy::parse("test", &format!("exit_group: 1\n{text}")).expect(text);
    Filter::new(&policy.compile(violation).expect("compiles"))
}

#[test]
fn tests_of_arguments() {
    const HIGH: u64 = 1 << 32;
    // Test, values for which it holds, values for which it does not.
    let table: &[(&str, &[u64], &[u64])] = &[
        ("arg0 == 3", &[3], &[0, 2, 4, HIGH + 3]),
        ("arg0 != 3", &[0, HIGH + 3, HIGH], &[3]),
        (
            "arg0 < 0x100000002",
            &[0, u32::MAX.into(), HIGH, HIGH + 1],
            &[HIGH + 2, 2 * HIGH, u64::MAX],
        ),
        ("arg0 <= 0x100000002", &[0, HIGH + 2], &[HIGH + 3, 2 * HIGH]),
        ("arg0 > 0x100000002", &[HIGH + 3, 2 * HIGH, u64::MAX], &[0, 9, HIGH, HIGH + 2]),
        ("arg0 >= 0x100000002", &[HIGH + 2, 2 * HIGH], &[0, 9, HIGH + 1]),
        ("arg0 & 0x100000005", &[1, 4, 7, HIGH, HIGH + 2], &[0, 2, 8, 2 * HIGH]),
        ("arg0 in 0x100000005", &[0, 1, 4, 5, HIGH + 5], &[2, 7, 2 * HIGH, HIGH + 2]),
        ("arg0 in ~PROT_EXEC", &[0, 3, u64::MAX - 4], &[4, 7, u64::MAX]),
        ("arg0 == -1", &[u64::MAX], &[u32::MAX as u64, 1]),
        ("arg0 == 1 || arg0 == 5 || arg0 >= 10 && arg0 < 12", &[1, 5, 10, 11], &[0, 2, 9, 12]),
        ("arg0 > 1 && arg0 != 3 && arg0 in 0xff", &[2, 4, 255], &[0, 1, 3, 256]),
    ];
    for (test, holds, fails) in table {
        let strict = filter(&format!("afs_syscall: {test}"), Violation::Kill);
        let errno = filter(&format!("afs_syscall: {test}; return 99"), Violation::Kill);
        for value in *holds {
            assert_eq!(call(&errno, CALL, [*value, 0, 0, 0, 0, 0]), ALLOWED, "{test}: {value:#x}");
        }
        for value in *fails {
            let args = [*value, 0, 0, 0, 0, 0];
            assert_eq!(call(&errno, CALL, args), Outcome::Errno(99), "{test}: {value:#x}");
        }
        assert_eq!(call(&strict, CALL, [fails[0], 0, 0, 0, 0, 0]), KILLED, "{test}");
    }
}

#[test]
fn every_argument_is_itself() {
    for n in 0..6 {
        let filter = filter(&format!("afs_syscall: arg{n} == 7; return 99"), Violation::Kill);
        let mut args = [1; 6];
        assert_eq!(call(&filter, CALL, args), Outcome::Errno(99));
        args[n] = 7;
        assert_eq!(call(&filter, CALL, args), ALLOWED);
    }
}

#[test]
fn actions() {
    let with = |text: &str, violation| call(&filter(text, violation), CALL, [0; 6]);
    for (text, kill, log) in [
        ("read: 1", KILLED, ALLOWED),
        ("afs_syscall: 1", ALLOWED, ALLOWED),
        ("{read, afs_syscall}: allow", ALLOWED, ALLOWED),
        ("afs_syscall: return EPERM", Outcome::Errno(1), Outcome::Errno(1)),
        ("afs_syscall: return 0", Outcome::Errno(0), Outcome::Errno(0)),
        ("afs_syscall: kill", KILLED, ALLOWED),
        ("afs_syscall: kill-thread", KILLED, ALLOWED),
        ("afs_syscall: trap", KILLED, ALLOWED),
        ("afs_syscall: log", ALLOWED, ALLOWED),
        ("afs_syscall: arg0 == 1; trap", KILLED, ALLOWED),
        ("@default return EBADF", Outcome::Errno(9), Outcome::Errno(9)),
        ("@default log", ALLOWED, ALLOWED),
        ("@default return EBADF\nafs_syscall: arg0 == 1", Outcome::Errno(9), Outcome::Errno(9)),
        ("@default return EBADF\nafs_syscall: kill", KILLED, ALLOWED),
    ] {
        assert_eq!(with(text, Violation::Kill), kill, "{text}");
        assert_eq!(with(text, Violation::Log), log, "{text}, violations pass");
    }
}

/// Calls of the other tables are refused whatever the policy says of those numbers.
#[test]
fn x32_calls_are_not_the_x86_64_ones() {
    let filter = filter("{afs_syscall, getppid}: 1", Violation::Kill);
    assert_eq!(call(&filter, CALL | 0x4000_0000, [0; 6]), KILLED);
}

#[test]
fn many_rules_are_searched_rightly() {
    // Each second call of a stretch of numbers, with as many tests as one may have.
    let names = ["timer_gettime", "timer_delete", "clock_gettime", "clock_nanosleep", "epoll_wait"];
    let tests = (1..=40).map(|n| format!("arg5 != {n}")).collect::<Vec<_>>().join(" && ");
    let text: Vec<_> = names.iter().map(|name| format!("{name}: {tests}; return 99")).collect();
    let filter = filter(&text.join("\n"), Violation::Kill);
    let numbers = [libc::SYS_timer_gettime, libc::SYS_clock_gettime, libc::SYS_epoll_wait];
    for number in numbers {
        assert_eq!(call(&filter, number, [0, 0, 0, 0, 0, 40]), Outcome::Errno(99), "{number}");
        assert_ne!(call(&filter, number, [9999, 0, 0, 0, 0, 41]), Outcome::Errno(99), "{number}");
    }
    assert_eq!(call(&filter, libc::SYS_timer_settime, [0; 6]), KILLED);
}

#[test]
fn our_own_policies_compile_and_hold() {
    let policy = Policy::for_plugins().expect("reads").and(&Policy::for_startup().expect("reads"));
    let filter = Filter::new(&policy.compile(Violation::Kill).expect("compiles"));
    let errno = |number, args| match call(&filter, number, args) {
        Outcome::Errno(errno) => errno,
        Outcome::Signal(signal) => -signal,
    };
    assert_eq!(errno(libc::SYS_socket, [2, 1, 0, 0, 0, 0]), libc::EACCES);
    assert_eq!(errno(libc::SYS_socketpair, [2, 1, 0, 0, 0, 0]), libc::EACCES);
    assert_eq!(errno(libc::SYS_unshare, [0; 6]), -libc::SIGSYS);
    assert_eq!(errno(libc::SYS_ptrace, [0; 6]), -libc::SIGSYS);
    assert_eq!(errno(libc::SYS_mount, [0; 6]), -libc::SIGSYS);
    assert_eq!(errno(libc::SYS_execve, [0; 6]), libc::EACCES);
    assert_eq!(errno(libc::SYS_clone3, [0; 6]), libc::ENOSYS);
    assert_eq!(errno(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]), libc::EPERM);
    assert_eq!(errno(libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0]), libc::EPERM); // TIOCSTI
    // Memory that is both code and writable.
    assert_eq!(errno(libc::SYS_mmap, [0, 4096, 7, 0x22, u64::MAX, 0]), -libc::SIGSYS);
    assert_eq!(errno(libc::SYS_mmap, [0, 4096, 5, 0x22, u64::MAX, 0]), -libc::SIGSYS);
    assert_eq!(errno(libc::SYS_mprotect, [0, 4096, 5, 0, 0, 0]), -libc::SIGSYS);
    assert_eq!(errno(libc::SYS_mmap, [0, 4096, 3, 0x22, u64::MAX, 0]), 0);
    assert_eq!(errno(libc::SYS_prlimit64, [0, 7, 8, 0, 0, 0]), libc::EPERM);
    assert_eq!(errno(libc::SYS_prlimit64, [0, 7, 0, 0, 0, 0]), 0);
    assert_eq!(errno(libc::SYS_getpid, [0; 6]), 0);
}

#[test]
fn a_policy_with_more_than_the_kernel_takes_is_refused() {
    let any = vec!["arg0 == 1 && arg1 == 2 && arg2 == 3"; 400].join(" || ");
    let policy = Policy::parse("big", &format!("read: {any}")).expect("reads");
    let error = policy.compile(Violation::Kill).expect_err("too long").to_string();
    assert!(error.contains("instructions are more than the kernel takes"), "{error}");
    assert!(Policy::read(Path::new("/nowhere")).is_err());
}
