//! What belongs to the machine and to no vCPU: interrupt controllers, timer, clock.

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use super::{StateError, raw};

/// Interrupt controllers, interval timer and clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    /// The real time at which the clock was read, in nanoseconds since the Unix epoch.
    real_ns: u64,
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
    let clock = vm.get_clock().map_err(step("reading the clock"))?;
    let real_ns = real_time();
    Ok(MachineState {
        pic_master: chip(master)?,
        pic_slave: chip(slave)?,
        ioapic: chip(ioapic)?,
        pit: vm.get_pit2().map_err(step("reading the interval timer"))?,
        clock,
        real_ns,
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
        vm.set_clock(&self.clock_at(real_time())).map_err(step("setting the clock"))
    }

    /// The clock as it is to be set when it is `now`: what has passed since it was read is
    /// added, by KVM where it knows the real time it was read at, which it does where the
    /// host's own clock is its TSC. Real time that went back adds nothing.
    fn clock_at(&self, now: u64) -> kvm_clock_data {
        if self.clock.flags & KVM_CLOCK_REALTIME != 0 {
            return kvm_clock_data {
                clock: self.clock.clock,
                flags: KVM_CLOCK_REALTIME,
                realtime: self.clock.realtime,
                ..Default::default()
            };
        }
        let passed = now.saturating_sub(self.real_ns);
        kvm_clock_data { clock: self.clock.clock.saturating_add(passed), ..Default::default() }
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

/// The host's TSC.
pub fn host_tsc() -> u64 {
    raw::host_tsc()
}

fn real_time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn moment(clock: &kvm_clock_data) -> Option<(u64, u64)> {
    (clock.flags & KVM_CLOCK_HOST_TSC != 0).then_some((clock.clock, clock.host_tsc))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(clock: kvm_clock_data, real_ns: u64) -> MachineState {
        let (chip, pit) = (kvm_irqchip::default(), kvm_pit_state2::default());
        MachineState { pic_master: chip, pic_slave: chip, ioapic: chip, pit, clock, real_ns }
    }

    #[test]
    fn the_clock_goes_on_by_real_time_and_never_back() {
        let saved = kvm_clock_data { clock: 500, ..Default::default() };
        assert_eq!(state(saved, 1000).clock_at(1600).clock, 1100);
        assert_eq!(state(saved, 1000).clock_at(900).clock, 500);
        // KVM adds it where it can.
        let flags = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
        let known = kvm_clock_data { clock: 500, flags, realtime: 990, host_tsc: 7, ..saved };
        let set = state(known, 1000).clock_at(1600);
        assert_eq!((set.clock, set.flags, set.realtime), (500, KVM_CLOCK_REALTIME, 990));
    }
}
