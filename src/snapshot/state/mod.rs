//! Everything of a VM but its memory and its disks, as one value with one encoding.
//!
//! | module | holds |
//! |---|---|
//! | `vcpu`, `msrs`, `raw` | a vCPU: registers, XSAVE, local APIC, MSRs, TSC |
//! | `machine` | interrupt controllers, timer, clock |
//! | `device` | what each device is made of and where it stands |
//! | `compat` | whether this host can go on where the state's host was |
//! | `payload` | the encoding: parts with a kind and a version each |
//!
//! A state decodes within bounds and is then still only a claim: who uses a part checks it
//! (rings against guest memory, registers by KVM).

pub mod compat;
pub mod device;
pub mod machine;
mod msrs;
mod payload;
mod raw;
pub mod vcpu;

use std::io;

use cellblock_wire::CodecError;
use serde::{Deserialize, Serialize};

pub use compat::{Difference, Host};
pub use device::{DeviceState, DiskRecord};
pub use machine::MachineState;
pub use payload::MAX_BYTES;
pub use vcpu::{HostFacts, VcpuState};

/// A state that cannot be read from a VM, set in one, encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused a request.
    #[error("{step}")]
    Kvm {
        /// What was being done.
        step: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// KVM refused the value of a model-specific register.
    #[error("setting model-specific register {0:#x}: this host's KVM refuses the value it had")]
    Msr(u32),
    /// A vCPU cannot be here what it was there.
    #[error(transparent)]
    Host(compat::Incompatible),
    /// It encodes or decodes beyond its bounds, or not at all.
    #[error("{0} of the state")]
    Codec(&'static str, #[source] CodecError),
    /// A part is newer than this program.
    #[error("part '{kind}' of the state has version {found}, this program reads up to {known}")]
    Version {
        /// The part.
        kind: String,
        /// Of the state.
        found: u16,
        /// Of this program.
        known: u16,
    },
    /// A part this program does not know.
    #[error("the state has a part '{0}', which this program does not know")]
    Kind(String),
    /// A part that every state has.
    #[error("the state lacks its part '{0}'")]
    Lacks(&'static str),
    /// Values that contradict each other or that no VM has.
    #[error("the state has {0}")]
    Malformed(&'static str),
}

/// A VM between two instructions.
#[derive(Clone, Debug)]
pub struct MicrovmState {
    /// What the VM is made of, and where it ran.
    pub vm_info: VmInfo,
    /// By rising id, one each.
    pub vcpu_states: Vec<VcpuState>,
    /// By slot, then id.
    pub device_states: Vec<DeviceState>,
    /// Interrupt controllers, timer, clock.
    pub irqchip_state: MachineState,
    /// By name.
    pub plugin_states: Vec<PluginState>,
    /// Why and when.
    pub metadata: Metadata,
}

/// What a VM is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Version of the program that made the state.
    pub program: String,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Bytes of guest memory.
    pub memory: u64,
    /// The host it ran on.
    pub host: Host,
    /// Names one run of that host's kernel: within it the TSC is one clock.
    pub boot_id: String,
}

/// What a plugin gave to be kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginState {
    /// Its name.
    pub name: String,
    /// Opaque to us. `None`: it cannot say, and the state cannot be restored.
    pub state: Option<Vec<u8>>,
}

/// Why and when a state was captured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Number of the pause it was captured in.
    pub epoch: u64,
    /// Microseconds of the real-time clock.
    pub captured_us: u64,
    /// What asked for it.
    pub trigger: String,
}

/// Most vCPUs of a state.
const MAX_VCPUS: usize = 255;
/// Most devices of a state.
const MAX_DEVICES: usize = 64;
/// Most plugins of a state.
const MAX_PLUGINS: usize = 64;
/// Most bytes of one's state.
const MAX_PLUGIN_STATE: usize = cellblock_plugin_api::wire::part::MAX_STATE;

impl MicrovmState {
    /// The bytes of the state: the same for the same state.
    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        self.check()?;
        payload::encode(self)
    }

    /// Decodes what [`MicrovmState::encode`] made, of this version or an older one.
    pub fn decode(bytes: &[u8]) -> Result<MicrovmState, StateError> {
        let state = payload::decode(bytes)?;
        state.check()?;
        Ok(state)
    }

    /// What has to be true of every state.
    fn check(&self) -> Result<(), StateError> {
        let bad = |what| Err(StateError::Malformed(what));
        let vcpus = self.vcpu_states.len();
        if vcpus == 0 || vcpus > MAX_VCPUS || vcpus != usize::from(self.vm_info.cpus) {
            return bad("another number of vCPUs than it says");
        }
        if (0..).zip(&self.vcpu_states).any(|(id, vcpu)| id != usize::from(vcpu.id)) {
            return bad("vCPUs that are not in their order");
        }
        let key = |device: &DeviceState| (device.slot, device.id.clone());
        if self.device_states.len() > MAX_DEVICES
            || !self.device_states.is_sorted_by(|a, b| key(a) < key(b))
        {
            return bad("devices that are too many or not in their order");
        }
        if self.plugin_states.len() > MAX_PLUGINS
            || !self.plugin_states.is_sorted_by(|a, b| a.name < b.name)
        {
            return bad("plugins that are too many or not in their order");
        }
        let large = |plugin: &PluginState| {
            plugin.state.as_ref().is_some_and(|state| state.len() > MAX_PLUGIN_STATE)
        };
        if self.plugin_states.iter().any(large) {
            return bad("more of a plugin than that may give");
        }
        Ok(())
    }

    /// What of this host differs from the one the state is from, so that it cannot go on here.
    pub fn verify_compatible(&self, host: &Host) -> Result<(), compat::Incompatible> {
        compat::verify(&self.vm_info.host, host)
    }
}
