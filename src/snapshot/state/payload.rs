//! The encoding of a state: a list of parts, each with a kind and a version.
//!
//! A part is never changed in another way than by a new version of its kind, so that a
//! program reads what its predecessors wrote, and names what only a successor can read.

use cellblock_wire::{decode_within, encode_within};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{DeviceState, MachineState, MicrovmState, StateError};

/// Most bytes of an encoded state, when it is made and when it is read: as much as the format has
/// room for. What it is decoded to counts as well.
pub const MAX_BYTES: usize = 64 << 20;

const VERSION: u16 = 1;
const VM: &str = "vm";
const VCPU: &str = "vcpu-x86_64";
const MACHINE: &str = "irqchip-kvm";
const DEVICE: &str = "device";
const PLUGIN: &str = "plugin";
const METADATA: &str = "metadata";

#[derive(Serialize, Deserialize)]
struct Payload {
    kind: String,
    version: u16,
    data: Vec<u8>,
}

pub(super) fn encode(state: &MicrovmState) -> Result<Vec<u8>, StateError> {
    let mut parts = vec![part(VM, &state.vm_info)?];
    for vcpu in &state.vcpu_states {
        parts.push(part(VCPU, vcpu)?);
    }
    for device in &state.device_states {
        parts.push(part(DEVICE, device)?);
    }
    parts.push(part(MACHINE, &state.irqchip_state)?);
    for plugin in &state.plugin_states {
        parts.push(part(PLUGIN, plugin)?);
    }
    parts.push(part(METADATA, &state.metadata)?);
    encode_within::<MAX_BYTES, _>(&parts).map_err(|e| StateError::Codec("encoding", e))
}

fn part(kind: &str, value: &impl Serialize) -> Result<Payload, StateError> {
    let data = encode_within::<MAX_BYTES, _>(value)
        .map_err(|e| StateError::Codec("encoding a part", e))?;
    Ok(Payload { kind: kind.to_string(), version: VERSION, data })
}

pub(super) fn decode(bytes: &[u8]) -> Result<MicrovmState, StateError> {
    let parts: Vec<Payload> =
        decode_within::<MAX_BYTES, _>(bytes).map_err(|e| StateError::Codec("decoding", e))?;
    let (mut vm_info, mut machine, mut metadata) = (None, None::<MachineState>, None);
    let mut vcpu_states = Vec::new();
    let mut device_states: Vec<DeviceState> = Vec::new();
    let mut plugin_states = Vec::new();
    for part in parts {
        match part.kind.as_str() {
            VM => vm_info = Some(read(part)?),
            VCPU => vcpu_states.push(read(part)?),
            MACHINE => machine = Some(read(part)?),
            DEVICE => device_states.push(read(part)?),
            PLUGIN => plugin_states.push(read(part)?),
            METADATA => metadata = Some(read(part)?),
            _ => return Err(StateError::Kind(printable(&part.kind))),
        }
    }
    Ok(MicrovmState {
        vm_info: vm_info.ok_or(StateError::Lacks(VM))?,
        vcpu_states,
        device_states,
        irqchip_state: machine.ok_or(StateError::Lacks(MACHINE))?,
        plugin_states,
        metadata: metadata.ok_or(StateError::Lacks(METADATA))?,
    })
}

fn read<T: DeserializeOwned>(part: Payload) -> Result<T, StateError> {
    if part.version > VERSION {
        let kind = printable(&part.kind);
        return Err(StateError::Version { kind, found: part.version, known: VERSION });
    }
    decode_within::<MAX_BYTES, _>(&part.data).map_err(|e| StateError::Codec("decoding a part", e))
}

fn printable(kind: &str) -> String {
    crate::remedy::printable(&kind.chars().take(64).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(parts: &[Payload]) -> Vec<u8> {
        encode_within::<MAX_BYTES, _>(&parts).expect("encodes")
    }

    #[test]
    fn what_is_newer_or_unknown_is_named() {
        let data = Vec::new();
        let newer = Payload { kind: VM.into(), version: 2, data: data.clone() };
        let error = decode(&bytes(&[newer])).unwrap_err().to_string();
        assert!(error.contains("'vm'") && error.contains("version 2"), "{error}");
        let other = Payload { kind: "x\n".into(), version: 1, data };
        let error = decode(&bytes(&[other])).unwrap_err().to_string();
        assert!(error.contains("part 'x '"), "{error}");
        assert!(matches!(decode(&bytes(&[])), Err(StateError::Lacks(VM))));
    }

    #[test]
    fn no_length_makes_it_allocate_beyond_the_bound() {
        let mut claim = vec![1, 2, b'v', b'm', 1]; // one part 'vm' of version 1, with
        claim.extend([253, 0, 0, 0, 0, 0, 0, 0, 16]); // 2^60 bytes
        assert!(matches!(decode(&claim), Err(StateError::Codec(..))));
        assert!(matches!(decode(&vec![0; MAX_BYTES + 1]), Err(StateError::Codec(..))));
    }
}
