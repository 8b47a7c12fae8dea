//! Debian's gdb on a bare-metal guest, and programs that attach: at CPL 0, where the host can do
//! breakpoints and steps.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod common;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cellblock::control::protocol::Request;
use cellblock_plugin_api::{Event, GuestDebug, MemoryAccess, Rights, Space};
use common::Vm;

/// Where the guest's code is, and where it counts.
const CODE: u64 = 0x10_0000;
const COUNTER: u64 = 0x20_0000;
/// Behind the store of the count.
const NOP: u64 = CODE + 0x12;

/// `xor rax, rax` (7 bytes); 7: `inc rax`; `mov [0x200000], rax`; `nop`; `jmp 7`.
const COUNT: &[u8] = &[
    0x48, 0xc7, 0xc0, 0, 0, 0, 0, 0x48, 0xff, 0xc0, 0x48, 0x89, 0x04, 0x25, 0, 0, 0x20, 0, 0x90,
    0xeb, 0xf2,
];

/// A kernel of a few bytes: an ELF file with one segment.
fn kernel(dir: &Path, code: &[u8]) -> PathBuf {
    let mut elf = vec![0; 0x78];
    elf[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
    elf[20] = 1;
    elf[24..32].copy_from_slice(&CODE.to_le_bytes()); // entry
    elf[32] = 0x40; // program headers
    (elf[52], elf[54], elf[56]) = (0x40, 0x38, 1);
    let mut header = Vec::new();
    header.extend(1u32.to_le_bytes()); // PT_LOAD
    header.extend(7u32.to_le_bytes());
    for word in [0x1000u64, CODE, CODE, code.len() as u64, code.len() as u64, 0x1000] {
        header.extend(word.to_le_bytes());
    }
    elf[0x40..0x78].copy_from_slice(&header);
    elf.resize(0x1000, 0);
    elf.extend(code);
    let path = dir.join("tiny");
    fs::write(&path, elf).unwrap();
    path
}

fn counting(options: &str, cpus: usize) -> (Vm, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::with("")
        .kernel(&kernel(dir.path(), COUNT))
        .cpus(cpus)
        .arg("--plugin-socket")
        .arg(format!("plugin{options}"))
        .start();
    (vm, dir)
}

/// Waits until the socket is there.
fn attach(vm: &Vm) -> cellblock_plugin_api::Vm {
    let path = vm.path("plugin");
    let until = Instant::now() + common::LIMIT;
    loop {
        match cellblock_plugin_api::Vm::attach(&path) {
            Ok(attached) => return attached,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn counter(memory: &File) -> u64 {
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, COUNTER).unwrap();
    u64::from_le_bytes(bytes)
}

#[track_caller]
fn goes_on(memory: &File) {
    let before = counter(memory);
    let until = Instant::now() + common::LIMIT;
    while counter(memory) == before {
        assert!(Instant::now() < until, "the guest stands at {before}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

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
    let other = third.vcpu(0).unwrap();
    assert_eq!(other.wait_timeout(Duration::from_millis(20)).unwrap(), None);
    drop(second);
    assert_eq!(other.wait().unwrap(), Event::Paused { user: 2 });
    other.resume().unwrap();
    vm.ask(Request::Stop);
    vm.ends_well();
}

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

/// An example of the plugin interface, built as a reader would.
fn example(name: &str) -> PathBuf {
    let built = Command::new(env!("CARGO"))
        .args([
            "build",
            "--release",
            "--locked",
            "-q",
            "-p",
            "cellblock-plugin-api",
            "--example",
            name,
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(built.success());
    // Beside the program, wherever that is.
    Path::new(env!("CARGO_BIN_EXE_cellblock")).with_file_name("examples").join(name)
}

#[test]
fn trace_prints_what_goes_to_a_device_that_does_not_notice() {
    let program = example("trace");
    let mut vm = Vm::with("mode=echo").arg("--plugin-socket").arg("plugin").start();
    drop(attach(&vm));
    vm.wait_for("cellblock guest");
    let mut trace = Gdb(Command::new(program)
        .args([vm.path("plugin").to_str().unwrap(), "port:0x3f8+8"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap());
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

/// `mov dx, 0x510`; 4: says 1; `mov al, [0x200000]`; with the top bit set says 3, else 2; goes to 4.
const FUZZED: &[u8] = &[
    0x66, 0xba, 0x10, 0x05, 0xb0, 1, 0xee, 0x8a, 0x04, 0x25, 0, 0, 0x20, 0, 0xa8, 0x80, 0x75, 5,
    0xb0, 2, 0xee, 0xeb, 0xed, 0xb0, 3, 0xee, 0xeb, 0xe8,
];

#[test]
fn snapfuzz_finds_the_input_that_crashes() {
    let program = example("snapfuzz");
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path(), FUZZED);
    let vm = Vm::with("").kernel(&kernel).arg("--plugin-socket").arg("plugin,memory=rw").start();
    drop(attach(&vm));
    let output = Command::new(program)
        .args([vm.path("plugin").to_str().unwrap(), "--buffer", "0x200000+1"])
        .args(["--runs", "60", "--reset", "true"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let crashes: Vec<_> =
        text.lines().filter_map(|line| line.split_once("Crashed in run ")).collect();
    assert!(!crashes.is_empty() && text.contains("60 runs"), "{text}");
    for (_, rest) in crashes {
        let byte = rest.split_once("with ").unwrap().1;
        assert!(u8::from_str_radix(byte, 16).unwrap() >= 0x80, "{text}");
    }
}
