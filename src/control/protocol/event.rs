//! What happens to a VM.

use serde::{Deserialize, Serialize};

/// Something that happened to the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// From 1, without gaps: a gap in what a client sees is what it missed.
    pub seq: u64,
    /// Microseconds since the Unix epoch.
    pub time_us: u64,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened, named in `"event"`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// The vCPUs run for the first time.
    Start,
    /// All vCPUs are parked.
    Pause {
        /// Number of the pause.
        epoch: u64,
        /// From the request to the last vCPU parked, in microseconds.
        took_us: u64,
    },
    /// The vCPUs run again.
    Resume {
        /// Number of the pause that ended.
        epoch: u64,
    },
    /// A cut was made; what follows is its client's to do.
    Snapshot {
        /// Number of the pause it was made in.
        epoch: u64,
        /// How long the guest stood still, in microseconds; 0 where it is held.
        still_us: u64,
    },
    /// A cut was given up, and everyone goes on.
    SnapshotFailed {
        /// How far it was.
        phase: String,
        /// Who failed or did not answer.
        who: String,
        /// What went wrong.
        why: String,
    },
    /// The VM was put back to its snapshot.
    Reset {
        /// Number of the pause it was done in.
        epoch: u64,
        /// From the request until the guest ran on, in microseconds.
        took_us: u64,
        /// Pages of guest memory that were put back.
        pages: u64,
    },
    /// The guest reported readiness.
    Marker {
        /// `heartbeat`, `pre-exec`, `listener`, `listener-gone`, `parked`.
        marker: String,
        /// `port` or `console`.
        source: String,
    },
    /// A device process ended without being asked to.
    DeviceDied {
        /// `blk`, `serial`.
        role: String,
        /// Id of the device.
        id: String,
        /// Host process id it had.
        pid: i32,
        /// `exit status 1`, `signal 9 (SIGKILL)`.
        how: String,
    },
    /// Another process has taken the place of one that died; to the guest it was a delay.
    DeviceReplaced {
        /// `blk`, `serial`.
        role: String,
        /// Id of the device.
        id: String,
        /// Host process id of the new one.
        pid: i32,
        /// How often that happened to this device.
        restarts: u64,
        /// From the death to the device being as it was, in microseconds.
        took_us: u64,
    },
    /// The processes of a device died too often: it gives nothing but errors from now on.
    DeviceFailed {
        /// `blk`, `serial`.
        role: String,
        /// Id of the device.
        id: String,
        /// How many died within 10 s.
        deaths: u64,
    },
    /// A device process gave no sign of life for too long, and is ended.
    DeviceHung {
        /// `blk`, `serial`.
        role: String,
        /// Id of the device.
        id: String,
        /// The process.
        pid: i32,
    },
    /// A device process does not answer the guest: reads give 0xff, writes are dropped,
    /// until it moves again.
    DeviceStalled {
        /// `serial`.
        role: String,
        /// Id of the device.
        id: String,
    },
    /// The back end of a `vhost-user=` disk closed its connection or did not answer.
    BackEndGone {
        /// Id of the disk.
        id: String,
    },
    /// There is a connection to a back end that was gone.
    BackEndBack {
        /// Id of the disk.
        id: String,
        /// The disk went on where it was; else its driver has to reset it.
        resumed: bool,
    },
    /// The driver of a device broke the rules of its queue and has to reset it.
    NeedsReset {
        /// Id of the device.
        id: String,
    },
    /// A process made a system call its policy does not allow.
    Violation {
        /// `blk disk0`.
        process: String,
        /// The system call: `openat (257)`.
        syscall: String,
        /// Name and id of the thread.
        thread: String,
    },
    /// The VM ends; the last event.
    Shutdown {
        /// Why.
        reason: Shutdown,
        /// The error's line, where there was one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message: Option<String>,
    },
}

/// Why a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shutdown {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset, or triple-faulted.
    Reset,
    /// Somebody outside stopped it: a control client, a signal, the console's escape.
    Stopped,
    /// The VM could not go on.
    Error,
}
