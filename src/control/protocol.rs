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

mod event;
mod process;
mod stats;

use serde::{Deserialize, Serialize};

pub use event::{Event, EventKind, Shutdown};
pub use process::{CapSet, Process, Thread};
pub use stats::{DeviceState, DiskStats, Limits, Phase, SerialStats, State, Stats, VcpuStats};

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
