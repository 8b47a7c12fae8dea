//! bzImages, entered at their 64-bit entry.

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::loader::bzimage::BzImage;
use std::io::SeekFrom;
use vm_memory::{ByteValued, GuestAddress};

use super::{BootError, HIGH_MEMORY, KernelFile, low_end};
use crate::vm::memory::GuestRam;

/// Of the setup header in the file.
const HEADER_AT: u64 = 0x1f1;
const MAGIC: u32 = 0x5372_6448; // "HdrS"
/// The first protocol with a 64-bit entry.
const VERSION_MIN: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
/// The 64-bit entry lies this far behind the load address.
const ENTRY_64: u64 = 0x200;

pub(super) struct Loaded {
    /// 64-bit entry.
    pub entry: u64,
    /// First address beyond what the kernel needs while it unpacks itself.
    pub end: u64,
    /// Highest address an initrd may have.
    pub initrd_max: u64,
    /// For the zero page.
    pub header: setup_header,
}

/// Loads the file of `len` bytes.
pub(super) fn load(
    ram: &GuestRam,
    file: &mut (impl KernelFile + Sized),
    len: u64,
) -> Result<Loaded, BootError> {
    let mut header = setup_header::default();
    let size = size_of::<setup_header>() as u64;
    if len < HEADER_AT + size {
        return Err(BootError::NotAKernel("no ELF file and too short for a bzImage"));
    }
    file.seek(SeekFrom::Start(HEADER_AT))
        .and_then(|_| file.read_exact(header.as_mut_slice()))
        .map_err(|source| BootError::Read { what: "kernel", source })?;
    if header.header != MAGIC {
        return Err(BootError::NotAKernel("neither an ELF file nor a bzImage"));
    }
    if header.version < VERSION_MIN || header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::NotAKernel("a bzImage older than boot protocol 2.12"));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::NotAKernel("a 32-bit bzImage"));
    }
    let setup = match u64::from(header.setup_sects) {
        0 => 4,
        sectors => sectors,
    };
    // The header counts the rest in paragraphs of 16 bytes.
    let protected = u64::from(header.syssize) * 16;
    let body = len.checked_sub((setup + 1) * 512).filter(|body| *body > ENTRY_64);
    let body = body.ok_or(BootError::Damaged("it ends in its set-up code; it was cut short"))?;
    if body.next_multiple_of(16) < protected {
        return Err(BootError::Damaged("it is shorter than its header says; it was cut short"));
    }
    let preferred = header.pref_address.max(HIGH_MEMORY);
    let needed = preferred
        .saturating_add(u64::from(header.init_size))
        .max(HIGH_MEMORY.saturating_add(body));
    if needed > low_end(ram) {
        return Err(BootError::TooLarge { needed, have: low_end(ram) });
    }
    let loaded = BzImage::load(ram.memory(), Some(GuestAddress(HIGH_MEMORY)), file, None)?;
    Ok(Loaded {
        entry: loaded.kernel_load.0 + ENTRY_64,
        end: needed,
        initrd_max: u64::from(header.initrd_addr_max),
        header: loaded.setup_header.unwrap_or(header),
    })
}
