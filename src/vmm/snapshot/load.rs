//! A machine that goes on from a state: the reverse of `capture`, in KVM's order.
//!
//! The machine is a shell: its processes wait in their jails, its vCPUs have not run, its
//! memory is as the snapshot has it. A machine that ran can be brought back the same way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_devices::protocol::state::CellLoad;
use cellblock_devices::protocol::{FromCell, ToCell};

use super::super::event_loop::Vm;
use crate::snapshot::state::{DeviceState, MicrovmState, StateError, machine};
use crate::transport::front_end::TransferError;
use crate::transport::mmio::{FreezeError, Loading, TransportState};
use crate::vcpu::WorkError;

/// How long a device process may take over what it is to go on from.
const LIMIT: Duration = Duration::from_secs(5);

/// A machine that could not be brought to where a state is.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum LoadError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Vcpu(#[from] WorkError),
    #[error("the snapshot has {0}, which this machine has not")]
    NoDevice(String),
    #[error("the {0} process does not take the state of its device")]
    Refused(String),
    #[error("the {0} process did not answer in time")]
    Silent(String),
    #[error("the {0} process died")]
    Died(String),
    #[error("disk {0}")]
    Disk(String, #[source] FreezeError),
    #[error("disk {0}")]
    BackEnd(String, #[source] TransferError),
}

impl Vm {
    /// Sets everything but memory: vCPUs, then what they share, then the devices. What has to be
    /// done in processes is asked of all of them first: they do it beside what follows.
    pub(in super::super) fn load(&mut self, state: &Arc<MicrovmState>) -> Result<(), LoadError> {
        let mut told = Vec::new();
        for device in &state.device_states {
            told.push(match device.as_back_end()? {
                Some(_) => None,
                None => Some(self.tell_process(device)?),
            });
        }
        self.load_vcpus(state)?;
        state.irqchip_state.load(self.machine.vm())?;
        let mut begun = Vec::new();
        for (device, n) in state.device_states.iter().zip(told) {
            match n {
                Some(n) => self.await_loaded(n)?,
                None => self.load_back_end(device)?,
            }
            let disk = device.as_disk()?.map(|disk| disk.transport);
            let back_end = device.as_back_end()?.map(|disk| disk.transport);
            if let Some(transport) = disk.or(back_end) {
                begun.push(self.begin_disk(device, &transport)?);
            }
        }
        for (n, loading) in begun {
            let (id, transport) = &self.devices[n];
            transport.finish_load(&loading).map_err(|e| LoadError::Disk(id.clone(), e))?;
        }
        Ok(())
    }

    fn load_vcpus(&self, state: &Arc<MicrovmState>) -> Result<(), LoadError> {
        let offsets = self.tsc_offsets(state)?;
        let (facts, state) = (self.snapshots.facts.clone(), state.clone());
        let results = self.vcpus.with_each(move |id, vcpu| match state.vcpu_states.get(id) {
            Some(saved) => saved.load(vcpu, &facts, offsets[id]).map(|()| {
                // Its watchdogs are not to see the time that passed. Refused where the guest has
                // no such clock.
                let _ = vcpu.kvmclock_ctrl();
            }),
            None => Err(StateError::Malformed("fewer vCPUs than the machine")),
        })?;
        Ok(results.into_iter().collect::<Result<(), _>>()?)
    }

    /// What each vCPU's TSC is to be ahead of this host's. While the host's TSC is the clock that
    /// it was, that is what it was; otherwise the guest's TSC goes on by what its clock does.
    fn tsc_offsets(&self, state: &MicrovmState) -> Result<Vec<Option<u64>>, LoadError> {
        let saved = state.vcpu_states.iter().map(|vcpu| (vcpu.tsc_offset, vcpu.tsc_khz));
        let boot_id = &self.snapshots.boot_id;
        let same_boot = !boot_id.is_empty() && *boot_id == state.vm_info.boot_id;
        let then = state.irqchip_state.moment().map(|(_, tsc)| tsc);
        if is_same_clock(same_boot, then, machine::host_tsc()) {
            return Ok(saved.map(|(offset, _)| offset).collect());
        }
        state.irqchip_state.load_clock(self.machine.vm())?;
        let (then, now) = (state.irqchip_state.moment(), machine::moment_now(self.machine.vm())?);
        let (Some(then), Some(now)) = (then, now) else {
            return Ok(saved.map(|_| None).collect());
        };
        Ok(saved.map(|(offset, khz)| offset.map(|o| shifted(o, khz, then, now))).collect())
    }

    /// Hands a process what its device goes on from; its place.
    fn tell_process(&mut self, device: &DeviceState) -> Result<usize, LoadError> {
        let load = if let Some(serial) = device.as_serial()? {
            CellLoad::Serial(serial)
        } else if let Some(disk) = device.as_disk()? {
            CellLoad::Blk { counters: disk.counters, balance: disk.balance }
        } else {
            return Err(LoadError::NoDevice(device.kind.clone()));
        };
        let n = self.cells.iter().position(|cell| cell.id() == device.id);
        let n = n.ok_or_else(|| LoadError::NoDevice(device.id.clone()))?;
        match self.cells[n].channel().try_send(&ToCell::Load(Box::new(load)), &[]) {
            Ok(true) => Ok(n),
            _ => Err(self.no_answer(n)),
        }
    }

    /// Waits until the process has taken it.
    fn await_loaded(&mut self, n: usize) -> Result<(), LoadError> {
        let end = Instant::now() + LIMIT;
        loop {
            match self.cells[n].wait_message(end) {
                Some(FromCell::Loaded(true)) => return Ok(()),
                Some(FromCell::Loaded(false)) => return Err(LoadError::Refused(self.name_of(n))),
                Some(other) => self.cell_message(n, other),
                None => return Err(self.no_answer(n)),
            }
        }
    }

    fn no_answer(&self, n: usize) -> LoadError {
        match self.cells[n].has_ended() {
            true => LoadError::Died(self.name_of(n)),
            false => LoadError::Silent(self.name_of(n)),
        }
    }

    fn name_of(&self, n: usize) -> String {
        format!("{} {}", self.cells[n].role(), self.cells[n].id())
    }

    fn place_of(&self, device: &DeviceState) -> Result<usize, LoadError> {
        let n = self.devices.iter().position(|(id, _)| *id == device.id);
        n.ok_or_else(|| LoadError::NoDevice(device.id.clone()))
    }

    /// Gives a back end of another program what it kept to itself.
    fn load_back_end(&self, device: &DeviceState) -> Result<(), LoadError> {
        let Some(disk) = device.as_back_end()? else { return Ok(()) };
        let loaded = self.devices[self.place_of(device)?].1.load_back_end(&disk.state, LIMIT);
        loaded.map_err(|e| LoadError::BackEnd(device.id.clone(), e))
    }

    fn begin_disk(
        &self,
        device: &DeviceState,
        transport: &TransportState,
    ) -> Result<(usize, Loading), LoadError> {
        let n = self.place_of(device)?;
        let begun = self.devices[n].1.begin_load(transport);
        Ok((n, begun.map_err(|e| LoadError::Disk(device.id.clone(), e))?))
    }

    /// Kicks every queue and raises every interrupt once: one too many is harmless, one too
    /// few is not, and what was on its way when the state was read is in no register.
    pub(in super::super) fn nudge(&self) {
        for (_, device) in &self.devices {
            device.nudge();
        }
        if let Some(irq) = &self.com1_irq {
            let _ = irq.write(1); // a full eventfd is an interrupt all the same
        }
        if let Some(vmgenid) = &self.vmgenid {
            let _ = vmgenid.raise(); // the same holds
        }
    }
}

/// Whether the host's TSC, which was at `then` and is at `now`, is the same clock still: the host
/// was not started anew, nor did it sleep in a way that begins its TSC again.
fn is_same_clock(same_boot: bool, then: Option<u64>, now: u64) -> bool {
    same_boot && then.is_none_or(|then| then <= now)
}

/// A TSC offset for another host: `then` and `now` are clock (ns) and host TSC.
fn shifted(offset: u64, khz: u32, then: (u64, u64), now: (u64, u64)) -> u64 {
    let passed = i128::from(now.0) - i128::from(then.0);
    let ticks = passed * i128::from(khz) / 1_000_000;
    // Modulo 2^64, as the processor adds it.
    let moved = ticks + i128::from(then.1) - i128::from(now.1);
    offset.wrapping_add(moved as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_is_kept_only_while_the_hosts_tsc_is_one_clock() {
        assert!(is_same_clock(true, Some(5), 5) && is_same_clock(true, Some(5), 6));
        assert!(is_same_clock(true, None, 0), "KVM does not say what it was");
        assert!(!is_same_clock(true, Some(5), 4), "it began again");
        assert!(!is_same_clock(false, Some(5), 6) && !is_same_clock(false, None, 6));
        let now = machine::host_tsc();
        assert!(is_same_clock(true, Some(now), machine::host_tsc()));
    }

    #[test]
    fn the_tsc_goes_on_by_what_the_clock_does() {
        // Then: guest TSC 1000 + 500. Now 2 us later on the clock, at 1 GHz, on a host
        // whose own TSC has just begun.
        let offset = shifted(500, 1_000_000, (10_000, 1000), (12_000, 7));
        assert_eq!(offset.wrapping_add(7), 1000 + 500 + 2000);
        // The same moment on the same host changes nothing.
        assert_eq!(shifted(u64::MAX - 3, 2_600_000, (5, 9), (5, 9)), u64::MAX - 3);
    }
}
