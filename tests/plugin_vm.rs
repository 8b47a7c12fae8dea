//! A plugin's VM: events, accesses, registers.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod plugin_support;

use std::sync::Arc;
use std::time::Duration;

use cellblock::bus::VmExit;
use cellblock_plugin_api::{Access, Data, Error, Event, Hint, HintDetail, Space, Vcpu, Vm};
use kvm_bindings::{kvm_mp_state, kvm_msr_entry};
use plugin_support::*;

fn access(space: Space, address: u64, is_write: bool, data: &[u8]) -> Event {
    let data = Data::new(data);
    Event::Access(Access { space, address, is_write, no_resume: false, data })
}

fn read(address: u64, len: usize) -> Event {
    access(Space::Port, address, false, &vec![0; len])
}

fn write(address: u64, data: &[u8]) -> Event {
    access(Space::Port, address, true, data)
}

fn posted(address: u64, data: &[u8]) -> Event {
    let data = Data::new(data);
    Event::Access(Access { space: Space::Port, address, is_write: true, no_resume: true, data })
}

/// A VM with one vCPU that runs `code`, which is expected to get stuck at its end.
fn machine(code: &[u8]) -> (Vmm, Vm, Arc<Vcpu>, Memory) {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    let memory = guest(&vm, &[code]);
    let vcpu = vm.vcpu(0).unwrap();
    (vmm, vm, vcpu, memory)
}

fn errno<T: std::fmt::Debug>(result: Result<T, Error>) -> i32 {
    result.unwrap_err().errno()
}

#[test]
fn a_port_read_is_answered_and_the_vcpu_pauses() {
    // in al, 0x50; inc al; out 0x51, al; jmp -2
    let (vmm, vm, vcpu, _memory) = machine(&[0xe4, 0x50, 0xfe, 0xc0, 0xe6, 0x51, 0xeb, 0xfe]);
    vm.reserve_range(Space::Port, 0x50, 2).unwrap();
    vm.start().unwrap();
    enter(&vcpu);
    assert_eq!(vcpu.wait().unwrap(), read(0x50, 1));
    vcpu.answer(&[0x41]).unwrap();
    vcpu.resume().unwrap();
    assert_eq!(vcpu.wait().unwrap(), write(0x51, &[0x42]));
    vcpu.resume().unwrap();
    vm.pause_vcpus(1, 77).unwrap();
    assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 77 });
    assert_eq!((vcpu.regs().unwrap().rip, vcpu.regs().unwrap().rax), (6, 0x42));
    vcpu.resume().unwrap();
    assert_eq!(vmm.end(), None);
}

#[test]
fn nobodys_reads_are_zero_and_writes_are_dropped() {
    // mov al, 7; in al, 0x60; out 0x61, al; mov [0x0], al; mov bl, [0x10]; out 0x50, al; out 0x50, bl
    let code = [
        0xb0, 0x07, 0xe4, 0x60, 0xe6, 0x61, 0xa2, 0x00, 0x00, 0xb3, 9, 0x8a, 0x1e, 0x10, 0x00,
        0xe6, 0x50, 0x88, 0xd8, 0xe6, 0x50, 0xeb, 0xfe,
    ];
    let (_vmm, vm, vcpu, _memory) = machine(&code);
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    vm.start().unwrap();
    assert_eq!(vcpu.wait().unwrap(), Event::Init);
    real_mode(&vcpu);
    let mut sregs = vcpu.sregs().unwrap();
    sregs.ds.base = 0xd000_0000; // where there is no memory
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.resume().unwrap();
    assert_eq!(vcpu.wait().unwrap(), write(0x50, &[0]), "a port without owner");
    vcpu.resume().unwrap();
    assert_eq!(vcpu.wait().unwrap(), write(0x50, &[0]), "memory without owner");
}

#[test]
fn ranges_are_reserved_and_released() {
    const ENOENT: i32 = libc::ENOENT;
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    for space in [Space::Port, Space::Mmio] {
        let reserve = |start, length| vm.reserve_range(space, start, length);
        let reserve_async = |start, length| vm.reserve_async_write_range(space, start, length);
        reserve(0x100, 0x10).unwrap();
        // The byte that is the last of one and the first of the other included.
        for (start, length) in
            [(0x100, 0x10), (0x10f, 1), (0xff, 2), (0x104, 2), (0xf1, 0x10), (0, 0x1000)]
        {
            assert_eq!(errno(reserve(start, length)), libc::EPERM, "{start:#x} {length:#x}");
            assert_eq!(errno(reserve_async(start, length)), libc::EPERM);
        }
        reserve(0x110, 1).unwrap();
        reserve_async(0xff, 1).unwrap();
        assert_eq!(errno(reserve(u64::MAX, 2)), libc::EINVAL);
        assert_eq!(errno(reserve(2, u64::MAX)), libc::EINVAL);
        for start in [0x101, 0x10f, 0x50, 0] {
            assert_eq!(errno(reserve(start, 0)), ENOENT, "{start:#x}");
        }
        // Either function releases either kind.
        reserve_async(0x100, 0).unwrap();
        reserve(0xff, 0).unwrap();
        reserve(0x110, 0).unwrap();
        assert_eq!(errno(reserve(0x110, 0)), ENOENT);
        reserve(0xff, 0x12).unwrap();
    }
    vm.start().unwrap();
    vm.reserve_range(Space::Port, 0x200, 1).unwrap();
}

#[test]
fn an_access_belongs_to_the_range_it_begins_in_and_is_whole() {
    // in eax, 0x50 (the range ends after one byte); in eax, 0x4f (begins before it); out 0x50, al
    let (_vmm, vm, vcpu, _memory) =
        machine(&[0x66, 0xe5, 0x50, 0x66, 0xe5, 0x4f, 0xe6, 0x50, 0xeb, 0xfe]);
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    vm.start().unwrap();
    enter(&vcpu);
    assert_eq!(vcpu.wait().unwrap(), read(0x50, 4));
    vcpu.answer(&[1, 2, 3, 4]).unwrap();
    vcpu.resume().unwrap();
    assert_eq!(vcpu.wait().unwrap(), write(0x50, &[0]), "0x4f was nobody's");
}

#[test]
fn string_input_is_one_event_and_sixteen_bytes_of_memory_are_two() {
    // mov di, 0x3000; mov cx, 1000; mov dx, 0x500; rep insb; movdqu [0], xmm0; movdqu xmm1, [0]; out
    let code = [
        0xbf, 0x00, 0x30, 0xb9, 0xe8, 0x03, 0xba, 0x00, 0x05, 0xf3, 0x6c, 0xf3, 0x0f, 0x7f, 0x06,
        0x00, 0x00, 0xf3, 0x0f, 0x6f, 0x0e, 0x00, 0x00, 0xee, 0xeb, 0xfe,
    ];
    let (_vmm, vm, vcpu, memory) = machine(&code);
    vm.reserve_range(Space::Port, 0x500, 1).unwrap();
    vm.reserve_range(Space::Mmio, 0xd000_0000, 0x1000).unwrap();
    vm.start().unwrap();
    assert_eq!(vcpu.wait().unwrap(), Event::Init);
    real_mode(&vcpu);
    let mut sregs = vcpu.sregs().unwrap();
    sregs.ds.base = 0xd000_0000;
    sregs.cr4 |= 0x200; // OSFXSR
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.resume().unwrap();
    let mut got = Vec::new();
    let mut events = 0;
    while got.len() < 1000 {
        let Event::Access(access) = vcpu.wait().unwrap() else { panic!() };
        assert_eq!((access.address, access.is_write), (0x500, false));
        let piece: Vec<u8> =
            (got.len()..got.len() + access.data.len()).map(|n| (n * 7) as u8).collect();
        vcpu.answer(&piece).unwrap();
        got.extend(piece);
        events += 1;
        vcpu.resume().unwrap();
    }
    assert!(events <= 2, "{events} events for 1000 bytes");
    for (half, is_write) in [(0, true), (8, true), (0, false), (8, false)] {
        let wanted = access(Space::Mmio, 0xd000_0000 + half, is_write, &[0; 8]);
        assert_eq!(vcpu.wait().unwrap(), wanted);
        vcpu.answer(&[half as u8 + 1; 8]).unwrap();
        vcpu.resume().unwrap();
    }
    assert!(matches!(vcpu.wait().unwrap(), Event::Access(_)));
    let there: [u8; 1000] = memory.get(0x3000);
    assert_eq!(there.to_vec(), got);
    let fpu = vcpu.fpu().unwrap();
    assert_eq!((fpu.xmm[1][..8].to_vec(), fpu.xmm[1][8..].to_vec()), (vec![1; 8], vec![9; 8]));
}

#[test]
fn async_writes_do_not_stop_the_vcpu_and_keep_their_order() {
    // mov cx, 300; 3: mov ax, cx; out 0x50, ax; loop 3; in al, 0x50; out 0x60, al; jmp -2
    let code = [
        0xb9, 0x2c, 0x01, 0x89, 0xc8, 0xe7, 0x50, 0xe2, 0xfa, 0xb0, 0x55, 0xe4, 0x50, 0xe6, 0x60,
        0xeb, 0xfe,
    ];
    let (vmm, vm, vcpu, _memory) = machine(&code);
    vm.reserve_async_write_range(Space::Port, 0x50, 1).unwrap();
    vm.reserve_range(Space::Port, 0x60, 1).unwrap();
    vm.start().unwrap();
    enter(&vcpu);
    // More than the ring holds: the vCPU waits for room, in a pause's reach.
    std::thread::sleep(Duration::from_millis(50));
    vmm.pause().unwrap();
    vmm.resume().unwrap();
    for n in (1..=300u16).rev() {
        if n == 100 {
            // The rest finds room, and the write that is waited for comes behind it.
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(vcpu.wait().unwrap(), posted(0x50, &n.to_le_bytes()));
        assert_eq!(errno(vcpu.resume()), libc::EPROTO, "there is nothing to resume");
    }
    assert_eq!(vcpu.wait().unwrap(), write(0x60, &[0]), "a read of it gives 0");
    vcpu.resume().unwrap();
}

#[test]
fn calls_that_do_not_fit_are_refused_and_harm_nothing() {
    let (vmm, vm, vcpu, _memory) = machine(&[0xe4, 0x50, 0xeb, 0xfc]);
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    assert_eq!(errno(vm.vcpu(1)), libc::ENOENT);
    let proto = |result: Result<(), Error>| assert_eq!(errno(result), libc::EPROTO);
    proto(vcpu.resume());
    proto(vcpu.regs().map(drop));
    vm.start().unwrap();
    assert_eq!(errno(vm.start()), libc::EINVAL);
    proto(vcpu.resume());
    enter(&vcpu);
    assert!(matches!(vcpu.wait().unwrap(), Event::Access(_)));
    proto(vcpu.wait().map(drop));
    vcpu.resume().unwrap();
    proto(vcpu.resume());
    proto(vcpu.resume());
    proto(vcpu.fpu().map(drop));
    proto(vcpu.set_regs(&Default::default()));
    assert!(matches!(vcpu.wait().unwrap(), Event::Access(_)));
    assert_eq!(vmm.end(), None);
}

#[test]
fn registers_take_effect_at_the_resume_and_their_errors_come_with_the_next_wait() {
    let (_vmm, vm, vcpu, _memory) = machine(&[0xe6, 0x50, 0xeb, 0xfc]);
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    vm.start().unwrap();
    enter(&vcpu);
    assert_eq!(vcpu.wait().unwrap(), write(0x50, &[0]));
    let mut regs = vcpu.regs().unwrap();
    regs.rax = 0x99;
    vcpu.set_regs(&regs).unwrap();
    assert_eq!(vcpu.regs().unwrap(), regs, "a get sees the set");
    let mut debugregs = vcpu.debugregs().unwrap();
    debugregs.db[2] = 0x1234;
    vcpu.set_debugregs(&debugregs).unwrap();
    vcpu.resume().unwrap();
    assert_eq!(vcpu.wait().unwrap(), write(0x50, &[0x99]));
    assert_eq!(vcpu.debugregs().unwrap().db[2], 0x1234);
    let mut sregs = vcpu.sregs().unwrap();
    sregs.cs.l = 1; // 64-bit code, and no 64-bit mode
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.resume().unwrap();
    assert_eq!(errno(vcpu.wait()), libc::EINVAL);
    assert_eq!(vcpu.wait().unwrap(), write(0x50, &[0x99]), "the event is not lost");
    assert_eq!(vcpu.sregs().unwrap().cs.l, 0);
}

#[test]
fn state_is_set_at_once_with_kvms_errors() {
    let (_vmm, vm, vcpu, _memory) = machine(&[0xe6, 0x50, 0xeb, 0xfc]);
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    vm.start().unwrap();
    enter(&vcpu);
    vcpu.wait().unwrap();
    let mut fpu = vcpu.fpu().unwrap();
    fpu.xmm[3] = [7; 16];
    vcpu.set_fpu(&fpu).unwrap();
    assert_eq!(vcpu.fpu().unwrap().xmm[3], [7; 16]);
    let mut xcrs = vcpu.xcrs().unwrap();
    vcpu.set_xcrs(&xcrs).unwrap();
    xcrs.nr_xcrs = 1;
    (xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) = (0, 0);
    assert_eq!(errno(vcpu.set_xcrs(&xcrs)), libc::EINVAL);
    let mut lapic = vcpu.lapic_state().unwrap();
    lapic.regs[0x80] = 0x20; // task priority
    vcpu.set_lapic_state(&lapic).unwrap();
    assert_eq!(vcpu.lapic_state().unwrap().regs[0x80], 0x20);
    assert_eq!(vcpu.mp_state().unwrap().mp_state, kvm_bindings::KVM_MP_STATE_RUNNABLE);
    assert_eq!(errno(vcpu.set_mp_state(&kvm_mp_state { mp_state: 99 })), libc::EINVAL);
    let mut events = vcpu.vcpu_events().unwrap();
    vcpu.set_vcpu_events(&events).unwrap();
    events.flags = u32::MAX;
    assert_eq!(errno(vcpu.set_vcpu_events(&events)), libc::EINVAL);
    // SYSENTER_EIP, then one that no processor has: what comes before it is given.
    let got = vcpu.msrs(&[0x176, 0xdead_beef, 0x175]).unwrap();
    assert_eq!(got.iter().map(|msr| msr.index).collect::<Vec<_>>(), [0x176]);
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    assert_eq!(vcpu.set_msrs(&[msr(0x176, 5), msr(0xdead_beef, 0)]).unwrap(), 1);
    assert_eq!(vcpu.msrs(&[0x176]).unwrap()[0].data, 5);
    assert_eq!(vcpu.msrs(&vec![0x176; 1000]).unwrap().len(), 1000, "more than one ioctl takes");
    for (cap, flags, args) in [(999, 0, [0; 4]), (123, 1, [0; 4]), (148, 0, [0, 1, 0, 0])] {
        assert_eq!(errno(vcpu.enable_capability(cap, flags, args)), libc::EINVAL);
    }
    assert_eq!(errno(vcpu.set_cpuid(&[Default::default(); 300])), libc::E2BIG);
}

#[test]
fn a_hint_brings_registers_along_without_a_round_trip() {
    // mov bx, 5; mov al, 1; out 0x50, al; mov bx, 6; out 0x50, al; in al, 0x50; jmp
    let code = [
        0xbb, 0x05, 0x00, 0xb0, 0x01, 0xe6, 0x50, 0xbb, 0x06, 0x00, 0xe6, 0x50, 0xe4, 0x50, 0xeb,
        0xf0,
    ];
    let (vmm, vm, vcpu, _memory) = machine(&code);
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    let detail = HintDetail { rbx: Some(5), send_sregs: true, ..HintDetail::default() };
    let rest = HintDetail { send_debugregs: true, ..HintDetail::default() };
    let hint =
        Hint { space: Space::Port, address: 0x50, on_write: true, details: vec![detail, rest] };
    let many = Hint { details: vec![rest; 33], ..hint.clone() };
    assert_eq!(errno(vm.set_hypercall_hint(Some(&many))), libc::EINVAL);
    let nowhere = Hint { address: 0, ..hint.clone() };
    assert_eq!(errno(vm.set_hypercall_hint(Some(&nowhere))), libc::EINVAL);
    vm.set_hypercall_hint(Some(&hint)).unwrap();
    vm.start().unwrap();
    enter(&vcpu);

    // With the VM paused nobody answers: what is got was there already.
    assert_eq!(vcpu.wait().unwrap(), write(0x50, &[1]));
    vmm.pause().unwrap();
    let mut regs = vcpu.regs().unwrap();
    assert_eq!((regs.rbx, regs.rax), (5, 1));
    assert_eq!(vcpu.sregs().unwrap().ds.base, 0);
    regs.rax = 3;
    vcpu.set_regs(&regs).unwrap();
    let late = std::thread::scope(|scope| {
        let fpu = scope.spawn(|| vcpu.fpu().map(drop));
        std::thread::sleep(Duration::from_millis(20));
        let early = fpu.is_finished();
        vmm.resume().unwrap();
        fpu.join().unwrap().unwrap();
        !early
    });
    assert!(late, "what a hint does not bring is for the VMM to say");
    vcpu.resume().unwrap();

    assert_eq!(vcpu.wait().unwrap(), write(0x50, &[3]));
    vmm.pause().unwrap();
    assert_eq!((vcpu.regs().unwrap().rbx, vcpu.debugregs().unwrap().db[0]), (6, 0));
    vmm.resume().unwrap();
    vcpu.resume().unwrap();
    assert_eq!(vcpu.wait().unwrap(), read(0x50, 1), "a read, which the hint is not for");
    vm.set_hypercall_hint(None).unwrap();
}

#[test]
fn no_vcpu_runs_before_all_are_resumed_from_their_first_event() {
    let mut vmm = Vmm::new(3);
    let vm = vmm.connect();
    // out 0x50, al; jmp
    let code: &[u8] = &[0xe6, 0x50, 0xeb, 0xfc];
    let _memory = guest(&vm, &[code, code, code]);
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    let vcpus: Vec<_> = (0..3).map(|id| vm.vcpu(id).unwrap()).collect();
    vm.start().unwrap();
    enter(&vcpus[0]);
    enter(&vcpus[1]);
    for vcpu in &vcpus[..2] {
        assert_eq!(vcpu.wait_timeout(Duration::from_millis(30)).unwrap(), None);
    }
    // One that is held back pauses all the same, for the plugin and for the VM.
    vm.pause_vcpus(1, 4).unwrap();
    assert_eq!(vcpus[0].wait().unwrap(), Event::Paused { user: 4 });
    vmm.pause().unwrap();
    vmm.resume().unwrap();
    vcpus[0].resume().unwrap();
    enter(&vcpus[2]);
    for vcpu in &vcpus {
        assert_eq!(vcpu.wait().unwrap(), write(0x50, &[0]));
        vcpu.resume().unwrap();
    }
}

#[test]
fn sixty_four_vcpus_work() {
    let mut vmm = Vmm::new(64);
    let vm = vmm.connect();
    let memory = guest(&vm, &[]);
    for id in 0..64 {
        // mov al, id; out 0x50, al; jmp
        memory.put(CODE + CODE * id, &[0xb0, id as u8, 0xe6, 0x50, 0xeb, 0xfc]);
    }
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    assert_eq!(vm.vcpu_count(), 64);
    let vcpus: Vec<_> = (0..64).map(|id| vm.vcpu(id).unwrap()).collect();
    assert_eq!(errno(vm.vcpu(64)), libc::ENOENT);
    vm.start().unwrap();
    vcpus.iter().for_each(|vcpu| enter(vcpu));
    for vcpu in &vcpus {
        assert_eq!(vcpu.wait().unwrap(), write(0x50, &[vcpu.id() as u8]));
    }
    vm.pause_many(&[u64::MAX, u64::MAX], 9).unwrap();
    for vcpu in &vcpus {
        vcpu.resume().unwrap();
        assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 9 });
    }
}

#[test]
fn a_triple_fault_ends_the_vm_and_the_plugin_hears_of_it() {
    let (vmm, vm, vcpu, memory) = machine(&[0xe6, 0x50, 0xeb, 0xfc]);
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    vm.start().unwrap();
    enter(&vcpu);
    vcpu.wait().unwrap();
    // No interrupt table, and an instruction that faults.
    user_mode(&vcpu, &memory, 0x8000);
    let events = [vm.shutdown_event().unwrap(), vm.shutdown_event().unwrap()];
    memory.put(0x8000, &[0x0f, 0x0b]); // ud2
    vcpu.resume().unwrap();
    wait_for("the end of the VM", || vmm.end().filter(|end| *end == VmExit::Reset));
    vmm.hub.ending();
    let mut counter = [0; 8];
    assert_eq!(nix::unistd::read(&events[1], &mut counter).unwrap(), 8);
}

#[test]
fn connections_share_what_they_made_and_the_last_ends_it() {
    let (mut vmm, vm, vcpu, _memory) = machine(&[0xe6, 0x50, 0xeb, 0xfc]);
    let other = vm.new_connection().unwrap();
    other.reserve_range(Space::Port, 0x50, 1).unwrap();
    assert_eq!(errno(vm.reserve_range(Space::Port, 0x50, 1)), libc::EPERM);
    vm.reserve_range(Space::Port, 0x50, 0).unwrap();
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    assert!(Arc::ptr_eq(&vcpu, &other.vcpu(0).unwrap()));
    drop(vm);
    other.start().unwrap();
    enter(&vcpu);
    assert_eq!(vcpu.wait().unwrap(), write(0x50, &[0]));
    // The plugin is gone with its last connection: a vCPU that waits for it waits for the end of the
    // VM, in reach of a pause and of the stop.
    drop(other);
    vmm.pause().unwrap();
    vmm.resume().unwrap();
    assert!(vmm.stop() < PATIENCE);
    assert_eq!(errno(vcpu.fpu()), libc::EPIPE);
}

#[test]
fn the_end_of_the_vmm_ends_a_wait() {
    let (mut vmm, vm, vcpu, _memory) = machine(&[0xeb, 0xfe]);
    vm.start().unwrap();
    enter(&vcpu);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| vcpu.wait().map(drop));
        std::thread::sleep(Duration::from_millis(20));
        vmm.stop();
        assert_eq!(errno(waiter.join().unwrap()), libc::EPIPE);
    });
    assert_eq!(errno(vm.msr_index_list()), libc::EPIPE);
}
