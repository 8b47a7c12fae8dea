//! Tiny guests, assembled here, on the real `/dev/kvm`: each boot protocol hands
//! the kernel what it promises, and the machine is wired as the tables say.
//!
//! A guest writes what it sees to the serial port, four bytes at a time, and ends
//! by powering off.
#![allow(clippy::unwrap_used)] // a failed step is a failed test

use std::fs::File;
use std::io::Write;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cellblock::vm::boot::{self, Entry};
use cellblock::vm::cpu::CpuModel;
use cellblock::vm::kvm::Machine;
use cellblock::vm::memory::{GuestRam, MemoryError};
use cellblock::vm::{acpi, kvm, layout};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const LOAD: u32 = 0x20_0000;
const DEADLINE: Duration = Duration::from_secs(20);

/// Machine code, an instruction or two per item.
macro_rules! code {
    ($($bytes:expr),* $(,)?) => { [$(&$bytes[..]),*].concat() };
}

// These mean the same in 32-bit and in 64-bit code.
const MOV_DX_SERIAL: [u8; 4] = [0x66, 0xba, 0xf8, 0x03];
const OUT_EAX: [u8; 1] = [0xef];
/// `mov dx, 0x600; mov al, 0x34; out dx, al; hlt`
const POWER_OFF: [u8; 8] = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];

/// An ELF file with one segment of `code` at [`LOAD`], and a PVH note if asked.
fn elf(code: &[u8], pvh: bool) -> File {
    let mut note = Vec::new();
    for word in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    let note_at = 64 + 2 * 56;
    let code_at = note_at + note.len() as u64;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend_from_slice(&2u16.to_le_bytes()); // executable
    bytes.extend_from_slice(&62u16.to_le_bytes()); // x86_64
    bytes.extend_from_slice(&1u32.to_le_bytes());
    bytes.extend_from_slice(&u64::from(LOAD).to_le_bytes()); // entry
    bytes.extend_from_slice(&64u64.to_le_bytes()); // program headers
    bytes.extend_from_slice(&[0; 12]); // no sections, no flags
    for half in [64u16, 56, 1 + u16::from(pvh), 0, 0, 0] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    for (kind, offset, len) in [(1u32, code_at, code.len()), (4, note_at, note.len())] {
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&7u32.to_le_bytes());
        for word in [offset, LOAD.into(), LOAD.into(), len as u64, len as u64, 1] {
            bytes.extend_from_slice(&u64::to_le_bytes(word));
        }
    }
    bytes.extend_from_slice(&note);
    bytes.extend_from_slice(code);
    file(&bytes)
}

fn file(contents: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    file
}

struct Vm {
    machine: Machine,
    vcpus: Vec<VcpuFd>,
    entry: Entry,
}

/// A machine of 64 MiB with this kernel loaded and its vCPUs set up.
fn vm(kernel: &File, initrd: Option<&File>, cmdline: &str, cpus: u8) -> Vm {
    let ram = GuestRam::new(64 << 20).unwrap();
    let slots: Vec<_> = layout::virtio_slot(0).into_iter().collect();
    let rsdp = acpi::write(&ram, cpus, &slots).unwrap();
    let entry = boot::load(&ram, kernel, initrd, cmdline, rsdp).unwrap();
    let machine = Machine::new(&ram).unwrap();
    let model = CpuModel::new(machine.kvm(), cpus).unwrap();
    let mut vcpus = Vec::new();
    for id in 0..cpus {
        let vcpu = machine.create_vcpu(id).unwrap();
        model.configure(&vcpu, id, (id == 0).then_some(&entry)).unwrap();
        vcpus.push(vcpu);
    }
    Vm { machine, vcpus, entry }
}

/// Runs a vCPU until it powers off or has written `enough` bytes to the serial port.
fn run(vcpu: &mut VcpuFd, enough: usize) -> Vec<u8> {
    let mut seen = Vec::new();
    let end = Instant::now() + DEADLINE;
    while Instant::now() < end && seen.len() < enough {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(layout::SERIAL_PORT, data)) => seen.extend_from_slice(data),
            Ok(VcpuExit::IoOut(layout::SLEEP_CONTROL_PORT, &[value])) => {
                assert!(layout::is_power_off(value));
                return seen;
            }
            Err(e) if e.errno() == libc::EAGAIN => {} // woken by INIT or SIPI: enter again
            other => panic!("unexpected exit {other:?} after {seen:x?}"),
        }
    }
    seen
}

#[test]
fn the_64_bit_protocol_passes_the_zero_page() {
    let code = code![
        MOV_DX_SERIAL,
        [0x89, 0xf0], // mov eax, esi
        OUT_EAX,
        [0x8b, 0x86, 0x02, 0x02, 0, 0], // mov eax, [rsi + 0x202]: "HdrS"
        OUT_EAX,
        [0x8b, 0x9e, 0x28, 0x02, 0, 0], // mov ebx, [rsi + 0x228]: command line
        [0x8b, 0x03],                   // mov eax, [rbx]
        OUT_EAX,
        [0x8b, 0x9e, 0x18, 0x02, 0, 0], // mov ebx, [rsi + 0x218]: initrd
        [0x8b, 0x03],
        OUT_EAX,
        [0x8b, 0x5e, 0x70], // mov ebx, [rsi + 0x70]: RSDP
        [0x8b, 0x03],
        OUT_EAX,
        [0x8b, 0x86, 0xe8, 0x01, 0, 0], // mov eax, [rsi + 0x1e8]: e820 entries
        [0x25, 0xff, 0, 0, 0],          // and eax, 0xff
        OUT_EAX,
        POWER_OFF,
    ];
    let mut vm = vm(&elf(&code, false), Some(&file(b"initrd")), "quiet", 1);
    assert!(matches!(vm.entry, Entry::Linux64 { .. }));
    let seen = run(&mut vm.vcpus[0], usize::MAX);
    let zero_page = (layout::ZERO_PAGE as u32).to_le_bytes();
    assert_eq!(seen, code![zero_page, b"HdrS", b"quie", b"init", b"RSD ", [4, 0, 0, 0]]);
}

#[test]
fn pvh_passes_the_start_info() {
    let code = code![
        MOV_DX_SERIAL,
        [0x8b, 0x03], // mov eax, [ebx]: magic
        OUT_EAX,
        [0x8b, 0x4b, 0x18], // mov ecx, [ebx + 24]: command line
        [0x8b, 0x01],       // mov eax, [ecx]
        OUT_EAX,
        [0x8b, 0x4b, 0x10], // mov ecx, [ebx + 16]: module list
        [0x8b, 0x09],       // mov ecx, [ecx]: module
        [0x8b, 0x01],
        OUT_EAX,
        [0x8b, 0x4b, 0x20], // mov ecx, [ebx + 32]: RSDP
        [0x8b, 0x01],
        OUT_EAX,
        [0x8b, 0x43, 0x30], // mov eax, [ebx + 48]: memory map entries
        OUT_EAX,
        [0x8b, 0x4b, 0x28], // mov ecx, [ebx + 40]: memory map
        [0x8b, 0x41, 0x40], // mov eax, [ecx + 2 * 24 + 16]: the third's type
        OUT_EAX,
        POWER_OFF,
    ];
    let mut vm = vm(&elf(&code, true), Some(&file(b"initrd")), "quiet", 1);
    assert!(matches!(vm.entry, Entry::Pvh { .. }));
    let seen = run(&mut vm.vcpus[0], usize::MAX);
    let magic = 0x336e_c578u32.to_le_bytes();
    assert_eq!(seen, code![magic, b"quie", b"init", b"RSD ", [4, 0, 0, 0], [1, 0, 0, 0]]);
}

#[test]
fn another_cpu_waits_for_its_start_up_interrupt() {
    let code = code![
        // mov dword [0x8000], "mov dx, 0x3f8; mov al"; mov dword [0x8004], "'A'; out; hlt"
        [0xc7, 0x04, 0x25, 0x00, 0x80, 0, 0, 0xba, 0xf8, 0x03, 0xb0],
        [0xc7, 0x04, 0x25, 0x04, 0x80, 0, 0, 0x41, 0xee, 0xf4, 0xf4],
        [0xbb, 0x00, 0x03, 0xe0, 0xfe], // mov ebx, 0xfee00300
        [0xc7, 0x43, 0x10, 0, 0, 0, 1], // mov dword [rbx + 0x10], 1 << 24: to APIC 1
        [0xc7, 0x03, 0x00, 0x45, 0, 0], // mov dword [rbx], INIT
        [0xc7, 0x03, 0x08, 0x46, 0, 0], // mov dword [rbx], SIPI to 0x8000
        POWER_OFF,
    ];
    let mut vm = vm(&elf(&code, false), None, "", 2);
    let mut second = vm.vcpus.pop().unwrap();
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || sender.send(run(&mut second, 1)).unwrap());
    run(&mut vm.vcpus[0], usize::MAX);
    assert_eq!(receiver.recv_timeout(DEADLINE).expect("the second vCPU never ran"), b"A");
    thread.join().unwrap();
}

#[test]
fn vcpus_start_as_processors_come_out_of_reset() {
    const RUNNABLE: u32 = 0;
    const UNINITIALIZED: u32 = 1;
    let vm = vm(&elf(&POWER_OFF, false), None, "", 3);
    for (id, vcpu) in vm.vcpus.iter().enumerate() {
        let state = vcpu.get_mp_state().unwrap().mp_state;
        assert_eq!(state, if id == 0 { RUNNABLE } else { UNINITIALIZED });
        let xsave = vcpu.get_xsave().unwrap();
        assert_eq!((xsave.region[0] & 0xffff, xsave.region[6]), (0x37f, 0x1f80)); // FCW, MXCSR
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
        let one = cpuid.as_slice().iter().find(|e| e.function == 1).unwrap();
        assert_eq!(one.ebx >> 24, id as u32);
    }
    let lapic = vm.vcpus[0].get_lapic().unwrap();
    assert_eq!((lapic.regs[0x351] & 7, lapic.regs[0x361] & 7), (7, 4)); // ExtINT, NMI
}

#[test]
fn a_jump_to_the_firmware_resets_the_machine() {
    let mut vm = vm(&elf(&POWER_OFF, false), None, "", 1);
    let vcpu = &mut vm.vcpus[0];
    // Real mode at f000:fff0, with nothing else of the boot state kept.
    let mut sregs = vcpu.get_sregs().unwrap();
    let real = |selector: u16, code: bool| kvm_segment {
        base: u64::from(selector) << 4,
        limit: 0xffff,
        selector,
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        s: 1,
        ..Default::default()
    };
    sregs.cs = real(0xf000, true);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = real(0, false);
    }
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x10, 0, 0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs { rip: 0xfff0, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(layout::I8042_COMMAND_PORT, &[layout::RESET_VALUE]) => {}
        other => panic!("unexpected exit {other:?}"),
    }
}

#[test]
fn impossible_numbers_of_cpus_are_refused() {
    let kvm = kvm::open().unwrap();
    assert_eq!(kvm::check_cpus(&kvm, 1).unwrap(), 1);
    for asked in [0, 65, 256, 1000, u32::MAX] {
        let text = kvm::check_cpus(&kvm, asked).unwrap_err().to_string();
        assert!(text.starts_with(&format!("{asked} vCPUs are not possible: give 1 to ")), "{text}");
    }
}

#[test]
fn a_notification_does_not_leave_the_guest() {
    let notify = layout::virtio_slot(0).unwrap().base + 0x50;
    let code = code![
        [0xbb],
        (notify as u32).to_le_bytes(), // mov ebx, notify
        [0xc7, 0x03, 1, 0, 0, 0],      // mov dword [rbx], 1
        [0xc7, 0x03, 0, 0, 0, 0],      // mov dword [rbx], 0
        POWER_OFF,
    ];
    let mut vm = vm(&elf(&code, false), None, "", 1);
    let one = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let zero = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    vm.machine.ioeventfd(&one, notify, Some(1)).unwrap();
    vm.machine.ioeventfd(&zero, notify, Some(0)).unwrap();
    run(&mut vm.vcpus[0], usize::MAX);
    assert_eq!((one.read().unwrap(), zero.read().unwrap()), (1, 1));
    assert!(vm.machine.ioeventfd(&zero, notify, Some(1)).is_err());
    vm.machine.remove_ioeventfd(&one, notify, Some(1)).unwrap();
    vm.machine.ioeventfd(&zero, notify, Some(1)).unwrap(); // its place is free again
}

#[test]
fn an_irqfd_raises_its_ioapic_pin() {
    const VECTOR: u8 = 0x55;
    let gsi = layout::virtio_slot(0).unwrap().gsi;
    let code = code![
        [0xbb, 0, 0, 0xc0, 0xfe],                    // mov ebx, IOAPIC
        [0xc7, 0x03, 0x10 + 2 * gsi as u8, 0, 0, 0], // mov dword [rbx], the pin's low half
        [0xc7, 0x43, 0x10, VECTOR, 0, 0, 0],         // mov dword [rbx + 16], fixed, edge, unmasked
        [0xbb, 0xf0, 0, 0xe0, 0xfe],                 // mov ebx, local APIC + 0xf0
        [0xc7, 0x03, 0xff, 0x01, 0, 0],              // mov dword [rbx], enabled
        POWER_OFF,
    ];
    let mut vm = vm(&elf(&code, false), None, "", 1);
    let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    vm.machine.irqfd(&fd, gsi).unwrap();
    run(&mut vm.vcpus[0], usize::MAX);

    fd.write(1).unwrap();
    let end = Instant::now() + DEADLINE;
    // Interrupt request register: 32 bits every 16 bytes.
    let byte = 0x200 + usize::from(VECTOR / 32) * 16 + usize::from(VECTOR % 32 / 8);
    while vm.vcpus[0].get_lapic().unwrap().regs[byte] & 1 << (VECTOR % 8) == 0 {
        assert!(Instant::now() < end, "the interrupt never arrived");
        std::thread::sleep(Duration::from_millis(1));
    }
    vm.machine.remove_irqfd(&fd, gsi).unwrap();
}

#[test]
fn a_vcpu_that_outlives_its_machine_has_no_memory() {
    let code = code![MOV_DX_SERIAL, OUT_EAX, POWER_OFF];
    let Vm { machine, mut vcpus, .. } = vm(&elf(&code, false), None, "", 1);
    drop(machine);
    if let Ok(VcpuExit::IoOut(port, _)) = vcpus[0].run() {
        panic!("it ran code and wrote to port {port:#x}");
    }
}

#[test]
fn memory_above_the_hole_is_the_guests() {
    let ram = match GuestRam::new(5 << 30) {
        Ok(ram) => ram,
        Err(MemoryError::TooLarge { .. }) => return, // a smaller host has nothing to show
        Err(e) => panic!("{e}"),
    };
    let code = code![
        [0x48, 0xb8],
        b"highram!", // mov rax, "highram!"
        [0x48, 0xa3],
        0xffff_fff8u64.to_le_bytes(), // mov [4 GiB - 8], rax
        POWER_OFF,
    ];
    let entry = boot::load(&ram, &elf(&code, false), None, "", 0).unwrap();
    let machine = Machine::new(&ram).unwrap();
    let mut vcpu = machine.create_vcpu(0).unwrap();
    CpuModel::new(machine.kvm(), 1).unwrap().configure(&vcpu, 0, Some(&entry)).unwrap();
    // The boot map's last 2 MiB are made to lead to the first RAM above the hole.
    let last = layout::PAGE_TABLES + 6 * 0x1000 - 8;
    ram.write(last, &(layout::HIGH_RAM_START | 0x83).to_le_bytes()).unwrap();
    run(&mut vcpu, usize::MAX);
    let at = GuestAddress(layout::HIGH_RAM_START + (2 << 20) - 8);
    assert_eq!(&ram.memory().read_obj::<[u8; 8]>(at).unwrap(), b"highram!");
}
