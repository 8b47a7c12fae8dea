//! Bytes that may be more than a datagram holds.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use cellblock_wire::{ShmError, check_sealed, sealed_memfd};
use serde::{Deserialize, Serialize};

/// The most bytes a payload has: the dirty log of 4 TiB of memory.
pub const MAX_PAYLOAD: usize = 128 << 20;
/// Up to this many bytes travel in the message itself.
const INLINE: usize = 32 << 10;

/// Bytes, in the message or in the memfd that comes with it as its last descriptor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Payload(Place);

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Place {
    Here(Vec<u8>),
    Memfd(u64),
}

/// A payload that could not be made or taken.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The memfd.
    #[error("sharing a large message")]
    Memory(#[from] ShmError),
    /// Its contents.
    #[error("reading or writing a large message")]
    Io(#[from] std::io::Error),
    /// Larger than [`MAX_PAYLOAD`].
    #[error("a message of {0} bytes is too large")]
    TooLarge(u64),
    /// The memfd did not come.
    #[error("a large message came without its memory")]
    Missing,
}

impl Payload {
    /// A payload, and the memfd to send along if there is one.
    pub fn new(bytes: Vec<u8>) -> Result<(Payload, Option<OwnedFd>), PayloadError> {
        let len = bytes.len() as u64;
        if bytes.len() <= INLINE {
            return Ok((Payload(Place::Here(bytes)), None));
        }
        if bytes.len() > MAX_PAYLOAD {
            return Err(PayloadError::TooLarge(len));
        }
        let file = File::from(sealed_memfd("cellblock-payload", len)?);
        file.write_all_at(&bytes, 0)?;
        Ok((Payload(Place::Memfd(len)), Some(file.into())))
    }

    /// How many bytes it says it has.
    pub fn bytes(&self) -> u64 {
        match &self.0 {
            Place::Here(bytes) => bytes.len() as u64,
            Place::Memfd(len) => *len,
        }
    }

    /// The bytes, copied once: the sender may go on changing the memfd.
    pub fn take(self, fd: Option<BorrowedFd<'_>>) -> Result<Vec<u8>, PayloadError> {
        match self.0 {
            Place::Here(bytes) => Ok(bytes),
            Place::Memfd(len) if len > MAX_PAYLOAD as u64 => Err(PayloadError::TooLarge(len)),
            Place::Memfd(len) => {
                let fd = fd.ok_or(PayloadError::Missing)?;
                check_sealed(fd.as_fd(), len)?;
                let file = File::from(fd.try_clone_to_owned()?);
                let mut bytes = vec![0; len as usize];
                file.read_exact_at(&mut bytes, 0)?;
                Ok(bytes)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_bytes_arrive() {
        for len in [0, INLINE, INLINE + 1, 1 << 20] {
            let bytes: Vec<u8> = (0..len).map(|n| n as u8).collect();
            let (payload, fd) = Payload::new(bytes.clone()).unwrap();
            assert_eq!(fd.is_some(), len > INLINE);
            assert_eq!(payload.take(fd.as_ref().map(|fd| fd.as_fd())).unwrap(), bytes);
        }
    }

    #[test]
    fn a_liar_is_found_out() {
        let claim = || Payload(Place::Memfd(1 << 16));
        assert!(matches!(claim().take(None), Err(PayloadError::Missing)));
        let small = sealed_memfd("small", 4096).unwrap();
        assert!(matches!(claim().take(Some(small.as_fd())), Err(PayloadError::Memory(_))));
        let vast = Payload(Place::Memfd(u64::MAX));
        assert!(matches!(vast.take(Some(small.as_fd())), Err(PayloadError::TooLarge(_))));
    }
}
