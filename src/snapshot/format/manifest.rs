//! The manifest: all that `describe` needs, packed by hand at fixed places.
//!
//! ```text
//!   0  magic                          88  bytes of the file `state`
//!   8  major, minor (u16 each)        96  its checksum
//!  12  bytes of the manifest (u32)   104  checksum of the table of chunks
//!  16  snapshot id                   112  vCPUs (u32), copied disks (u32)
//!  32  parent's id, or zeros         120  bytes of the parent's path (u32)
//!  48  when, us since 1970           124  reserved, zero
//!  56  flags: 1 made while running   160  version of the program, text, zero-padded
//!  64  bytes of guest RAM            192  reserved, zero
//!  72  bytes of a page (u32)         256  parent's path
//!  76  bytes of a chunk (u32)             copied disks, 64 bytes each: id (32), bytes, checksum
//!  80  reserved, zero                     checksum of all before it
//! ```

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::checksum::crc64;
use super::{
    CHUNK, FORMAT_MAJOR, FORMAT_MINOR, Fault, MAGIC, MAX_DISKS, MAX_MEMORY, MAX_STATE, PAGE,
    SnapshotId, files,
};

/// Where the snapshot's id is.
pub(super) const ID: u64 = 16;
/// Bytes before the variable part.
const HEADER: usize = 256;
/// Bytes of a copied disk's record.
const DISK: usize = 64;
/// Bytes of the id in it.
const DISK_ID: usize = 32;
/// Bytes of the checksum at the end.
const CRC: usize = 8;
/// Most bytes of the parent's path.
const MAX_PATH: usize = 4096;
/// Most bytes of a manifest.
pub(super) const MAX_MANIFEST: u64 = (HEADER + MAX_PATH + MAX_DISKS * DISK + CRC) as u64;

/// Made while the guest ran: memory was copied in rounds.
const LIVE: u64 = 1;

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Its format, major and minor.
    pub version: (u16, u16),
    /// Names it.
    pub id: SnapshotId,
    /// The snapshot it is a diff to: its id, and where it was, relative to the directory
    /// of this snapshot.
    pub parent: Option<(SnapshotId, PathBuf)>,
    /// When it was made, in microseconds since 1970.
    pub created_us: u64,
    /// Made while the guest ran.
    pub live: bool,
    /// Bytes of guest RAM.
    pub memory: u64,
    /// Bytes of the file `state`.
    pub state_len: u64,
    /// Checksum of the file `state`.
    pub state_crc: u64,
    /// Checksum of the table of chunks.
    pub table_crc: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Version of the program that made it.
    pub program: String,
    /// Disks copied into it.
    pub disks: Vec<DiskCopy>,
}

/// A disk's image that is kept in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskCopy {
    /// The disk's id.
    pub id: String,
    /// Bytes of the image.
    pub len: u64,
    /// Checksum of the image.
    pub crc: u64,
}

/// A manifest that may be damaged, and why it must not be used, if so.
#[derive(Debug)]
pub struct Suspect {
    /// What can be read of it; none if it is no manifest at all.
    pub manifest: Option<Manifest>,
    /// Why it is refused.
    pub fault: Option<Fault>,
}

impl DiskCopy {
    /// The name of its file in the snapshot.
    pub fn file(&self) -> String {
        format!("disk-{}", self.id)
    }
}

impl Manifest {
    /// The manifest as it is on disk.
    pub(super) fn encode(&self) -> Vec<u8> {
        let path = self.parent.as_ref().map_or(&[][..], |(_, path)| path.as_os_str().as_bytes());
        let len = HEADER + path.len() + self.disks.len() * DISK + CRC;
        let mut out = vec![0; HEADER];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(8, &self.version.0.to_le_bytes());
        put(10, &self.version.1.to_le_bytes());
        put(12, &(len as u32).to_le_bytes());
        put(16, &self.id.0);
        put(32, &self.parent.as_ref().map_or([0; 16], |(id, _)| id.0));
        put(48, &self.created_us.to_le_bytes());
        put(56, &if self.live { LIVE } else { 0 }.to_le_bytes());
        put(64, &self.memory.to_le_bytes());
        put(72, &(PAGE as u32).to_le_bytes());
        put(76, &(CHUNK as u32).to_le_bytes());
        put(88, &self.state_len.to_le_bytes());
        put(96, &self.state_crc.to_le_bytes());
        put(104, &self.table_crc.to_le_bytes());
        put(112, &self.vcpus.to_le_bytes());
        put(116, &(self.disks.len() as u32).to_le_bytes());
        put(120, &(path.len() as u32).to_le_bytes());
        let program = self.program.as_bytes();
        put(160, &program[..program.len().min(32)]);
        out.extend_from_slice(path);
        for disk in &self.disks {
            let mut id = [0; DISK_ID];
            let text = &disk.id.as_bytes()[..disk.id.len().min(DISK_ID)];
            id[..text.len()].copy_from_slice(text);
            out.extend_from_slice(&id);
            out.extend_from_slice(&disk.len.to_le_bytes());
            out.extend_from_slice(&disk.crc.to_le_bytes());
            out.resize(out.len() + DISK - DISK_ID - 16, 0);
        }
        let crc = crc64(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// Checks and decodes the bytes of a manifest.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, Fault> {
        match Suspect::read(bytes) {
            Suspect { fault: Some(fault), .. } => Err(fault),
            Suspect { manifest: Some(manifest), .. } => Ok(manifest),
            Suspect { manifest: None, fault: None } => Err(Fault::Foreign("manifest")),
        }
    }

    /// Whether some pages are its parent's.
    pub fn is_diff(&self) -> bool {
        self.parent.is_some()
    }

    /// Bytes of the file `memory`.
    pub fn memory_file_len(&self) -> u64 {
        self.memory + super::table::len(self.memory)
    }

    /// Checks every number against its limits.
    fn check(&self, fields: &Fields<'_>) -> Result<(), Fault> {
        let value = |what, value| Err(Fault::Value { what, value });
        if self.id.0 == [0; 16] {
            return value("its id", 0);
        }
        if fields.u32(72) as usize != PAGE {
            return value("the page size", fields.u32(72).into());
        }
        if fields.u32(76) as usize != CHUNK {
            return value("the chunk size", fields.u32(76).into());
        }
        if fields.u64(56) & !LIVE != 0 {
            return value("the set of flags", fields.u64(56));
        }
        if self.memory == 0 || self.memory > MAX_MEMORY || !self.memory.is_multiple_of(CHUNK as u64)
        {
            return value("the size of guest RAM", self.memory);
        }
        if self.state_len < files::STATE_HEADER as u64
            || self.state_len > MAX_STATE + files::STATE_HEADER as u64
        {
            return value("the size of the state", self.state_len);
        }
        for disk in &self.disks {
            let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c);
            if disk.id.is_empty() || !disk.id.chars().all(valid) {
                return value("the length of a disk's id", disk.id.len() as u64);
            }
        }
        Ok(())
    }
}

impl Suspect {
    /// Reads what can be read of a manifest, and finds what is wrong with it.
    pub fn read(bytes: &[u8]) -> Suspect {
        let fields = Fields(bytes);
        if bytes.get(..8) != Some(&MAGIC) {
            return Suspect { manifest: None, fault: Some(Fault::Foreign("manifest")) };
        }
        let manifest = fields.manifest();
        let fault = Suspect::find(&fields, &manifest).err();
        Suspect { manifest: Some(manifest), fault }
    }

    /// In this order: the version, for what follows depends on it; sizes, that the
    /// checksum covers all; the checksum; the values.
    fn find(fields: &Fields<'_>, manifest: &Manifest) -> Result<(), Fault> {
        let bytes = fields.0;
        let (major, minor) = manifest.version;
        // What is too long for ours may be a newer version's, and says so if it is whole.
        let whole = fields.checksum_matches();
        if whole && (major != FORMAT_MAJOR || minor > FORMAT_MINOR) {
            return Err(Fault::Version { major, minor });
        }
        let wanted = fields.wanted_len();
        if bytes.len() as u64 != wanted || u64::from(fields.u32(12)) != wanted {
            let file = files::MANIFEST.to_string();
            return Err(Fault::Length { file, found: bytes.len() as u64, wanted });
        }
        if !whole {
            let (body, crc) = bytes.split_at(bytes.len() - CRC);
            let wanted = u64::from_le_bytes(*crc.first_chunk().unwrap_or(&[0; 8]));
            let what = "the manifest".to_string();
            return Err(Fault::Checksum { what, found: crc64(body), wanted });
        }
        manifest.check(fields)
    }
}

/// The bytes of a manifest by place; what is beyond their end reads as zero.
struct Fields<'b>(&'b [u8]);

impl Fields<'_> {
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk());
        bytes.copied().unwrap_or([0; N])
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.get(at))
    }

    /// Text up to the first zero. What is none is shown as `?`: as long as it was, and nothing
    /// a terminal would obey.
    fn text<const N: usize>(&self, at: usize) -> String {
        let bytes: [u8; N] = self.get(at);
        let text = bytes.iter().take_while(|byte| **byte != 0);
        text.map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '?' }).collect()
    }

    fn path_len(&self) -> usize {
        (self.u32(120) as usize).min(MAX_PATH)
    }

    fn disks(&self) -> usize {
        (self.u32(116) as usize).min(MAX_DISKS)
    }

    /// What the manifest's length has to be by its counts.
    fn wanted_len(&self) -> u64 {
        (HEADER + self.path_len() + self.disks() * DISK + CRC) as u64
    }

    fn checksum_matches(&self) -> bool {
        self.0
            .split_last_chunk::<CRC>()
            .is_some_and(|(body, crc)| u64::from_le_bytes(*crc) == crc64(body))
    }

    fn manifest(&self) -> Manifest {
        let path = self.0.get(HEADER..HEADER + self.path_len()).unwrap_or_default();
        let path = PathBuf::from(OsString::from_vec(path.to_vec()));
        let disk = |index| {
            let at = HEADER + self.path_len() + index * DISK;
            let (len, crc) = (self.u64(at + DISK_ID), self.u64(at + DISK_ID + 8));
            DiskCopy { id: self.text::<DISK_ID>(at), len, crc }
        };
        Manifest {
            version: (self.u16(8), self.u16(10)),
            id: SnapshotId(self.get(16)),
            parent: SnapshotId::from_bytes(self.get(32)).map(|id| (id, path)),
            created_us: self.u64(48),
            live: self.u64(56) & LIVE != 0,
            memory: self.u64(64),
            state_len: self.u64(88),
            state_crc: self.u64(96),
            table_crc: self.u64(104),
            vcpus: self.u32(112),
            program: self.text::<32>(160),
            disks: (0..self.disks()).map(disk).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        Manifest {
            version: (FORMAT_MAJOR, FORMAT_MINOR),
            id: SnapshotId([3; 16]),
            parent: Some((SnapshotId([9; 16]), "../base".into())),
            created_us: 1_790_000_000_000_000,
            live: true,
            memory: 128 << 20,
            state_len: 4000,
            state_crc: 77,
            table_crc: 78,
            vcpus: 4,
            program: "0.1.0".into(),
            disks: vec![DiskCopy { id: "disk0".into(), len: 512, crc: 5 }],
        }
    }

    #[test]
    fn a_manifest_comes_back() {
        let manifest = sample();
        assert_eq!(Manifest::decode(&manifest.encode()).unwrap(), manifest);
        let full = Manifest { parent: None, disks: vec![], live: false, ..sample() };
        assert_eq!(full.encode().len(), HEADER + CRC);
        assert_eq!(Manifest::decode(&full.encode()).unwrap(), full);
    }

    #[test]
    fn every_flipped_bit_is_found_and_the_rest_still_read() {
        let bytes = sample().encode();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                let suspect = Suspect::read(&damaged);
                assert!(suspect.fault.is_some(), "bit {bit} of byte {at}");
                assert_eq!(suspect.manifest.is_some(), at >= 8, "byte {at}");
            }
        }
    }

    #[test]
    fn every_length_but_its_own_is_refused() {
        let bytes = sample().encode();
        for len in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(matches!(Manifest::decode(&longer), Err(Fault::Length { .. })));
    }

    #[test]
    fn values_out_of_their_limits_are_refused_however_well_they_check() {
        let refused = |change: fn(&mut Manifest)| {
            let mut manifest = sample();
            change(&mut manifest);
            Manifest::decode(&manifest.encode()).unwrap_err()
        };
        let value = |change| assert!(matches!(refused(change), Fault::Value { .. }));
        value(|m| m.memory = 0);
        value(|m| m.memory = u64::MAX);
        value(|m| m.memory = 4096);
        value(|m| m.state_len = 0);
        value(|m| m.state_len = u64::MAX);
        value(|m| m.id = SnapshotId([0; 16]));
        value(|m| m.disks[0].id = "../x".into());
        value(|m| m.disks[0].id = String::new());
        let newer = refused(|m| m.version.1 += 1);
        assert!(matches!(newer, Fault::Version { .. }));
        assert!(matches!(refused(|m| m.version.0 = 2), Fault::Version { .. }));
        assert!(matches!(refused(|m| m.version.0 = 0), Fault::Version { .. }));
    }
}
