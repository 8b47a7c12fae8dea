//! Messages of the control socket: newline-delimited JSON over a Unix stream socket.
//!
//! A client writes one [`Request`] a line, `{"request":"pause"}`, and gets one
//! [`Reply`] a line, in the order of its requests. A reply names its kind in
//! `"reply"`: that of the request, or `"error"`. After `{"request":"events"}` the
//! connection carries [`Event`]s, one a line, first those of the recent past, until
//! the VM ends. A line that is no request is answered with an error, and the
//! connection closed.
//!
//! The shapes are stable: fields are added, never renamed, removed or given another
//! meaning; readers ignore what they do not know. Times are microseconds, sizes bytes
//! unless the name says otherwise.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use cellblock_devices::protocol::ThrottleLimits;
use cellblock_devices::protocol::counters::VirtioBlkCountersSnapshot;
use serde::{Deserialize, Serialize};

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Park every vCPU. Refused while the VM is not running.
    Pause,
    /// Let the vCPUs go on. Refused while the VM is not paused, or held for another connection.
    Resume,
    /// End the VM, paused or not.
    Stop,
    /// State and counters.
    Stats,
    /// Every process of the VM.
    Ps,
    /// Change what a disk may do. Limits that are not given stay; zero is no limit.
    Throttle {
        /// Id of the disk.
        id: String,
        /// Bytes a second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bw: Option<u64>,
        /// Bytes that may go at once; those of one second where `bw` is given without.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bw_burst: Option<u64>,
        /// Requests a second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        iops: Option<u64>,
        /// Requests that may go at once, as above.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        iops_burst: Option<u64>,
    },
    /// Make a cut through all processes. The reply comes with file descriptors, for who
    /// asks by recvmsg: the state, guest memory as of the cut, what was written to `cow` disks.
    Snapshot {
        /// Stand still afterwards, until this connection asks to `resume`, or ends, or the VM does;
        /// guest memory is then not copied.
        #[serde(default)]
        hold: bool,
        /// Copy memory while the guest runs, and only what it wrote meanwhile in the cut.
        #[serde(default)]
        live: bool,
        /// How long each phase may take, in microseconds; 5 s where not given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout_us: Option<u64>,
        /// What asks for it, as the state will say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        trigger: Option<String>,
    },
    /// Ask whether this connection still holds the VM: what was read so far is then of the cut.
    Held,
    /// The last cut that this VM made was written down as the snapshot of this id: what is
    /// written from then on can be a diff to it.
    Kept {
        /// 32 hexadecimal digits.
        id: String,
    },
    /// Put a restored VM back to its snapshot, in place.
    Reset,
    /// Be answered when the VM is to take a snapshot by itself.
    AwaitTrigger,
    /// Turn this connection into a stream of events.
    Events,
}

/// What a client is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// All vCPUs are parked.
    Pause {
        /// Number of this pause.
        epoch: u64,
        /// From the request to the last vCPU parked, in microseconds.
        took_us: u64,
    },
    /// All vCPUs run again.
    Resume {
        /// Number of the pause that ended.
        epoch: u64,
        /// From the request to the last vCPU released, in microseconds.
        took_us: u64,
    },
    /// The VM stands still for this connection.
    Held,
    /// The VM knows that its cut was kept.
    Kept,
    /// The VM stops; the socket goes away when it has.
    Stop,
    /// State and counters.
    Stats(Box<Stats>),
    /// Every process of the VM.
    Ps {
        /// The VMM first, then the spawner, then the devices.
        processes: Vec<Process>,
    },
    /// The cut is made.
    Snapshot(SnapshotReport),
    /// The VM is where its snapshot is, and goes on.
    Reset {
        /// Number of the pause it was done in.
        epoch: u64,
        /// From the request until the guest ran on, in microseconds.
        took_us: u64,
        /// Pages of guest memory that were put back.
        pages: u64,
    },
    /// It is time.
    Trigger {
        /// `heartbeat`, `pre-exec`, `listener`, `parked`, `after-ms`; empty where the VM has
        /// ended first.
        trigger: String,
    },
    /// What the disk may do from now on.
    Throttle {
        /// Id of the disk.
        id: String,
        /// All its limits.
        #[serde(flatten)]
        limits: Limits,
    },
    /// Events follow on this connection.
    Events,
    /// The request was not carried out.
    Error {
        /// One line: what went wrong.
        message: String,
        /// What to do about it, if anything.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        remedy: Option<String>,
    },
}

impl Reply {
    /// An error with an optional remedy.
    pub fn error(message: impl Into<String>, remedy: Option<&str>) -> Reply {
        Reply::Error { message: message.into(), remedy: remedy.map(str::to_owned) }
    }
}

/// A cut, and how long each part of it took, in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Number of the pause it was made in.
    pub epoch: u64,
    /// Until the last vCPU had parked between two instructions.
    pub pause_us: u64,
    /// Until the last process had come to rest.
    pub drain_us: u64,
    /// Reading registers, controllers and devices.
    pub capture_us: u64,
    /// Copying guest memory.
    pub memory_us: u64,
    /// Before everything else, with the guest running: copying memory in rounds. 0 where
    /// the cut is not a live one.
    #[serde(default)]
    pub rounds_us: u64,
    /// How many rounds there were.
    #[serde(default)]
    pub rounds: u32,
    /// Pages copied while the guest stood still; all that have anything, but for a live cut.
    #[serde(default)]
    pub last_pages: u64,
    /// The snapshot since which all that was written is known: a set of pages then follows the
    /// other descriptors, a bit for each, and the cut can be written down as a diff to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Plugins that have part of the machine and gave no state: with one of them the snapshot is
    /// for inspection, and no VM can go on from it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<String>,
    /// Letting everyone go on; 0 where the VM is held.
    pub thaw_us: u64,
    /// From the request until the guest ran on: all of the above.
    pub still_us: u64,
    /// Bytes of guest memory.
    pub memory: u64,
    /// Bytes of the state.
    pub state: u64,
    /// The disks of the VM that it refers to.
    pub disks: Vec<SnapshotDisk>,
}

/// A disk that a cut refers to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotDisk {
    /// Its id.
    pub id: String,
    /// The image.
    pub path: std::path::PathBuf,
    /// The guest's writes are not in the image: a descriptor with them follows the first two,
    /// in the order of the disks that have one.
    pub cow: bool,
}

/// State of the VM, or of one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Made, not yet started.
    Created,
    /// Executing the guest.
    Running,
    /// Asked to pause, not yet parked.
    Pausing,
    /// Parked.
    Paused,
    /// Ended.
    Stopped,
}

/// State of a device process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// Being jailed and prepared.
    Starting,
    /// Serving.
    Running,
    /// Died.
    Dead,
    /// Its process died too often: it gives nothing but errors.
    Failed,
}

/// Answer to [`Request::Stats`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Version of the program that runs the VM.
    pub version: String,
    /// Process id of the VMM.
    pub pid: i32,
    /// State of the VM.
    pub state: State,
    /// Number of the last pause; 0 before the first.
    pub epoch: u64,
    /// Since the VM was made, in microseconds.
    pub uptime_us: u64,
    /// Bytes of guest memory.
    pub memory: u64,
    /// In the order of their ids.
    pub vcpus: Vec<VcpuStats>,
    /// In the order of the command line.
    pub disks: Vec<DiskStats>,
    /// The serial lines.
    pub serials: Vec<SerialStats>,
    /// What the start of the VM, or its restore, went through before the guest ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<Phase>,
    /// Where programs attach; absent where they cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugin_socket: Option<PathBuf>,
}

/// A part of a start or a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Its name: `open`, `ask`, `machine`, `guest`, `jails`, `threads`, `state`, `run`.
    pub phase: String,
    /// When it was over, in microseconds from the beginning of the first.
    pub done_us: u64,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStats {
    /// From 0.
    pub id: u32,
    /// What it is doing.
    pub state: State,
    /// Exits to the VMM by kind (`io-in`, `io-out`, `mmio-read`, ...); absent where not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits: Option<BTreeMap<String, u64>>,
}

/// What a disk may do; what is absent has no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw: Option<u64>,
    /// Bytes that may go at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw_burst: Option<u64>,
    /// Requests a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Requests that may go at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
}

impl From<ThrottleLimits> for Limits {
    fn from(limits: ThrottleLimits) -> Limits {
        Limits {
            bw: limits.bytes.map(|rate| rate.per_second),
            bw_burst: limits.bytes.map(|rate| rate.burst),
            iops: limits.requests.map(|rate| rate.per_second),
            iops_burst: limits.requests.map(|rate| rate.burst),
        }
    }
}

/// One disk. Counters are those the device process shows, cumulative.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStats {
    /// Its id in the VM.
    pub id: String,
    /// Its process; absent while there is none.
    pub pid: Option<i32>,
    /// How often another process took the place of one that died.
    #[serde(default)]
    pub restarts: u64,
    /// State of its process.
    pub state: DeviceState,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Bytes.
    pub size: u64,
    /// The same as `reads_completed`.
    pub reads: u64,
    /// The same as `writes_completed`.
    pub writes: u64,
    /// The same as `flushes_completed`.
    pub flushes: u64,
    /// The same as `io_errors`.
    pub errors: u64,
    /// What it may do.
    #[serde(default)]
    pub throttle: Limits,
    /// The sum over the queues.
    #[serde(flatten)]
    pub counters: VirtioBlkCountersSnapshot,
    /// Each queue, from 0.
    #[serde(default)]
    pub queues: Vec<VirtioBlkCountersSnapshot>,
}

/// One serial line. Counters as for a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialStats {
    /// Its id in the VM.
    pub id: String,
    /// Its process; absent while there is none.
    pub pid: Option<i32>,
    /// How often another process took the place of one that died.
    #[serde(default)]
    pub restarts: u64,
    /// State of its process.
    pub state: DeviceState,
    /// Bytes the guest wrote.
    pub output: u64,
    /// Bytes handed to the guest.
    pub input: u64,
    /// Bytes of output dropped because their reader did not keep up.
    pub dropped: u64,
}

/// One process of the VM, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// `vmm`, `spawner`, `blk`, `serial`.
    pub role: String,
    /// Id of the device it serves; empty for the VMM and the spawner.
    pub id: String,
    /// Host process id.
    pub pid: i32,
    /// Real user id, as the host sees it.
    pub uid: u32,
    /// Seccomp mode of the main thread: 0 none, 2 filter.
    pub seccomp: u8,
    /// Whether no_new_privs is set.
    pub no_new_privs: bool,
    /// Effective capabilities.
    pub cap_eff: CapSet,
    /// Permitted capabilities.
    pub cap_prm: CapSet,
    /// Bounding set.
    pub cap_bnd: CapSet,
    /// Namespace inode by kind: `user`, `mnt`, `pid`, `net`, `ipc`, `uts`, `cgroup`.
    pub namespaces: BTreeMap<String, u64>,
    /// Resident memory in KiB, shared pages counted in full.
    pub rss_kib: u64,
    /// Proportional set size in KiB: shared pages divided among their users.
    pub pss_kib: u64,
    /// Its threads.
    pub threads: Vec<Thread>,
}

/// One thread of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Its name.
    pub name: String,
    /// Host thread id.
    pub tid: i32,
    /// Its seccomp mode: 0 none, 2 filter.
    pub seccomp: u8,
}

/// A set of capabilities; 16 hexadecimal digits in JSON, as in `/proc/PID/status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct CapSet(pub u64);

impl fmt::Display for CapSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<CapSet> for String {
    fn from(set: CapSet) -> String {
        set.to_string()
    }
}

impl TryFrom<String> for CapSet {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<CapSet, Self::Error> {
        u64::from_str_radix(&text, 16).map(CapSet)
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn requests_read_as_documented() {
        for (text, request) in [
            (r#"{"request":"pause"}"#, Request::Pause),
            (r#"{"request":"resume"}"#, Request::Resume),
            (r#"{"request":"stop"}"#, Request::Stop),
            (r#"{"request":"stats"}"#, Request::Stats),
            (r#"{"request":"ps"}"#, Request::Ps),
            (r#"{"request":"events"}"#, Request::Events),
            (
                r#"{"request":"throttle","id":"disk0","iops":500}"#,
                Request::Throttle {
                    id: "disk0".into(),
                    bw: None,
                    bw_burst: None,
                    iops: Some(500),
                    iops_burst: None,
                },
            ),
        ] {
            assert_eq!(json(&request), text);
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        }
        assert!(serde_json::from_str::<Request>(r#"{"request":"throttle","bw":1}"#).is_err());
        for text in ["", "{}", "[]", "pause", r#"{"request":"explode"}"#, r#"{"request":1}"#] {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn replies_and_events_have_their_stable_shape() {
        assert_eq!(
            json(&Reply::Pause { epoch: 3, took_us: 41 }),
            r#"{"reply":"pause","epoch":3,"took_us":41}"#
        );
        let limits = Limits { iops: Some(5), iops_burst: Some(6), ..Limits::default() };
        assert_eq!(
            json(&Reply::Throttle { id: "disk0".into(), limits }),
            r#"{"reply":"throttle","id":"disk0","iops":5,"iops_burst":6}"#
        );
        assert_eq!(json(&Reply::Stop), r#"{"reply":"stop"}"#);
        assert_eq!(
            json(&Reply::error("no", Some("yes"))),
            r#"{"reply":"error","message":"no","remedy":"yes"}"#
        );
        assert_eq!(json(&CapSet(0x1ff)), r#""00000000000001ff""#);
        let event = Event {
            seq: 2,
            time_us: 5,
            kind: EventKind::Marker { marker: "heartbeat".into(), source: "port".into() },
        };
        let text = r#"{"seq":2,"time_us":5,"event":"marker","marker":"heartbeat","source":"port"}"#;
        assert_eq!(json(&event), text);
        assert_eq!(serde_json::from_str::<Event>(text).unwrap(), event);
        assert_eq!(
            json(&EventKind::Shutdown { reason: Shutdown::PowerOff, message: None }),
            r#"{"event":"shutdown","reason":"power-off"}"#
        );
    }
}
