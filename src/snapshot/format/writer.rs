//! Writing a snapshot: to a temporary sibling, which one rename makes the snapshot.
//!
//! Whatever fails or ends before that rename leaves what was there before; a writer that
//! is dropped takes its temporary directory with it. Everything is done relative to the
//! parent directory, opened once.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{Mode, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, fsync, ftruncate, unlinkat};

use super::checksum::Crc64;
use super::copy::{self, Copied, Task};
use super::files::{self, MANIFEST, MEMORY, STATE};
use super::leftover;
use super::table::{self, Entry};
use super::{
    CHUNK, Chain, DiskCopy, FORMAT_MAJOR, FORMAT_MINOR, MAX_CHAIN, MAX_DISKS, MAX_MEMORY,
    MAX_STATE, Manifest, PAGE, Snapshot, SnapshotId, WriteError, reader,
};

/// What is known of a snapshot before it is made.
#[derive(Clone, Copy, Debug)]
pub struct Contents {
    /// Bytes of guest RAM.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Made while the guest runs.
    pub live: bool,
}

/// The snapshot that a diff is made to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Its id.
    pub id: SnapshotId,
    /// Where it is, relative to the directory of the diff.
    pub path: PathBuf,
}

/// A snapshot being written.
#[derive(Debug)]
pub struct Writer {
    temporary: Temporary,
    contents: Contents,
    base: Option<Base>,
    id: SnapshotId,
    memory: File,
    entries: Vec<Entry>,
    /// Chunks whose checksum has to be computed from the file.
    stale: Vec<bool>,
    state: Option<(u64, u64)>,
    disks: Vec<DiskCopy>,
    cancel: Arc<AtomicBool>,
}

impl Base {
    /// The snapshot that `chain` is, as seen from a diff that will be at `target`. A chain that
    /// would be longer than one is followed is not begun.
    pub fn of(chain: &Chain, target: &Path) -> Result<Base, WriteError> {
        let base = chain.snapshot();
        if chain.links().len() >= MAX_CHAIN {
            return Err(WriteError::Depth(base.path().to_owned()));
        }
        let path = Base::seen_from(base, target).map_err(|source| WriteError::Step {
            path: target.to_owned(),
            step: "naming its parent",
            source,
        })?;
        Ok(Base { id: base.manifest().id, path })
    }

    fn seen_from(base: &Snapshot, target: &Path) -> io::Result<PathBuf> {
        let at = base.path().canonicalize()?;
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Ok(match (at.parent(), at.file_name()) {
            // Siblings can be moved together.
            (Some(of_base), Some(name)) if of_base == parent.canonicalize()? => {
                Path::new("..").join(name)
            }
            _ => at,
        })
    }
}

impl Writer {
    /// Begins a snapshot that will be at `target`, where nothing may be yet. With `base`
    /// it is a diff to it, and says nothing of pages that are not copied.
    pub fn create(
        target: &Path,
        contents: Contents,
        base: Option<Base>,
    ) -> Result<Writer, WriteError> {
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let parent = nix::fcntl::open(parent, flags, Mode::empty())
            .map_err(failed(target, "opening its parent directory"))?;
        Writer::create_at(parent, target, contents, base)
    }

    /// Like [`Writer::create`], in the open directory `parent`: of `target` only the last
    /// name counts, the rest is for messages.
    pub fn create_at(
        parent: OwnedFd,
        target: &Path,
        contents: Contents,
        base: Option<Base>,
    ) -> Result<Writer, WriteError> {
        let (path, size) = (target.to_owned(), contents.memory);
        if size > MAX_MEMORY {
            return Err(WriteError::TooLarge { path, what: "memory", size, most: MAX_MEMORY });
        }
        if size == 0 || !size.is_multiple_of(CHUNK as u64) {
            return Err(WriteError::Uneven { path, size });
        }
        let id = SnapshotId::random().map_err(|source| WriteError::Step {
            path,
            step: "choosing its id",
            source,
        })?;
        let temporary = Temporary::create(parent, target, id)?;
        let memory = temporary.file(MEMORY)?;
        ftruncate(&memory, size as i64).map_err(temporary.failed("sizing 'memory'"))?;
        let chunks = (size / CHUNK as u64) as usize;
        let blank = if base.is_some() { Entry::absent() } else { Entry::zero() };
        Ok(Writer {
            temporary,
            contents,
            base,
            id,
            memory,
            entries: vec![blank; chunks],
            stale: vec![false; chunks],
            state: None,
            disks: Vec::new(),
            cancel: Arc::new(AtomicBool::new(false)),
        })
    }

    /// Setting this makes the next step fail: the writer is then dropped.
    pub fn cancel(&self) -> Arc<AtomicBool> {
        self.cancel.clone()
    }

    /// The same with a flag that exists already.
    pub fn cancelled_by(self, cancel: Arc<AtomicBool>) -> Writer {
        Writer { cancel, ..self }
    }

    /// The id the snapshot will have.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Copies all of guest RAM. Nobody may write to it meanwhile, unless what they write
    /// is copied again.
    pub fn copy_all(&mut self, ram: BorrowedFd<'_>) -> Result<(), WriteError> {
        self.copy_chunks(ram, |_| true)
    }

    /// Copies the chunks that `wanted` names. Those where `ram` has nothing are zeros.
    pub fn copy_chunks(
        &mut self,
        ram: BorrowedFd<'_>,
        wanted: impl Fn(usize) -> bool,
    ) -> Result<(), WriteError> {
        let populated = copy::populated(ram, self.contents.memory)
            .map_err(self.temporary.io("looking for used memory"))?;
        for (index, entry) in self.entries.iter_mut().enumerate() {
            if wanted(index) {
                // What has bytes in the file already is overwritten, be it with zeros.
                entry.own = u64::MAX;
            }
        }
        let tasks: Vec<Task> = (0..self.entries.len())
            .filter(|index| wanted(*index))
            .filter(|index| {
                self.entries[*index].data != 0 || populated.binary_search(index).is_ok()
            })
            .map(|index| Task { index, pages: u64::MAX, written: self.entries[index].data })
            .collect();
        self.copy(ram, &tasks)
    }

    /// Copies single pages: a word for each chunk, a bit for each of its pages, in the
    /// order of KVM's dirty log.
    pub fn copy_pages(&mut self, ram: BorrowedFd<'_>, pages: &[u64]) -> Result<(), WriteError> {
        let chunks = self.entries.iter_mut().zip(pages).enumerate();
        let tasks: Vec<Task> = chunks
            .filter(|(_, (_, pages))| **pages != 0)
            .map(|(index, (entry, pages))| {
                entry.own |= *pages;
                Task { index, pages: *pages, written: entry.data }
            })
            .collect();
        self.copy(ram, &tasks)
    }

    /// Takes `chunks` from another snapshot.
    pub fn copy_from(
        &mut self,
        chain: &Chain,
        chunks: impl IntoIterator<Item = usize>,
    ) -> Result<(), WriteError> {
        let mut chunk = vec![0; CHUNK];
        let count = self.entries.len();
        for index in chunks.into_iter().take_while(|index| *index < count) {
            let written = self.entries[index].data;
            self.entries[index].own = u64::MAX;
            if written == 0 && chain.is_zero(index) {
                continue;
            }
            self.check_cancel()?;
            chain.read_chunk(index, &mut chunk).map_err(|source| WriteError::Source {
                path: self.temporary.target.clone(),
                source: Box::new(source),
            })?;
            let copied = copy::write(&self.memory, index, u64::MAX, written, &chunk)
                .map_err(self.temporary.io("writing memory"))?;
            self.keep(copied, u64::MAX);
        }
        Ok(())
    }

    fn copy(&mut self, ram: BorrowedFd<'_>, tasks: &[Task]) -> Result<(), WriteError> {
        self.check_cancel()?;
        let copied = copy::copy(ram, &self.memory, tasks, &self.cancel);
        self.check_cancel()?;
        for copied in copied.map_err(self.temporary.io("writing memory"))? {
            // Tasks are in order of their chunks.
            let task = tasks.binary_search_by_key(&copied.index, |task| task.index);
            self.keep(copied, task.map_or(0, |task| tasks[task].pages));
        }
        Ok(())
    }

    /// Records that `pages` of a chunk were copied.
    fn keep(&mut self, copied: Copied, pages: u64) {
        let entry = &mut self.entries[copied.index];
        entry.data |= copied.data;
        entry.crc = copied.crc;
        // The checksum is the chunk's only if this was all of it.
        self.stale[copied.index] = entry.data & !pages != 0;
    }

    /// Writes the state, once.
    pub fn state(&mut self, state: &[u8]) -> Result<(), WriteError> {
        let (size, most) = (state.len() as u64, MAX_STATE);
        if size > most {
            let path = self.temporary.target.clone();
            return Err(WriteError::TooLarge { path, what: "state", size, most });
        }
        self.check_cancel()?;
        let header = files::state_header(self.id);
        let mut crc = Crc64::new();
        crc.update(&header);
        crc.update(state);
        let file = self.temporary.file(STATE)?;
        file.write_all_at(&header, 0)
            .and_then(|()| file.write_all_at(state, header.len() as u64))
            .and_then(|()| file.sync_all())
            .map_err(self.temporary.io("writing the state"))?;
        self.state = Some((header.len() as u64 + size, crc.finish()));
        Ok(())
    }

    /// Copies the image of disk `id`: shared by the file system, where it can. Nobody may
    /// write to it meanwhile. Returns the checksum of the copy.
    pub fn disk(&mut self, id: &str, image: &File) -> Result<u64, WriteError> {
        if self.disks.len() == MAX_DISKS || id.len() > 32 {
            let (path, what) = (self.temporary.target.clone(), "number of disks");
            let most = MAX_DISKS as u64;
            return Err(WriteError::TooLarge { path, what, size: most + 1, most });
        }
        let mut disk = DiskCopy { id: id.to_string(), len: 0, crc: 0 };
        let copy = self.temporary.file(&disk.file())?;
        let mut source = image;
        // Seeks of a shared description would move its other holders'.
        disk.len = io::Seek::seek(&mut source, io::SeekFrom::End(0))
            .map_err(self.temporary.io("measuring a disk"))?;
        clone_or_copy(image, &copy, disk.len, &self.cancel)
            .and_then(|()| copy.sync_all())
            .map_err(self.temporary.io("copying a disk"))?;
        disk.crc = reader::disk_checksum(&copy, disk.len, |_| !self.cancel.load(Ordering::Relaxed))
            .map_err(self.temporary.io("reading a copied disk"))?;
        self.check_cancel()?;
        let crc = disk.crc;
        self.disks.push(disk);
        Ok(crc)
    }

    /// Completes the checksums, makes everything durable, and gives the snapshot its name.
    /// From then on it is there, whole.
    pub fn commit(mut self) -> Result<Manifest, WriteError> {
        let path = || self.temporary.target.clone();
        let (state_len, state_crc) = self.state.ok_or_else(|| WriteError::NoState(path()))?;
        self.refresh_checksums()?;
        let table = table::encode(self.id, &self.entries);
        self.memory
            .write_all_at(&table, self.contents.memory)
            .and_then(|()| self.memory.sync_all())
            .map_err(self.temporary.io("writing memory"))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let manifest = Manifest {
            version: (FORMAT_MAJOR, FORMAT_MINOR),
            id: self.id,
            parent: self.base.as_ref().map(|base| (base.id, base.path.clone())),
            created_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
            live: self.contents.live,
            memory: self.contents.memory,
            state_len,
            state_crc,
            table_crc: super::checksum::crc64(&table),
            vcpus: self.contents.vcpus,
            program: env!("CARGO_PKG_VERSION").to_string(),
            disks: std::mem::take(&mut self.disks),
        };
        let file = self.temporary.file(MANIFEST)?;
        file.write_all_at(&manifest.encode(), 0)
            .and_then(|()| file.sync_all())
            .map_err(self.temporary.io("writing the manifest"))?;
        self.check_cancel()?;
        self.temporary.rename()?;
        Ok(manifest)
    }

    /// Chunks that were written in several pieces.
    fn refresh_checksums(&mut self) -> Result<(), WriteError> {
        let mut buffer = vec![0; CHUNK];
        for index in (0..self.entries.len()).filter(|index| self.stale[*index]) {
            self.check_cancel()?;
            let mut crc = Crc64::new();
            for (page, pages) in table::runs(self.entries[index].data) {
                let bytes = &mut buffer[..pages * PAGE];
                self.memory
                    .read_exact_at(bytes, (index * CHUNK + page * PAGE) as u64)
                    .map_err(self.temporary.io("reading memory back"))?;
                crc.update(bytes);
            }
            self.entries[index].crc = crc.finish();
        }
        Ok(())
    }

    fn check_cancel(&self) -> Result<(), WriteError> {
        match self.cancel.load(Ordering::Relaxed) {
            true => Err(WriteError::Cancelled(self.temporary.target.clone())),
            false => Ok(()),
        }
    }
}

/// Copies `len` bytes, by reference where the file system can, in the kernel otherwise.
fn clone_or_copy(from: &File, to: &File, len: u64, cancel: &AtomicBool) -> io::Result<()> {
    const STEP: usize = 64 << 20;
    if super::clone::clone(from, to).is_ok() {
        return Ok(());
    }
    to.set_len(len)?;
    let mut at = 0;
    while at < len as i64 {
        // Holes stay holes.
        let data = match nix::unistd::lseek64(from, at, nix::unistd::Whence::SeekData) {
            Ok(data) => data,
            Err(Errno::ENXIO) => break,
            Err(_) => at,
        };
        let end = nix::unistd::lseek64(from, data, nix::unistd::Whence::SeekHole)
            .map_or(len as i64, |end| end.min(len as i64));
        at = data;
        while at < end {
            if cancel.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match super::clone::copy_range(from, to, at, (end - at).min(STEP as i64) as usize)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => at += n as i64,
            }
        }
    }
    Ok(())
}

/// The directory that becomes the snapshot; removed on drop, unless it did.
#[derive(Debug)]
struct Temporary {
    parent: OwnedFd,
    /// Locked: it is a living writer's.
    directory: Flock<OwnedFd>,
    name: OsString,
    target: PathBuf,
    files: std::cell::RefCell<Vec<String>>,
    renamed: bool,
}

impl Temporary {
    fn create(parent: OwnedFd, target: &Path, id: SnapshotId) -> Result<Temporary, WriteError> {
        let last = target.file_name().ok_or_else(|| WriteError::Name(target.to_owned()))?;
        if fstatat(&parent, last, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok() {
            return Err(WriteError::Exists(target.to_owned()));
        }
        leftover::sweep(&parent);
        let name = leftover::name(last, id);
        let made = failed(target, "making a directory");
        mkdirat(&parent, name.as_os_str(), Mode::S_IRWXU).map_err(made)?;
        let directory = leftover::open(&parent, &name).map_err(|e| {
            let _ = unlinkat(&parent, name.as_os_str(), UnlinkatFlags::RemoveDir);
            failed(target, "opening a directory just made")(e)
        })?;
        let (target, files) = (target.to_owned(), Default::default());
        Ok(Temporary { parent, directory, name, target, files, renamed: false })
    }

    /// Makes a file in it.
    fn file(&self, name: &str) -> Result<File, WriteError> {
        let flags =
            OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&*self.directory, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(self.failed("making a file"))?;
        self.files.borrow_mut().push(name.to_string());
        Ok(File::from(fd))
    }

    /// Gives it its name, durably.
    fn rename(&mut self) -> Result<(), WriteError> {
        fsync(self.directory.as_fd()).map_err(self.failed("making its directory durable"))?;
        let last: &OsStr = self.target.file_name().unwrap_or_default();
        let (from, to) = (self.name.as_os_str(), last);
        let flags = RenameFlags::RENAME_NOREPLACE;
        match renameat2(&self.parent, from, &self.parent, to, flags) {
            Err(Errno::EINVAL) => {
                // The file system cannot promise it. A directory replaces only an empty one.
                let plain = RenameFlags::empty();
                renameat2(&self.parent, from, &self.parent, to, plain)
            }
            other => other,
        }
        .map_err(|e| match e {
            Errno::EEXIST | Errno::ENOTEMPTY => WriteError::Exists(self.target.clone()),
            e => self.failed("giving it its name")(e),
        })?;
        self.renamed = true;
        let Err(e) = fsync(self.parent.as_fd()) else { return Ok(()) };
        // Who is told that there is no snapshot is to find none.
        let back = renameat2(&self.parent, to, &self.parent, from, RenameFlags::empty());
        self.renamed = back.is_err();
        Err(self.failed("making its name durable")(e))
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(Errno) -> WriteError {
        failed(&self.target, step)
    }

    fn io(&self, step: &'static str) -> impl FnOnce(io::Error) -> WriteError {
        let path = self.target.clone();
        move |source| WriteError::Step { path, step, source }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.renamed {
            return;
        }
        for file in self.files.borrow().iter() {
            let _ = unlinkat(&*self.directory, file.as_str(), UnlinkatFlags::NoRemoveDir);
        }
        let _ = unlinkat(&self.parent, self.name.as_os_str(), UnlinkatFlags::RemoveDir);
    }
}

fn failed(target: &Path, step: &'static str) -> impl FnOnce(Errno) -> WriteError {
    let path = target.to_owned();
    move |e| WriteError::Step { path, step, source: e.into() }
}
