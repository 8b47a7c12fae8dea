//! A VM as a debugger sees it: all of it stopped, or running until something stops one vCPU.

use std::sync::Arc;
use std::time::Duration;

use cellblock_plugin_api::{Error, Event, GuestDebug, GuestMemory, Vcpu, Vm};

use super::GdbError;

/// How long each vCPU is listened to in turn while the guest runs.
const TURN: Duration = Duration::from_millis(2);
/// The number a pause of ours has.
const STOP: u64 = 0x6764_6273_746f_7001;
const PAGE: u64 = 4096;

/// See the module. Dropping it lets the guest run on: the VMM does that for whoever leaves.
pub(super) struct Machine {
    vm: Vm,
    vcpus: Vec<Seat>,
    memory: GuestMemory,
    /// Hardware breakpoints, of all vCPUs.
    breakpoints: [Option<u64>; 4],
}

struct Seat {
    vcpu: Arc<Vcpu>,
    stopped: bool,
    /// A stop was asked for that has not been reported.
    asked: bool,
}

/// What stopped the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// A step of this vCPU is done.
    Stepped(usize),
    /// This vCPU is at a breakpoint.
    Breakpoint(usize),
}

/// What a vCPU does when the guest runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing.
    #[default]
    Stay,
    /// It runs.
    Run,
    /// It executes one instruction.
    Step,
}

const DR6_STEP: u64 = 1 << 14;

impl Machine {
    /// Stops the guest.
    pub(super) fn stop(vm: Vm) -> Result<Machine, GdbError> {
        let memory = vm.guest_memory()?;
        let vcpus = (0..vm.vcpu_count())
            .map(|id| Ok(Seat { vcpu: vm.vcpu(id)?, stopped: false, asked: false }))
            .collect::<Result<Vec<_>, Error>>()?;
        vcpus.iter().for_each(|seat| seat.vcpu.set_spin(Duration::ZERO));
        let mut machine = Machine { vm, vcpus, memory, breakpoints: [None; 4] };
        machine.stop_all()?;
        Ok(machine)
    }

    pub(super) fn count(&self) -> usize {
        self.vcpus.len()
    }

    pub(super) fn vcpu(&self, id: usize) -> Option<&Vcpu> {
        Some(&self.vcpus.get(id)?.vcpu)
    }

    /// Stops every vCPU that runs.
    pub(super) fn stop_all(&mut self) -> Result<(), Error> {
        let mut mask = vec![0; self.vcpus.len().div_ceil(64)];
        for (id, seat) in self.vcpus.iter_mut().enumerate() {
            if !seat.stopped && !seat.asked {
                mask[id / 64] |= 1 << (id % 64);
                seat.asked = true;
            }
        }
        self.vm.pause_many(&mask, STOP)?;
        for seat in &mut self.vcpus {
            while !seat.stopped {
                seat.take(seat.vcpu.wait()?)?;
            }
        }
        Ok(())
    }

    /// Lets the guest go: each vCPU as its action says.
    pub(super) fn resume(&mut self, actions: &[Action]) -> Result<(), Error> {
        for (seat, action) in self.vcpus.iter_mut().zip(actions) {
            if *action == Action::Stay {
                continue;
            }
            let single_step = *action == Action::Step;
            seat.vcpu
                .set_guest_debug(&GuestDebug { single_step, breakpoints: self.breakpoints })?;
            seat.stopped = false;
            seat.vcpu.resume()?;
        }
        Ok(())
    }

    /// What stopped the guest, with all of it stopped then. Listens to each vCPU for a moment.
    pub(super) fn stopped(&mut self) -> Result<Option<Stop>, Error> {
        for id in 0..self.vcpus.len() {
            let seat = &mut self.vcpus[id];
            if seat.stopped {
                continue;
            }
            let Some(event) = seat.vcpu.wait_timeout(TURN)? else { continue };
            if let Event::Paused { .. } = event {
                // Of a stop that was asked for when the vCPU was about to stop by itself.
                seat.asked = false;
                seat.vcpu.resume()?;
                continue;
            }
            let reason = match event {
                Event::Debug { dr6, .. } if dr6 & DR6_STEP != 0 => Some(Stop::Stepped(id)),
                Event::Debug { .. } => Some(Stop::Breakpoint(id)),
                _ => None,
            };
            seat.take(event)?;
            if reason.is_some() {
                self.stop_all()?;
                return Ok(reason);
            }
        }
        Ok(None)
    }

    /// Adds a breakpoint on all vCPUs; `false` when there is no room.
    pub(super) fn add_breakpoint(&mut self, address: u64) -> bool {
        match self.breakpoints.iter_mut().find(|place| place.is_none()) {
            Some(place) => {
                *place = Some(address);
                true
            }
            None => false,
        }
    }

    /// Removes it; `false` when there is none.
    pub(super) fn remove_breakpoint(&mut self, address: u64) -> bool {
        match self.breakpoints.iter_mut().find(|place| **place == Some(address)) {
            Some(place) => {
                *place = None;
                true
            }
            None => false,
        }
    }

    /// Reads memory by the linear addresses of a vCPU; as many bytes as there are.
    pub(super) fn read(&self, vcpu: usize, linear: u64, data: &mut [u8]) -> Result<usize, Error> {
        self.walk(vcpu, linear, data.len(), |at, range| {
            self.memory.read(at, &mut data[range]).is_ok()
        })
    }

    /// Writes memory.
    pub(super) fn write(&self, vcpu: usize, linear: u64, data: &[u8]) -> Result<usize, Error> {
        self.walk(vcpu, linear, data.len(), |at, range| self.memory.write(at, &data[range]).is_ok())
    }

    /// Goes through a range page by page, with the guest-physical address of each.
    fn walk(
        &self,
        vcpu: usize,
        linear: u64,
        len: usize,
        mut each: impl FnMut(u64, std::ops::Range<usize>) -> bool,
    ) -> Result<usize, Error> {
        let Some(seat) = self.vcpus.get(vcpu) else { return Ok(0) };
        let mut done = 0;
        while done < len {
            let Some(address) = linear.checked_add(done as u64) else { break };
            let piece = (len - done).min((PAGE - address % PAGE) as usize);
            let Some(physical) = seat.vcpu.translate(address)? else { break };
            if !each(physical, done..done + piece) {
                break;
            }
            done += piece;
        }
        Ok(done)
    }
}

impl Seat {
    /// Takes an event in: it is stopped, unless it reports a stop that it no longer has to.
    fn take(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Paused { .. } => {
                let wanted = std::mem::take(&mut self.asked);
                self.stopped = true;
                if !wanted {
                    // Not ours to keep.
                    self.stopped = false;
                    self.vcpu.resume()?;
                }
            }
            // Its stop is still to be reported if one was asked for: the next resume brings it.
            Event::Debug { .. } => self.stopped = true,
            _ => self.vcpu.resume()?,
        }
        Ok(())
    }
}
