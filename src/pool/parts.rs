//! A VM as bytes: guest memory and the state, for programs that keep them elsewhere.
//!
//! ```text
//!  0   magic "CBPARTS\n"        24  checksum of all that follows (CRC-64/NVME)
//!  8   bytes of state (u64)     32  the state, then guest memory from its start on
//! 16   bytes of memory (u64)
//! ```
//! Memory may end before the machine's does: the rest is zeros.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cellblock_wire::{ShmError, sealed_memfd};

use crate::snapshot::format::checksum::crc64;
use crate::snapshot::format::{CHUNK, Chain, FormatError, MAX_MEMORY, MAX_STATE};

const MAGIC: [u8; 8] = *b"CBPARTS\n";
const HEADER: usize = 32;
/// Zeros are left out in steps of this.
const STEP: usize = 64 << 10;

/// Bytes that are no VM.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum PartsError {
    #[error("these are no guest memory and state: they do not begin as such")]
    Magic,
    #[error("{found} bytes are not the {wanted} that they say they are")]
    Length { found: u64, wanted: u64 },
    #[error("their checksum is {found:016x}, and should be {wanted:016x}")]
    Checksum { found: u64, wanted: u64 },
    #[error("{0} bytes of state are more than there can be")]
    State(u64),
    #[error("{0} bytes of memory are more than there can be")]
    Memory(u64),
    #[error("a file for them")]
    File(#[from] ShmError),
    #[error("writing them to a file")]
    Write(#[from] io::Error),
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// Guest memory and the state of the snapshot at `path`, all of it read and checked.
pub fn read(path: &Path) -> Result<(Vec<u8>, Vec<u8>), PartsError> {
    let chain = Chain::open(path)?;
    let mut memory = vec![0; chain.manifest().memory as usize];
    for (index, chunk) in memory.chunks_mut(CHUNK).enumerate() {
        if !chain.is_zero(index) {
            chain.read_chunk(index, chunk)?;
        }
    }
    Ok((memory, chain.snapshot().state()?))
}

/// Both in one.
pub fn pack(memory: &[u8], state: &[u8]) -> Vec<u8> {
    let mut data = Vec::with_capacity(HEADER + state.len() + memory.len());
    data.extend(MAGIC);
    data.extend((state.len() as u64).to_le_bytes());
    data.extend((memory.len() as u64).to_le_bytes());
    data.extend([0; 8]);
    data.extend(state);
    data.extend(memory);
    let crc = crc64(&data[HEADER..]);
    data[24..HEADER].copy_from_slice(&crc.to_le_bytes());
    data
}

/// Guest memory, and the state.
pub fn unpack(data: &[u8]) -> Result<(&[u8], &[u8]), PartsError> {
    let Some((header, rest)) = data.split_at_checked(HEADER) else { return Err(PartsError::Magic) };
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    if header[..8] != MAGIC {
        return Err(PartsError::Magic);
    }
    let (state, memory) = (word(8), word(16));
    bounds(state, memory)?;
    let (found, wanted) = (rest.len() as u64, state + memory);
    if found != wanted {
        return Err(PartsError::Length { found, wanted });
    }
    let (found, wanted) = (crc64(rest), word(24));
    if found != wanted {
        return Err(PartsError::Checksum { found, wanted });
    }
    let (state, memory) = rest.split_at(state as usize);
    Ok((memory, state))
}

fn bounds(state: u64, memory: u64) -> Result<(), PartsError> {
    match (state > MAX_STATE, memory > MAX_MEMORY) {
        (true, _) => Err(PartsError::State(state)),
        (_, true) => Err(PartsError::Memory(memory)),
        _ => Ok(()),
    }
}

/// Both as files for a shell: memory, with holes for zeros, and the state.
pub(super) fn files(memory: &[u8], state: &[u8]) -> Result<[OwnedFd; 2], PartsError> {
    bounds(state.len() as u64, memory.len() as u64)?;
    let file = |name, bytes: &[u8]| -> Result<OwnedFd, PartsError> {
        let file = File::from(sealed_memfd(name, bytes.len() as u64)?);
        for (n, step) in bytes.chunks(STEP).enumerate() {
            if step.iter().any(|byte| *byte != 0) {
                file.write_all_at(step, (n * STEP) as u64)?;
            }
        }
        Ok(file.into())
    };
    Ok([file("parts-memory", memory)?, file("parts-state", state)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_is_unpacked_and_nothing_else() {
        let whole = pack(b"memory", b"the state");
        assert_eq!(unpack(&whole).expect("whole"), (&b"memory"[..], &b"the state"[..]));
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            assert!(unpack(&bad).is_err(), "byte {at}");
            assert!(unpack(&whole[..at]).is_err(), "the first {at} bytes");
        }
        let mut huge = whole.clone();
        huge[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(unpack(&huge), Err(PartsError::State(u64::MAX))));
    }

    #[test]
    fn zeros_are_holes() {
        let mut memory = vec![0; 4 << 20];
        memory[3 << 20] = 7;
        let [file, state] = files(&memory, b"s").map(|fds| fds.map(File::from)).expect("files");
        let read = |file: &File, at: u64| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("read");
            byte[0]
        };
        assert_eq!((read(&file, 3 << 20), read(&file, 0), read(&state, 0)), (7, 0, b's'));
        use std::os::unix::fs::MetadataExt;
        let data = file.metadata().expect("metadata");
        assert_eq!(data.len(), 4 << 20);
        assert!(data.blocks() * 512 <= 2 << 20, "{} blocks", data.blocks());
    }
}
