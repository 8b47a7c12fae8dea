//! The checksum of everything on disk: CRC-64/NVME.
//!
//! Its register starts and ends with all ones inverted, so that zero bytes do not check
//! as zero: an all-zero file never passes. `crc-fast` computes it with the processor's
//! carry-less multiplication, faster than memory delivers.

use crc_fast::{CrcAlgorithm, Digest, checksum_combine};

/// The checksum of `bytes`.
pub fn crc64(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// A checksum computed piece by piece.
pub struct Crc64(Digest);

impl Crc64 {
    /// Of nothing yet.
    pub fn new() -> Crc64 {
        Crc64(Digest::new(CrcAlgorithm::Crc64Nvme))
    }

    /// Continues with `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Continues with `len` zero bytes, however many: for those it need not see.
    pub fn zeros(&mut self, len: u64) {
        // The register, which is the checksum without its last inversion, as that many zeros leave it.
        let register = checksum_combine(CrcAlgorithm::Crc64Nvme, !self.finish(), 0, len);
        self.0 = Digest::new_with_init_state(CrcAlgorithm::Crc64Nvme, register);
    }

    /// The checksum of all that was given.
    pub fn finish(&self) -> u64 {
        self.0.finalize()
    }
}

impl Default for Crc64 {
    fn default() -> Crc64 {
        Crc64::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_crc_64_nvme() {
        // The check value of the catalogue of parametrised CRC algorithms.
        assert_eq!(crc64(b"123456789"), 0xae8b_1486_0a79_9888);
        let mut pieces = Crc64::new();
        pieces.update(b"1234");
        pieces.update(b"56789");
        assert_eq!(pieces.finish(), crc64(b"123456789"));
    }

    #[test]
    fn zeros_need_not_be_seen() {
        for (before, zeros, after) in [(0, 1, 0), (3, 4096, 5), (700, 1 << 20, 4096), (1, 0, 9)] {
            let (before, after) = (vec![7u8; before], vec![9u8; after]);
            let all = [before.clone(), vec![0; zeros], after.clone()].concat();
            let mut crc = Crc64::new();
            crc.update(&before);
            crc.zeros(zeros as u64);
            assert_eq!(crc.finish(), crc64(&all[..before.len() + zeros]));
            crc.update(&after);
            assert_eq!(crc.finish(), crc64(&all));
        }
    }

    #[test]
    fn zeros_do_not_check_as_zero() {
        for len in [1, 8, 64, 4096, 256 << 10] {
            assert_ne!(crc64(&vec![0; len]), 0, "{len} zero bytes");
        }
    }
}
