//! Programs that attach to a bare-metal guest: at CPL 0, where the host can do breakpoints and
//! steps.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod attach_support;
mod common;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use attach_support::counting::{COUNTER, counter, counting, goes_on};
use attach_support::{CODE, attach, example, kernel};
use cellblock::control::protocol::Request;
use cellblock_plugin_api::{Event, GuestDebug, Hint, HintDetail, MemoryAccess, Rights, Space};
use common::Vm;
use nix::sys::signal::Signal;

/// Behind the store of the count.
const NOP: u64 = CODE + 0x12;

#[track_caller]
fn stands(memory: &File) {
    let before = counter(memory);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(counter(memory), before);
}

#[test]
fn a_program_attaches_stops_and_steps_the_guest_and_leaves() {
    let (mut vm, _dir) = counting(",memory=rw", 1);
    let attached = attach(&vm);
    assert_eq!(attached.rights(), Rights::Control);
    let (memory, access, regions) = attached.memory().unwrap();
    assert_eq!((access, regions[0].gpa, regions[0].len), (MemoryAccess::ReadWrite, 0, 64 << 20));
    let memory = File::from(memory);
    goes_on(&memory);
    let vcpu = attached.vcpu(0).unwrap();
    attached.pause_vcpus(1, 5).unwrap();
    assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 5 });
    stands(&memory);
    let mut regs = vcpu.regs().unwrap();
    assert!((CODE..CODE + 0x20).contains(&regs.rip), "{:#x}", regs.rip);
    assert_eq!(vcpu.translate(COUNTER + 5).unwrap(), Some(COUNTER + 5));
    // The VM can be paused, resumed, and asked about itself while the plugin holds the vCPU.
    vm.pause();
    vm.resume();
    regs.rax = 1 << 40;
    regs.rip = CODE + 7;
    vcpu.set_regs(&regs).unwrap();
    vcpu.set_guest_debug(&GuestDebug { single_step: true, ..GuestDebug::default() }).unwrap();
    for rip in [CODE + 10, CODE + 18, CODE + 19, CODE + 7] {
        vcpu.resume().unwrap();
        assert!(matches!(vcpu.wait().unwrap(), Event::Debug { pc, .. } if pc == rip));
        assert_eq!(vcpu.regs().unwrap().rip, rip);
    }
    assert_eq!(counter(&memory), (1 << 40) + 1);
    let breakpoints = [None, Some(NOP), None, None];
    vcpu.set_guest_debug(&GuestDebug { single_step: false, breakpoints }).unwrap();
    vcpu.resume().unwrap();
    assert!(matches!(vcpu.wait().unwrap(), Event::Debug { pc: NOP, .. }));
    assert_eq!(counter(&memory), (1 << 40) + 2);
    // It goes without a word, with the vCPU stopped and a breakpoint set.
    let (other, _, _) = attach(&vm).memory().unwrap();
    drop((vcpu, attached));
    goes_on(&File::from(other));
    vm.ask(Request::Stop);
    vm.ends_well();
}

#[test]
fn ranges_and_interrupts_are_there_for_who_attaches_and_devices_keep_theirs() {
    let (mut vm, _dir) = counting("", 2);
    let attached = attach(&vm);
    let errno = |result: Result<(), cellblock_plugin_api::Error>| result.unwrap_err().errno();
    assert_eq!(errno(attached.reserve_range(Space::Port, 0x3f8, 8)), libc::EPERM);
    assert_eq!(errno(attached.reserve_range(Space::Port, 0x3ff, 2)), libc::EPERM);
    for length in [0, 1] {
        let taken = attached.create_io_event(Space::Port, 0x3f8, length, None).map(drop);
        assert_eq!(errno(taken), libc::EPERM);
    }
    attached.reserve_range(Space::Port, 0x400, 2).unwrap();
    attached.set_irq(20, true).unwrap();
    attached.set_irq(20, false).unwrap();
    // What belongs to the VMM is not for those who attach.
    assert_eq!(errno(attached.start()), libc::EPERM);
    assert_eq!(errno(attached.set_irq_routing(&[])), libc::EPERM);
    let second = attach(&vm);
    assert_eq!(errno(second.reserve_range(Space::Port, 0x401, 1)), libc::EPERM);
    assert_eq!(errno(second.reserve_range(Space::Port, 0x400, 0)), libc::ENOENT);
    drop(attached);
    let until = Instant::now() + common::LIMIT;
    while second.reserve_range(Space::Port, 0x401, 1).is_err() {
        assert!(Instant::now() < until, "what a plugin held is released when it goes");
    }
    // Handed out for reading: neither written to nor mapped for it.
    let (memory, access, _) = second.memory().unwrap();
    assert_eq!(access, MemoryAccess::ReadOnly);
    let memory = File::from(memory);
    goes_on(&memory);
    assert_eq!(memory.write_at(&[1], COUNTER).unwrap_err().raw_os_error(), Some(libc::EBADF));
    // Two hold two vCPUs at a time.
    let third = attach(&vm);
    second.pause_vcpus(1, 1).unwrap();
    assert_eq!(second.vcpu(0).unwrap().wait().unwrap(), Event::Paused { user: 1 });
    third.pause_vcpus(3, 2).unwrap();
    assert_eq!(third.vcpu(1).unwrap().wait().unwrap(), Event::Paused { user: 2 });
    // One at a time debugs a vCPU.
    let step = GuestDebug { single_step: true, ..GuestDebug::default() };
    let third_one = third.vcpu(1).unwrap();
    third_one.set_guest_debug(&step).unwrap();
    second.pause_vcpus(2, 1).unwrap();
    third_one.resume().unwrap();
    let second_one = second.vcpu(1).unwrap();
    assert_eq!(second_one.wait().unwrap(), Event::Paused { user: 1 });
    assert_eq!(errno(second_one.set_guest_debug(&step)), libc::EBUSY);
    second_one.resume().unwrap();
    let other = third.vcpu(0).unwrap();
    assert_eq!(other.wait_timeout(Duration::from_millis(20)).unwrap(), None);
    drop(second);
    assert_eq!(other.wait().unwrap(), Event::Paused { user: 2 });
    other.resume().unwrap();
    // Two that ask before the vCPU looks both get it.
    let fourth = attach(&vm);
    vm.pause();
    third.pause_vcpus(1, 3).unwrap();
    fourth.pause_vcpus(1, 4).unwrap();
    vm.resume();
    // In which order is decided by whose turn it is.
    let mut waiting = vec![(third.vcpu(0).unwrap(), 3), (fourth.vcpu(0).unwrap(), 4)];
    let until = Instant::now() + common::LIMIT;
    while !waiting.is_empty() {
        waiting.retain(|(vcpu, user)| {
            let event = vcpu.wait_timeout(Duration::from_millis(5)).unwrap();
            if event.is_some() {
                assert_eq!(event, Some(Event::Paused { user: *user }));
                vcpu.resume().unwrap();
            }
            event.is_none()
        });
        assert!(Instant::now() < until, "{} were not answered", waiting.len());
    }
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// A process that ends with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn trace_prints_what_goes_to_a_device_that_does_not_notice() {
    let program = example("trace");
    let mut vm = Vm::with("mode=echo").arg("--plugin-socket").arg("plugin").start();
    drop(attach(&vm));
    vm.wait_for("cellblock guest");
    let mut trace = Ended(
        Command::new(program)
            .args([vm.path("plugin").to_str().unwrap(), "port:0x3f8+8"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut lines =
        common::output::Output::collect(File::from(OwnedFd::from(trace.0.stdout.take().unwrap())));
    std::thread::sleep(Duration::from_millis(100)); // until it watches
    vm.say(b"Q");
    vm.wait_for("Q");
    let line = lines.wait_for("0x3f8 write 1 51", common::LIMIT).expect("the echo in the trace");
    assert!(
        line.contains("vcpu0 port") && line.contains("rip 0x") && line.contains("rdx 0x"),
        "{line}"
    );
    drop(trace);
    vm.say(b"Z");
    vm.wait_for("Z");
}

/// `mov dx, 0x510`; 4: says 1; `mov al, [0x200000]`; with the top bit set says 3 and halts for ever,
/// with the next one set and no other it hangs; else says 2; goes to 4.
const FUZZED: &[u8] = &[
    0x66, 0xba, 0x10, 0x05, // 0
    0xb0, 1, 0xee, // 4: says 1
    0x8a, 0x04, 0x25, 0, 0, 0x20, 0, // 7: mov al, [0x200000]
    0xa8, 0x80, 0x75, 9, // 14: test al, 0x80; jnz 27
    0xa8, 0x40, 0x75, 0xfe, // 18: test al, 0x40; jnz itself
    0xb0, 2, 0xee, 0xeb, 0xe9, // 22: says 2; jmp 4
    0xb0, 3, 0xee, 0xf4, 0xeb, 0xfd, // 27: says 3; hlt; jmp the hlt
];

/// The guest has a crash and a hang, and comes out of neither: only the reset gets it on.
#[test]
fn snapfuzz_finds_the_crash_and_the_hang_and_goes_on_after_each() {
    let program = example("snapfuzz");
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path(), FUZZED);
    let at = dir.path().join("s");
    let mut vm = Vm::with("").kernel(&kernel).start();
    let words = ["snapshot", vm.path("control").to_str().unwrap(), at.to_str().unwrap(), "--stop"]
        .map(str::to_owned);
    common::poll(common::LIMIT, || vm.path("control").exists().then_some(())).unwrap();
    let taken = Command::new(env!("CARGO_BIN_EXE_cellblock")).args(words).output().unwrap();
    assert!(taken.status.success(), "{taken:?}");
    vm.wait_exit();
    let vm = Vm::restore(&at).arg("--plugin-socket").arg("plugin,memory=rw").start();
    drop(attach(&vm));
    let reset = format!(
        "{} reset {} > /dev/null",
        env!("CARGO_BIN_EXE_cellblock"),
        vm.path("control").display()
    );
    let output = Command::new(program)
        .args([vm.path("plugin").to_str().unwrap(), "--buffer", "0x200000+1"])
        .args(["--runs", "60", "--timeout-ms", "300", "--reset", &reset])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("60 runs"), "{text}");
    let found = |verdict: &str| -> Vec<u8> {
        let lines = text.lines().filter(|line| line.starts_with(verdict));
        let byte = |line: &str| u8::from_str_radix(line.rsplit(' ').next().unwrap(), 16).unwrap();
        lines.map(byte).collect()
    };
    let (crashed, hung) = (found("Crashed"), found("Hung"));
    assert!(crashed.len() > 1 && !hung.is_empty(), "{text}");
    assert!(crashed.iter().all(|byte| byte & 0x80 != 0), "{text}");
    assert!(hung.iter().all(|byte| byte & 0xc0 == 0x40), "{text}");
}

/// `mov dx, 0x510`; `mov rcx, 5`; 11: `in al, dx`; `mov [0x200000], rcx`; `jmp 11`.
const ASKING: &[u8] = &[
    0x66, 0xba, 0x10, 0x05, 0x48, 0xc7, 0xc1, 5, 0, 0, 0, 0xec, 0x48, 0x89, 0x0c, 0x25, 0, 0, 0x20,
    0, 0xeb, 0xf5,
];

/// With a hint, registers are read and set while the VMM does nothing at all.
#[test]
fn hinted_registers_need_no_vmm() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::with("")
        .kernel(&kernel(dir.path(), ASKING))
        .arg("--plugin-socket")
        .arg("plugin")
        .start();
    let attached = attach(&vm);
    let details = vec![
        // The first that holds decides.
        HintDetail { rcx: Some(4), send_debugregs: true, ..HintDetail::default() },
        HintDetail { rcx: Some(5), rdx: Some(0x510), send_sregs: true, ..HintDetail::default() },
    ];
    let hint = Hint { space: Space::Port, address: 0x510, on_write: false, details };
    attached.set_hypercall_hint(Some(&hint)).unwrap();
    attached.reserve_range(Space::Port, 0x510, 1).unwrap();
    let memory = attached.guest_memory().unwrap();
    let vcpu = attached.vcpu(0).unwrap();
    let vmm = common::proc::Identity::of(vm.pid()).unwrap();
    for (before, after) in [(5, 6), (6, 5), (5, 7)] {
        assert!(matches!(vcpu.wait().unwrap(), Event::Access(_)));
        vm.signal(Signal::SIGSTOP);
        common::poll(common::LIMIT, || (vmm.state() == Some('T')).then_some(())).unwrap();
        let mut regs = vcpu.regs().unwrap();
        assert_eq!((regs.rcx, regs.rdx), (before, 0x510));
        if before == 5 {
            let sregs = vcpu.sregs().unwrap();
            assert_ne!(sregs.cr3, 0);
            vcpu.set_sregs(&sregs).unwrap();
        }
        regs.rcx = after;
        vcpu.set_regs(&regs).unwrap();
        assert_eq!(vcpu.regs().unwrap().rcx, after);
        vcpu.answer(&[1]).unwrap();
        vcpu.resume().unwrap();
        assert_eq!(vcpu.wait_timeout(Duration::from_millis(20)).unwrap(), None);
        vm.signal(Signal::SIGCONT);
        let written = common::poll(common::LIMIT, || {
            let mut bytes = [0; 8];
            memory.read(COUNTER, &mut bytes).unwrap();
            (u64::from_le_bytes(bytes) == after).then_some(())
        });
        written.unwrap_or_else(|| panic!("the guest does not have {after}"));
    }
    // A hint for writes is none for reads: then there is nobody to ask.
    attached.set_hypercall_hint(Some(&Hint { on_write: true, ..hint })).unwrap();
    // The access at hand may have been there before.
    assert!(matches!(vcpu.wait().unwrap(), Event::Access(_)));
    vcpu.resume().unwrap();
    assert!(matches!(vcpu.wait().unwrap(), Event::Access(_)));
    vm.signal(Signal::SIGSTOP);
    common::poll(common::LIMIT, || (vmm.state() == Some('T')).then_some(())).unwrap();
    let asks = vcpu.clone();
    let asking = std::thread::spawn(move || asks.regs());
    std::thread::sleep(Duration::from_millis(50));
    assert!(!asking.is_finished(), "registers came with what was not hinted at");
    vm.signal(Signal::SIGCONT);
    assert_eq!(asking.join().unwrap().unwrap().rdx, 0x510);
    vcpu.resume().unwrap();
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// `mov dx, 0x510`; 4: `out dx, al`; `jmp 4`.
const SAYING: &[u8] = &[0x66, 0xba, 0x10, 0x05, 0xee, 0xeb, 0xfd];

/// What signals an event of one program is no access of another's; when that one goes, it is.
#[test]
fn an_event_ends_with_its_program() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::with("")
        .kernel(&kernel(dir.path(), SAYING))
        .arg("--plugin-socket")
        .arg("plugin")
        .start();
    let (one, two) = (attach(&vm), attach(&vm));
    let event = one.create_io_event(Space::Port, 0x510, 1, None).unwrap();
    two.reserve_range(Space::Port, 0x510, 1).unwrap();
    let vcpu = two.vcpu(0).unwrap();
    // One may have been on its way.
    if vcpu.wait_timeout(Duration::from_millis(50)).unwrap().is_some() {
        vcpu.resume().unwrap();
    }
    assert_eq!(vcpu.wait_timeout(Duration::from_millis(50)).unwrap(), None);
    let mut count = [0; 8];
    nix::unistd::read(event.fd(), &mut count).unwrap();
    assert!(u64::from_ne_bytes(count) > 0);
    drop((event, one));
    assert!(matches!(vcpu.wait().unwrap(), Event::Access(access) if access.address == 0x510));
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// So that its watchdogs do not bark: by the flag that kvmclock has for it.
#[test]
fn a_guest_that_is_held_for_long_is_told_so() {
    const KVMCLOCK: u32 = 0x4b56_4d01;
    const GUEST_STOPPED: u8 = 2;
    let mut vm =
        Vm::with("mode=pause every=20").arg("--plugin-socket").arg("plugin,memory=rw").start();
    if vm.wait_for_line("pause: ready").contains("clock=no") {
        vm.fail("the guest has no kvmclock");
    }
    let attached = attach(&vm);
    let memory = attached.guest_memory().unwrap();
    let vcpu = attached.vcpu(0).unwrap();
    // Holds the vCPU for so long; for how long it was at most, and whether the guest was told.
    let hold = |limit: Duration| {
        let begun = Instant::now();
        attached.pause_vcpus(1, 1).unwrap();
        assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 1 });
        let area = vcpu.msrs(&[KVMCLOCK]).unwrap()[0].data;
        assert_eq!(area & 1, 1, "the clock is on");
        let at = (area & !1) + 29;
        let mut flags = [0];
        memory.read(at, &mut flags).unwrap();
        memory.write(at, &[flags[0] & !GUEST_STOPPED]).unwrap();
        std::thread::sleep(limit);
        let lines = || vm.console.text().matches("pause: n=").count();
        let before = lines();
        vcpu.resume().unwrap();
        let held = begun.elapsed();
        // What was on its way is one line at most.
        common::poll(common::LIMIT, || (lines() > before + 1).then_some(())).unwrap();
        memory.read(at, &mut flags).unwrap();
        (held, flags[0] & GUEST_STOPPED != 0)
    };
    assert!(hold(Duration::from_millis(1200)).1);
    // On a busy machine even a short one takes its time.
    let brief = (0..20).map(|_| hold(Duration::ZERO)).find(|(held, _)| held.as_millis() < 900);
    assert!(!brief.expect("a short hold").1);
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// Another user's process of this test, in which the environment says what it may.
const AS_USER: &str = "CELLBLOCK_ATTACH_AS";

#[test]
fn as_another_user() {
    let Ok(words) = std::env::var(AS_USER) else { return };
    let (rights, path) = words.split_once(' ').unwrap();
    let vm = match cellblock_plugin_api::Vm::attach(Path::new(path)) {
        Ok(vm) => vm,
        Err(error) => {
            assert_eq!(rights, "none", "{error}");
            // By the path's mode, or by who we are.
            assert!([libc::EACCES, libc::EPIPE, libc::ECONNRESET].contains(&error.errno()));
            return;
        }
    };
    let errno = |result: Result<(), cellblock_plugin_api::Error>| result.err().map(|e| e.errno());
    let vcpu = vm.vcpu(0).unwrap();
    // Both stop vCPUs and look.
    vm.pause_vcpus(1, 3).unwrap();
    assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 3 });
    let mut regs = vcpu.regs().unwrap();
    vcpu.fpu().unwrap();
    vcpu.msrs(&[0x10]).unwrap();
    vm.watch_range(Space::Port, 0x3f8, 8).unwrap();
    let memory = vm.guest_memory().unwrap();
    let mut byte = [0];
    memory.read(COUNTER, &mut byte).unwrap();
    let debug = GuestDebug { single_step: true, ..GuestDebug::default() };
    regs.rax = 1 << 41;
    vcpu.set_regs(&regs).unwrap(); // told of at the next wait
    match rights {
        "control" => {
            assert_eq!((vm.rights(), memory.access()), (Rights::Control, MemoryAccess::ReadWrite));
            vm.reserve_range(Space::Port, 0x700, 1).unwrap();
            memory.write(COUNTER + 64, &byte).unwrap();
            vm.log_memory(true).unwrap();
            vm.set_irq(20, true).unwrap();
            vcpu.set_fpu(&vcpu.fpu().unwrap()).unwrap();
            vcpu.set_guest_debug(&debug).unwrap();
            vcpu.resume().unwrap();
            assert!(matches!(vcpu.wait().unwrap(), Event::Debug { .. }));
        }
        "observe" => {
            assert_eq!((vm.rights(), memory.access()), (Rights::Observe, MemoryAccess::ReadOnly));
            let refused = [
                errno(vm.reserve_range(Space::Port, 0x700, 1)),
                errno(vm.reserve_async_write_range(Space::Port, 0x700, 1)),
                errno(memory.write(COUNTER + 64, &byte)),
                errno(vm.log_memory(true)),
                errno(vm.set_irq(20, true)),
                errno(vm.signal_msi(0xfee0_0000, 0x30)),
                errno(vm.set_clock(&vm.clock().unwrap())),
                errno(vm.create_irq_event(20).map(drop)),
                errno(vm.create_io_event(Space::Port, 0x700, 1, None).map(drop)),
                errno(vm.create_memory(memory.fd(), 0, 4096, 1 << 40, false, false).map(drop)),
                errno(vm.start()),
                errno(vm.set_irq_routing(&[])),
                errno(vcpu.set_fpu(&vcpu.fpu().unwrap())),
                errno(vcpu.set_guest_debug(&debug)),
            ];
            assert_eq!(refused, [Some(libc::EPERM); 14]);
            vcpu.resume().unwrap();
            vm.pause_vcpus(1, 4).unwrap();
            let error = vcpu.wait().unwrap_err();
            assert_eq!(error.errno(), libc::EPERM);
            assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 4 });
            assert_ne!(vcpu.regs().unwrap().rax, 1 << 41);
        }
        _ => panic!("{rights} was let in"),
    }
}

/// Who may do what, by user: those that are named, and nobody else.
#[test]
fn users_may_what_the_socket_says() {
    if !common::is_root("becoming other users") {
        return;
    }
    let (vm, _dir) = counting(",observe=65533:65532,control=65534,memory=rw", 1);
    drop(attach(&vm));
    // Where others find it.
    let program = vm.path("test");
    let own = std::env::current_exe().unwrap();
    assert!(Command::new("cp").arg(own).arg(&program).status().unwrap().success());
    for (uid, rights) in
        [(65533, "observe"), (65531, "none"), (65534, "control"), (65532, "observe"), (1, "none")]
    {
        let user = format!("--reuid={uid}");
        let output = Command::new("setpriv")
            .args([&user, "--regid=65530", "--clear-groups", "--"])
            .arg(&program)
            .args(["--exact", "as_another_user", "--nocapture"])
            .env(AS_USER, format!("{rights} {}", vm.path("plugin").display()))
            .current_dir("/")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{uid}: {text}{stderr}");
    }
    let (vm, _dir) = counting("", 1);
    drop(attach(&vm));
    use std::os::unix::fs::MetadataExt;
    assert_eq!(std::fs::metadata(vm.path("plugin")).unwrap().mode() & 0o777, 0o600);
}
