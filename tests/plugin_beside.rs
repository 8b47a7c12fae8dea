//! A plugin beside a kernel and jailed devices. The plugin is this very test program, in its jail.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod common;

use cellblock_plugin_api::{Event, MemoryAccess, SOCKET_VARIABLE, Space, Vm};
use common::LIMIT;

/// The plugin's life, in its process; nothing in the test's own.
#[test]
fn plugin_process() {
    if std::env::var_os(SOCKET_VARIABLE).is_none() {
        return;
    }
    let vm = Vm::connect().unwrap();
    // The devices' ranges are theirs.
    assert_eq!(vm.reserve_range(Space::Port, 0x3f8, 1).unwrap_err().errno(), libc::EPERM);
    vm.reserve_range(Space::Port, 0x500, 1).unwrap();
    let vcpu = vm.vcpu(0).unwrap();
    vm.start().unwrap();
    assert_eq!(vcpu.wait().unwrap(), Event::Init);
    // The kernel's entry, which the VMM has set up.
    let entry = vcpu.regs().unwrap().rip;
    assert_ne!(entry, 0xfff0);
    // Guest memory is there for its devices. In it is the kernel.
    let memory = vm.guest_memory().unwrap();
    assert_eq!(memory.access(), MemoryAccess::ReadWrite);
    let mut code = [0; 16];
    memory.read(entry, &mut code).unwrap();
    assert_ne!(code, [0; 16]);
    memory.write(entry, &code).unwrap();
    // More of it would not reach the disk's process.
    let more = vm.create_memory(memory.fd(), 0, 4096, 1 << 40, false, false);
    assert_eq!(more.unwrap_err().errno(), libc::EOPNOTSUPP);
    eprintln!("the guest starts");
    vcpu.resume().unwrap();
    for user in 1..=20 {
        vm.pause_vcpus(1, user).unwrap();
        assert_eq!(vcpu.wait_timeout(LIMIT).unwrap(), Some(Event::Paused { user }));
        vcpu.resume().unwrap();
    }
    eprintln!("paused it twenty times");
    let shutdown = vm.shutdown_event().unwrap();
    nix::unistd::read(&shutdown, &mut [0; 8]).unwrap();
}

#[test]
fn a_kernel_with_its_disk_runs_beside_a_plugin() {
    let own = std::env::current_exe().unwrap();
    let mut vm = common::Vm::with("mode=blk")
        .disk(8)
        .arg("--plugin")
        .arg(own.to_str().unwrap())
        .arg("-pplugin")
        .arg("-p--exact")
        .arg("-pplugin_process")
        .arg("-p--nocapture")
        .start();
    vm.wait_for_error("the guest starts");
    vm.wait_for_error("paused it twenty times");
    vm.ends_well();
}
