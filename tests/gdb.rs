//! Debian's gdb on a bare-metal guest: at CPL 0, where the host can do breakpoints and steps.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod attach_support;
mod common;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};

use attach_support::counting::{counter, counting, goes_on};
use attach_support::{CODE, attach, kernel};
use cellblock::control::protocol::Request;
use cellblock_plugin_api::Event;
use common::Vm;

/// The stub, which ends with the test.
struct Gdb(Child);

impl Drop for Gdb {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `cellblock gdb` and waits until it listens.
fn stub(vm: &Vm) -> Gdb {
    let child = Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .args(["gdb", "control", "--listen", "gdb"])
        .current_dir(vm.path("gdb").parent().unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stub = Gdb(child);
    let mut line = String::new();
    let stdout = OwnedFd::from(stub.0.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut std::io::BufReader::new(File::from(stdout)), &mut line)
        .unwrap();
    assert!(line.contains("target remote gdb"), "{line}");
    stub
}

fn gdb(vm: &Vm, commands: &[&str]) -> String {
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex", "set architecture i386:x86-64"]);
    gdb.args(["-ex", "set tcp connect-timeout 20", "-ex", "target remote gdb"]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let output = gdb.current_dir(vm.path("gdb").parent().unwrap()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn gdb_breaks_steps_reads_writes_and_leaves() {
    let (mut vm, _dir) = counting(",memory=rw", 2);
    let memory = File::from(attach(&vm).memory().unwrap().0);
    goes_on(&memory);
    let _stub = stub(&vm);
    let text = gdb(
        &vm,
        &[
            "info threads",
            "hbreak *0x100012",
            "continue",
            "printf \"at %#lx\\n\", $pc",
            "printf \"equal %d\\n\", $rax == *(long *)0x200000",
            "stepi",
            "printf \"then %#lx\\n\", $pc",
            "delete",
            "stepi",
            "printf \"last %#lx\\n\", $pc",
            "set var $rax = 0x10000000000",
            "set var *(long *)0x200008 = 77",
            "printf \"wrote %d\\n\", *(int *)0x200008",
            "break *0x10000a",
            "continue",
            "printf \"count %#lx at %#lx\\n\", $rax, $pc",
            "delete",
            "shell (sleep 0.3; kill -INT $PPID) &",
            "continue",
            "printf \"interrupted %d\\n\", $pc >= 0x100000 && $pc < 0x100020",
            "thread 2",
            "printf \"second %#lx\\n\", $pc",
            "detach",
        ],
    );
    for part in [
        "vCPU 0",
        "vCPU 1",
        "at 0x100012",
        "equal 1",
        "then 0x100013",
        "last 0x100007",
        "wrote 77",
        "count 0x10000000001 at 0x10000a",
        "received signal SIGINT",
        "interrupted 1",
        "second 0xfff0",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    goes_on(&memory);
    assert!(counter(&memory) > 1 << 40);
    // The next one may come.
    let text = gdb(&vm, &["printf \"again %d\\n\", *(int *)0x200008", "detach"]);
    assert!(text.contains("again 77"), "{text}");
    goes_on(&memory);
    vm.ask(Request::Stop);
    vm.ends_well();
}

/// `inc rax`; `mov [rbx], rax`; 6: `nop`; `jmp 0`.
const COUNT_AT: &[u8] = &[0x48, 0xff, 0xc0, 0x48, 0x89, 0x03, 0x90, 0xeb, 0xf7];
/// Where each vCPU counts.
const COUNTERS: u64 = 0x20_0000;

/// Has every vCPU run [`COUNT_AT`] with a counter of its own.
fn all_count(vm: &cellblock_plugin_api::Vm) {
    let all: Vec<_> = (0..vm.vcpu_count()).map(|id| vm.vcpu(id).unwrap()).collect();
    vm.pause_vcpus(!0, 1).unwrap();
    all.iter().for_each(|vcpu| assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 1 }));
    let (mut regs, sregs) = (all[0].regs().unwrap(), all[0].sregs().unwrap());
    (regs.rip, regs.rax) = (CODE, 0);
    for (vcpu, n) in all.iter().zip(0..) {
        let apic_base = vcpu.sregs().unwrap().apic_base;
        vcpu.set_sregs(&kvm_bindings::kvm_sregs { apic_base, ..sregs }).unwrap();
        regs.rbx = COUNTERS + 8 * n;
        vcpu.set_regs(&regs).unwrap();
        let mp_state = kvm_bindings::KVM_MP_STATE_RUNNABLE;
        vcpu.set_mp_state(&kvm_bindings::kvm_mp_state { mp_state }).unwrap();
    }
    all.iter().for_each(|vcpu| vcpu.resume().unwrap());
}

/// Both vCPUs come to the breakpoint by themselves: one is reported, and the other stops when it is
/// asked to, or had before. From neither may gdb keep it.
#[test]
fn gdb_lets_two_vcpus_go_that_stopped_at_one_breakpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::with("")
        .kernel(&kernel(dir.path(), COUNT_AT))
        .cpus(2)
        .arg("--plugin-socket")
        .arg("plugin,memory=rw")
        .start();
    all_count(&attach(&vm));
    let _stub = stub(&vm);
    let round = [
        "hbreak *0x100006",
        "continue",
        "printf \"stands at %#lx\\n\", $pc",
        "delete",
        "set $one = *(long *)0x200000",
        "set $two = *(long *)0x200008",
        "shell (sleep 0.2; kill -INT $PPID) &",
        "continue",
        "printf \"went on %d %d\\n\", *(long *)0x200000 > $one + 1000, *(long *)0x200008 > $two + 1000",
    ];
    let mut commands = round.repeat(6);
    commands.push("detach");
    let text = gdb(&vm, &commands);
    assert_eq!(text.matches("stands at 0x100006").count(), 6, "{text}");
    assert_eq!(text.matches("went on 1 1").count(), 6, "{text}");
    // Dead in the middle of it, it leaves both running, and without breakpoints.
    let text = gdb(&vm, &["hbreak *0x100006", "continue", "shell kill -KILL $PPID"]);
    assert!(text.contains("Breakpoint 1, "), "{text}");
    let memory = File::from(attach(&vm).memory().unwrap().0);
    let counts = || {
        [0, 8].map(|at| {
            let mut bytes = [0; 8];
            memory.read_exact_at(&mut bytes, COUNTERS + at).unwrap();
            u64::from_le_bytes(bytes)
        })
    };
    let before = counts();
    let both = || counts().iter().zip(before).all(|(now, before)| *now > before + 100_000);
    common::poll(common::LIMIT, || both().then_some(())).expect("both run on");
    vm.ask(Request::Stop);
    vm.ends_well();
}

#[test]
fn gdb_without_memory_says_what_to_do() {
    let (mut vm, _dir) = counting(",memory=none", 1);
    drop(attach(&vm));
    let output = Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .args(["gdb", vm.path("plugin").to_str().unwrap(), "--listen", "/tmp/never"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(text.contains("hands out no memory") && text.contains("memory=rw"), "{text}");
    vm.ask(Request::Stop);
    vm.ends_well();
}

#[test]
fn gdb_without_a_vm_says_what_to_do() {
    let output = Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .args(["gdb", "/nonexistent", "--listen", "/tmp/never"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(text.contains("attaching to the VM") && text.contains("--plugin-socket"), "{text}");
}
