//! What a program or a library says that it needs, read from the file.
//!
//! The file may be hostile: nothing of it is run, and everything is bounded. `ldd` would
//! run it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use object::LittleEndian as LE;
use object::elf::{
    DT_NEEDED, DT_RPATH, DT_RUNPATH, DT_STRTAB, EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_LOAD,
    ProgramHeader64,
};
use object::read::ReadCache;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};

/// Longest string taken from a file: a path.
const MAX_STRING: usize = 4096;
/// Entries of a dynamic section that are looked at.
const MAX_ENTRIES: usize = 4096;

/// The needs of one file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Elf {
    pub(super) interpreter: Option<String>,
    pub(super) needed: Vec<String>,
    pub(super) rpath: Vec<String>,
    pub(super) runpath: Vec<String>,
}

/// Why a file cannot be run, or not be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum ElfError {
    #[error("it is a script, and a jail has no interpreter for it")]
    Script,
    #[error("it is not an ELF file")]
    NotElf,
    #[error("it is not for x86_64")]
    Machine,
    #[error("it is not a program or a shared library")]
    Kind,
    #[error("its {0} cannot be read")]
    Damaged(&'static str),
}

/// Reads what `file` needs.
pub(super) fn read(file: &File) -> Result<Elf, ElfError> {
    let mut magic = [0; 4];
    let count = file.read_at(&mut magic, 0).map_err(|_| ElfError::Damaged("contents"))?;
    if magic[..count].starts_with(b"#!") {
        return Err(ElfError::Script);
    }
    if magic[..count] != *b"\x7fELF" {
        return Err(ElfError::NotElf);
    }
    let data = ReadCache::new(file);
    let header = FileHeader64::<LE>::parse(&data).map_err(|_| ElfError::Machine)?;
    let endian = header.endian().map_err(|_| ElfError::Machine)?;
    if header.e_machine(endian) != EM_X86_64 {
        return Err(ElfError::Machine);
    }
    if !matches!(header.e_type(endian), ET_DYN | ET_EXEC) {
        return Err(ElfError::Kind);
    }
    let segments =
        header.program_headers(endian, &data).map_err(|_| ElfError::Damaged("program headers"))?;
    let mut elf = Elf::default();
    for segment in segments {
        if let Some(path) =
            segment.interpreter(endian, &data).map_err(|_| ElfError::Damaged("interpreter"))?
        {
            elf.interpreter = Some(text(path).ok_or(ElfError::Damaged("interpreter"))?);
        }
        const DYNAMIC: ElfError = ElfError::Damaged("dynamic section");
        if let Some(entries) = segment.dynamic(endian, &data).map_err(|_| DYNAMIC)? {
            let entries: Vec<(u64, u64)> = entries
                .iter()
                .take(MAX_ENTRIES)
                .map(|entry| (entry.d_tag(endian), entry.d_val(endian)))
                .take_while(|(tag, _)| *tag != 0)
                .collect();
            let of = |wanted: u32| {
                let list = entries.iter().filter(move |(tag, _)| *tag == u64::from(wanted));
                list.map(|(_, value)| *value)
            };
            let Some(strings) = of(DT_STRTAB).next().and_then(|at| offset(segments, at)) else {
                continue;
            };
            let string = |at: u64| strings.checked_add(at).and_then(|at| string(file, at));
            let all =
                |tag| of(tag).map(|at| string(at).ok_or(DYNAMIC)).collect::<Result<Vec<_>, _>>();
            elf.needed = all(DT_NEEDED)?;
            elf.rpath = folders(all(DT_RPATH)?);
            elf.runpath = folders(all(DT_RUNPATH)?);
        }
    }
    // The loader looks at the one only where the other is missing.
    if !elf.runpath.is_empty() {
        elf.rpath.clear();
    }
    Ok(elf)
}

fn folders(lists: Vec<String>) -> Vec<String> {
    lists.iter().flat_map(|list| list.split(':')).map(str::to_owned).collect()
}

/// Where in the file an address of the loaded image is.
fn offset(segments: &[ProgramHeader64<LE>], address: u64) -> Option<u64> {
    segments.iter().filter(|s| s.p_type(LE) == PT_LOAD).find_map(|s| {
        let within = address.checked_sub(s.p_vaddr(LE)).filter(|n| *n < s.p_filesz(LE))?;
        s.p_offset(LE).checked_add(within)
    })
}

fn string(file: &File, at: u64) -> Option<String> {
    let mut bytes = vec![0; MAX_STRING];
    let count = file.read_at(&mut bytes, at).ok()?;
    let end = bytes[..count].iter().position(|b| *b == 0)?;
    text(&bytes[..end])
}

fn text(bytes: &[u8]) -> Option<String> {
    if bytes.is_empty() || bytes.len() >= MAX_STRING {
        return None;
    }
    String::from_utf8(bytes.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn of(bytes: &[u8]) -> Result<Elf, ElfError> {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(bytes).expect("written");
        read(&file)
    }

    #[test]
    fn this_very_program() {
        let elf = read(&File::open("/proc/self/exe").expect("opens")).expect("reads");
        assert!(elf.interpreter.expect("dynamic").starts_with('/'));
        assert!(elf.needed.iter().any(|name| name.starts_with("libc.so")), "{:?}", elf.needed);
    }

    #[test]
    fn what_is_no_program_is_told_apart() {
        assert_eq!(of(b"#!/bin/sh\n"), Err(ElfError::Script));
        assert_eq!(of(b""), Err(ElfError::NotElf));
        assert_eq!(of(b"hello, world"), Err(ElfError::NotElf));
        assert_eq!(of(b"\x7fELF"), Err(ElfError::Machine));
    }

    /// Whatever is done to a real file, reading it ends, and without a panic.
    #[test]
    fn damaged_files_are_read_without_harm() {
        let mut whole = std::fs::read("/proc/self/exe").expect("reads");
        whole.truncate(1 << 20);
        let head = whole.len().min(1024);
        for n in 0..head {
            for value in [0, 0xff, 0x7f] {
                let before = std::mem::replace(&mut whole[n], value);
                let _ = of(&whole[..64 * 1024]);
                whole[n] = before;
            }
        }
        for len in [1, 16, 63, 64, 65, 120, 4096] {
            let _ = of(&whole[..len]);
        }
    }
}
