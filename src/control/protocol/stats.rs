//! How a VM and its devices stand: states and counters.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cellblock_devices::protocol::ThrottleLimits;
use cellblock_devices::protocol::counters::VirtioBlkCountersSnapshot;
use serde::{Deserialize, Serialize};

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

/// Answer to [`Request::Stats`](super::Request::Stats).
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
