//! A plugin's VM: events, accesses, registers.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod plugin_support;

use cellblock_plugin_api::{Access, Data, Event, Space};
use plugin_support::*;

fn read(address: u64, len: usize) -> Event {
    Event::Access(Access {
        space: Space::Port,
        address,
        is_write: false,
        no_resume: false,
        data: Data::new(&vec![0; len]),
    })
}

fn write(address: u64, data: &[u8]) -> Event {
    Event::Access(Access {
        space: Space::Port,
        address,
        is_write: true,
        no_resume: false,
        data: Data::new(data),
    })
}

#[test]
fn a_port_read_is_answered_and_the_vcpu_pauses() {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    // in al, 0x50; inc al; out 0x51, al; jmp -2
    let _memory = guest(&vm, &[&[0xe4, 0x50, 0xfe, 0xc0, 0xe6, 0x51, 0xeb, 0xfe]]);
    vm.reserve_range(Space::Port, 0x50, 2).unwrap();
    let vcpu = vm.vcpu(0).unwrap();
    vm.start().unwrap();
    enter(&vcpu);
    assert_eq!(vcpu.wait().unwrap(), read(0x50, 1));
    vcpu.answer(&[0x41]).unwrap();
    vcpu.resume().unwrap();
    assert_eq!(vcpu.wait().unwrap(), write(0x51, &[0x42]));
    vcpu.resume().unwrap();
    vm.pause_vcpus(1, 77).unwrap();
    assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 77 });
    assert_eq!((vcpu.regs().unwrap().rip, vcpu.regs().unwrap().rax), (CODE + 6, 0x42));
    vcpu.resume().unwrap();
    assert_eq!(vmm.end(), None);
}
