//! When a VM is to be written down by itself.
//!
//! | priority | trigger | due | settles first |
//! |---|---|---|---|
//! | 1 | heartbeat | so many heartbeats were counted | yes |
//! | 2 | pre-exec | the guest is about to run its workload | no: it waits there |
//! | 3 | listener | the workload listens | yes |
//! | 4 | parked | the workload is done waiting, and nothing listens | no |
//! | 5 | wall clock | so much time has passed | no |
//!
//! Whatever the trigger, the cut brings every process to rest.

use std::path::PathBuf;
use std::time::Duration;

use cellblock_devices::protocol::Marker;

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotResources {
    /// So many milliseconds after the start.
    pub after_ms: Option<u64>,
    /// At this heartbeat, counted from 1.
    pub at_heartbeat: Option<u64>,
    /// When the workload listens; or, where it does not, when it is parked.
    pub on_listener: bool,
    /// Just before the workload runs.
    pub on_pre_exec: bool,
    /// How long to let things settle after a heartbeat or a listener, in milliseconds.
    pub quiesce_ms: u64,
    /// Where the snapshot is to be.
    pub out_path: Option<PathBuf>,
}

/// Options that do not go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResourcesError {
    /// There is a trigger and no place.
    #[error("a snapshot is to be taken, but not where: add --snapshot-out DIR")]
    NoPlace,
    /// There is a place and no trigger.
    #[error(
        "--snapshot-out says where but not when: add --snapshot-after-ms, \
         --snapshot-at-heartbeat, --snapshot-on-listener or --snapshot-on-pre-exec"
    )]
    NoTrigger,
    /// Heartbeats are counted from 1.
    #[error("heartbeats are counted from 1: give --snapshot-at-heartbeat 1 or more")]
    NoHeartbeat,
}

impl SnapshotResources {
    /// Whether anything is asked for at all.
    pub fn check(&self) -> Result<bool, ResourcesError> {
        let wanted = self.after_ms.is_some()
            || self.at_heartbeat.is_some()
            || self.on_listener
            || self.on_pre_exec;
        match (&self.out_path, wanted) {
            _ if self.at_heartbeat == Some(0) => Err(ResourcesError::NoHeartbeat),
            (None, true) => Err(ResourcesError::NoPlace),
            (Some(_), false) => Err(ResourcesError::NoTrigger),
            (place, _) => Ok(place.is_some()),
        }
    }
}

/// What the guest has shown so far, and how long it has run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signs {
    /// Heartbeats counted.
    pub heartbeats: u64,
    /// It is about to run its workload.
    pub pre_exec: bool,
    /// Something listens.
    pub listening: bool,
    /// The workload is parked.
    pub parked: bool,
    /// Since the start.
    pub elapsed: Duration,
}

impl Signs {
    /// Takes in what the guest says.
    pub fn see(&mut self, marker: Marker) {
        match marker {
            Marker::Heartbeat => self.heartbeats = self.heartbeats.saturating_add(1),
            Marker::PreExec => self.pre_exec = true,
            Marker::Listener => self.listening = true,
            Marker::ListenerGone => self.listening = false,
            Marker::Parked => self.parked = true,
        }
    }
}

/// What a snapshot was taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trigger {
    /// Enough heartbeats.
    Heartbeat,
    /// The workload is about to run.
    PreExec,
    /// Something listens.
    Listener,
    /// The workload is parked.
    Parked,
    /// Enough time.
    WallClock,
}

impl Trigger {
    /// As the state of the snapshot names it.
    pub fn name(self) -> &'static str {
        match self {
            Trigger::Heartbeat => "heartbeat",
            Trigger::PreExec => "pre-exec",
            Trigger::Listener => "listener",
            Trigger::Parked => "parked",
            Trigger::WallClock => "after-ms",
        }
    }

    /// How long to wait before the cut.
    pub fn settle(self, resources: &SnapshotResources) -> Duration {
        match self {
            Trigger::Heartbeat | Trigger::Listener => Duration::from_millis(resources.quiesce_ms),
            Trigger::PreExec | Trigger::Parked | Trigger::WallClock => Duration::ZERO,
        }
    }
}

/// The trigger that is due, the most important one where there are several.
pub fn due(resources: &SnapshotResources, signs: &Signs) -> Option<Trigger> {
    let after = resources.after_ms.map(Duration::from_millis);
    if resources.at_heartbeat.is_some_and(|n| signs.heartbeats >= n) {
        Some(Trigger::Heartbeat)
    } else if resources.on_pre_exec && signs.pre_exec {
        Some(Trigger::PreExec)
    } else if resources.on_listener && signs.listening {
        Some(Trigger::Listener)
    } else if resources.on_listener && signs.parked {
        Some(Trigger::Parked)
    } else if after.is_some_and(|after| signs.elapsed >= after) {
        Some(Trigger::WallClock)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Trigger::{Heartbeat, Listener, Parked, PreExec, WallClock};

    fn all() -> SnapshotResources {
        SnapshotResources {
            after_ms: Some(100),
            at_heartbeat: Some(3),
            on_listener: true,
            on_pre_exec: true,
            quiesce_ms: 7,
            out_path: Some("out".into()),
        }
    }

    /// Makes `trigger` due.
    fn show(signs: &mut Signs, trigger: Trigger) {
        match trigger {
            Heartbeat => (0..3).for_each(|_| signs.see(Marker::Heartbeat)),
            PreExec => signs.see(Marker::PreExec),
            Listener => signs.see(Marker::Listener),
            Parked => signs.see(Marker::Parked),
            WallClock => signs.elapsed = Duration::from_millis(100),
        }
    }

    const EVERY: [Trigger; 5] = [Heartbeat, PreExec, Listener, Parked, WallClock];

    #[test]
    fn of_every_pair_the_more_important_wins() {
        for one in EVERY {
            for other in EVERY {
                let mut signs = Signs::default();
                show(&mut signs, one);
                assert_eq!(due(&all(), &signs), Some(one));
                show(&mut signs, other);
                assert_eq!(due(&all(), &signs), Some(one.min(other)), "{one:?} and {other:?}");
            }
        }
    }

    #[test]
    fn only_what_was_asked_for_is_due() {
        type Off = fn(&mut SnapshotResources);
        let off: [(Trigger, Off); 5] = [
            (Heartbeat, |r| r.at_heartbeat = None),
            (PreExec, |r| r.on_pre_exec = false),
            (Listener, |r| r.on_listener = false),
            (Parked, |r| r.on_listener = false),
            (WallClock, |r| r.after_ms = None),
        ];
        for (trigger, off) in off {
            let mut signs = Signs::default();
            show(&mut signs, trigger);
            let mut resources = all();
            off(&mut resources);
            assert_eq!(due(&resources, &signs), None, "{trigger:?}");
        }
        assert_eq!(due(&all(), &Signs::default()), None);
    }

    #[test]
    fn a_listener_that_is_gone_does_not_count_and_two_heartbeats_are_not_three() {
        let mut signs = Signs::default();
        signs.see(Marker::Listener);
        signs.see(Marker::ListenerGone);
        signs.see(Marker::Heartbeat);
        signs.see(Marker::Heartbeat);
        signs.elapsed = Duration::from_millis(99);
        assert_eq!(due(&all(), &signs), None);
        signs.see(Marker::Parked);
        assert_eq!(due(&all(), &signs), Some(Parked));
    }

    #[test]
    fn things_settle_after_a_heartbeat_and_a_listener() {
        let settles = EVERY.map(|trigger| trigger.settle(&all()).as_millis());
        assert_eq!(settles, [7, 0, 7, 0, 0]);
    }

    #[test]
    fn a_trigger_needs_a_place_and_a_place_a_trigger() {
        let none = SnapshotResources::default();
        assert_eq!(none.check(), Ok(false));
        assert_eq!(all().check(), Ok(true));
        let nowhere = SnapshotResources { out_path: None, ..all() };
        assert_eq!(nowhere.check(), Err(ResourcesError::NoPlace));
        let never = SnapshotResources { out_path: all().out_path, ..none };
        assert_eq!(never.check(), Err(ResourcesError::NoTrigger));
        let zeroth = SnapshotResources { at_heartbeat: Some(0), ..all() };
        assert_eq!(zeroth.check(), Err(ResourcesError::NoHeartbeat));
    }
}
