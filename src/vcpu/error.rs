//! What can go wrong with vCPUs.

use super::state::{ForbiddenTransition, VcpuState};
use std::io;
use std::time::Duration;
use thiserror::Error;

/// Why the vCPU threads could not be started.
#[derive(Debug, Error)]
pub enum StartError {
    /// The kicks were made for another number of vCPUs.
    #[error("{vcpus} vcpus cannot use the request slots of {slots}")]
    Slots {
        /// Number of vCPUs given.
        vcpus: usize,
        /// Number of slots given.
        slots: usize,
    },
    /// The kick signal has no handler.
    #[error("installing the handler of the kick signal")]
    Handler(#[source] io::Error),
    /// The kick page is missing.
    #[error("mapping the run page of vcpu {vcpu}")]
    Mapping {
        /// Which vCPU.
        vcpu: usize,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is no thread to be had.
    #[error("starting the thread of vcpu {vcpu}")]
    Thread {
        /// Which vCPU.
        vcpu: usize,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A thread could not be set up.
    #[error("setting up the thread of vcpu {vcpu}: {message}")]
    Hook {
        /// Which vCPU.
        vcpu: usize,
        /// What failed, from the thread.
        message: String,
    },
    /// A thread ended before it was ready.
    #[error("the thread of vcpu {vcpu} ended before it was ready")]
    Died {
        /// Which vCPU.
        vcpu: usize,
    },
}

/// The vCPUs cannot run for the first time.
#[derive(Debug, Error)]
#[error("running the vcpus")]
pub struct RunError(#[source] pub ForbiddenTransition);

/// The vCPUs cannot be resumed.
#[derive(Debug, Error)]
#[error("resuming the vcpus")]
pub struct ResumeError(#[source] pub ForbiddenTransition);

/// Why a pause did not come about. All vCPUs that can run do.
#[derive(Debug, Error)]
pub enum PauseError {
    /// The vCPUs are not running: they are paused already, or have not run yet.
    #[error("pausing the vcpus")]
    State(#[source] ForbiddenTransition),
    /// The guest has ended, before the pause or during it.
    #[error("the guest has ended on vcpu {}", list(.vcpus))]
    Ended {
        /// The vCPUs that have stopped.
        vcpus: Vec<usize>,
    },
    /// Not everyone arrived in time.
    #[error(
        "vcpu {} did not pause within {:.3} s; the others were resumed", list(.vcpus),
        .waited.as_secs_f64()
    )]
    Absent {
        /// The vCPUs that did not arrive.
        vcpus: Vec<usize>,
        /// How long they were waited for.
        waited: Duration,
    },
}

/// Some vCPU threads did not end in time.
#[derive(Debug, Error)]
#[error("vcpu {} did not stop within {:.3} s", list(.vcpus), .waited.as_secs_f64())]
pub struct StopError {
    /// The vCPUs whose threads still live.
    pub vcpus: Vec<usize>,
    /// How long they were waited for.
    pub waited: Duration,
}

/// Why work could not be done with a vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WorkError {
    /// There is no such vCPU.
    #[error("there is no vcpu {vcpu}")]
    Unknown {
        /// The number asked for.
        vcpu: usize,
    },
    /// Only a vCPU that is not running can be worked with.
    #[error("vcpu {vcpu} is {state}: pause it first")]
    Running {
        /// Which vCPU.
        vcpu: usize,
        /// Its state.
        state: VcpuState,
    },
    /// The vCPU itself has not been made yet.
    #[error("vcpu {vcpu} does not exist yet")]
    Missing {
        /// Which vCPU.
        vcpu: usize,
    },
    /// The vCPU's thread has ended.
    #[error("the thread of vcpu {vcpu} has ended")]
    Gone {
        /// Which vCPU.
        vcpu: usize,
    },
    /// Its thread has not done it in time, and does it when it can.
    #[error("the thread of vcpu {vcpu} does not get to it")]
    Late {
        /// Which vCPU.
        vcpu: usize,
    },
}

fn list(vcpus: &[usize]) -> String {
    vcpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
