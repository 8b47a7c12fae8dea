//! A chain made one snapshot that needs no other.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::{CHUNK, Chain, Contents, FormatError, Manifest, WriteError, Writer};
use crate::remedy::Remedy;

/// Chunks between two reports of progress.
const STEP: usize = 64;

/// A chain that could not be flattened.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// It could not be read.
    #[error(transparent)]
    Read(#[from] FormatError),
    /// The result could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl Remedy for MergeError {
    fn remedy(&self) -> Option<String> {
        match self {
            MergeError::Read(error) => error.remedy(),
            MergeError::Write(error) => error.remedy(),
        }
    }
}

/// Writes what `chain` is to `target`, where nothing may be yet: a full snapshot of the same
/// moment with an id of its own. What is copied is checked on the way: the state, the chunks of memory,
/// the disks; where one is damaged there is no target. Tells `progress` how many bytes of memory are
/// done and how many there are. Once `cancel` is set it fails, and nothing is left.
pub fn merge(
    chain: &Chain,
    target: &Path,
    cancel: Arc<AtomicBool>,
    mut progress: impl FnMut(u64, u64),
) -> Result<Manifest, MergeError> {
    let from = chain.manifest();
    let contents = Contents { memory: from.memory, vcpus: from.vcpus, live: from.live };
    let mut writer = Writer::create(target, contents, None)?.cancelled_by(cancel);
    writer.state(&chain.snapshot().state()?)?;
    for start in (0..chain.chunks()).step_by(STEP) {
        let end = chain.chunks().min(start + STEP);
        writer.copy_from(chain, start..end)?;
        progress((end * CHUNK) as u64, from.memory);
    }
    for disk in &from.disks {
        if let Some(image) = chain.snapshot().disk(&disk.id)? {
            let found = writer.disk(&disk.id, &image)?;
            let same = chain.snapshot().compare_disk(disk, found);
            same.map_err(|fault| fault.at(chain.snapshot().path()))?;
        }
    }
    Ok(writer.commit()?)
}
