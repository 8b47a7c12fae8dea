//! What belongs to the machine and to no vCPU: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use super::StateError;

/// Interrupt controllers, interval timer and clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

fn step(step: &'static str) -> impl FnOnce(errno::Error) -> StateError {
    move |source| StateError::Kvm { step, source: source.into() }
}

/// Reads the machine. Every vCPU has parked by now: the clock is theirs.
pub fn capture(vm: &VmFd) -> Result<MachineState, StateError> {
    let chip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(step("reading an interrupt controller"))?;
        Ok(chip)
    };
    let [master, slave, ioapic] = CHIPS;
    Ok(MachineState {
        pic_master: chip(master)?,
        pic_slave: chip(slave)?,
        ioapic: chip(ioapic)?,
        pit: vm.get_pit2().map_err(step("reading the interval timer"))?,
        clock: vm.get_clock().map_err(step("reading the clock"))?,
    })
}

impl MachineState {
    /// Sets everything: the controllers, the timer, the clock.
    pub fn load(&self, vm: &VmFd) -> Result<(), StateError> {
        let chips = [&self.pic_master, &self.pic_slave, &self.ioapic];
        if chips.map(|chip| chip.chip_id) != CHIPS {
            return Err(StateError::Malformed("interrupt controllers that this machine has not"));
        }
        for chip in chips {
            vm.set_irqchip(chip).map_err(step("setting an interrupt controller"))?;
        }
        vm.set_pit2(&self.pit).map_err(step("setting the interval timer"))?;
        self.load_clock(vm)
    }

    /// Sets the clock alone.
    pub fn load_clock(&self, vm: &VmFd) -> Result<(), StateError> {
        // With the real time it was read at, KVM adds what has passed since.
        let flags = self.clock.flags & KVM_CLOCK_REALTIME;
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            flags,
            realtime: if flags == 0 { 0 } else { self.clock.realtime },
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(step("setting the clock"))
    }

    /// The clock and the host's TSC at one moment, where KVM can tell.
    pub fn moment(&self) -> Option<(u64, u64)> {
        moment(&self.clock)
    }
}

/// As [`MachineState::moment`], of the machine as it is now.
pub fn moment_now(vm: &VmFd) -> Result<Option<(u64, u64)>, StateError> {
    Ok(moment(&vm.get_clock().map_err(step("reading the clock"))?))
}

fn moment(clock: &kvm_clock_data) -> Option<(u64, u64)> {
    (clock.flags & KVM_CLOCK_HOST_TSC != 0).then_some((clock.clock, clock.host_tsc))
}
