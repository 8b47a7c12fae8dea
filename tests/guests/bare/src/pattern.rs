//! Sectors that say what they are, so that a wrong one tells how it is wrong.
//!
//! Sector layout, little-endian 64-bit words: magic, sector number, generation, then words derived
//! from these and their position.

/// Bytes in a sector.
pub const SECTOR: usize = 512;
const MAGIC: u64 = 0x6b63_6f6c_626c_6c65;

/// Fills `data` with the sectors from `first` on.
pub fn fill(data: &mut [u8], first: u64, generation: u64) {
    for (sector, bytes) in (first..).zip(data.chunks_exact_mut(SECTOR)) {
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&expected(sector, generation, i).to_le_bytes());
        }
    }
}

/// Checks `data` to be the sectors from `first` on; fails the guest if it is not.
pub fn check(data: &[u8], first: u64, generation: u64) {
    for (sector, bytes) in (first..).zip(data.chunks_exact(SECTOR)) {
        for (i, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let (found, wanted) = (u64::from_le_bytes(*word), expected(sector, generation, i));
            if found != wanted {
                let words = bytes.as_chunks::<8>().0;
                crate::exit::fail(format_args!(
                    "sector {sector} generation {generation}: word {i} is {found:#x}, not \
                     {wanted:#x} (it says magic {:#x} sector {} generation {})",
                    u64::from_le_bytes(words[0]),
                    u64::from_le_bytes(words[1]),
                    u64::from_le_bytes(words[2]),
                ));
            }
        }
    }
}

fn expected(sector: u64, generation: u64, word: usize) -> u64 {
    match word {
        0 => MAGIC,
        1 => sector,
        2 => generation,
        _ => {
            let mixed = (sector << 6 | word as u64) ^ generation.rotate_left(40);
            mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mixed >> 7
        }
    }
}
