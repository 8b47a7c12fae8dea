//! The machine as KVM makes it, on a thread of its own: that takes milliseconds, most of them
//! in the kernel, which is time to read files and to ask for device processes.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use nix::sched::{CloneFlags, unshare};

use super::VmmError;
use crate::snapshot::state::Host;
use crate::vm::cpu::CpuModel;
use crate::vm::kvm::{self, Machine};
use crate::vm::memory::GuestRam;

/// How long a thread that was joined may take to be gone from the kernel, too.
const GONE: Duration = Duration::from_secs(1);

/// A machine that is being made.
pub(super) struct Hardware {
    /// How many vCPUs it is for.
    pub(super) cpus: u8,
    thread: JoinHandle<Result<Made, VmmError>>,
}

/// A machine without vCPUs, and what it is on.
pub(super) struct Made {
    pub(super) machine: Machine,
    pub(super) model: CpuModel,
    pub(super) host: Host,
}

impl Hardware {
    /// Begins. The thread has all the rights that this one has: it has to be waited for by
    /// [`Hardware::finish`] before they are given up.
    pub(super) fn begin(kvm: Kvm, cpus: u32, ram: &GuestRam) -> Result<Hardware, VmmError> {
        let cpus = kvm::check_cpus(&kvm, cpus)?;
        let ram = ram.clone();
        let make = move || {
            let model = CpuModel::new(&kvm, cpus)?;
            let host = Host::new(&kvm, &model)?;
            Ok(Made { machine: Machine::with_kvm(kvm, &ram)?, model, host })
        };
        let thread = std::thread::Builder::new().name("hardware".into()).spawn(make);
        let system = |source| VmmError::System { what: "starting a thread", source };
        Ok(Hardware { cpus, thread: thread.map_err(system)? })
    }

    /// Waits for it.
    pub(super) fn finish(self) -> Result<Made, VmmError> {
        let made = self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // Rights are given up thread by thread, which takes that there is one. It is joined
        // before it has quite gone; if it does not go, giving up says so.
        let end = Instant::now() + GONE;
        while unshare(CloneFlags::CLONE_THREAD).is_err() && Instant::now() < end {
            std::thread::yield_now();
        }
        made
    }
}
