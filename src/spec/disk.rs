//! A disk as the user asked for it, and its image opened.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use cellblock_devices::protocol::counters::MAX_QUEUES;
use cellblock_devices::protocol::{EngineKind, ThrottleLimits};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};

use super::throttle::Throttle;
use super::{SpecError, back_end, fields};
use crate::cell::blk::Held;
use crate::cell::overlay::{Overlay, OverlayError, Place};
use crate::remedy::Remedy;

/// Keys of the documented command line, in its order.
const KEYS: &[&str] = &[
    "ro",
    "direct",
    "cow",
    "id",
    "serial",
    "engine",
    "queues",
    "poll-us",
    "bw",
    "bw-burst",
    "iops",
    "iops-burst",
    "vhost-user",
];
/// Bytes of a virtio-blk device id string (virtio 1.2, 5.2.6.1).
const SERIAL_BYTES: usize = 20;
/// Busy wait of a disk whose SPEC does not say: what waking a sleeping worker costs, so
/// that polling is never dearer than twice the sleep it saves.
const POLL_US: u32 = 50;
/// Longest busy wait a disk may be given, in microseconds.
const POLL_US_MAX: u32 = 100_000;
/// Bytes of a virtio-blk sector; an image is a whole number of them.
const SECTOR: u64 = 512;
/// Ids that other devices of a VM carry.
const RESERVED: &[&str] = &["com1"];

/// A disk SPEC: `PATH[,key=value]...`, or `vhost-user=SOCKET[,id=NAME]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The image: a regular file or a block device. Empty with `vhost_user`.
    pub path: PathBuf,
    /// Name of the disk in this VM, `[a-z0-9_-]{1,32}`; [`name_disks`] fills it in
    /// where the user gave none.
    pub id: Option<String>,
    /// Refuse writes.
    pub read_only: bool,
    /// Leave the image alone, and keep the guest's writes here until the VM ends.
    pub cow: Option<Place>,
    /// What the guest reads as the disk's serial number; the id where none is given.
    /// At most 20 bytes of printable ASCII.
    pub serial: Option<String>,
    /// How long, in microseconds, the disk's worker polls before it sleeps, at most: the
    /// window closes while the guest is slow to come back.
    pub poll_us: u32,
    /// Request queues, each with a worker of its own; one per vCPU where not given, as far as
    /// a back end of another program has them.
    pub queues: Option<u16>,
    /// What the disk may do.
    pub throttle: ThrottleLimits,
    /// Read and write past the page cache.
    pub direct: bool,
    /// What carries requests out; what suits the image where not given.
    pub engine: Option<EngineKind>,
    /// The socket of another program's vhost-user-blk back end, which has the image.
    pub vhost_user: Option<PathBuf>,
}

/// What a SPEC without an image starts with.
const BACK_END: &str = "vhost-user=";

impl FromStr for DiskSpec {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Self, SpecError> {
        let parts = fields::split(spec);
        let (path, rest) = match parts.split_first() {
            // Everything else is the back end's affair.
            Some((first, rest)) if first.starts_with(BACK_END) => {
                let ours = ["id", "queues"];
                if let Some(field) = fields::fields(rest, KEYS)?
                    .iter()
                    .find(|field| !ours.contains(&field.key.as_str()))
                {
                    return Err(SpecError::BackEnds(field.key.clone()));
                }
                ("", &parts[..])
            }
            Some((first, rest)) if !first.is_empty() => (first.as_str(), rest),
            _ => return Err(SpecError::NoPath),
        };
        let mut disk = DiskSpec::at(path.into());
        let mut throttle = Throttle::default();
        for field in fields::fields(rest, KEYS)? {
            match field.key.as_str() {
                "ro" => disk.read_only = field.switch()?,
                "direct" => disk.direct = field.switch()?,
                "cow" => {
                    disk.cow = match field.text() {
                        None | Some("true") => Some(Place::Memory),
                        Some("false") => None,
                        Some(_) => Some(Place::Directory(field.value("DIR")?.into())),
                    }
                }
                "id" => {
                    let id = field.value("NAME")?;
                    check_id(id).map_err(|why| field.bad(why))?;
                    disk.id = Some(id.to_owned());
                }
                "serial" => {
                    let serial = field.value("TEXT")?;
                    if serial.len() > SERIAL_BYTES || !serial.bytes().all(|b| b.is_ascii_graphic())
                    {
                        return Err(field.bad(format!(
                            "it is 1 to {SERIAL_BYTES} printable ASCII characters without spaces"
                        )));
                    }
                    disk.serial = Some(serial.to_owned());
                }
                "poll-us" => {
                    disk.poll_us = field
                        .value("MICROSECONDS")?
                        .parse()
                        .ok()
                        .filter(|us| *us <= POLL_US_MAX)
                        .ok_or_else(|| {
                            field.bad(format!("it is a number of microseconds up to {POLL_US_MAX}"))
                        })?;
                }
                "engine" => {
                    disk.engine = Some(match field.value("ENGINE")? {
                        "sync" => EngineKind::Sync,
                        "io_uring" => EngineKind::IoUring,
                        _ => return Err(field.bad("it is sync or io_uring")),
                    });
                }
                "queues" => {
                    let queues = field.value("N")?.parse();
                    let queues = queues.ok().filter(|n| (1..=MAX_QUEUES).contains(n));
                    disk.queues =
                        Some(queues.ok_or_else(|| field.bad(format!("it is 1 to {MAX_QUEUES}")))?);
                }
                key @ ("bw" | "bw-burst" | "iops" | "iops-burst") => {
                    let value = field.value("NUMBER")?;
                    throttle.set(key, value).map_err(|why| field.bad(why))?;
                }
                "vhost-user" if path.is_empty() => {
                    disk.vhost_user = Some(field.value("SOCKET")?.into());
                }
                "vhost-user" => return Err(SpecError::BackEndHasImage),
                unread => {
                    return Err(SpecError::UnknownKey {
                        key: unread.to_owned(),
                        known: KEYS.join(", "),
                    });
                }
            }
        }
        if disk.read_only && disk.cow.is_some() {
            return Err(SpecError::ReadOnlyCow);
        }
        let by_ring = disk.engine == Some(EngineKind::IoUring);
        if disk.cow.is_some() && (disk.direct || by_ring) {
            return Err(SpecError::CachedCow);
        }
        disk.throttle =
            throttle.applied_to(&ThrottleLimits::default()).map_err(SpecError::Throttle)?;
        Ok(disk)
    }
}

fn check_id(id: &str) -> Result<(), String> {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-';
    if id.is_empty() || id.len() > 32 || !id.bytes().all(letter) {
        return Err("an id is 1 to 32 of a-z, 0-9, '_' and '-'".into());
    }
    if RESERVED.contains(&id) {
        return Err("that is the id of another device of every VM".into());
    }
    Ok(())
}

/// Gives every disk without an id the name `diskN`, N being its position, and
/// refuses ids that two disks would share.
pub fn name_disks(disks: &mut [DiskSpec]) -> Result<(), SpecError> {
    for (n, disk) in disks.iter_mut().enumerate() {
        disk.id.get_or_insert_with(|| format!("disk{n}"));
    }
    for (n, disk) in disks.iter().enumerate() {
        if let Some(id) = &disk.id
            && disks[..n].iter().any(|d| d.id.as_ref() == Some(id))
        {
            return Err(SpecError::SharedId(id.clone()));
        }
    }
    Ok(())
}

/// What a disk of a VM is made of.
#[derive(Debug)]
pub enum Backing {
    /// An image, for a block process of ours.
    Image(OpenedDisk),
    /// A connection to another program's back end.
    BackEnd(UnixStream),
}

/// A disk image that was checked and locked.
#[derive(Debug)]
pub struct OpenedDisk {
    /// The image, close-on-exec. Its lock lasts until every duplicate of it is closed.
    pub fd: OwnedFd,
    /// Bytes, a positive multiple of 512.
    pub size: u64,
    /// The guest may only read. The image is open for writing if not, unless there is
    /// an overlay.
    pub read_only: bool,
    /// Where the guest's writes go instead of to the image.
    pub overlay: Option<Overlay>,
    /// What the guest reads as its serial number, at most 20 bytes.
    pub serial: String,
    /// What the processes that had the image hold while they have requests in flight.
    pub(crate) held: Arc<Held>,
}

/// A disk that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image could not be opened.
    #[error("opening disk {} for {}", path.display(), if *read_only { "reading" } else { "reading and writing" })]
    Open {
        /// The image.
        path: PathBuf,
        /// As asked for.
        read_only: bool,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Its file system has no I/O past the page cache.
    #[error("opening disk {} for direct I/O", path.display())]
    NotDirect {
        /// The image.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Something that is neither a file nor a block device.
    #[error("disk {} is {kind}, not a disk image", path.display())]
    Kind {
        /// The image.
        path: PathBuf,
        /// What it is, with its article.
        kind: &'static str,
    },
    /// No bytes at all.
    #[error("disk {} is empty", .0.display())]
    Empty(PathBuf),
    /// Not a whole number of sectors.
    #[error("disk {} has {size} bytes, which is not a multiple of {SECTOR}", path.display())]
    Ragged {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Another process, or another disk of this VM, holds it.
    #[error("disk {} is in use, by another VM or as another disk of this one", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
        /// As asked for.
        read_only: bool,
    },
    /// The socket of a back end could not be connected to.
    #[error("connecting to the vhost-user back end at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// There is no place for what the guest will write.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// Its size could not be found or its lock not taken, for a reason of the kernel's.
    #[error("{doing} disk {}", path.display())]
    Examine {
        /// What was being done.
        doing: &'static str,
        /// The image.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

impl Remedy for DiskError {
    fn remedy(&self) -> Option<String> {
        use io::ErrorKind as Kind;
        Some(match self {
            DiskError::Open { read_only, source, .. } => match source.kind() {
                Kind::NotFound => {
                    "check the path, or make an image with 'truncate -s 1G FILE'".into()
                }
                Kind::PermissionDenied | Kind::ReadOnlyFilesystem if !read_only => {
                    "add ',ro' to use it read-only, or make it writable".into()
                }
                Kind::PermissionDenied => "make it readable for this user".into(),
                _ => return None,
            },
            DiskError::NotDirect { .. } => {
                "leave ',direct' away, or put the image on a file system that has it, as ext4, xfs and btrfs do".into()
            }
            DiskError::Kind { .. } => "give a raw image file or a block device".into(),
            DiskError::Empty(_) => "give it a size with 'truncate -s 1G FILE'".into(),
            DiskError::Ragged { size, .. } => match size.checked_next_multiple_of(SECTOR) {
                Some(next) => format!(
                    "if it is a raw image, pad it with 'truncate -s {next} FILE'; other formats need converting first"
                ),
                None => return None,
            },
            DiskError::Overlay(OverlayError::File { .. }) => {
                "give a directory that this user may write to with cow=DIR".into()
            }
            DiskError::Overlay(_) => return None,
            DiskError::InUse { read_only: false, .. } => {
                "stop the other one, or leave the image alone in both with ',ro' or ',cow'".into()
            }
            DiskError::InUse { read_only: true, .. } => "stop the one that writes it".into(),
            DiskError::Connect { source, .. } => match source.kind() {
                Kind::NotFound | Kind::ConnectionRefused => "start the back end first".into(),
                Kind::PermissionDenied => "run both as the same user".into(),
                Kind::WouldBlock | Kind::TimedOut => {
                    "it serves another front end, or hangs: stop the other, or restart it".into()
                }
                _ => return None,
            },
            DiskError::Examine { .. } => return None,
        })
    }
}

impl DiskSpec {
    /// The id, once [`name_disks`] has been over the VM's disks.
    pub fn id(&self) -> &str {
        self.id.as_deref().unwrap_or_default()
    }

    /// The disk that another program serves at `socket`, with so many queues.
    pub fn far(id: &str, socket: PathBuf, queues: u16) -> DiskSpec {
        let (id, queues) = (Some(id.into()), Some(queues));
        DiskSpec { id, queues, vhost_user: Some(socket), ..DiskSpec::at(PathBuf::new()) }
    }

    /// Keeps the guest's writes at `place`, off the image. Its blocks come from two files then,
    /// through the page cache, however the image was used before.
    pub fn keep_writes(&mut self, place: Place) {
        self.cow = Some(place);
        self.direct = false;
        self.engine = self.engine.filter(|engine| *engine != EngineKind::IoUring);
    }

    fn at(path: PathBuf) -> DiskSpec {
        DiskSpec {
            path,
            id: None,
            read_only: false,
            cow: None,
            serial: None,
            poll_us: POLL_US,
            queues: None,
            throttle: ThrottleLimits::default(),
            direct: false,
            engine: None,
            vhost_user: None,
        }
    }

    /// Request queues of the disk in a VM of `cpus` vCPUs.
    pub fn queues(&self, cpus: u8) -> u16 {
        self.queues.unwrap_or(cpus.into()).clamp(1, MAX_QUEUES)
    }

    /// Opens the image, or connects to the back end that has it.
    pub fn open_backing(&self) -> Result<Backing, DiskError> {
        match &self.vhost_user {
            Some(socket) => Ok(Backing::BackEnd(back_end::connect(socket)?)),
            None => self.open().map(Backing::Image),
        }
    }

    /// Opens, checks and locks the image: one writer or any number of readers, to which
    /// those belong that keep their writes to themselves.
    ///
    /// The lock is one on the open file description, so it is held by whatever
    /// process gets a duplicate of the fd, and gone when the last of them is. Other
    /// machine monitors that lock images in this way respect it, as we do theirs.
    pub fn open(&self) -> Result<OpenedDisk, DiskError> {
        let path = || self.path.clone();
        let read_only = self.read_only || self.cow.is_some();
        // A FIFO without a peer must not hang the start.
        let mut flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        flags.set(OFlag::O_DIRECT, self.direct);
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(flags.bits())
            .open(&self.path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EISDIR) => DiskError::Kind { path: path(), kind: "a directory" },
                Some(libc::EINVAL) if self.direct => DiskError::NotDirect { path: path(), source },
                Some(libc::ENXIO) => DiskError::Kind { path: path(), kind: "a socket or device" },
                _ => DiskError::Open { path: path(), read_only, source },
            })?;
        let size = image_size(&file, &self.path)?;
        lock(&file, read_only).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => DiskError::InUse { path: path(), read_only },
            errno => DiskError::Examine { doing: "locking", path: path(), source: errno.into() },
        })?;
        let mut serial = self.serial.clone().unwrap_or_else(|| self.id().to_owned());
        serial.truncate(SERIAL_BYTES);
        let overlay = self.cow.as_ref().map(|place| Overlay::new(size, place)).transpose()?;
        Ok(OpenedDisk {
            fd: file.into(),
            size,
            read_only: self.read_only,
            overlay,
            serial,
            held: Default::default(),
        })
    }
}

/// Checks what kind of file it is and returns its size in bytes.
fn image_size(mut file: &File, path: &Path) -> Result<u64, DiskError> {
    let examine = |doing| {
        let path = path.to_owned();
        move |source| DiskError::Examine { doing, path, source }
    };
    let kind = file.metadata().map_err(examine("examining"))?.file_type();
    let wrong = |kind| DiskError::Kind { path: path.to_owned(), kind };
    if kind.is_dir() {
        return Err(wrong("a directory"));
    } else if kind.is_fifo() {
        return Err(wrong("a pipe"));
    } else if kind.is_char_device() {
        return Err(wrong("a character device"));
    } else if !kind.is_file() && !kind.is_block_device() {
        return Err(wrong("something else"));
    }
    // Non-blocking was for the open alone.
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|e| examine("examining")(e.into()))?;
    let flags = OFlag::from_bits_retain(flags) - OFlag::O_NONBLOCK;
    fcntl(file, FcntlArg::F_SETFL(flags)).map_err(|e| examine("examining")(e.into()))?;
    // The end of a block device is its size, as it is a file's.
    let size = file.seek(SeekFrom::End(0)).map_err(examine("finding the size of"))?;
    file.rewind().map_err(examine("finding the size of"))?;
    match size {
        0 => Err(DiskError::Empty(path.to_owned())),
        size if !size.is_multiple_of(SECTOR) => {
            Err(DiskError::Ragged { path: path.to_owned(), size })
        }
        size => Ok(size),
    }
}

/// Locks the whole file, for as long as its open file description lives.
pub(crate) fn lock(file: &File, shared: bool) -> Result<(), Errno> {
    let kind = if shared { libc::F_RDLCK } else { libc::F_WRLCK };
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0, // to the end, wherever that will be
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&range)).map(drop)
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
