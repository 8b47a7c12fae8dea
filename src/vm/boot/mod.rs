//! Loading a kernel: which kind of file it is, where its parts go, how it starts.
//!
//! | file | starts by |
//! |---|---|
//! | ELF with a Xen `PHYS32_ENTRY` note | PVH: 32-bit protected mode, `hvm_start_info` |
//! | other 64-bit ELF (`vmlinux`) | Linux's 64-bit protocol at the ELF entry |
//! | bzImage, protocol 2.12 or newer | Linux's 64-bit protocol, 0x200 behind its start |
//!
//! The files are untrusted. Headers are read once into a copy, checked as a whole,
//! and only then is anything placed in guest memory, by one read per part straight
//! to its place. All kernel parts and the initrd lie in RAM below the MMIO hole.

mod bzimage;
mod cmdline;
mod e820;
mod elf;
mod initrd;
mod params;

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::cpu::write_boot_tables;
use super::layout::{
    CMDLINE, I8042_COMMAND_PORT, PVH_START_INFO, RESET_VALUE, RESET_VECTOR, ZERO_PAGE,
};
use super::memory::{GuestRam, MemoryError};

pub use cmdline::CmdlineError;
pub use initrd::InitrdError;

/// Where and how the boot vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Linux's 64-bit boot protocol: long mode, the zero page in RSI.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// Address of `struct boot_params`.
        zero_page: u64,
    },
    /// PVH: 32-bit protected mode without paging, the start info in EBX.
    Pvh {
        /// First instruction, below 4 GiB.
        rip: u64,
        /// Address of `hvm_start_info`.
        start_info: u64,
    },
}

/// A kernel, initrd or command line that cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file is not one we can start.
    #[error("loading the kernel")]
    Kernel(#[source] KernelError),
    /// The initrd is unusable.
    #[error("loading the initrd")]
    Initrd(#[source] InitrdError),
    /// The command line is unusable.
    #[error("passing the kernel its command line")]
    Cmdline(#[source] CmdlineError),
    /// Boot structures could not be written.
    #[error("writing boot structures")]
    Structures(#[source] linux_loader::configurator::Error),
    /// The boot vCPU's tables or the reset code could not be written.
    #[error("writing the boot vCPU's tables")]
    Tables(#[source] MemoryError),
}

/// What is wrong with a kernel file.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Reading failed.
    #[error("reading the file")]
    Read(#[source] std::io::Error),
    /// A directory, device, pipe or socket.
    #[error("it is not a regular file: give a vmlinux or bzImage file")]
    NotAFile,
    /// No bytes at all.
    #[error("the file is empty: give a vmlinux or bzImage file")]
    Empty,
    /// Neither ELF nor bzImage.
    #[error("it is neither an ELF file nor a bzImage{0}")]
    Unknown(&'static str),
    /// The file ends before what its headers promise.
    #[error("the file is truncated: {what} ends at byte {end} of {size}; copy it again")]
    Truncated {
        /// The part that is cut off.
        what: &'static str,
        /// Where that part should end.
        end: u64,
        /// The file's size.
        size: u64,
    },
    /// A 32-bit kernel.
    #[error("it is a 32-bit kernel: give one for x86_64")]
    Bits32,
    /// For another processor.
    #[error("it is for another processor (ELF machine {0}): give one for x86_64")]
    Machine(u16),
    /// An ELF file that is not a program with load segments, or is malformed.
    #[error("its ELF headers are unusable: {0}")]
    BadElf(&'static str),
    /// A bzImage too old, or malformed.
    #[error("its bzImage header is unusable: {0}")]
    BadBzImage(&'static str),
    /// Load address below 1 MiB.
    #[error(
        "it loads at {0:#x}, below 1 MiB, where boot structures are: link it at 1 MiB or above"
    )]
    TooLow(u64),
    /// It does not fit.
    #[error(
        "it needs memory up to {needed} MiB, and the guest has {have} MiB there: give more memory"
    )]
    TooLarge {
        /// End of the kernel in memory, in MiB, rounded up.
        needed: u64,
        /// End of the guest's RAM below the MMIO hole, in MiB.
        have: u64,
    },
    /// Two segments claim the same memory.
    #[error("its segments at {0:#x} and {1:#x} overlap")]
    Overlap(u64, u64),
    /// The entry point is not in what the file loads.
    #[error("its entry point {0:#x} is outside what it loads")]
    Entry(u64),
    /// Placing it failed.
    #[error("copying it to guest memory")]
    Place(#[source] MemoryError),
}

/// A kernel placed in guest memory, before anything else is.
struct Loaded {
    start: Start,
    /// End of the memory it uses, BSS and decompression room included.
    end: u64,
    /// The last address an initrd may touch.
    initrd_max: u64,
    /// Most bytes of command line, without the nul.
    cmdline_max: u64,
}

enum Start {
    Pvh { rip: u64 },
    Linux64 { rip: u64, header: linux_loader::bootparam::setup_header },
}

/// Places kernel, initrd, command line and boot structures in `ram`.
///
/// `rsdp` is what [`super::acpi::write`] returned. The memory has to be fresh
/// (zero). Returns where the boot vCPU starts.
pub fn load(
    ram: &GuestRam,
    kernel: &File,
    initrd: Option<&File>,
    cmdline: &str,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let loaded = load_kernel(ram, kernel).map_err(BootError::Kernel)?;
    cmdline::write(ram, cmdline, loaded.cmdline_max).map_err(BootError::Cmdline)?;
    let initrd = match initrd {
        Some(file) => Some(initrd::load(ram, file, &loaded).map_err(BootError::Initrd)?),
        None => None,
    };
    let map = e820::map(ram.regions());
    let written = match loaded.start {
        Start::Pvh { rip } => params::write_pvh(ram, initrd, &map, rsdp)
            .map(|()| Entry::Pvh { rip, start_info: PVH_START_INFO }),
        Start::Linux64 { rip, header } => {
            params::write_linux(ram, header, CMDLINE, initrd, &map, rsdp)
                .map(|()| Entry::Linux64 { rip, zero_page: ZERO_PAGE })
        }
    };
    let entry = written.map_err(BootError::Structures)?;
    write_boot_tables(ram, &entry).map_err(BootError::Tables)?;
    ram.write(RESET_VECTOR, &RESET_CODE).map_err(BootError::Tables)?;
    Ok(entry)
}

/// `mov al, 0xfe; out 0x64, al; hlt; jmp back`, in 16-bit code.
///
/// On a hardware-reduced platform Linux restarts through EFI, and without EFI by
/// jumping to the firmware, rather than by the reset register.
const RESET_CODE: [u8; 7] = [0xb0, RESET_VALUE, 0xe6, I8042_COMMAND_PORT as u8, 0xf4, 0xeb, 0xfd];

/// Bytes that hold a bzImage's setup header and the headers of common ELF files.
const HEAD: usize = 4096;

fn load_kernel(ram: &GuestRam, file: &File) -> Result<Loaded, KernelError> {
    let metadata = file.metadata().map_err(KernelError::Read)?;
    if !metadata.is_file() {
        return Err(KernelError::NotAFile);
    }
    let size = metadata.len();
    let mut head = vec![0; HEAD.min(usize::try_from(size).unwrap_or(HEAD))];
    if head.is_empty() {
        return Err(KernelError::Empty);
    }
    file.read_exact_at(&mut head, 0).map_err(KernelError::Read)?;
    if head.starts_with(b"\x7fELF") {
        elf::load(ram, file, size, &head)
    } else if bzimage::is_bzimage(&head) {
        bzimage::load(ram, file, size, &head)
    } else {
        Err(KernelError::Unknown(hint(&head)))
    }
}

/// What a user most likely gave us, where that can be told.
fn hint(head: &[u8]) -> &'static str {
    let compressed: [&[u8]; 5] = [
        &[0x1f, 0x8b],
        b"BZh",
        &[0xfd, b'7', b'z', b'X', b'Z'],
        &[0x28, 0xb5, 0x2f, 0xfd],
        &[0x04, 0x22, 0x4d, 0x18],
    ];
    if compressed.iter().any(|magic| head.starts_with(magic)) {
        ": it looks compressed, unpack it first"
    } else {
        ": give a vmlinux or bzImage file"
    }
}

/// Checks that `start..end` lies in the RAM a kernel may use.
fn check_place(ram: &GuestRam, start: u64, end: u64) -> Result<(), KernelError> {
    if start < super::layout::KERNEL_MIN {
        return Err(KernelError::TooLow(start));
    }
    if end > ram.low_end() {
        let needed = end.div_ceil(1 << 20);
        return Err(KernelError::TooLarge { needed, have: ram.low_end() >> 20 });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    pub fn file(contents: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(contents).unwrap();
        file
    }

    fn refused(contents: &[u8]) -> String {
        let ram = GuestRam::new(32 << 20).unwrap();
        load_kernel(&ram, &file(contents)).err().unwrap().to_string()
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(refused(b"").contains("empty"));
        assert!(refused(b"hello").contains("neither an ELF file nor a bzImage: give"));
        assert!(refused(&[0x1f, 0x8b, 8, 0]).contains("unpack it first"));
        let ram = GuestRam::new(32 << 20).unwrap();
        let directory = File::open("/").unwrap();
        assert!(matches!(load_kernel(&ram, &directory), Err(KernelError::NotAFile)));
        let device = File::open("/dev/zero").unwrap();
        assert!(matches!(load_kernel(&ram, &device), Err(KernelError::NotAFile)));
    }
}
