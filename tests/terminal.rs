//! The console on a terminal: raw while the guest has it, itself again afterwards,
//! however the VM ends.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use cellblock::control::protocol::Request;
use common::{LIMIT, Vm, is_cooked, poll, proc, send};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::{
    LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr,
};

const CTRL_A: u8 = 1;
const CTRL_C: u8 = 3;
const CTRL_Z: u8 = 26;
const CTRL_BACKSLASH: u8 = 28;

/// A guest on a terminal that gives back what is typed, and the mode the terminal had.
fn echo() -> (Vm, Termios) {
    let pty = openpty(None, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    assert!(is_cooked(&pty.slave));
    let mut vm = Vm::with("mode=echo").disk(8).terminal_on(pty).start();
    vm.wait_for_error("ctrl-a x stops the VM");
    vm.wait_for("echo: ready");
    assert!(!is_cooked(vm.terminal()), "raw while the guest has it");
    (vm, before)
}

/// The terminal is as it was, in every flag.
#[track_caller]
fn restored(vm: &mut Vm, before: &Termios) {
    let now = tcgetattr(vm.terminal()).unwrap();
    let flags = |t: &Termios| (t.input_flags, t.output_flags, t.control_flags, t.local_flags);
    if flags(&now) != flags(before) || now.control_chars != before.control_chars {
        vm.fail(&format!("the terminal was left as {now:?}, not {before:?}"));
    }
}

#[test]
fn the_terminal_is_itself_again_when_the_guest_ends() {
    let (mut vm, before) = echo();
    vm.say(b"quit");
    vm.wait_for("echo: ok");
    assert_eq!(vm.wait_exit().code(), Some(0));
    restored(&mut vm, &before);
    vm.ends_well();
}

#[test]
fn the_terminal_is_itself_again_after_signals_and_stop() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let (mut vm, before) = echo();
        vm.signal(signal);
        assert_eq!(vm.wait_exit().code(), Some(0), "{signal}");
        restored(&mut vm, &before);
        vm.ends_well();
    }
    for paused in [false, true] {
        let (mut vm, before) = echo();
        if paused {
            vm.pause();
        }
        vm.ask(Request::Stop);
        assert_eq!(vm.wait_exit().code(), Some(0));
        restored(&mut vm, &before);
        vm.ends_well();
    }
}

#[test]
fn the_terminal_is_itself_again_when_the_vmm_is_killed() {
    // By the spawner, which outlives it for that.
    let (mut vm, before) = echo();
    let family = vm.processes();
    vm.signal(Signal::SIGKILL);
    assert_eq!(vm.wait_exit().signal(), Some(Signal::SIGKILL as i32));
    if let Err(left) = proc::wait_gone(&family, Duration::from_secs(1)) {
        vm.fail(&format!("left: {left:?}"));
    }
    restored(&mut vm, &before);
}

#[test]
fn the_terminal_is_itself_again_when_the_spawner_is_killed() {
    let (mut vm, before) = echo();
    let spawner = vm.pid_of("spawner", "");
    send(spawner, Signal::SIGKILL);
    assert_eq!(vm.wait_exit().code(), Some(1));
    restored(&mut vm, &before);
    vm.wait_for_error("the spawner died");
}

#[test]
fn the_terminal_is_itself_again_when_the_start_fails() {
    let mut vm = Vm::with("").arg("--initrd=none").terminal().start();
    let line = vm.wait_for_error("cellblock: error: ");
    assert_eq!(vm.wait_exit().code(), Some(1), "{line}");
    assert!(is_cooked(vm.terminal()));

    // After the terminal was made raw: this kernel is none.
    let mut vm = Vm::with("").image(&[0; 4096]).terminal().start();
    assert_eq!(vm.wait_exit().code(), Some(1));
    assert!(is_cooked(vm.terminal()));
    let said = vm.stderr.finished(LIMIT);
    assert!(said.contains("cellblock: error: ") && !said.contains("panicked"), "{said}");
}

#[test]
fn ctrl_a_x_quits() {
    for paused in [false, true] {
        let (mut vm, before) = echo();
        if paused {
            vm.pause();
        }
        vm.say(b"he");
        vm.say(&[CTRL_A, b'x']);
        assert_eq!(vm.wait_exit().code(), Some(0));
        restored(&mut vm, &before);
        assert!(!vm.stderr.finished(LIMIT).contains("panic"));
        vm.ends_well();
    }
}

#[test]
fn keys_that_signal_elsewhere_go_to_the_guest() {
    let (mut vm, before) = echo();
    for key in [CTRL_C, CTRL_Z, CTRL_BACKSLASH, b'\r', 127, 4] {
        vm.say(&[b'<', key, b'>']);
        let wanted = String::from_utf8(vec![b'<', key, b'>']).unwrap();
        vm.wait_for(&wanted);
    }
    // ctrl-a alone waits for the next key; twice, it is the guest's.
    vm.say(&[b'(', CTRL_A, CTRL_A, b')']);
    vm.wait_for("(\u{1})");
    assert!(vm.try_exit().is_none());
    vm.say(b"quit");
    vm.wait_for("echo: ok");
    vm.wait_exit();
    restored(&mut vm, &before);
    vm.ends_well();
}

#[test]
fn log_lines_are_whole_on_a_raw_terminal() {
    // Output is not translated in raw mode: a line needs a carriage return of its own.
    let (mut vm, _) = echo();
    let blk = vm.pid_of("blk", "disk0");
    send(blk, Signal::SIGKILL);
    vm.wait_for_error("device process died");
    let whole = poll(LIMIT, || vm.stderr.text().ends_with("\r\n").then_some(()));
    assert!(whole.is_some(), "{:?}", vm.stderr.text());
    for line in vm.stderr.text().split_inclusive('\n') {
        assert!(line.ends_with("\r\n"), "{line:?}");
    }
}

#[test]
fn a_mode_of_the_users_own_comes_back_too() {
    // No echo, as after `stty -echo intr ^G`.
    for kill in [false, true] {
        let pty = openpty(None, None).unwrap();
        let mut own = tcgetattr(&pty.slave).unwrap();
        own.local_flags.remove(LocalFlags::ECHO);
        own.control_chars[SpecialCharacterIndices::VINTR as usize] = 7;
        tcsetattr(&pty.slave, SetArg::TCSANOW, &own).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let mut vm = Vm::with("mode=echo").terminal_on(pty).start();
        vm.wait_for("echo: ready");
        let family = vm.processes();
        vm.signal(if kill { Signal::SIGKILL } else { Signal::SIGTERM });
        vm.wait_exit();
        assert_eq!(proc::wait_gone(&family, Duration::from_secs(1)), Ok(()));
        restored(&mut vm, &before);
    }
}
