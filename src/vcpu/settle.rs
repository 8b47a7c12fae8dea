//! Bringing parked vCPUs out of the middle of an access.
//!
//! An instruction whose access waits for a device is not complete, and the state of a vCPU
//! has no place for what the device has begun. Such a vCPU is let go for a moment, while the
//! others stay parked, and parks again behind that instruction: the device has the time that
//! it needs, up to a deadline.

use super::{Next, Outstanding, PauseError, Space, VcpuState, Vcpus};
use crate::vcpu::pause::{self, Command};
use std::time::{Duration, Instant};

/// How long a vCPU is let go at first; twice as long with each round, up to the second.
const BREATH: [Duration; 2] = [Duration::from_micros(50), Duration::from_millis(5)];

/// Why a vCPU could not be brought out of its access. All stay paused, or park as soon as they
/// can: [`Vcpus::resume`] lets them go.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    /// The device does not finish it.
    #[error("vcpu {vcpu} waits for the device at {} {:#x}", space(.access.space), .access.addr)]
    Waits {
        /// The vCPU.
        vcpu: usize,
        /// What it waits for.
        access: Outstanding,
    },
    /// Nobody will finish it.
    #[error(
        "vcpu {vcpu} waits for the device at {} {:#x}, whose process is dead",
        space(.access.space), .access.addr
    )]
    Dead {
        /// The vCPU.
        vcpu: usize,
        /// What it waits for.
        access: Outstanding,
    },
    /// Something else happened in between.
    #[error(transparent)]
    Pause(#[from] PauseError),
}

fn space(space: Space) -> &'static str {
    match space {
        Space::Port => "port",
        Space::Mmio => "address",
    }
}

impl Vcpus {
    /// What each parked vCPU is in the middle of.
    pub fn outstanding(&self) -> &[Option<Outstanding>] {
        &self.outstanding
    }

    /// Has no vCPU in the middle of an access, `deadline` from now at the latest; no longer than
    /// until `is_dead` says of an access that nobody will finish it. To be called when all are
    /// paused.
    ///
    /// # Errors
    /// [`SettleError`]; none of them runs on then.
    pub fn settle(
        &mut self,
        deadline: Duration,
        is_dead: impl Fn(&Outstanding) -> bool,
    ) -> Result<(), SettleError> {
        let until = Instant::now() + deadline;
        let [mut breath, longest] = BREATH;
        let states = self.states().into_iter().enumerate();
        let late = states.filter(|(_, state)| *state == VcpuState::Pausing).map(|(id, _)| id);
        self.gather(late.collect(), until)?;
        loop {
            let waiting: Vec<(usize, Outstanding)> = (0..)
                .zip(&self.outstanding)
                .filter_map(|(id, access)| access.map(|access| (id, access)))
                .collect();
            let Some(&(vcpu, access)) = waiting.first() else { return Ok(()) };
            if Instant::now() >= until {
                return Err(SettleError::Waits { vcpu, access });
            }
            if let Some(&(vcpu, access)) = waiting.iter().find(|(_, access)| is_dead(access)) {
                return Err(SettleError::Dead { vcpu, access });
            }
            for (id, _) in &waiting {
                self.let_go(*id);
            }
            std::thread::sleep(breath);
            breath = longest.min(breath * 2);
            for (id, _) in &waiting {
                if self.seats[*id].cell.advance(VcpuState::Pausing).is_ok() {
                    self.kicks.request(*id, self.epoch);
                }
            }
            self.gather(waiting.iter().map(|(id, _)| *id).collect(), until)?;
        }
    }

    /// Waits until all of `missing` have parked again.
    fn gather(&mut self, mut missing: Vec<usize>, until: Instant) -> Result<(), PauseError> {
        let begun = Instant::now();
        // Parking takes microseconds: a vCPU that is let go late still gets the time.
        let until = until.max(begun + Duration::from_secs(1));
        while !missing.is_empty() {
            let ended = self.stopped();
            if !ended.is_empty() {
                return Err(PauseError::Ended { vcpus: ended });
            }
            match self.next_event(Some(until)) {
                Next::Event(super::Event::Parked(ack)) if ack.epoch == self.epoch => {
                    missing.retain(|id| *id != ack.vcpu);
                    self.parked_again(ack);
                }
                Next::Event(_) => {}
                Next::Late => missing.iter().for_each(|id| self.kicks.interrupt(*id)),
                // Who is missing is still asked to park: see `take_late`.
                Next::Deadline => {
                    return Err(PauseError::Absent { vcpus: missing, waited: begun.elapsed() });
                }
            }
        }
        Ok(())
    }

    /// A vCPU that was let go for a moment is back.
    fn parked_again(&mut self, ack: pause::Ack<Outstanding>) {
        // Refused for none: it is Pausing, and has parked instead of ending.
        let _ = self.seats[ack.vcpu].cell.advance(VcpuState::Paused);
        if let Some(outstanding) = self.outstanding.get_mut(ack.vcpu) {
            *outstanding = ack.outstanding;
        }
    }

    /// Hears of those that [`Vcpus::settle`] did not wait for any longer.
    pub(super) fn take_late(&mut self) {
        while self.states().contains(&VcpuState::Pausing)
            && let Next::Event(event) = self.next_event(Some(Instant::now()))
        {
            if let super::Event::Parked(ack) = event
                && ack.epoch == self.epoch
            {
                self.parked_again(ack);
            }
        }
    }

    /// Whether every vCPU is paused, or about to park again for a pause that holds them all.
    pub fn is_paused(&mut self) -> bool {
        self.take_late();
        let held = |state: &VcpuState| matches!(state, VcpuState::Pausing | VcpuState::Paused);
        self.states().iter().all(held)
    }

    /// Lets one parked vCPU run on.
    fn let_go(&self, id: usize) {
        let seat = &self.seats[id];
        if seat.cell.advance(VcpuState::Running).is_ok() {
            seat.tell(Command::Resume(self.epoch));
        }
    }

    /// Lets everyone run that can, parked or on the way there.
    pub(super) fn release_all(&self) {
        for (id, seat) in self.seats.iter().enumerate() {
            let arrived = seat.cell.get() == VcpuState::Paused;
            pause::release(self.kicks.state(id), self.epoch, arrived, |command| {
                seat.tell(command);
            });
            // Refused when it has ended.
            let _ = seat.cell.advance(VcpuState::Running);
        }
    }
}
