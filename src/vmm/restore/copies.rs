//! Disks that a snapshot holds copies of, checked before a guest runs on them.
//!
//! A lazy restore does not read them: they can be as large as any disk. An eager one checks
//! everything. What was written to a `cow` disk is read by either, and checked by either.

use super::{DiskOverride, RestoreError};
use crate::snapshot::format::{CHUNK, Chain, DiskCopy};
use crate::snapshot::state::MicrovmState;

/// Images that a VM goes on with: copies in the snapshot that the user names no other for.
pub(in super::super) struct Copies<'c> {
    chain: &'c Chain,
    images: Vec<&'c DiskCopy>,
}

impl<'c> Copies<'c> {
    /// Those of `state`, but for what the user `named`.
    pub(in super::super) fn of(
        state: &MicrovmState,
        chain: &'c Chain,
        named: &[DiskOverride],
    ) -> Result<Copies<'c>, RestoreError> {
        let mut images = Vec::new();
        for device in &state.device_states {
            let malformed = |e| RestoreError::State(chain.snapshot().path().into(), e);
            let Some(disk) = device.as_disk().map_err(malformed)? else { continue };
            let by_user = named.iter().any(|named| named.id == device.id && named.path.is_some());
            // The copy of a cow disk is of what was written to it.
            if disk.written.is_none() && !by_user {
                images.extend(chain.manifest().disks.iter().find(|copy| copy.id == device.id));
            }
        }
        Ok(Copies { chain, images })
    }

    /// How much there is to check, in chunks.
    pub(in super::super) fn chunks(&self) -> usize {
        self.images.iter().map(|image| image.len.div_ceil(CHUNK as u64) as usize).sum()
    }

    /// Checks all of them; tells `advance` how many chunks more are done.
    pub(in super::super) fn check(&self, advance: &dyn Fn(usize)) -> Result<(), RestoreError> {
        for image in &self.images {
            let (mut done, mut told) = (0, 0);
            self.chain.snapshot().check_disk(&image.id, |bytes| {
                done += bytes;
                let chunks = done.div_ceil(CHUNK as u64) as usize;
                advance(chunks - told);
                told = chunks;
            })?;
        }
        Ok(())
    }
}
