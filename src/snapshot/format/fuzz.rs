//! What the fuzz targets `manifest`, `chunks` and `state` in `fuzz/` drive; a unit test replays their
//! corpus. Checksums are made right, or nothing behind them would ever be reached.

use super::checksum::crc64;
use super::{MAX_MEMORY, Manifest, SnapshotId, Suspect, table};
use crate::snapshot::state::MicrovmState;

/// Decodes `input` as a manifest, as it is and with a checksum that fits. True if that was
/// taken.
pub fn manifest(input: &[u8]) -> bool {
    let raw = Suspect::read(input);
    assert!(raw.manifest.is_some() || raw.fault.is_some());
    let mut whole = input.to_vec();
    whole.extend_from_slice(&crc64(input).to_le_bytes());
    let Ok(manifest) = Manifest::decode(&whole) else { return false };
    assert!(manifest.memory <= MAX_MEMORY && manifest.memory_file_len() > manifest.memory);
    // What is taken can be written, and means the same again.
    let again = Manifest::decode(&manifest.encode()).expect("what was decoded");
    assert_eq!(again, manifest);
    true
}

/// Decodes `input` as a table of chunks, as it is and with the header that fits; its first
/// byte says whether of a diff. True if that was taken.
pub fn chunks(input: &[u8]) -> bool {
    let Some((first, rest)) = input.split_first() else { return false };
    let (partial, id) = (first & 1 != 0, SnapshotId([1; 16]));
    let _ = table::decode(rest, id, crc64(rest), partial);
    let mut whole = table::encode(id, &[]);
    whole[24..32].copy_from_slice(&((rest.len() / table::ENTRY) as u64).to_le_bytes());
    whole.extend_from_slice(rest);
    let Ok(entries) = table::decode(&whole, id, crc64(&whole), partial) else { return false };
    for entry in &entries {
        let pages: usize = table::runs(entry.data).map(|(_, pages)| pages).sum();
        assert_eq!(pages as u32, entry.data.count_ones());
        assert!(table::runs(entry.own).all(|(page, pages)| pages > 0 && page + pages <= 64));
    }
    assert_eq!(table::encode(id, &entries)[table::HEADER..], *rest);
    true
}

/// Decodes `input` as the state of a VM, with every device's part. True if that was taken.
pub fn state(input: &[u8]) -> bool {
    let Ok(state) = MicrovmState::decode(input) else { return false };
    for device in &state.device_states {
        let _ = (device.as_disk(), device.as_serial(), device.as_back_end());
    }
    let again = state.encode().expect("what was decoded");
    MicrovmState::decode(&again).expect("what was encoded");
    true
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Both ends are reached, or the corpus is worth nothing.
    fn replay(name: &str, target: fn(&[u8]) -> bool) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut taken = [0, 0];
        for entry in std::fs::read_dir(corpus).unwrap() {
            let input = std::fs::read(entry.unwrap().path()).unwrap();
            taken[usize::from(target(&input))] += 1;
        }
        assert!(taken[0] > 0 && taken[1] > 0, "{name}: {taken:?} refused and taken");
    }

    #[test]
    fn the_corpus_of_manifests() {
        replay("manifest", super::manifest);
    }

    #[test]
    fn the_corpus_of_states() {
        replay("state", super::state);
    }

    #[test]
    fn the_corpus_of_chunk_tables() {
        replay("chunks", super::chunks);
    }
}
