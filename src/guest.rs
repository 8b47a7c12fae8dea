//! The built-in bare-metal guest, from `tests/guests/bare`.
//!
//! Its first lines of documentation (`tests/guests/bare/src/main.rs`) say which modes it has and
//! how its command line chooses them. It needs 32 MiB of memory.

use std::fs::File;
use std::io::{Seek, Write};

use nix::sys::memfd::{MFdFlags, memfd_create};

/// The guest as an ELF file with a PVH note, which loaders that know PVH start by.
pub const BARE_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bare-guest"));

/// The same guest without the note: it starts by the 64-bit entry of the Linux boot protocol.
pub const BARE_GUEST_LINUX64: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/bare-guest-linux64"));

/// One of the images as an open file, for those who take a kernel as a file. It has no path.
///
/// # Errors
/// When the system has no memory, or no file descriptor, for it.
pub fn open(image: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(memfd_create(c"bare-guest", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(image)?;
    file.rewind()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// Types of the program headers.
    fn segment_types(elf: &[u8]) -> Vec<u32> {
        assert_eq!(&elf[..6], b"\x7fELF\x02\x01");
        let count = u16::from_le_bytes([elf[0x38], elf[0x39]]);
        (0..usize::from(count))
            .map(|i| u32::from_le_bytes(elf[64 + 56 * i..][..4].try_into().unwrap()))
            .collect()
    }

    #[test]
    fn only_one_image_has_the_pvh_note() {
        assert_eq!(segment_types(BARE_GUEST), [1, 4]);
        assert_eq!(segment_types(BARE_GUEST_LINUX64), [1, 0]);
    }

    #[test]
    fn an_image_opens_as_a_file_from_its_beginning() {
        let mut read = Vec::new();
        open(BARE_GUEST).unwrap().read_to_end(&mut read).unwrap();
        assert_eq!(read, BARE_GUEST);
    }

    #[test]
    fn the_image_names_no_folder_of_the_machine_it_was_built_on() {
        let folder = env!("CARGO_MANIFEST_DIR").as_bytes();
        assert!(!BARE_GUEST.windows(folder.len()).any(|window| window == folder));
    }
}
