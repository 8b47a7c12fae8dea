//! Seccomp filters: one policy per kind of process and per kind of VMM thread.
//!
//! The policies are JSON files in `policies/`, compiled at build time. Every call
//! that a policy does not name is refused; `README.md` says how to add one.

use seccompiler::{BpfProgramRef, sock_filter};

include!(concat!(env!("OUT_DIR"), "/programs.rs"));

/// Which calls are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// A block device process (`policies/blk.json`).
    Blk,
    /// A serial device process (`policies/serial.json`).
    Serial,
    /// The VMM's main thread and its helper threads (`policies/vmm_main.json`).
    VmmMain,
    /// A vCPU thread of the VMM (`policies/vmm_vcpu.json`).
    VmmVcpu,
    /// A device's front-end thread in the VMM (`policies/vmm_device.json`).
    VmmDevice,
    /// The VMM's thread that serves plugins (`policies/vmm_plugin.json`).
    VmmPlugin,
    /// The pager of a restored VM (`policies/vmm_pager.json`).
    VmmPager,
}

/// What happens on a call outside the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// SIGSYS: with the handler of [`crate::violation::install`] the call is
    /// reported and the process ends with status 159; without it the process is
    /// killed by the signal.
    Kill,
    /// The kernel logs the call (audit record type 1326, in `dmesg` where no audit
    /// daemon runs) and lets it through.
    Log,
}

/// A filter that could not be installed. After this nothing of the filter is in force.
#[derive(Debug, thiserror::Error)]
#[error("installing seccomp filter {policy:?} (the kernel needs CONFIG_SECCOMP_FILTER)")]
pub struct FilterError {
    policy: Policy,
    #[source]
    source: seccompiler::Error,
}

impl Policy {
    fn program(self, mode: Mode) -> BpfProgramRef<'static> {
        match (self, mode) {
            (Policy::Blk, Mode::Kill) => &BLK_KILL,
            (Policy::Blk, Mode::Log) => &BLK_LOG,
            (Policy::Serial, Mode::Kill) => &SERIAL_KILL,
            (Policy::Serial, Mode::Log) => &SERIAL_LOG,
            (Policy::VmmMain, Mode::Kill) => &VMM_MAIN_KILL,
            (Policy::VmmMain, Mode::Log) => &VMM_MAIN_LOG,
            (Policy::VmmVcpu, Mode::Kill) => &VMM_VCPU_KILL,
            (Policy::VmmVcpu, Mode::Log) => &VMM_VCPU_LOG,
            (Policy::VmmDevice, Mode::Kill) => &VMM_DEVICE_KILL,
            (Policy::VmmDevice, Mode::Log) => &VMM_DEVICE_LOG,
            (Policy::VmmPlugin, Mode::Kill) => &VMM_PLUGIN_KILL,
            (Policy::VmmPlugin, Mode::Log) => &VMM_PLUGIN_LOG,
            (Policy::VmmPager, Mode::Kill) => &VMM_PAGER_KILL,
            (Policy::VmmPager, Mode::Log) => &VMM_PAGER_LOG,
        }
    }
}

/// Puts the calling thread, and threads it starts from now on, under `policy`.
///
/// Sets no_new_privs for the thread. A thread may do this once: the filter allows
/// no further one.
pub fn apply(policy: Policy, mode: Mode) -> Result<(), FilterError> {
    seccompiler::apply_filter(policy.program(mode)).map_err(|source| FilterError { policy, source })
}

/// Puts every thread of the process under `policy`, all or none.
///
/// Sets no_new_privs for all of them. Fails where another thread has a filter
/// that the caller does not have.
pub fn seal(policy: Policy, mode: Mode) -> Result<(), FilterError> {
    seccompiler::apply_filter_all_threads(policy.program(mode))
        .map_err(|source| FilterError { policy, source })
}
