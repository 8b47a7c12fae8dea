//! bzImage kernels, started by their 64-bit entry.
//!
//! The setup header is described in Linux's Documentation/arch/x86/boot.rst; the
//! 64-bit entry exists from protocol 2.12 on and is marked in `xloadflags`.

use std::fs::File;

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::{KernelError, Loaded, Start, check_place};
use crate::vm::memory::GuestRam;

const SECTOR: u64 = 512;
const HEADER: usize = 0x1f1;
const MAGIC: usize = 0x202;
/// The byte that holds the header's length, counted from [`MAGIC`].
const HEADER_LENGTH: usize = 0x201;
const MIN_VERSION: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// Whether a file that starts with `head` is a bzImage (or an older zImage).
pub fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

/// Checks the bzImage and places its protected-mode part. `head` is the file's
/// beginning.
pub fn load(ram: &GuestRam, file: &File, size: u64, head: &[u8]) -> Result<Loaded, KernelError> {
    let header = setup(size, head)?;
    let sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
    let offset = (u64::from(sectors) + 1) * SECTOR;
    let promised = offset + u64::from(header.syssize) * 16;
    // The length is in units of 16 bytes; the last may be incomplete.
    if size + 15 < promised || offset + ENTRY_64 >= promised {
        return Err(KernelError::Truncated { what: "the kernel proper", end: promised, size });
    }
    let len = promised.min(size) - offset;
    let start = header.pref_address;
    let room = u64::from(header.init_size).max(len);
    check_place(ram, start, start.saturating_add(room))?;
    ram.fill_from(start, file, offset, len).map_err(KernelError::Place)?;
    Ok(Loaded {
        end: start + room,
        initrd_max: header.initrd_addr_max.into(),
        cmdline_max: header.cmdline_size.into(),
        start: Start::Linux64 { rip: start + ENTRY_64, header },
    })
}

/// The setup header as far as the file says it goes, checked.
fn setup(size: u64, head: &[u8]) -> Result<setup_header, KernelError> {
    let end = MAGIC + usize::from(head[HEADER_LENGTH]);
    let bytes = head.get(HEADER..end).ok_or(KernelError::Truncated {
        what: "the setup header",
        end: end as u64,
        size,
    })?;
    let mut header = setup_header::default();
    let known = bytes.len().min(size_of::<setup_header>());
    header.as_mut_slice()[..known].copy_from_slice(&bytes[..known]);
    if header.version < MIN_VERSION {
        return Err(KernelError::BadBzImage("it is older than protocol 2.12; use a newer kernel"));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::BadBzImage("it is a zImage, not a bzImage"));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::Bits32);
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::super::load_kernel;
    use super::super::tests::file;
    use super::*;

    fn good() -> setup_header {
        setup_header {
            setup_sects: 1,
            syssize: 0x400 / 16,
            boot_flag: 0xaa55,
            jump: 0x66eb, // the header's length is in its second byte
            header: u32::from_le_bytes(*b"HdrS"),
            version: 0x020f,
            loadflags: LOADED_HIGH,
            xloadflags: XLF_KERNEL_64,
            initrd_addr_max: 0x7fff_ffff,
            cmdline_size: 2047,
            pref_address: 0x100_0000,
            init_size: 0x10_0000,
            ..Default::default()
        }
    }

    fn image(header: &setup_header) -> Vec<u8> {
        let mut bytes = vec![0; 0x400];
        let header = header.as_slice();
        bytes[HEADER..HEADER + header.len()].copy_from_slice(header);
        bytes.extend_from_slice(&[0x90; 0x400]);
        bytes
    }

    fn try_load(bytes: &[u8]) -> Result<Loaded, KernelError> {
        load_kernel(&GuestRam::new(32 << 20).unwrap(), &file(bytes))
    }

    fn refused(change: impl FnOnce(&mut setup_header)) -> String {
        let mut header = good();
        change(&mut header);
        try_load(&image(&header)).err().expect("loaded").to_string()
    }

    #[test]
    fn a_good_image_starts_at_its_64_bit_entry() {
        let loaded = try_load(&image(&good())).unwrap();
        assert!(matches!(loaded.start, Start::Linux64 { rip: 0x100_0200, .. }));
        assert_eq!(loaded.end, 0x110_0000);
        assert_eq!(loaded.initrd_max, 0x7fff_ffff);
        assert_eq!(loaded.cmdline_max, 2047);
    }

    #[test]
    fn header_bytes_beyond_its_length_are_not_taken() {
        let mut header = good();
        header.jump = 0x62eb; // ends before kernel_info_offset at 0x268
        header.kernel_info_offset = 0xdead;
        let Start::Linux64 { header, .. } = try_load(&image(&header)).unwrap().start else {
            panic!("not the 64-bit protocol");
        };
        assert_eq!({ header.kernel_info_offset }, 0);
        assert_eq!({ header.init_size }, 0x10_0000);
    }

    #[test]
    fn unusable_images_are_refused() {
        assert!(refused(|h| h.version = 0x020b).contains("older than protocol 2.12"));
        assert!(refused(|h| h.loadflags = 0).contains("zImage"));
        assert!(refused(|h| h.xloadflags = 0).contains("32-bit"));
        assert!(refused(|h| h.syssize = 0x500 / 16).contains("truncated"));
        assert!(refused(|h| h.syssize = u32::MAX).contains("truncated"));
        assert!(refused(|h| h.syssize = 0).contains("truncated"));
        assert!(refused(|h| h.setup_sects = 255).contains("truncated"));
        assert!(refused(|h| h.pref_address = 0).contains("below 1 MiB"));
        assert!(refused(|h| h.pref_address = u64::MAX).contains("give more memory"));
        assert!(refused(|h| h.init_size = u32::MAX).contains("give more memory"));
        let text = refused(|h| h.init_size = 64 << 20);
        assert!(text.contains("up to 80 MiB, and the guest has 32 MiB"), "{text}");
    }

    #[test]
    fn every_truncation_is_refused_and_none_panics() {
        let whole = image(&good());
        for len in (0x206..0x280).chain(0x3f0..0x410).chain([0x7f0]) {
            let text = try_load(&whole[..len]).err().expect("loaded").to_string();
            assert!(text.contains("truncated"), "{len:#x}: {text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn damaged_headers_never_panic(
            at in HEADER..0x270,
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..16),
        ) {
            let mut whole = image(&good());
            whole[at..at + bytes.len()].copy_from_slice(&bytes);
            let _ = try_load(&whole);
        }
    }
}
