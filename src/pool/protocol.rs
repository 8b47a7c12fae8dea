//! What a pool and its shells say to each other, over the socket that a shell has for standard
//! input. Its end is the shell's end.
//!
//! | the pool says | fds | the shell answers |
//! |---|---|---|
//! | `Prepare`, once | | `Ready` or `Failed` |
//! | `Claim` | with `Parts`: guest memory, the state | `Claimed` or `Failed` |
//! | `Reset` | | `Ready` or `Failed` |
//! | `End` | | nothing: it ends |
//!
//! After `Failed` it ends. Whatever else it says is not listened to.

use std::path::PathBuf;

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use serde::{Deserialize, Serialize};

use crate::spec::DiskSpec;
use crate::vmm::restore::DiskOverride;

/// The pool's messages.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToShell {
    /// Become a shell.
    Prepare(Box<Preparation>),
    /// Become a VM.
    Claim(Box<Claim>),
    /// Become a shell again, for another VM.
    Reset {
        /// Of that.
        id: [u8; 16],
    },
    /// End, and leave nothing.
    End,
}

/// What to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Preparation {
    /// Of the VM to be.
    pub id: [u8; 16],
    /// Where to make the control socket.
    pub control: PathBuf,
    /// Where to make the console's.
    pub console: PathBuf,
    /// How far to go already.
    pub stage: Stage,
    /// False only with `--disable-sandbox`.
    pub sandbox: bool,
    /// What happens on a system call outside a policy.
    pub seccomp: SeccompMode,
    /// What is logged.
    pub log: LogLevel,
}

/// How far a shell goes before its claim.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Stage {
    /// All the way, for one snapshot.
    Primed {
        /// Where it is.
        snapshot: PathBuf,
        /// Which it has to be.
        id: [u8; 16],
        /// What is different about its disks.
        disks: Vec<DiskOverride>,
        /// Note what is written, so that a reset is quick.
        track: bool,
    },
    /// As far as the machine goes, for any snapshot of one like it.
    Shape(Shape),
}

/// What a machine is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Bytes of guest memory.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Its disks, each with its id.
    pub disks: Vec<DiskSpec>,
}

/// What to become.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Claim {
    /// Where from; nothing for a primed shell.
    pub from: Option<Origin>,
    /// For the guest.
    pub data: Vec<u8>,
    /// Disks that are to be others. Of each the image comes along, and of a cow disk the two
    /// files of its overlay; of a primed shell only.
    pub disks: Vec<OtherDisk>,
}

/// A disk in the place of one that a shell has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OtherDisk {
    /// Of the same id.
    pub spec: DiskSpec,
    /// Bytes of the image.
    pub size: u64,
    /// Whether it has an overlay.
    pub cow: bool,
}

/// Where a VM goes on from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Origin {
    /// A snapshot's directory.
    Snapshot(PathBuf),
    /// Guest memory and the encoded state, two files.
    Parts,
}

/// A shell's answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromShell {
    /// It waits.
    Ready {
        /// Its device processes: a process group each.
        cells: Vec<u32>,
    },
    /// The guest runs.
    Claimed {
        /// When the claim was heard of, on this host's monotonic clock.
        heard_ns: u64,
        /// When the vCPUs were to be told to run, which comes next.
        runs_ns: u64,
    },
    /// It does not, and never will.
    Failed {
        /// One line.
        message: String,
        /// What to do about it.
        remedy: Option<String>,
    },
}
