//! Sizes with binary suffixes.

/// Reads a size in bytes: a decimal number with an optional suffix K, M, G or T
/// (powers of 1024; lower case is as good).
pub fn size(text: &str) -> Result<u64, String> {
    scaled(text, 0)
}

/// Reads a memory size in bytes. As [`size`], but a plain number counts MiB, as it
/// does for other machine monitors: 512 bytes of memory is never what was meant.
pub fn memory_size(text: &str) -> Result<u64, String> {
    scaled(text, 20)
}

fn scaled(text: &str, plain_shift: u32) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, plain_shift),
    };
    // `u64::from_str` takes a leading plus sign; a size has none.
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("'{text}' is not a size: write a number and K, M, G or T, as 512M"));
    }
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| format!("'{text}' is more than 64 bits can count"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("513", 513),
            ("4K", 4096),
            ("4k", 4096),
            ("512M", 512 << 20),
            ("2G", 2 << 30),
            ("3t", 3 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn a_plain_memory_size_counts_mebibytes() {
        assert_eq!(memory_size("512"), Ok(512 << 20));
        assert_eq!(memory_size("512M"), Ok(512 << 20));
        assert_eq!(memory_size("64K"), Ok(64 << 10));
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in ["", "M", "+1M", "-1", "1.5G", "1GB", "0x10", " 1", "1 M", "१"] {
            assert!(size(text).unwrap_err().contains("not a size"), "{text}");
        }
        for text in ["18446744073709551616", "16777216T"] {
            assert!(size(text).unwrap_err().contains("64 bits"), "{text}");
        }
    }
}
