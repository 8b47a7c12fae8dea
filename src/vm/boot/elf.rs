//! ELF kernels: `vmlinux`, and bare-metal programs.
//!
//! The headers are parsed here rather than by `linux-loader`, whose loader places
//! segments as it reads them: overlapping ones, those for another processor and
//! entries outside of what was loaded would all pass. Its types are used.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS32, ELFCLASS64, ELFDATA2LSB, EM_X86_64, Elf64_Ehdr, Elf64_Phdr,
    PT_LOAD, PT_NOTE,
};
use vm_memory::ByteValued;

use super::{KernelError, Loaded, Start, check_place};
use crate::vm::memory::GuestRam;

const EHDR: usize = size_of::<Elf64_Ehdr>();
const PHDR: usize = size_of::<Elf64_Phdr>();
/// Kernels have about five program headers.
const MAX_HEADERS: u16 = 64;
/// Kernels have a few hundred bytes of notes.
const MAX_NOTES: u64 = 64 << 10;
/// What a vmlinux takes (COMMAND_LINE_SIZE without the nul): its file does not say.
const CMDLINE_MAX: u64 = 2047;

/// Checks the ELF file and places its segments. `head` is the file's beginning.
pub fn load(ram: &GuestRam, file: &File, size: u64, head: &[u8]) -> Result<Loaded, KernelError> {
    let ehdr = file_header(size, head)?;
    let headers = program_headers(file, size, head, &ehdr)?;
    let segments: Vec<_> =
        headers.iter().filter(|h| h.p_type == PT_LOAD && h.p_memsz > 0).copied().collect();
    check_segments(ram, size, &segments)?;
    let pvh = pvh_entry(file, size, &headers)?;
    let rip = pvh.map_or(ehdr.e_entry, u64::from);
    let loaded = |s: &Elf64_Phdr| (s.p_paddr..s.p_paddr + s.p_filesz).contains(&rip);
    if !segments.iter().any(loaded) {
        return Err(KernelError::Entry(rip));
    }
    for s in segments.iter().filter(|s| s.p_filesz > 0) {
        ram.fill_from(s.p_paddr, file, s.p_offset, s.p_filesz).map_err(KernelError::Place)?;
    }
    let start = match pvh {
        Some(entry) => Start::Pvh { rip: entry.into() },
        None => Start::Linux64 { rip, header: synthetic_header() },
    };
    Ok(Loaded {
        start,
        end: segments.iter().map(|s| s.p_paddr + s.p_memsz).max().unwrap_or(0),
        initrd_max: u64::MAX, // up to the end of low RAM
        cmdline_max: CMDLINE_MAX,
    })
}

fn file_header(size: u64, head: &[u8]) -> Result<Elf64_Ehdr, KernelError> {
    // The class decides how long the header is, so it comes before the length.
    match head.get(EI_CLASS) {
        Some(&ELFCLASS64) | None => {}
        Some(&ELFCLASS32) => return Err(KernelError::Bits32),
        Some(_) => return Err(KernelError::BadElf("unknown class")),
    }
    let bytes = head.get(..EHDR).ok_or(KernelError::Truncated {
        what: "the ELF header",
        end: EHDR as u64,
        size,
    })?;
    let mut ehdr = Elf64_Ehdr::default();
    ehdr.as_mut_slice().copy_from_slice(bytes);
    if ehdr.e_ident[EI_DATA] != ELFDATA2LSB {
        return Err(KernelError::BadElf("it is big-endian; give a kernel for x86_64"));
    }
    if ehdr.e_machine != EM_X86_64 {
        return Err(KernelError::Machine(ehdr.e_machine));
    }
    const ET_EXEC: u16 = 2;
    const ET_DYN: u16 = 3;
    if ehdr.e_type != ET_EXEC && ehdr.e_type != ET_DYN {
        return Err(KernelError::BadElf("it is not a linked program; give the linked vmlinux"));
    }
    if ehdr.e_phnum == 0 {
        return Err(KernelError::BadElf("it has no program headers"));
    }
    if ehdr.e_phnum > MAX_HEADERS {
        return Err(KernelError::BadElf("it has more than 64 program headers"));
    }
    if usize::from(ehdr.e_phentsize) != PHDR {
        return Err(KernelError::BadElf("its program headers have an unknown size"));
    }
    Ok(ehdr)
}

fn program_headers(
    file: &File,
    size: u64,
    head: &[u8],
    ehdr: &Elf64_Ehdr,
) -> Result<Vec<Elf64_Phdr>, KernelError> {
    let len = usize::from(ehdr.e_phnum) * PHDR;
    let what = "the program header table";
    let bytes = part(file, size, head, what, ehdr.e_phoff, len as u64)?;
    let headers = bytes.chunks_exact(PHDR).map(|bytes| {
        let mut header = Elf64_Phdr::default();
        header.as_mut_slice().copy_from_slice(bytes);
        header
    });
    Ok(headers.collect())
}

/// A part of the file, from `head` if it is in there.
fn part(
    file: &File,
    size: u64,
    head: &[u8],
    what: &'static str,
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, KernelError> {
    let end = check_part(size, what, offset, len)?;
    if let Some(bytes) = head.get(offset as usize..end as usize) {
        return Ok(bytes.to_vec());
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, offset).map_err(KernelError::Read)?;
    Ok(bytes)
}

/// Checks that a part of the file is in the file, and returns its end.
fn check_part(size: u64, what: &'static str, offset: u64, len: u64) -> Result<u64, KernelError> {
    let end = offset.saturating_add(len);
    if end > size {
        return Err(KernelError::Truncated { what, end, size });
    }
    Ok(end)
}

fn check_segments(ram: &GuestRam, size: u64, segments: &[Elf64_Phdr]) -> Result<(), KernelError> {
    if segments.is_empty() {
        return Err(KernelError::BadElf("it has nothing to load"));
    }
    for s in segments {
        if s.p_filesz > s.p_memsz {
            return Err(KernelError::BadElf("a segment is larger in the file than in memory"));
        }
        check_part(size, "a segment", s.p_offset, s.p_filesz)?;
        check_place(ram, s.p_paddr, s.p_paddr.saturating_add(s.p_memsz))?;
    }
    let mut sorted: Vec<_> = segments.iter().collect();
    sorted.sort_unstable_by_key(|s| s.p_paddr);
    for pair in sorted.windows(2) {
        if pair[0].p_paddr + pair[0].p_memsz > pair[1].p_paddr {
            return Err(KernelError::Overlap(pair[0].p_paddr, pair[1].p_paddr));
        }
    }
    Ok(())
}

/// The entry that a Xen `PHYS32_ENTRY` note names, if there is one.
fn pvh_entry(file: &File, size: u64, headers: &[Elf64_Phdr]) -> Result<Option<u32>, KernelError> {
    for header in headers.iter().filter(|h| h.p_type == PT_NOTE) {
        if header.p_filesz > MAX_NOTES {
            return Err(KernelError::BadElf("it has more than 64 KiB of notes"));
        }
        let notes = part(file, size, &[], "the notes", header.p_offset, header.p_filesz)?;
        if let Some(entry) = find_pvh_note(&notes)? {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Walks notes: three words (name size, descriptor size, type), name and
/// descriptor, each padded to four bytes.
fn find_pvh_note(mut notes: &[u8]) -> Result<Option<u32>, KernelError> {
    const PHYS32_ENTRY: u32 = 18;
    const BAD: KernelError = KernelError::BadElf("its notes are malformed");
    while let Some(([name_len, desc_len, kind], rest)) = words(notes) {
        let name_end = name_len as usize;
        let desc_start = name_end.next_multiple_of(4);
        let desc_end = desc_start + desc_len as usize;
        let name = rest.get(..name_end).ok_or(BAD)?;
        let desc = rest.get(desc_start..desc_end).ok_or(BAD)?;
        if kind == PHYS32_ENTRY && name == b"Xen\0" {
            let entry = desc.first_chunk().ok_or(BAD)?;
            return Ok(Some(u32::from_le_bytes(*entry)));
        }
        notes = rest.get(desc_end.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(None)
}

fn words(bytes: &[u8]) -> Option<([u32; 3], &[u8])> {
    let (head, rest) = bytes.split_at_checked(12)?;
    let word = |n: usize| u32::from_le_bytes([head[n], head[n + 1], head[n + 2], head[n + 3]]);
    Some(([word(0), word(4), word(8)], rest))
}

/// The setup header a bzImage would have had: enough for the kernel to trust the
/// zero page.
fn synthetic_header() -> linux_loader::bootparam::setup_header {
    linux_loader::bootparam::setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: 1, // loaded high
        kernel_alignment: 0x20_0000,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::load_kernel;
    use super::super::tests::file;
    use super::*;

    const ENTRY: u64 = 0x10_0000;

    fn segment(paddr: u64, offset: u64, filesz: u64, memsz: u64) -> Elf64_Phdr {
        Elf64_Phdr {
            p_type: PT_LOAD,
            p_offset: offset,
            p_paddr: paddr,
            p_filesz: filesz,
            p_memsz: memsz,
            ..Default::default()
        }
    }

    fn elf(entry: u64, headers: &[Elf64_Phdr], change: impl FnOnce(&mut Elf64_Ehdr)) -> Vec<u8> {
        let mut ehdr = Elf64_Ehdr {
            e_type: 2,
            e_machine: EM_X86_64,
            e_entry: entry,
            e_phoff: EHDR as u64,
            e_phentsize: PHDR as u16,
            e_phnum: headers.len() as u16,
            ..Default::default()
        };
        ehdr.e_ident[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        change(&mut ehdr);
        let mut bytes = ehdr.as_slice().to_vec();
        headers.iter().for_each(|h| bytes.extend_from_slice(h.as_slice()));
        bytes.resize(0x1000, 0);
        bytes.extend_from_slice(&[0x90; 0x1000]);
        bytes
    }

    fn plain() -> Vec<u8> {
        elf(ENTRY, &[segment(ENTRY, 0x1000, 0x1000, 0x3000)], |_| {})
    }

    fn try_load(bytes: &[u8]) -> Result<Loaded, KernelError> {
        load_kernel(&GuestRam::new(32 << 20).unwrap(), &file(bytes))
    }

    fn refused(bytes: &[u8]) -> String {
        try_load(bytes).err().expect("loaded").to_string()
    }

    fn refused_segments(headers: &[Elf64_Phdr]) -> String {
        refused(&elf(ENTRY, headers, |_| {}))
    }

    #[test]
    fn a_good_file_loads() {
        let ram = GuestRam::new(32 << 20).unwrap();
        let loaded = load_kernel(&ram, &file(&plain())).unwrap();
        assert!(matches!(loaded.start, Start::Linux64 { rip: ENTRY, .. }));
        assert_eq!(loaded.end, ENTRY + 0x3000);
        let mut seen = [0; 0x1001];
        vm_memory::Bytes::read_slice(ram.memory(), &mut seen, vm_memory::GuestAddress(ENTRY))
            .unwrap();
        assert_eq!((seen[0], seen[0xfff], seen[0x1000]), (0x90, 0x90, 0));
    }

    #[test]
    fn every_truncation_is_refused_and_none_panics() {
        let good = plain();
        for len in (0..0x200).chain(0xff0..0x1010).chain(0x1ff0..0x2000) {
            let text = refused(&good[..len]);
            if len >= EHDR {
                assert!(text.contains("truncated"), "{len}: {text}");
            }
        }
    }

    #[test]
    fn other_machines_and_shapes_are_refused() {
        let with = |change: fn(&mut Elf64_Ehdr)| {
            refused(&elf(ENTRY, &[segment(ENTRY, 0x1000, 16, 16)], change))
        };
        assert!(with(|h| h.e_ident[EI_CLASS] = 1).contains("32-bit"));
        assert!(with(|h| h.e_ident[EI_CLASS] = 9).contains("unknown class"));
        assert!(with(|h| h.e_ident[EI_DATA] = 2).contains("big-endian"));
        assert!(with(|h| h.e_machine = 183).contains("machine 183"));
        assert!(with(|h| h.e_type = 1).contains("not a linked program"));
        assert!(with(|h| h.e_phnum = 0).contains("no program headers"));
        assert!(with(|h| h.e_phnum = 0xffff).contains("more than 64"));
        assert!(with(|h| h.e_phentsize = 32).contains("unknown size"));
        assert!(with(|h| h.e_phoff = u64::MAX).contains("truncated"));
        assert!(refused(b"\x7fELF\x01\x01\x01").contains("32-bit"));
    }

    #[test]
    fn unusable_segments_are_refused() {
        assert!(refused_segments(&[segment(ENTRY, 0, 0, 0)]).contains("nothing to load"));
        assert!(refused_segments(&[segment(ENTRY, 0, 2, 1)]).contains("larger in the file"));
        assert!(refused_segments(&[segment(ENTRY, u64::MAX, 1, 1)]).contains("truncated"));
        assert!(refused_segments(&[segment(0xf_f000, 0x1000, 1, 1)]).contains("below 1 MiB"));
        let large = refused_segments(&[segment(ENTRY, 0x1000, 1, 40 << 20)]);
        assert!(large.contains("up to 41 MiB, and the guest has 32 MiB"), "{large}");
        assert!(refused_segments(&[segment(ENTRY, 0x1000, 1, u64::MAX)]).contains("more memory"));
        assert!(refused_segments(&[segment(u64::MAX, 0x1000, 1, 1)]).contains("more memory"));
        let overlap = [segment(ENTRY + 0x800, 0x1000, 1, 1), segment(ENTRY, 0x1000, 1, 0x801)];
        assert!(refused_segments(&overlap).contains("overlap"));
    }

    #[test]
    fn an_entry_outside_the_loaded_bytes_is_refused() {
        for entry in [0, ENTRY - 1, ENTRY + 16, ENTRY + 32, u64::MAX] {
            let text = refused(&elf(entry, &[segment(ENTRY, 0x1000, 16, 64)], |_| {}));
            assert!(text.contains("outside what it loads"), "{entry:#x}: {text}");
        }
    }

    fn note(kind: u32, name: &[u8], desc: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [name.len() as u32, desc.len() as u32, kind] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for part in [name, desc] {
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn a_note_asks_for_pvh() {
        let load = segment(ENTRY, 0x1000, 0x1000, 0x1000);
        let with_note = |notes: &[u8]| {
            let header = Elf64_Phdr {
                p_type: PT_NOTE,
                p_offset: 0x800,
                p_filesz: notes.len() as u64,
                ..Default::default()
            };
            let mut bytes = elf(0, &[load, header], |_| {});
            bytes[0x800..0x800 + notes.len()].copy_from_slice(notes);
            try_load(&bytes)
        };
        let other = note(1, b"GNU\0", &[1, 2, 3, 4, 5]);
        let good = [other.clone(), note(18, b"Xen\0", &0x10_0010u32.to_le_bytes())].concat();
        let loaded = with_note(&good).unwrap();
        assert!(matches!(loaded.start, Start::Pvh { rip: 0x10_0010 }));

        let outside = note(18, b"Xen\0", &0x7000u32.to_le_bytes());
        assert!(matches!(with_note(&outside), Err(KernelError::Entry(0x7000))));
        // Not ours: the entry is then the ELF's, 0, which is refused.
        assert!(matches!(with_note(&other), Err(KernelError::Entry(0))));
        let short = note(18, b"Xen\0", &[1, 2]);
        assert!(matches!(with_note(&short), Err(KernelError::BadElf(_))));
        let mut lying = good.clone();
        lying[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(with_note(&lying), Err(KernelError::BadElf(_))));
    }

    proptest::proptest! {
        /// Whatever a file says, loading ends with a result and touches no memory
        /// but the guest's.
        #[test]
        fn damaged_headers_never_panic(
            at in 0usize..0x100,
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..16),
        ) {
            let mut file = plain();
            file[at..at + bytes.len()].copy_from_slice(&bytes);
            let _ = try_load(&file);
        }
    }
}
