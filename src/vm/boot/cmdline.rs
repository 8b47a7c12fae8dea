//! The kernel command line.

use crate::vm::layout::{CMDLINE, CMDLINE_ROOM};
use crate::vm::memory::{GuestRam, MemoryError};

/// A command line that cannot be passed on.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// Longer than this kernel takes.
    #[error("it has {len} bytes and this kernel takes {max}: shorten it")]
    TooLong {
        /// Its length in bytes.
        len: u64,
        /// The kernel's limit in bytes.
        max: u64,
    },
    /// A character that would end it or that no kernel parses.
    #[error("it has a control character at byte {0}: remove it")]
    Control(usize),
    /// It could not be written.
    #[error("writing it")]
    Write(#[source] MemoryError),
}

/// Checks `text` against the kernel's limit and writes it, with its nul.
pub fn write(ram: &GuestRam, text: &str, kernel_max: u64) -> Result<(), CmdlineError> {
    let max = kernel_max.min(CMDLINE_ROOM - 1);
    let len = text.len() as u64;
    if len > max {
        return Err(CmdlineError::TooLong { len, max });
    }
    if let Some(at) = text.bytes().position(|b| b.is_ascii_control() && b != b'\t') {
        return Err(CmdlineError::Control(at));
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    ram.write(CMDLINE, &bytes).map_err(CmdlineError::Write)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn ends_with_a_nul_and_is_bounded() {
        let ram = GuestRam::new(32 << 20).unwrap();
        ram.write(CMDLINE, &[0xff; 8]).unwrap();
        write(&ram, "a=b", 3).unwrap();
        let seen: [u8; 4] = ram.memory().read_obj(GuestAddress(CMDLINE)).unwrap();
        assert_eq!(&seen, b"a=b\0");
        assert!(matches!(write(&ram, "a=bc", 3), Err(CmdlineError::TooLong { len: 4, max: 3 })));
        assert!(matches!(write(&ram, "a\0b", 9), Err(CmdlineError::Control(1))));
        assert!(matches!(write(&ram, "a\nb", 9), Err(CmdlineError::Control(1))));
        let long = "x".repeat(CMDLINE_ROOM as usize);
        assert!(matches!(write(&ram, &long, u64::MAX), Err(CmdlineError::TooLong { .. })));
    }
}
