//! Guest memory filled from a snapshot before the guest runs, every byte of it checked.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::format::{CHUNK, Chain, FormatError};
use crate::vm::memory::GuestRam;

/// Most threads that copy.
const THREADS: usize = 4;
/// Chunks that a thread takes at a time.
const RUN: usize = 16;

/// Memory that could not be filled.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The snapshot's part of it.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The guest's part of it.
    #[error("filling guest memory")]
    Memory(#[from] GuestMemoryError),
    /// The snapshot is of another amount of memory.
    #[error("the snapshot has {snapshot} bytes of memory, the VM {vm}")]
    Size {
        /// Of the snapshot.
        snapshot: u64,
        /// Of the VM.
        vm: u64,
    },
}

/// Fills `ram` from `chain`; tells `progress` how many chunks are done. Memory that is zero
/// is not touched, so that a guest costs what it used.
pub fn fill(
    chain: &Chain,
    ram: &GuestRam,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<(), FillError> {
    let snapshot = chain.manifest().memory;
    if snapshot != ram.len() {
        return Err(FillError::Size { snapshot, vm: ram.len() });
    }
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || {
        let mut buffer = vec![0; CHUNK];
        loop {
            let start = next.fetch_add(RUN, Ordering::Relaxed);
            if start >= chain.chunks() || failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            let end = chain.chunks().min(start + RUN);
            for index in start..end {
                if let Err(error) = fill_chunk(chain, ram, index, &mut buffer) {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
            progress(end - start);
        }
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cpus.min(THREADS).min(chain.chunks().div_ceil(RUN));
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut result = work();
        for other in others {
            result = result.and(other.join().unwrap_or_else(|panic| {
                std::panic::resume_unwind(panic);
            }));
        }
        result
    })
}

fn fill_chunk(
    chain: &Chain,
    ram: &GuestRam,
    index: usize,
    buffer: &mut [u8],
) -> Result<(), FillError> {
    if chain.is_zero(index) {
        return Ok(());
    }
    chain.read_chunk(index, buffer)?;
    let offset = index as u64 * CHUNK as u64;
    let region = ram.regions().iter().find(|r| offset >= r.offset && offset - r.offset < r.len);
    if let Some(region) = region {
        // A chunk lies in one region: their sizes are whole MiB.
        let at = GuestAddress(region.gpa + (offset - region.offset));
        ram.memory().write_slice(buffer, at)?;
    }
    Ok(())
}
