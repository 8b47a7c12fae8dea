//! A plugin's VM: memory, interrupts, controllers, what KVM can do.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod plugin_support;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use cellblock::plugin::Network;
use cellblock_plugin_api::{Error, Event, IrqRoute, Plain, Route, SOCKET_VARIABLE, Space, Vm};
use cellblock_wire::sealed_memfd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use plugin_support::*;

fn errno<T: std::fmt::Debug>(result: Result<T, Error>) -> i32 {
    result.unwrap_err().errno()
}

fn signalled(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    let ready = poll(&mut fds, PollTimeout::from(1000u16)).unwrap() == 1;
    if ready {
        nix::unistd::read(fd, &mut [0; 8]).unwrap();
    }
    ready
}

fn quiet(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 0
}

#[test]
fn memory_is_checked_in_the_interfaces_order() {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    let good = sealed_memfd("good", 0x10000).unwrap();
    let name = c"open";
    let open = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&open, 0x10000).unwrap();
    let file = File::from(nix::unistd::pipe().unwrap().0);
    let make = |fd: BorrowedFd<'_>, offset, length, start| {
        vm.create_memory(fd, offset, length, start, false, false)
    };
    let (good, open, file) = (good.as_fd(), open.as_fd(), file.as_fd());
    assert_eq!(errno(make(file, 1, 0x1000, 0)), libc::EINVAL, "alignment first");
    assert_eq!(errno(make(good, 0x1000, 0x1001, 0)), libc::EINVAL);
    assert_eq!(errno(make(file, 0, 0x1000, 0)), libc::EINVAL, "no memfd");
    assert_eq!(errno(make(open, u64::MAX - 0xfff, 0x1000, 0)), libc::EPERM, "no seal");
    assert_eq!(errno(make(good, u64::MAX - 0xfff, 0x1000, 0)), libc::EOVERFLOW);
    assert_eq!(errno(make(good, 0xf000, 0x2000, 0)), libc::EINVAL, "past the end");
    assert_eq!(errno(make(good, 0x10000, 0, 0)), libc::EINVAL, "nothing");
    assert_eq!(errno(make(good, 0, 0x1000, 0x10)), libc::EINVAL, "KVM wants pages");
    let memory = make(good, 0, 0x2000, 0x1000).unwrap();
    for start in [0x1000, 0x2000, 0] {
        assert_eq!(errno(make(good, 0, 0x2000, start)), libc::EEXIST, "{start:#x}");
    }
    make(good, 0, 0x1000, 0x3000).unwrap();
    assert_eq!(errno(vm.dirty_log(&memory)), libc::ENOENT);
    vm.destroy_memory(&memory).unwrap();
    assert_eq!(errno(vm.destroy_memory(&memory)), libc::ENOENT);
    assert_eq!(errno(vm.dirty_log(&memory)), libc::ENOENT);
    make(good, 0, 0x2000, 0x1000).unwrap();
}

#[test]
fn written_pages_are_in_the_dirty_log_once() {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    // mov [0x3000], al; mov [0xa000], al; out 0x50, al; jmp
    let code = [0xa2, 0x00, 0x30, 0xa2, 0x00, 0xa0, 0xe6, 0x50, 0xeb, 0xfc];
    let file = Memory::new(0x10000);
    file.put(CODE, &code);
    let memory = vm.create_memory(&file, 0, 0x10000, 0, false, true).unwrap();
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    let vcpu = vm.vcpu(0).unwrap();
    vm.start().unwrap();
    enter(&vcpu);
    vcpu.wait().unwrap();
    assert_eq!(memory.log_bytes(), 2);
    let log = vm.dirty_log(&memory).unwrap();
    assert_eq!(log, [1 << 3, 1 << (0xa - 8)]);
    assert_eq!(vm.dirty_log(&memory).unwrap(), [0, 0], "reading clears");
    // A log larger than any message.
    let vast = File::from(sealed_memfd("vast", 8 << 30).unwrap());
    let big = vm.create_memory(&vast, 0, 8 << 30, 1 << 32, false, true).unwrap();
    let log = vm.dirty_log(&big).unwrap();
    assert_eq!((log.len(), log.iter().any(|byte| *byte != 0)), (256 << 10, false));
}

#[test]
fn writes_to_read_only_memory_are_accesses() {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    // mov al, [0x3001]; inc al; mov [0x3001], al; mov bl, [0x3001]; out 0x50, al
    let code =
        [0xa0, 1, 0x30, 0xfe, 0xc0, 0xa2, 1, 0x30, 0x8a, 0x1e, 1, 0x30, 0xe6, 0x50, 0xeb, 0xfc];
    let file = Memory::new(0x3000);
    file.put(CODE, &code);
    vm.create_memory(&file, 0, 0x3000, 0, false, false).unwrap();
    let rom = Memory::new(0x1000);
    rom.put(1, &[0x41]);
    vm.create_memory(&rom, 0, 0x1000, 0x3000, true, false).unwrap();
    vm.reserve_range(Space::Mmio, 0x3000, 0x1000).unwrap();
    vm.reserve_range(Space::Port, 0x50, 1).unwrap();
    let vcpu = vm.vcpu(0).unwrap();
    vm.start().unwrap();
    enter(&vcpu);
    let Event::Access(access) = vcpu.wait().unwrap() else { panic!() };
    assert_eq!((access.space, access.address, &*access.data), (Space::Mmio, 0x3001, &[0x42][..]));
    vcpu.resume().unwrap();
    assert!(matches!(vcpu.wait().unwrap(), Event::Access(a) if a.address == 0x50));
    assert_eq!(vcpu.regs().unwrap().rbx, 0x41, "reads are memory's");
}

#[test]
fn io_events_take_writes_away() {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    // mov ax, 0x0102; out 0x50, ax; out 0x50, al; mov ax, 0x0203; out 0x50, ax; out 0x52, al;
    // mov [0], al; out 0x60, al; jmp
    let code = [
        0xb8, 2, 1, 0xe7, 0x50, 0xe6, 0x50, 0xb8, 3, 2, 0xe7, 0x50, 0xe6, 0x52, 0xa2, 0, 0, 0xe6,
        0x60, 0xeb, 0xfe,
    ];
    let _memory = guest(&vm, &[&code]);
    for length in [3, 5, 16] {
        assert_eq!(errno(vm.create_io_event(Space::Port, 0x50, length, None)), libc::EINVAL);
    }
    // Of the value only as many bytes count as the write has.
    let word = vm.create_io_event(Space::Port, 0x50, 2, Some(0xffff_0102)).unwrap();
    let any = vm.create_io_event(Space::Port, 0x52, 1, None).unwrap();
    let mmio = vm.create_io_event(Space::Mmio, 0xd000_0000, 0, Some(9)).unwrap();
    let gone = vm.create_io_event(Space::Port, 0x60, 1, None).unwrap();
    assert_eq!(errno(vm.create_io_event(Space::Port, 0x52, 1, None)), libc::EEXIST);
    vm.destroy_io_event(&gone).unwrap();
    assert_eq!(errno(vm.destroy_io_event(&gone)), libc::ENOENT);
    vm.reserve_range(Space::Port, 0x50, 0x11).unwrap();
    vm.reserve_range(Space::Mmio, 0xd000_0000, 1).unwrap();
    let vcpu = vm.vcpu(0).unwrap();
    vm.start().unwrap();
    assert_eq!(vcpu.wait().unwrap(), Event::Init);
    real_mode(&vcpu);
    let mut sregs = vcpu.sregs().unwrap();
    sregs.ds.base = 0xd000_0000;
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.resume().unwrap();
    let mut seen = Vec::new();
    loop {
        let Event::Access(access) = vcpu.wait().unwrap() else { panic!() };
        seen.push((access.address, access.data.to_vec()));
        if access.address == 0x60 {
            break;
        }
        vcpu.resume().unwrap();
    }
    assert_eq!(seen, [(0x50, vec![2]), (0x50, vec![3, 2]), (0x60, vec![3])]);
    assert!(signalled(word.fd()) && signalled(any.fd()) && signalled(mmio.fd()));
    assert!(quiet(gone.fd()) && quiet(word.fd()));
}

/// Interrupts in real mode: the PICs set up by code, vector 0x20 + line; the handler ends the
/// interrupt, writes its line to port 0x50 and returns.
const INTERRUPTED: &[u8] = &[
    0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x20, 0xe6, 0x21, 0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x01, 0xe6, 0x21,
    0xb0, 0x00, 0xe6, 0x21, 0xfb, 0xe6, 0x51, 0xf4, 0xeb, 0xfd,
];
const HANDLER: &[u8] = &[0xb0, 0x20, 0xe6, 0x20, 0xb0, 0x05, 0xe6, 0x50, 0xcf];

fn interrupted() -> (Vmm, Vm, std::sync::Arc<cellblock_plugin_api::Vcpu>, Memory) {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    let memory = guest(&vm, &[INTERRUPTED]);
    memory.put(0x6000, HANDLER);
    memory.put(4 * 0x25, &[0x00, 0x60, 0x00, 0x00]);
    vm.reserve_range(Space::Port, 0x50, 2).unwrap();
    let vcpu = vm.vcpu(0).unwrap();
    vm.start().unwrap();
    enter(&vcpu);
    expect_write(&vcpu, 0x51);
    (vmm, vm, vcpu, memory)
}

#[track_caller]
fn expect_write(vcpu: &cellblock_plugin_api::Vcpu, address: u64) {
    match vcpu.wait_timeout(PATIENCE).unwrap() {
        Some(Event::Access(access)) => {
            assert_eq!((access.address, access.is_write), (address, true))
        }
        other => panic!("{other:?}"),
    }
    vcpu.resume().unwrap();
}

#[test]
fn interrupts_by_line_by_event_and_by_message() {
    let (_vmm, vm, vcpu, _memory) = interrupted();
    vm.set_irq(5, true).unwrap();
    expect_write(&vcpu, 0x50);
    vm.set_irq(5, false).unwrap();
    let event = vm.create_irq_event(5).unwrap();
    assert!(quiet(event.resample_fd()));
    nix::unistd::write(event.fd(), &1u64.to_ne_bytes()).unwrap();
    expect_write(&vcpu, 0x50);
    assert!(signalled(event.resample_fd()), "told of the interrupt's end");
    vm.destroy_irq_event(&event).unwrap();
    assert_eq!(errno(vm.destroy_irq_event(&event)), libc::ENOENT);
    nix::unistd::write(event.fd(), &1u64.to_ne_bytes()).unwrap();
    assert_eq!(vcpu.wait_timeout(Duration::from_millis(30)).unwrap(), None);

    // Line 9 now goes to the pin that was line 5's.
    vm.set_irq_routing(&[IrqRoute { irq: 9, route: Route::Irqchip { irqchip: 0, pin: 5 } }])
        .unwrap();
    vm.set_irq(9, true).unwrap();
    expect_write(&vcpu, 0x50);
    vm.set_irq(9, false).unwrap();
    vm.set_irq_routing(&[]).unwrap();
    vm.set_irq(9, true).unwrap();
    assert_eq!(vcpu.wait_timeout(Duration::from_millis(30)).unwrap(), None);
}

#[test]
fn routing_tables_of_any_size_and_no_nonsense() {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    let msi = |irq| IrqRoute { irq, route: Route::Msi { address: 0xfee0_0000, data: 0x31 } };
    vm.set_irq_routing(&(0..4000).map(msi).collect::<Vec<_>>()).unwrap();
    let chip = |irqchip, pin| IrqRoute { irq: 1, route: Route::Irqchip { irqchip, pin } };
    assert_eq!(errno(vm.set_irq_routing(&[chip(7, 0)])), libc::EINVAL);
    assert_eq!(errno(vm.set_irq_routing(&[chip(2, 99)])), libc::EINVAL);
    vm.set_irq_routing(&[chip(2, 3)]).unwrap();
}

#[test]
fn controllers_and_clocks_are_read_and_set() {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    for primary in [true, false] {
        let mut pic = vm.pic_state(primary).unwrap();
        pic.imr = 0x5a + u8::from(primary);
        vm.set_pic_state(primary, &pic).unwrap();
        assert_eq!(vm.pic_state(primary).unwrap(), pic);
    }
    assert_ne!(vm.pic_state(true).unwrap().imr, vm.pic_state(false).unwrap().imr);
    let mut ioapic = vm.ioapic_state().unwrap();
    ioapic.ioregsel = 0x12;
    ioapic.redirtbl[4].bits = 0x1_0031;
    vm.set_ioapic_state(&ioapic).unwrap();
    let back = vm.ioapic_state().unwrap();
    assert_eq!((back.ioregsel, back.bytes()), (0x12, ioapic.bytes()));
    let mut pit = vm.pit_state().unwrap();
    pit.channels[1].count = 0x1234;
    vm.set_pit_state(&pit).unwrap();
    assert_eq!(vm.pit_state().unwrap().channels[1].count, 0x1234);
    let mut clock = vm.clock().unwrap();
    (clock.clock, clock.flags) = (1 << 50, 0);
    vm.set_clock(&clock).unwrap();
    assert!(vm.clock().unwrap().clock >= 1 << 50);
}

#[test]
fn what_kvm_can_is_told_and_little_of_it_can_be_changed() {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    assert!(vm.check_extension(kvm_bindings::KVM_CAP_IRQCHIP).unwrap());
    assert!(!vm.check_extension(kvm_bindings::KVM_CAP_NR_VCPUS).unwrap(), "a number, not 1");
    assert!(!vm.check_extension(0xffff).unwrap());
    assert_eq!(
        errno(vm.enable_capability(kvm_bindings::KVM_CAP_SPLIT_IRQCHIP, 0, [0; 4])),
        libc::EINVAL
    );
    assert!(vm.supported_cpuid().unwrap().iter().any(|entry| entry.function == 0));
    vm.emulated_cpuid().unwrap();
    assert!(vm.msr_index_list().unwrap().contains(&0x174));
    vm.set_identity_map_addr(0xfff0_0000).unwrap();
    vm.start().unwrap();
    assert_eq!(errno(vm.set_identity_map_addr(0xfff1_0000)), libc::EINVAL);
    let vcpu = vm.vcpu(0).unwrap();
    assert_eq!(vcpu.wait().unwrap(), Event::Init);
    vcpu.set_cpuid(&vm.supported_cpuid().unwrap()).unwrap();
    // Where this KVM knows nothing of Hyper-V, it says so.
    match vcpu.hyperv_cpuid() {
        Ok(entries) => assert!(entries.iter().any(|entry| entry.function == 0x4000_0000)),
        Err(error) => {
            assert_eq!(error.errno(), libc::EINVAL);
            assert!(!vm.check_extension(kvm_bindings::KVM_CAP_HYPERV_CPUID).unwrap());
        }
    }
    vcpu.resume().unwrap();
}

#[test]
fn the_network_is_the_one_the_vmm_was_given() {
    let mut vmm = Vmm::new(1);
    assert_eq!(errno(vmm.connect().net_config()), libc::ENODATA);
    let tap: OwnedFd = sealed_memfd("tap", 4096).unwrap();
    let network = Network {
        tap,
        host_ip: [10, 0, 0, 1].into(),
        netmask: [255, 255, 255, 0].into(),
        mac: [2, 0, 0, 0, 0, 7],
    };
    let mut vmm = Vmm::with(1, Some(network));
    let net = vmm.connect().net_config().unwrap();
    assert_eq!((net.host_ip.octets(), net.netmask.octets()), ([10, 0, 0, 1], [255, 255, 255, 0]));
    assert_eq!(net.mac, [2, 0, 0, 0, 0, 7]);
    assert_eq!(nix::sys::stat::fstat(&net.tap).unwrap().st_size, 4096);
}

/// Runs as a child of the next test, with another environment each time.
#[test]
fn connect_as_the_environment_says() {
    if let Ok(wanted) = std::env::var("WANTED_ERRNO") {
        assert_eq!(errno(Vm::connect()).to_string(), wanted);
    }
}

#[test]
fn connecting_takes_a_socket_in_the_environment() {
    let run = |socket: Option<&str>, wanted: i32| {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "connect_as_the_environment_says"]);
        child.env("WANTED_ERRNO", wanted.to_string()).env_remove(SOCKET_VARIABLE);
        child.envs(socket.map(|socket| (SOCKET_VARIABLE, socket)));
        let output = child.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    };
    run(None, libc::ENOTCONN);
    for socket in ["", "x", "-1", "3x", "99999999999"] {
        run(Some(socket), libc::EINVAL);
    }
}
