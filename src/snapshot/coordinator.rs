//! The order of a snapshot, without anything that carries it out.
//!
//! ```text
//! Running ─▶ Pausing ─▶ Draining ─▶ Frozen ─▶ Capturing ─▶ Held ─▶ Running
//!    ▲      (vCPUs)    (processes)                           └────▶ Stopped
//!    └──────────┴──────────┴──────────┴──────────┴── a failure: everyone is thawed
//! ```
//! One epoch runs through all of it: an answer with another is left over from a cut that was
//! given up, and counts for nothing. All answer or none is kept: a failure names the phase and
//! who failed, and leads back to Running, whatever had been reached.
//!
//! What is written to disk comes after Held, beside the guest, and fails by itself.

use std::fmt;

/// How far a cut is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// No cut is being made.
    Running,
    /// vCPUs are on their way to a halt.
    Pausing,
    /// Device processes and plugins finish what they hold.
    Draining,
    /// Nothing moves.
    Frozen,
    /// State and memory are being read.
    Capturing,
    /// The cut is complete and nothing has gone on yet.
    Held,
    /// The VM is not to go on.
    Stopped,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Running => "before the pause",
            Phase::Pausing => "pausing the vCPUs",
            Phase::Draining => "bringing the devices to rest",
            Phase::Frozen => "standing still",
            Phase::Capturing => "capturing",
            Phase::Held => "holding the cut",
            Phase::Stopped => "after the stop",
        })
    }
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Somebody wants a snapshot.
    Begin,
    /// Every vCPU has parked between two instructions.
    Parked,
    /// A process has come to rest and given its state.
    Acked {
        /// Its place among the participants.
        who: usize,
        /// The epoch it answers.
        epoch: u64,
    },
    /// Reading begins.
    Capture,
    /// State and memory are held.
    Captured,
    /// Everyone may go on.
    Thaw,
    /// Nobody goes on: the VM ends.
    Stop,
    /// Somebody failed.
    Failed {
        /// A process, or a part of the VMM.
        who: String,
        /// What went wrong.
        why: String,
    },
    /// The phase took longer than it may.
    Deadline,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Pause the vCPUs.
    Pause,
    /// Ask every process to come to rest.
    Quiesce,
    /// Wait for more of what is missing.
    Wait,
    /// Read state and memory.
    Capture,
    /// Write down what was read, or let everyone go on.
    Hold,
    /// Let everyone go on.
    Thaw,
    /// End the VM.
    Stop,
}

/// A snapshot that did not come about. Everyone goes on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{phase}: {who}: {why}")]
pub struct CutError {
    /// How far it was.
    pub phase: Phase,
    /// Who failed, or did not answer.
    pub who: String,
    /// What went wrong.
    pub why: String,
}

/// The cut that is being made, or none.
#[derive(Clone, Debug)]
pub struct Coordinator {
    phase: Phase,
    epoch: u64,
    participants: Vec<String>,
    missing: Vec<bool>,
}

impl Coordinator {
    /// No cut; what takes part in one are these processes, by name.
    pub fn new(participants: Vec<String>) -> Coordinator {
        Coordinator { phase: Phase::Running, epoch: 0, participants, missing: Vec::new() }
    }

    /// From the next cut on, these processes take part.
    pub fn participate(&mut self, participants: Vec<String>) {
        self.participants = participants;
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Number of this cut, or of the last one; the first is 1.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The processes that have not answered.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        let late = self.participants.iter().zip(&self.missing).filter(|(_, missing)| **missing);
        late.map(|(name, _)| name.as_str())
    }

    /// Takes one step.
    ///
    /// # Errors
    /// The cut is given up, and everyone has to be thawed. An input that has no place in this
    /// phase is a failure of whoever gave it.
    pub fn step(&mut self, input: Input) -> Result<Action, CutError> {
        use Phase::{Capturing, Draining, Frozen, Held, Pausing, Running, Stopped};
        let (phase, action) = match (self.phase, input) {
            (Running, Input::Begin) => {
                self.epoch += 1;
                self.missing = vec![true; self.participants.len()];
                (Pausing, Action::Pause)
            }
            (Pausing, Input::Parked) if self.participants.is_empty() => (Frozen, Action::Capture),
            (Pausing, Input::Parked) => (Draining, Action::Quiesce),
            (Draining, Input::Acked { who, epoch }) if epoch == self.epoch => {
                match self.missing.get_mut(who) {
                    Some(missing) => *missing = false,
                    None => return Err(self.fail("a process", "it takes no part")),
                }
                if self.missing.contains(&true) {
                    (Draining, Action::Wait)
                } else {
                    (Frozen, Action::Capture)
                }
            }
            // Of a cut that was given up.
            (phase, Input::Acked { epoch, .. }) if epoch != self.epoch => (phase, Action::Wait),
            (Frozen, Input::Capture) => (Capturing, Action::Capture),
            (Capturing, Input::Captured) => (Held, Action::Hold),
            (Held, Input::Thaw) => (Running, Action::Thaw),
            (Held, Input::Stop) => (Stopped, Action::Stop),
            (Running | Stopped, Input::Deadline | Input::Failed { .. }) => {
                (self.phase, Action::Wait)
            }
            (_, Input::Failed { who, why }) => return Err(self.fail(&who, &why)),
            (Draining, Input::Deadline) => {
                let late = self.missing().collect::<Vec<_>>().join(", ");
                return Err(self.fail(&late, "no answer in time"));
            }
            (_, Input::Deadline) => return Err(self.fail("the VMM", "not done in time")),
            (Stopped, _) => (Stopped, Action::Stop),
            (Running, _) => (Running, Action::Wait),
            (_, input) => return Err(self.fail("the VMM", &format!("{input:?} has no place here"))),
        };
        self.phase = phase;
        Ok(action)
    }

    fn fail(&mut self, who: &str, why: &str) -> CutError {
        let phase = std::mem::replace(&mut self.phase, Phase::Running);
        CutError { phase, who: who.to_string(), why: why.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn two() -> Coordinator {
        Coordinator::new(vec!["serial com1".into(), "blk disk0".into()])
    }

    fn acked(who: usize, epoch: u64) -> Input {
        Input::Acked { who, epoch }
    }

    fn failed() -> Input {
        Input::Failed { who: "blk disk0".into(), why: "it died".into() }
    }

    /// The steps of a cut of [`two`], and what each leads to.
    fn good() -> [(Input, Action, Phase); 7] {
        [
            (Input::Begin, Action::Pause, Phase::Pausing),
            (Input::Parked, Action::Quiesce, Phase::Draining),
            (acked(1, 1), Action::Wait, Phase::Draining),
            (acked(0, 1), Action::Capture, Phase::Frozen),
            (Input::Capture, Action::Capture, Phase::Capturing),
            (Input::Captured, Action::Hold, Phase::Held),
            (Input::Thaw, Action::Thaw, Phase::Running),
        ]
    }

    fn after(steps: usize) -> Coordinator {
        let mut cut = two();
        for (input, action, phase) in good().into_iter().take(steps) {
            assert_eq!(cut.step(input), Ok(action));
            assert_eq!(cut.phase(), phase);
        }
        cut
    }

    #[test]
    fn a_cut_goes_through_all_phases_and_can_be_made_again() {
        let mut cut = after(7);
        assert_eq!(cut.step(Input::Begin), Ok(Action::Pause));
        assert_eq!(cut.epoch(), 2);
        let mut end = after(6);
        assert_eq!(end.step(Input::Stop), Ok(Action::Stop));
        assert_eq!(end.step(Input::Begin), Ok(Action::Stop));
        assert_eq!(end.phase(), Phase::Stopped);
        let mut none = Coordinator::new(Vec::new());
        assert_eq!(none.step(Input::Begin), Ok(Action::Pause));
        assert_eq!(none.step(Input::Parked), Ok(Action::Capture));
    }

    #[test]
    fn a_failure_in_any_phase_names_it_and_leads_back() {
        for steps in 1..=6 {
            let mut cut = after(steps);
            let phase = cut.phase();
            let error = cut.step(failed()).unwrap_err();
            assert_eq!((error.phase, error.who.as_str()), (phase, "blk disk0"));
            assert_eq!(cut.phase(), Phase::Running);
            assert_eq!(cut.step(Input::Begin), Ok(Action::Pause), "the next one may work");
        }
        assert_eq!(two().step(failed()), Ok(Action::Wait), "nobody was stopped");
    }

    #[test]
    fn a_deadline_names_the_laggards() {
        let mut cut = after(3);
        let error = cut.step(Input::Deadline).unwrap_err();
        assert_eq!(
            error.to_string(),
            "bringing the devices to rest: serial com1: no answer in time"
        );
        let error = after(2).step(Input::Deadline).unwrap_err();
        assert_eq!(error.who, "serial com1, blk disk0");
        for steps in [1, 4, 5, 6] {
            let mut cut = after(steps);
            assert!(cut.step(Input::Deadline).is_err());
            assert_eq!(cut.phase(), Phase::Running);
        }
    }

    #[test]
    fn an_answer_of_another_epoch_counts_for_nothing() {
        let mut cut = after(2);
        assert!(cut.step(Input::Deadline).is_err());
        assert_eq!(cut.step(Input::Begin), Ok(Action::Pause));
        assert_eq!(cut.step(Input::Parked), Ok(Action::Quiesce));
        for who in [0, 1] {
            assert_eq!(cut.step(acked(who, 1)), Ok(Action::Wait));
        }
        assert_eq!(cut.missing().count(), 2);
        assert_eq!(cut.step(acked(7, 2)).unwrap_err().phase, Phase::Draining);
    }

    #[test]
    fn what_has_no_place_gives_the_cut_up() {
        let inputs = [
            Input::Begin,
            Input::Parked,
            Input::Capture,
            Input::Captured,
            Input::Thaw,
            Input::Stop,
        ];
        for steps in 1..=6 {
            let wanted = good()[steps].0.clone();
            for input in &inputs {
                let fits = *input == wanted || steps == 6 && *input == Input::Stop;
                let mut cut = after(steps);
                assert_eq!(cut.step(input.clone()).is_ok(), fits, "{input:?} after {steps}");
                assert!(fits || cut.phase() == Phase::Running);
            }
        }
    }

    proptest! {
        /// Whatever comes in whatever order, nothing is captured before every vCPU has parked
        /// and every process has answered in this epoch.
        #[test]
        fn nothing_is_captured_early(inputs in prop::collection::vec((0usize..9, 0usize..2, 0u64..3), 0..40)) {
            let mut cut = two();
            let (mut parked, mut answers) = (false, [false; 2]);
            for (kind, who, back) in inputs {
                let epoch = cut.epoch().saturating_sub(back);
                let before = cut.phase();
                let input = match kind {
                    0 => Input::Begin,
                    1 => Input::Parked,
                    2 => acked(who, epoch),
                    3 => Input::Capture,
                    4 => Input::Captured,
                    5 => Input::Thaw,
                    6 => Input::Stop,
                    7 => Input::Deadline,
                    _ => failed(),
                };
                let result = cut.step(input.clone());
                if before == Phase::Running && input == Input::Begin {
                    (parked, answers) = (false, [false; 2]);
                }
                if let (Input::Parked, Phase::Pausing) = (&input, before) {
                    parked = true;
                }
                if let (Input::Acked { who, .. }, Phase::Draining, true) = (&input, before, epoch == cut.epoch()) {
                    answers[*who] = true;
                }
                if matches!(cut.phase(), Phase::Frozen | Phase::Capturing | Phase::Held) {
                    prop_assert!(parked && answers == [true; 2]);
                }
                prop_assert!(result.is_ok() || cut.phase() == Phase::Running);
            }
        }
    }
}
