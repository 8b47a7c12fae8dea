//! A snapshot that comes to grief, at each step of its saving: what is there afterwards is
//! a whole snapshot or none, and the VM runs on.
#![allow(clippy::unwrap_used)] // a test fails by panicking
#![allow(unsafe_code)] // a traced process asks to be traced before it becomes the program

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cellblock::control::protocol::State;
use common::{LIMIT, Vm};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What happens at a step.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The process is killed before it.
    Kill,
    /// It does not succeed.
    Fail(Errno),
}

/// The system calls by which a snapshot comes to be on disk.
fn is_step(call: &libc::user_regs_struct) -> bool {
    let number = call.orig_rax as i64;
    let creates = |flags: u64| flags & libc::O_CREAT as u64 != 0;
    match number {
        libc::SYS_openat => creates(call.rdx),
        // Not what is said on standard output and error, nor to the VM.
        libc::SYS_pwrite64 | libc::SYS_ftruncate | libc::SYS_fallocate => true,
        libc::SYS_mkdirat | libc::SYS_mkdir | libc::SYS_copy_file_range => true,
        libc::SYS_fsync | libc::SYS_fdatasync | libc::SYS_sync_file_range => true,
        libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => true,
        _ => false,
    }
}

/// Writes whole pages of guest memory: many alike, of which the first few are steps.
fn is_memory(call: &libc::user_regs_struct) -> bool {
    call.orig_rax as i64 == libc::SYS_pwrite64 && call.rdx > 0 && call.rdx.is_multiple_of(4096)
}

/// Runs a program under our eyes until its step number `at`, has that one go wrong, and
/// lets the program end. False if it had no such step; steps are counted over all threads.
fn run_with_fault(mut command: Command, at: usize, fault: Fault) -> (bool, ExitStatus, String) {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: one system call between fork and exec, which touches no memory.
    unsafe { command.pre_exec(|| ptrace::traceme().map_err(Into::into)) };
    let mut child = command.spawn().unwrap();
    let pid = Pid::from_raw(child.id() as i32);
    assert!(matches!(waitpid(pid, None), Ok(WaitStatus::Stopped(_, Signal::SIGTRAP))));
    let options = ptrace::Options::PTRACE_O_TRACESYSGOOD
        | ptrace::Options::PTRACE_O_TRACECLONE
        | ptrace::Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(pid, options).unwrap();
    ptrace::syscall(pid, None).unwrap();
    let (happened, status) = trace(&mut child, at, fault);
    let mut said = String::new();
    use std::io::Read;
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (happened, status, said)
}

/// What a thread is doing.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Outside,
    /// In a system call, which is to have failed with this when it returns.
    Inside(Option<Errno>),
}

fn trace(child: &mut Child, at: usize, fault: Fault) -> (bool, ExitStatus) {
    let main = Pid::from_raw(child.id() as i32);
    let mut threads = BTreeMap::from([(main, Place::Outside)]);
    let (mut steps, mut memory, mut happened) = (0, 0, false);
    let end = Instant::now() + LIMIT;
    loop {
        let mut idle = true;
        for thread in threads.keys().copied().collect::<Vec<_>>() {
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
            let status = match waitpid(thread, Some(flags)) {
                Ok(WaitStatus::StillAlive) => continue,
                Ok(status) => status,
                Err(_) => {
                    threads.remove(&thread);
                    continue;
                }
            };
            idle = false;
            let mut signal = None;
            match status {
                WaitStatus::Exited(pid, code) if pid == main => {
                    return (happened, ExitStatus::from_raw(code << 8));
                }
                WaitStatus::Signaled(pid, signal, _) if pid == main => {
                    return (happened, ExitStatus::from_raw(signal as i32));
                }
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    threads.remove(&thread);
                    continue;
                }
                WaitStatus::PtraceEvent(..) => {
                    if let Ok(new) = ptrace::getevent(thread) {
                        threads.insert(Pid::from_raw(new as i32), Place::Outside);
                    }
                }
                WaitStatus::PtraceSyscall(_) => {
                    let Ok(mut call) = ptrace::getregs(thread) else { continue };
                    let place = threads.get_mut(&thread).unwrap();
                    match *place {
                        Place::Outside => {
                            let mut wrong = None;
                            memory += usize::from(is_memory(&call));
                            if is_step(&call) && !(is_memory(&call) && memory > 4) {
                                if steps == at {
                                    happened = true;
                                    match fault {
                                        Fault::Kill => {
                                            let _ = nix::sys::signal::kill(main, Signal::SIGKILL);
                                            continue;
                                        }
                                        Fault::Fail(errno) => {
                                            // No such call: the kernel does nothing.
                                            call.orig_rax = u64::MAX;
                                            ptrace::setregs(thread, call).unwrap();
                                            wrong = Some(errno);
                                        }
                                    }
                                }
                                steps += 1;
                            }
                            *place = Place::Inside(wrong);
                        }
                        Place::Inside(wrong) => {
                            if let Some(errno) = wrong {
                                call.rax = -(errno as i64) as u64;
                                ptrace::setregs(thread, call).unwrap();
                            }
                            *place = Place::Outside;
                        }
                    }
                }
                // A thread's first stop is ours; every other signal is its own.
                WaitStatus::Stopped(_, Signal::SIGSTOP) => {}
                WaitStatus::Stopped(_, other) => signal = Some(other),
                _ => {}
            }
            let _ = ptrace::syscall(thread, signal);
        }
        assert!(Instant::now() < end, "the traced program does not end");
        if idle {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

fn snapshot(vm: &Vm, to: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    command.arg("snapshot").arg(vm.path("control")).arg(to);
    command
}

fn verifies(snapshot: &Path) -> bool {
    let verify = Command::new(env!("CARGO_BIN_EXE_cellblock")).arg("verify").arg(snapshot).output();
    verify.unwrap().status.success()
}

/// The guest makes progress, and its counters are right: it looks by itself.
#[track_caller]
fn runs_on(vm: &mut Vm) {
    assert_eq!(vm.stats().state, State::Running);
    vm.wait_for_line("pause: n=");
}

/// Every step of the command that writes the snapshot fails once, and is its last once.
#[test]
fn a_save_that_fails_or_dies_at_any_step_leaves_a_whole_snapshot_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::with("mode=pause every=20").memory("32M").disk(2).start();
    vm.wait_for_line("pause: n=40 ");
    for fault in [Fault::Fail(Errno::ENOSPC), Fault::Kill] {
        let (mut done, mut step) = (false, 0);
        while !done {
            let place = dir.path().join("snap");
            let (happened, status, said) = run_with_fault(snapshot(&vm, &place), step, fault);
            let what = format!("{fault:?} at step {step}: {status} {said}");
            if place.exists() {
                // The rename is done: all of it is there.
                assert!(verifies(&place), "{what}: it is not whole");
            } else {
                assert!(
                    happened && !status.success(),
                    "{what}: nothing went wrong, nothing is there"
                );
            }
            if let (Fault::Fail(_), true) = (fault, happened && !status.success()) {
                assert_eq!(said.lines().count(), 1, "{what}");
                assert!(said.contains("No space left"), "{what}");
                let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
                assert!(left.is_empty(), "{what}: {left:?} is left behind");
            }
            // What a killed process left is not a snapshot, and in nobody's way.
            for entry in fs::read_dir(dir.path()).unwrap() {
                fs::remove_dir_all(entry.unwrap().path()).unwrap();
            }
            done = !happened;
            step += 1;
        }
        assert!(step > 8, "there were {step} steps only");
        runs_on(&mut vm);
    }
    let place = dir.path().join("snap");
    assert!(snapshot(&vm, &place).status().unwrap().success());
    assert!(verifies(&place));
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}
