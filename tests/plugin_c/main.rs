//! C plugins under the real program: each of `tests/plugins/*.c` is compiled with the library
//! and run, jailed and plain.
#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod orphans;
#[path = "../common/proc.rs"]
#[allow(dead_code)] // shared by several test programs
mod proc;
mod run;

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgid};
use run::Plugin;

/// Runs a plugin that checks what it does itself, in both ways.
#[track_caller]
fn both(name: &str, cpus: u32, arguments: &[&str]) {
    for sandbox in [true, false] {
        let plugin = Plugin::new(name).cpus(cpus).arguments(arguments).sandbox(sandbox);
        let end = plugin.start().finish();
        assert_eq!(end.status.code(), Some(0), "sandbox {sandbox}: {}", end.stderr);
    }
}

/// Polls until `done`; `None` if that does not come within `limit`.
fn poll<T>(limit: Duration, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = done() {
            return Some(found);
        }
        if Instant::now() > end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for what comes in its time.
#[track_caller]
fn until(what: &str, mut there: impl FnMut() -> bool) {
    let came = poll(run::PATIENCE, || there().then_some(()));
    assert!(came.is_some(), "waited too long for {what}");
}

#[test]
fn errors() {
    both("errors", 1, &[]);
}

#[test]
fn memory() {
    both("memory", 1, &[]);
}

#[test]
fn accesses() {
    both("io", 1, &[]);
}

#[test]
fn io_events() {
    both("ioevent", 1, &[]);
}

#[test]
fn interrupts() {
    both("irq", 1, &[]);
}

#[test]
fn chips_and_clock() {
    both("chips", 1, &[]);
}

#[test]
fn state() {
    both("state", 1, &[]);
}

#[test]
fn cpuid() {
    both("cpuid", 1, &[]);
}

#[test]
fn pause() {
    both("pause", 1, &[]);
}

#[test]
fn connections() {
    both("connections", 1, &[]);
}

#[test]
fn several_vcpus() {
    both("smp", 3, &["3"]);
    both("smp", 64, &["64"]);
}

/// Registers are read and set while the VMM cannot do anything.
#[test]
fn hints() {
    for sandbox in [true, false] {
        let mut vm = Plugin::new("hints").sandbox(sandbox).start();
        let vmm = Pid::from_raw(vm.pid());
        for _ in 0..2 {
            vm.expect("stop");
            kill(vmm, Signal::SIGSTOP).unwrap();
            vm.wait_state('T');
            vm.say("stopped");
            vm.expect("go");
            kill(vmm, Signal::SIGCONT).unwrap();
            vm.say("gone");
        }
        let end = vm.finish();
        assert_eq!(end.status.code(), Some(0), "sandbox {sandbox}: {}", end.stderr);
    }
}

fn life(arguments: &[&str]) -> Plugin {
    Plugin::new("life").arguments(arguments)
}

#[test]
fn how_a_plugin_ends_is_how_the_vm_ended() {
    for (arguments, status, part) in [
        (&["before"][..], 0, ""),
        (&["status", "0"], 0, ""),
        (&["status", "3"], 1, "plugin-life ended: exit status 3"),
        // Process 1 of its namespace dies of abort() by what abort() does last.
        (&["abort"], 1, "plugin-life ended: signal "),
        (&["segv"], 1, "plugin-life ended: signal 11 (SIGSEGV)"),
        (&["fault"], 0, ""),
        (&["fault-bad"], 1, "plugin-life ended: exit status 3"),
    ] {
        for sandbox in [true, false] {
            let end = life(arguments).sandbox(sandbox).start().finish();
            assert_eq!(end.status.code(), Some(status), "{arguments:?}: {}", end.stderr);
            assert!(end.stderr.contains(part), "{arguments:?}: {}", end.stderr);
        }
    }
}

#[test]
fn a_plugin_that_does_not_exit_is_killed_after_its_grace() {
    let begin = Instant::now();
    let end = life(&["fault-hang"]).start().finish();
    assert_eq!(end.status.code(), Some(1));
    assert!(end.stderr.contains("plugin did not exit within timeout"), "{}", end.stderr);
    assert!(begin.elapsed() > Duration::from_millis(1000));
}

/// Whom it was started beside, in the same process group, lives on when a plugin is killed.
#[test]
fn the_end_is_nobody_elses() {
    for sandbox in [true, false] {
        let mut beside = Command::new("sleep").arg("60").spawn().unwrap();
        let mut vm = life(&["hang"]).sandbox(sandbox).start();
        vm.expect("up");
        let group = |pid: u32| getpgid(Some(Pid::from_raw(pid as i32))).unwrap();
        assert_eq!(group(beside.id()), group(vm.pid() as u32));
        vm.control("stop");
        assert!(vm.finish().stderr.contains("plugin did not exit within timeout"));
        assert_eq!(beside.try_wait().unwrap(), None, "sandbox {sandbox}");
        beside.kill().unwrap();
        beside.wait().unwrap();
    }
}

#[test]
fn standard_error_is_logged_by_line() {
    let end = life(&["stderr"]).start().finish();
    let lines: Vec<_> = end.stderr.lines().collect();
    assert_eq!(lines.len(), 3, "{}", end.stderr);
    for (line, text) in lines.iter().zip(["first line", "\\u{1b}[31mred\\u{7}", "no end"]) {
        assert!(line.contains(text) && line.contains("role=\"plugin\""), "{line}");
    }
    let end = life(&["flood"]).start().finish();
    assert_eq!(end.status.code(), Some(0));
    let count = end.stderr.lines().count();
    assert!((20..1000).contains(&count), "{count} lines");
    assert!(end.stderr.contains("lines were left out"), "{}", end.stderr);
}

/// A VM whose plugin hangs, with a vCPU that waits for it, is stopped all the same; so is one
/// whose plugin is stopped.
#[test]
fn stop_works_whatever_the_plugin_does() {
    for sandbox in [true, false] {
        let mut vm = life(&["hang"]).sandbox(sandbox).start();
        vm.expect("up");
        let begin = Instant::now();
        vm.control("stop");
        let end = vm.finish();
        assert_eq!(end.status.code(), Some(0), "{}", end.stderr);
        assert!(begin.elapsed() < Duration::from_secs(5));
        assert!(end.stderr.contains("plugin did not exit within timeout"), "{}", end.stderr);
    }
    let mut vm = life(&["serve"]).start();
    vm.expect("up");
    let ps = vm.control("ps");
    let line = ps.lines().find(|line| line.starts_with("plugin")).unwrap();
    let pid = line.split_whitespace().nth(2).unwrap().parse().unwrap();
    assert!(line.contains("filter") && line.contains("none"), "{line}");
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    // Stopped is not dead: the VM lives.
    std::thread::sleep(Duration::from_millis(300));
    assert!(vm.control("stats").contains("running"));
    kill(Pid::from_raw(pid), Signal::SIGCONT).unwrap();
    vm.control("stop");
    let end = vm.finish();
    assert_eq!((end.status.code(), end.stderr.as_str()), (Some(0), ""));
}

#[test]
fn pause_and_resume_from_outside() {
    let mut vm = life(&["serve"]).start();
    vm.expect("up");
    vm.control("pause");
    assert!(vm.control("stats").contains("paused"));
    vm.control("resume");
    vm.control("stop");
    assert_eq!(vm.finish().status.code(), Some(0));
}

#[test]
fn an_ordinary_users_plugin_is_jailed_too() {
    let end = Plugin::new("io").user().start().finish();
    assert_eq!(end.status.code(), Some(0), "{}", end.stderr);
}

/// What a policy leaves out ends the plugin, and is named as that.
#[test]
fn policies_of_ones_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plugin.policy");
    let with = |text: &str, more: &[&str]| {
        std::fs::write(&path, text).unwrap();
        let plugin = Plugin::new("chips").option("--seccomp-policy-dir");
        let mut plugin = plugin.option(dir.path().to_str().unwrap());
        for option in more {
            plugin = plugin.option(option);
        }
        plugin.start().finish()
    };
    let end = with("read: 1\n", &[]);
    assert_eq!(end.status.code(), Some(1));
    let call = "was ended: system call fcntl (72) is not in its seccomp policy";
    assert!(end.stderr.contains(call), "{}", end.stderr);
    assert!(end.stderr.contains("--seccomp log"), "{}", end.stderr);
    let end = with("read: 1\n", &["--seccomp", "log"]);
    assert_eq!(end.status.code(), Some(0), "{}", end.stderr);
    for call in ["sendmsg (46)", "recvmsg (47)", "memfd_create (319)"] {
        let line = format!("system call {call} is not in its seccomp policy");
        assert!(end.stderr.contains(&line), "{}", end.stderr);
    }
    let needed = "{sendmsg, recvmsg, memfd_create, ftruncate, fcntl, poll, ppoll, lseek}: 1\n\
                  {clock_nanosleep, clock_gettime, sched_yield, sigaltstack, madvise}: 1\n\
                  mmap: arg2 in ~PROT_EXEC\n";
    let end = with(needed, &[]);
    assert_eq!(end.status.code(), Some(0), "{}", end.stderr);
    let end = with("read: 1\nfoo: 1\n", &[]);
    assert_eq!(end.status.code(), Some(1));
    assert!(end.stderr.contains("plugin.policy, line 2: no system call `foo`"), "{}", end.stderr);
}

/// A policy as it was written when the C library made other calls: it has clone and nanosleep, and
/// neither clone3 nor clock_nanosleep.
#[test]
fn a_policy_of_another_time_still_has_threads_that_sleep() {
    let dir = tempfile::tempdir().unwrap();
    let policy = "# one thread a vCPU\n\
                  clone: arg0 & CLONE_THREAD\n\
                  nanosleep: 1\n\
                  {recvmsg, sendmsg, poll, memfd_create, ftruncate, fcntl, lseek}: 1\n\
                  {madvise, sigaltstack, sched_yield, clock_gettime}: 1\n\
                  mmap: arg2 in ~PROT_EXEC || arg2 in ~PROT_WRITE\n\
                  mprotect: arg2 in ~PROT_EXEC\n";
    std::fs::write(dir.path().join("plugin.policy"), policy).unwrap();
    let plugin = Plugin::new("smp").cpus(3).arguments(&["3"]).option("--seccomp-policy-dir");
    let end = plugin.option(dir.path().to_str().unwrap()).start().finish();
    assert_eq!(end.status.code(), Some(0), "{}", end.stderr);
}

#[test]
fn what_cannot_be_is_said() {
    let usage = |options: &[&str]| run::usage(options);
    for (options, part) in [
        (&["-p", "x"][..], "-p concerns a plugin, and there is none; say --plugin PATH"),
        (&["--plugin-mount", "/x"], "--plugin-mount concerns a plugin"),
        (&["--plugin", "p", "--disk", "d"], "--disk is for a VM with a kernel"),
        (&["--plugin", "p", "--serial", "null"], "--serial is for a VM with a kernel"),
        (&["--plugin", "p", "--host-ip", "10.0.0.1"], "give all three"),
        (&["--plugin", "p", "--tap-fd", "1"], "--tap-fd 1: 0, 1 and 2"),
        (&["--plugin", "p", "--plugin-mount", "/a:b"], "no place in the plugin's root"),
        (&["--plugin", "p", "--plugin-gid-map", "5:6:0"], "the range is empty"),
        (&["--plugin", "p", "--plugin-gid-map", "5::2", "--plugin-gid-map", "6"], "overlap"),
        (&["--plugin", "p", "-c", "65"], "with nothing but a plugin up to 64"),
        (&["--kernel", "k", "-c", "33"], "has 1 to 32 CPUs"),
        (
            &[
                "--plugin",
                "p",
                "--tap-name",
                "t",
                "--host-ip",
                "10.0.0.1",
                "--netmask",
                "255.0.0.0",
                "--mac",
                "02:00:00:00:00:01",
            ],
            "say one or the other",
        ),
    ] {
        let (status, line) = usage(options);
        assert_eq!(status, Some(2), "{line}");
        assert!(line.contains(part) && line.lines().count() == 1, "{line}");
    }
    for (options, part) in [
        (&["--plugin", "/nowhere"][..], "opening /nowhere"),
        (&["--plugin", "/bin/sh", "--plugin-root", "/nowhere"], "is not a folder; give a folder"),
        (
            &["--plugin", "/bin/sh", "--plugin-mount", "/nowhere"],
            "opening /nowhere for the plugin's",
        ),
        (&["--plugin", "/bin/sh", "--plugin-mount-file", "/nowhere"], "reading /nowhere"),
        (
            &["--plugin", "/bin/sh", "--seccomp-policy-dir", "/nowhere"],
            "a folder with a file plugin.policy",
        ),
        (&["--plugin", "/usr/bin/ldd"], "it is a script"),
    ] {
        let (status, line) = usage(options);
        assert_eq!(status, Some(1), "{line}");
        assert!(line.contains(part) && line.lines().count() == 1, "{line}");
    }
}

/// The console of `plugin-api/examples`, as its documentation has it run.
#[test]
fn the_uart_example() {
    let source = std::fs::read_to_string("plugin-api/examples/uart.c").unwrap();
    assert!(source.lines().count() < 200);
    let mut vm = Plugin::example("uart").start();
    vm.expect("A serial console by a plugin. Type; ctrl-d ends.");
    vm.type_in(b"hello\r");
    vm.expect("hello");
    vm.type_in(b"\x04");
    let end = vm.finish();
    assert_eq!((end.status.code(), end.stderr.as_str()), (Some(0), ""));
}

/// `mov si, 0x1026`; `mov cx, 10`; `mov dx, 0x3f8`; `cld`; `rep outsb`; `in al, 0x64`; `add al, '0'`;
/// `out dx, al`; `mov si, 0x1026`; `mov cx, 2`; `rep outsb`; `mov al, 0xfe`; `out 0x64, al`; `hlt`;
/// and at 0x26 the text.
const STRINGS: &[u8] = b"\xbe\x26\x10\xb9\x0a\x00\xba\xf8\x03\xfc\xf3\x6e\xe4\x64\x04\x30\xee\
    \xbe\x26\x10\xb9\x02\x00\xf3\x6e\xb0\xfe\xe6\x64\xf4\x90\x90\x90\x90\x90\x90\x90\x90string 10\n";

/// What a string instruction writes is one event, and goes to one register.
#[test]
fn the_uart_example_takes_strings() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, STRINGS).unwrap();
    let image = image.to_str().unwrap();
    let plugin = Plugin::example("uart").arguments(&[image]).option("--plugin-mount");
    let mut vm = plugin.option(image).start();
    vm.expect("string 10");
    vm.expect("0st");
    let end = vm.finish();
    assert_eq!((end.status.code(), end.stderr.as_str()), (Some(0), ""));
}
