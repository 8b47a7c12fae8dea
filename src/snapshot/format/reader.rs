//! Reading a snapshot.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

use super::checksum::{Crc64, crc64};
use super::files::{self, MANIFEST, MEMORY, STATE, STATE_HEADER};
use super::manifest::MAX_MANIFEST;
use super::table::{self, Entry};
use super::{CHUNK, CHUNK_PAGES, Fault, FormatError, Manifest, PAGE, Suspect};

/// Bytes read at once of a copied disk.
const DISK_STEP: usize = 1 << 20;

/// A snapshot whose manifest, sizes and table of chunks have been checked.
///
/// Its state is checked by [`Snapshot::state`], each chunk when it is read.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    directory: OwnedFd,
    manifest: Manifest,
    memory: File,
    entries: Vec<Entry>,
}

/// What `describe` knows about a snapshot, from its manifest alone.
#[derive(Debug)]
pub struct Description {
    /// The manifest, as far as it can be read.
    pub manifest: Option<Manifest>,
    /// Why it must not be used.
    pub fault: Option<FormatError>,
}

/// Reads the manifest of the snapshot at `path`, damaged or not.
pub fn describe(path: &Path) -> Result<Description, FormatError> {
    let directory = files::directory(path)?;
    let suspect = Suspect::read(&manifest_bytes(&directory).map_err(|e| e.at(path))?);
    let fault = suspect.fault.map(|fault| fault.at(path));
    Ok(Description { manifest: suspect.manifest, fault })
}

/// What there is of the manifest, up to one byte more than the largest has.
fn manifest_bytes(directory: &OwnedFd) -> Result<Vec<u8>, Fault> {
    let (file, len) = files::regular(directory, MANIFEST)?;
    files::read(&file, MANIFEST, 0, len.min(MAX_MANIFEST + 1) as usize)
}

impl Snapshot {
    /// Opens the snapshot at `path`. Checks the manifest, the sizes of all files, and the
    /// table of chunks.
    pub fn open(path: &Path) -> Result<Snapshot, FormatError> {
        Snapshot::open_parts(path).map_err(|fault| match fault {
            OpenError::Directory(e) => e,
            OpenError::Fault(fault) => fault.at(path),
        })
    }

    fn open_parts(path: &Path) -> Result<Snapshot, OpenError> {
        let directory = files::directory(path).map_err(OpenError::Directory)?;
        let manifest = Manifest::decode(&manifest_bytes(&directory)?)?;
        files::sized(&directory, STATE, manifest.state_len)?;
        for disk in &manifest.disks {
            files::sized(&directory, &disk.file(), disk.len)?;
        }
        let memory = files::sized(&directory, MEMORY, manifest.memory_file_len())?;
        // Bounded by the limit on memory and by the file's size.
        let len = table::len(manifest.memory) as usize;
        let bytes = files::read(&memory, MEMORY, manifest.memory, len)?;
        let entries = table::decode(&bytes, manifest.id, manifest.table_crc, manifest.is_diff())?;
        Ok(Snapshot { path: path.to_owned(), directory, manifest, memory, entries })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its table of chunks.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The state, as it was given to the writer, after its checksum was checked.
    pub fn state(&self) -> Result<Vec<u8>, FormatError> {
        self.read_state().map_err(|fault| fault.at(&self.path))
    }

    fn read_state(&self) -> Result<Vec<u8>, Fault> {
        let len = self.manifest.state_len;
        let file = files::sized(&self.directory, STATE, len)?;
        let mut bytes = files::read(&file, STATE, 0, len as usize)?;
        files::check_state_header(&bytes, self.manifest.id)?;
        let found = crc64(&bytes);
        if found != self.manifest.state_crc {
            let (what, wanted) = ("the state".to_string(), self.manifest.state_crc);
            return Err(Fault::Checksum { what, found, wanted });
        }
        bytes.drain(..STATE_HEADER);
        Ok(bytes)
    }

    /// The image of a disk that was copied into it.
    pub fn disk(&self, id: &str) -> Result<Option<File>, FormatError> {
        let Some(disk) = self.manifest.disks.iter().find(|disk| disk.id == id) else {
            return Ok(None);
        };
        let file = files::sized(&self.directory, &disk.file(), disk.len);
        file.map(Some).map_err(|fault| fault.at(&self.path))
    }

    /// Checks what was copied of a disk; `progress` is told how many bytes are done.
    pub fn check_disk(&self, id: &str, progress: impl FnMut(u64)) -> Result<(), FormatError> {
        let disk = self.manifest.disks.iter().find(|disk| disk.id == id);
        let checked = disk.map(|disk| self.verify_disk(disk, progress)).transpose();
        checked.map(drop).map_err(|fault| fault.at(&self.path))
    }

    /// Number of chunks.
    pub fn chunks(&self) -> usize {
        self.entries.len()
    }

    /// Puts the pages this snapshot has of chunk `index` to their places in `into`, a
    /// chunk, and checks them first: after an error what is in `into` means nothing.
    /// Returns the pages it speaks for; the others are left as they are.
    pub fn read_chunk(&self, index: usize, into: &mut [u8]) -> Result<u64, FormatError> {
        self.fill_chunk(index, into).map_err(|fault| fault.at(&self.path))
    }

    fn fill_chunk(&self, index: usize, into: &mut [u8]) -> Result<u64, Fault> {
        let entry = *self.entries.get(index).ok_or(Fault::NoChunk(index as u64))?;
        let mut crc = Crc64::new();
        for (page, pages) in table::runs(entry.data) {
            let bytes = &mut into[page * PAGE..(page + pages) * PAGE];
            let offset = (index * CHUNK + page * PAGE) as u64;
            files::read_into(&self.memory, MEMORY, offset, bytes)?;
            crc.update(bytes);
        }
        for (page, pages) in table::runs(entry.own & !entry.data) {
            into[page * PAGE..(page + pages) * PAGE].fill(0);
        }
        match crc.finish() {
            found if found == entry.crc => Ok(entry.own),
            found => {
                let what = format!("memory chunk {index}");
                Err(Fault::Checksum { what, found, wanted: entry.crc })
            }
        }
    }

    /// Checks that pages without data have none, which no reader looks at: what is there
    /// was not written by us.
    pub fn check_holes(&self, index: usize) -> Result<(), FormatError> {
        self.find_stray(index).map_err(|fault| fault.at(&self.path))
    }

    fn find_stray(&self, index: usize) -> Result<(), Fault> {
        let entry = *self.entries.get(index).ok_or(Fault::NoChunk(index as u64))?;
        if entry.data == u64::MAX {
            return Ok(());
        }
        let start = (index * CHUNK) as u64;
        let mut page = vec![0; PAGE];
        for at in 0..CHUNK_PAGES {
            if entry.data & 1 << at != 0 {
                continue;
            }
            let offset = start + (at * PAGE) as u64;
            if at == 0 && !self.has_data(offset, start + CHUNK as u64)? {
                return Ok(());
            }
            files::read_into(&self.memory, MEMORY, offset, &mut page)?;
            if page.iter().any(|byte| *byte != 0) {
                return Err(Fault::Stray(index as u64));
            }
        }
        Ok(())
    }

    /// Whether the file system has anything between two offsets.
    fn has_data(&self, from: u64, to: u64) -> Result<bool, Fault> {
        match lseek64(&self.memory, from as i64, Whence::SeekData) {
            Ok(at) => Ok((at as u64) < to),
            Err(Errno::ENXIO) => Ok(false),
            Err(Errno::EINVAL) => Ok(true), // it cannot say
            Err(e) => Err(Fault::Read { file: MEMORY.into(), source: e.into() }),
        }
    }

    /// Checks everything: state, every chunk, every page that should be empty, copied
    /// disks. Tells `progress` how many bytes are done and how many there are.
    pub fn verify_all(&self, mut progress: impl FnMut(u64, u64)) -> Result<(), FormatError> {
        self.state()?;
        let disks: u64 = self.manifest.disks.iter().map(|disk| disk.len).sum();
        let total = self.manifest.memory + disks;
        let mut chunk = vec![0; CHUNK];
        for index in 0..self.entries.len() {
            self.read_chunk(index, &mut chunk)?;
            self.check_holes(index)?;
            progress(((index + 1) * CHUNK) as u64, total);
        }
        let mut done = self.manifest.memory;
        for disk in &self.manifest.disks {
            self.verify_disk(disk, |bytes| {
                done += bytes;
                progress(done, total);
            })
            .map_err(|fault| fault.at(&self.path))?;
        }
        Ok(())
    }

    fn verify_disk(
        &self,
        disk: &super::DiskCopy,
        mut progress: impl FnMut(u64),
    ) -> Result<(), Fault> {
        let name = disk.file();
        let file = files::sized(&self.directory, &name, disk.len)?;
        let found = disk_checksum(&file, disk.len, |bytes| {
            progress(bytes);
            true
        });
        let found = found.map_err(|source| Fault::Read { file: name.clone(), source })?;
        self.compare_disk(disk, found)
    }

    /// Whether a disk's copy has the checksum that it had.
    pub(super) fn compare_disk(&self, disk: &super::DiskCopy, found: u64) -> Result<(), Fault> {
        match found == disk.crc {
            true => Ok(()),
            false => {
                let what = format!("the image '{}'", disk.file());
                Err(Fault::Checksum { what, found, wanted: disk.crc })
            }
        }
    }
}

/// The checksum of `len` bytes of `file`, whose holes are not read. Stops when `go_on`, told of each
/// step, is false.
pub(super) fn disk_checksum(
    file: &File,
    len: u64,
    mut go_on: impl FnMut(u64) -> bool,
) -> std::io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; DISK_STEP];
    let mut crc = Crc64::new();
    let mut at = 0;
    while at < len {
        let hole = hole(file, at, len);
        let step = if hole > 0 { hole } else { data(file, at, len).min(DISK_STEP as u64) };
        if hole > 0 {
            crc.zeros(hole);
        } else {
            let bytes = &mut buffer[..step as usize];
            file.read_exact_at(bytes, at)?;
            crc.update(bytes);
        }
        at += step;
        if !go_on(step) {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
    }
    Ok(crc.finish())
}

/// How much of `file` from `at` to `len` is a hole to begin with, where the file system can say.
fn hole(file: &File, at: u64, len: u64) -> u64 {
    match lseek64(file, at as i64, Whence::SeekData) {
        Ok(data) => (data as u64).min(len).saturating_sub(at),
        // Nothing but a hole, if it is as long as it was.
        Err(Errno::ENXIO) if file.metadata().is_ok_and(|data| data.len() >= len) => len - at,
        Err(_) => 0,
    }
}

/// How much of it from `at` on, where there is no hole, is before the next; at least a byte.
fn data(file: &File, at: u64, len: u64) -> u64 {
    match lseek64(file, at as i64, Whence::SeekHole) {
        Ok(hole) => (hole as u64).min(len).saturating_sub(at).max(1),
        Err(_) => len - at,
    }
}

/// Only the directory's error knows the path already.
enum OpenError {
    Directory(FormatError),
    Fault(Fault),
}

impl From<Fault> for OpenError {
    fn from(fault: Fault) -> OpenError {
        OpenError::Fault(fault)
    }
}
