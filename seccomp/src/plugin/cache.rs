//! `/etc/ld.so.cache`: where the dynamic loader finds libraries outside its own folders.
//!
//! The format is glibc's "new" one (`glibc-ld.so.cache1.1`): a header of 48 bytes with
//! the number of entries, entries of 24, strings by their offset from the header.

use std::path::{Path, PathBuf};

const PATH: &str = "/etc/ld.so.cache";
const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const HEADER: usize = 48;
const ENTRY: usize = 24;
/// ELF of a libc 6 for x86_64.
const FLAGS: u32 = 0x0303;
const MAX_SIZE: u64 = 16 << 20;

/// The cache's contents, or nothing where there is none.
pub(super) struct Cache(Vec<u8>);

impl Cache {
    pub(super) fn read() -> Cache {
        let size = std::fs::metadata(PATH).map_or(0, |m| m.len());
        let bytes = if size <= MAX_SIZE { std::fs::read(PATH).ok() } else { None };
        Cache::of(bytes.unwrap_or_default())
    }

    /// A cache in the old format has one in the new format at its end.
    fn of(bytes: Vec<u8>) -> Cache {
        let start = bytes.windows(MAGIC.len()).position(|window| window == MAGIC);
        Cache(start.map(|start| bytes[start..].to_vec()).unwrap_or_default())
    }

    /// The first library called `name` for this machine.
    pub(super) fn find(&self, name: &str) -> Option<PathBuf> {
        let count = self.word(20)? as usize;
        (0..count.min(1 << 20)).find_map(|n| {
            let at = HEADER.checked_add(n.checked_mul(ENTRY)?)?;
            let matches =
                self.word(at)? == FLAGS && self.string(self.word(at + 4)?)? == name.as_bytes();
            let path = matches.then(|| self.string(self.word(at + 8)?))??;
            Some(Path::new(std::str::from_utf8(path).ok()?).to_owned())
        })
    }

    fn word(&self, at: usize) -> Option<u32> {
        let bytes = self.0.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    fn string(&self, at: u32) -> Option<&[u8]> {
        let tail = self.0.get(at as usize..)?;
        tail.iter().take(4096).position(|b| *b == 0).map(|end| &tail[..end])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(entries: &[(u32, &str, &str)]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend((entries.len() as u32).to_le_bytes());
        bytes.resize(HEADER, 0);
        let mut strings = Vec::new();
        let base = HEADER + entries.len() * ENTRY;
        for (flags, name, path) in entries {
            bytes.extend(flags.to_le_bytes());
            for text in [name, path] {
                bytes.extend(((base + strings.len()) as u32).to_le_bytes());
                strings.extend(text.bytes().chain([0]));
            }
            bytes.extend([0; 12]);
        }
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn libraries_of_this_machine_are_found() {
        let entries = [
            (FLAGS, "libx.so.1", "/a/libx.so.1"),
            (3, "liby.so", "/32/liby.so"),
            (FLAGS, "liby.so", "/b/liby.so"),
        ];
        let mut bytes = b"old format".to_vec();
        bytes.extend(cache(&entries));
        let found = Cache::of(bytes);
        assert_eq!(found.find("libx.so.1"), Some("/a/libx.so.1".into()));
        assert_eq!(found.find("liby.so"), Some("/b/liby.so".into()));
        assert_eq!(found.find("libz.so"), None);
    }

    #[test]
    fn a_damaged_cache_finds_nothing() {
        let whole = cache(&[(FLAGS, "libx.so.1", "/a/libx.so.1")]);
        for len in 0..whole.len() {
            assert_eq!(Cache::of(whole[..len].to_vec()).find("libx.so.1"), None, "{len}");
        }
        let mut lying = whole;
        lying[20..24].fill(0xff);
        assert_eq!(Cache::of(lying).find("other"), None);
        assert_eq!(Cache::of(Vec::new()).find("x"), None);
    }
}
