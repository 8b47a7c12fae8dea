//! virtio-blk as a vhost-user back end.
//!
//! The front end (our VMM, or another one) hands over guest memory, rings and
//! eventfds by the standard's messages; from then on requests go between guest
//! and this process alone. One thread per queue does the work:
//!
//! ```text
//!  vhost-user socket ─► Backend ─ start/stop ─► Worker (blk-q0) ─► Server
//!  cell channel ─► Blk::serve                     kick ─►  Ring ─► Parser ─► Engine ─► image
//!                                                 call ◄─
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | `config` | features and configuration space |
//! | `memory`, `view` | the memory table, checked and mapped; how the data path looks at it |
//! | `backend` | vhost-user messages and the state of each ring |
//! | `worker`, `server` | the thread of a queue, and what it does |
//! | `chain` | the descriptors of a chain |
//! | `inflight` | the record of requests in flight, and recovery from it |
//! | `ring` | one virtqueue: chains, used entries, suppression of kicks and interrupts |
//! | `request` | a chain parsed and checked, or why it is refused |
//! | `engine` | what carries requests out: one by one, or many at once by io_uring |
//! | `execute` | a request done on the image by system calls |
//! | `direct`, `turns` | images without the page cache: bounce buffers, and who writes when |
//! | `drained` | nothing of a process before this one is in flight |
//! | `overlay` | what the guest writes kept apart from the image, where the disk is `cow` |
//! | `throttle` | how much the disk may do |
//! | `clear` | ranges discarded or zeroed |
//! | `poll` | how long to look at a ring before sleeping |
//!
//! Everything from the guest and from the front end is hostile. Parsing ends
//! before the image is touched, a broken chain is still given back so that no
//! guest waits for it, and a ring whose driver breaks it is stopped by itself.

mod backend;
mod chain;
mod clear;
mod config;
mod direct;
mod drained;
mod engine;
mod execute;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod inflight;
mod memory;
mod overlay;
mod poll;
mod prefetch;
mod quiesce;
mod request;
mod ring;
mod server;
mod throttle;
mod turns;
mod view;
mod worker;

use std::error::Error as StdError;
use std::fmt;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cellblock_wire::{Access, Channel, ChannelError, ShmError, sealed_memfd};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll as poll_fds};
use nix::sys::socket::{MsgFlags, recv};
use vhost::vhost_user::BackendReqHandler;

use crate::lazy::Lazy;
use crate::protocol::counters::{CountersPage, MAX_QUEUES};
use crate::protocol::overlay::{Bitmap, overlay_bytes};
use crate::protocol::{BlkStart, CellStats, FromCell, ToCell};
use backend::Backend;
use config::SECTOR;
use direct::Direct;
pub use engine::UringError;
use execute::{Disk, ID_BYTES};
use inflight::Offer;
use overlay::Overlay;
use throttle::Throttle;
pub use worker::WorkerError;
use worker::{Equipment, Worker};

/// A block device that cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The configuration came with the wrong number of file descriptors.
    #[error("a block device takes two file descriptors, or four with an overlay, not {0}")]
    Fds(usize),
    /// A process before this one still has requests in flight, or it cannot be told.
    #[error("waiting for the requests of the process before this one")]
    Predecessor(#[source] std::io::Error),
    /// The page to count in cannot be used.
    #[error("mapping the page of the counters")]
    Counters(#[source] ShmError),
    /// The record of requests in flight cannot be made.
    #[error("making the record of requests in flight")]
    Record(#[source] ShmError),
    /// The overlay's map cannot be used.
    #[error("mapping the overlay's map")]
    Bitmap(#[source] ShmError),
    /// The disk would be empty, or its last sector cut short.
    #[error("disk size of {0} bytes is not a positive multiple of 512")]
    Size(u64),
    /// The serial number does not fit.
    #[error("disk serial {0:?} is not at most 20 characters of ASCII")]
    Serial(String),
    /// No queue, or more than [`MAX_QUEUES`].
    #[error("a block device has 1 to {MAX_QUEUES} queues, not {0}")]
    Queues(u16),
    /// The image could not be examined.
    #[error("examining the disk image")]
    Examine(#[source] std::io::Error),
    /// The image was opened in another way than the device is to use it.
    #[error("disk image is open {found} where the device is {wanted}")]
    Mode {
        /// How it was opened.
        found: &'static str,
        /// How it has to be.
        wanted: &'static str,
    },
    /// The image is shorter than the disk.
    #[error("disk image has {found} bytes where the disk has {wanted}")]
    Short {
        /// Bytes of the image.
        found: u64,
        /// Bytes of the disk.
        wanted: u64,
    },
    /// The image was opened without the page cache, and cannot be used so.
    #[error("finding the alignment that direct I/O needs on the disk image")]
    Direct(#[source] std::io::Error),
    /// Direct I/O cannot write the image's last block without making it longer.
    #[error(
        "disk image of {size} bytes ends inside a block of {block}, which direct I/O cannot write; pad it with 'truncate -s {} FILE', or leave direct away", size.next_multiple_of(*block)
    )]
    CutShort {
        /// Bytes of the disk.
        size: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// A queue's thread could not be made, or ended.
    #[error("preparing queue {0}")]
    Worker(u16, #[source] WorkerError),
    /// Waiting for messages failed.
    #[error("waiting for messages")]
    Wait(#[source] Errno),
    /// The VMM sent what is not a message.
    #[error("talking to the virtual machine monitor")]
    Cell(#[source] ChannelError),
    /// The front end sent what no front end may send, and was not to be answered.
    #[error("serving a vhost-user message")]
    FrontEnd(#[source] vhost::vhost_user::Error),
}

/// A block device, ready to be sealed and to serve.
pub struct Blk {
    disk: Arc<Disk>,
    backend: Arc<Mutex<Backend>>,
    handler: BackendReqHandler<Mutex<Backend>>,
    socket: UnixStream,
    throttle: Arc<Throttle>,
    counters: CountersPage,
}

/// Checks what was handed over and makes the queues' threads. Reads nothing that
/// a guest or a front end can influence.
pub fn prepare(
    config: BlkStart,
    fds: Vec<OwnedFd>,
    vhost_user: UnixStream,
) -> Result<Blk, BlkError> {
    let count = fds.len();
    let mut fds = fds.into_iter();
    let (image, page) = fds.next().zip(fds.next()).ok_or(BlkError::Fds(count))?;
    let layer = match config.cow {
        true => Some(fds.next().zip(fds.next()).ok_or(BlkError::Fds(count))?),
        false => None,
    };
    let pipes: Vec<OwnedFd> = fds.collect();
    if !pipes.iter().all(drained::is_pipe) {
        return Err(BlkError::Fds(count));
    }
    let mut pipes = pipes.into_iter();
    let hold = pipes.next().map(Arc::new);
    drained::wait(pipes.collect()).map_err(BlkError::Predecessor)?;
    let disk = Arc::new(open(&config, image, layer)?);
    let counters = CountersPage::map(page, Access::ReadWrite).map_err(BlkError::Counters)?;
    if config.queues == 0 || config.queues > MAX_QUEUES {
        return Err(BlkError::Queues(config.queues));
    }
    // A process before this one may have died with a request put back, and the driver may
    // have reset the device since.
    (0..config.queues).for_each(|queue| counters.queue(queue).flows());
    let throttle = Throttle::new(&config.throttle, counters.clone(), throttle::now());
    let throttle = Arc::new(throttle);
    let poll = Duration::from_micros(config.poll_us.into());
    let sync_failed = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    for index in 0..config.queues {
        let worker = Worker::spawn(Equipment {
            queue: index,
            disk: disk.clone(),
            sync_failed: sync_failed.clone(),
            counters: counters.queue(index),
            throttle: throttle.clone(),
            poll,
            // One that gives only errors needs none.
            engine: config.engine.filter(|_| !config.failed),
            hold: hold.clone(),
        });
        workers.push(worker.map_err(|e| BlkError::Worker(index, e))?);
    }
    let offer = Offer::new(config.queues).map_err(BlkError::Record)?;
    let mut backend = Backend::new(disk.clone(), workers, offer);
    if config.failed {
        backend.fail();
    }
    let backend = Arc::new(Mutex::new(backend));
    let socket = vhost_user.try_clone().map_err(BlkError::Examine)?;
    let handler = BackendReqHandler::from_stream(vhost_user, backend.clone());
    Ok(Blk { disk, backend, handler, socket, throttle, counters })
}

/// A serial number as the driver gets it.
fn id_of(serial: &str) -> Result<[u8; ID_BYTES], BlkError> {
    let mut id = [0; ID_BYTES];
    match id.get_mut(..serial.len()) {
        Some(id) if serial.is_ascii() => id.copy_from_slice(serial.as_bytes()),
        _ => return Err(BlkError::Serial(serial.into())),
    }
    Ok(id)
}

/// `layer` is an overlay and its map.
fn open(
    config: &BlkStart,
    fd: OwnedFd,
    layer: Option<(OwnedFd, OwnedFd)>,
) -> Result<Disk, BlkError> {
    if config.size == 0 || !config.size.is_multiple_of(SECTOR) || config.size > i64::MAX as u64 {
        return Err(BlkError::Size(config.size));
    }
    let id = id_of(&config.serial)?;
    if config.failed {
        return failed(config, File::from(fd), id);
    }
    let file = check(fd, config.read_only || config.cow, config.size)?;
    let overlay = match layer {
        Some((fd, map)) => {
            let file = check(fd, false, overlay_bytes(config.size))?;
            let map = Bitmap::map(map, config.size, Access::ReadWrite);
            Some(Overlay::new(file, map.map_err(BlkError::Bitmap)?, config.size))
        }
        None => None,
    };
    let block_size = block_size(&file)?;
    let direct = Direct::of(&file).map_err(BlkError::Direct)?;
    if let Some(block) = direct.as_ref().map(|direct| direct.block)
        && !config.size.is_multiple_of(block)
    {
        return Err(BlkError::CutShort { size: config.size, block });
    }
    let (size, read_only) = (config.size, config.read_only);
    Ok(Disk { file, block_size, size, read_only, id: id.into(), direct, overlay })
}

/// A disk that gives nothing but errors: whatever is wrong with its image, which is only
/// looked at for what the guest was told of it.
fn failed(config: &BlkStart, image: File, id: [u8; ID_BYTES]) -> Result<Disk, BlkError> {
    let block_size = block_size(&image)?;
    let file = sealed_memfd("cellblock-no-image", 0).map_err(BlkError::Record)?.into();
    let (size, read_only) = (config.size, config.read_only);
    Ok(Disk { file, block_size, size, read_only, id: id.into(), direct: None, overlay: None })
}

/// What the guest is told of the image's blocks.
fn block_size(file: &File) -> Result<u32, BlkError> {
    // A power of two on every file system; a guest is told nothing else.
    let bytes = file.metadata().map_err(BlkError::Examine)?.blksize();
    Ok(match u32::try_from(bytes) {
        Ok(bytes) if bytes.is_power_of_two() => bytes.clamp(SECTOR as u32, 1 << 20),
        _ => SECTOR as u32,
    })
}

/// A file for `size` bytes of a disk, opened as it is to be used.
fn check(fd: OwnedFd, read_only: bool, size: u64) -> Result<File, BlkError> {
    check_mode(fd.as_fd(), read_only)?;
    let mut file = File::from(fd);
    let found = file.seek(SeekFrom::End(0)).map_err(BlkError::Examine)?;
    if found < size { Err(BlkError::Short { found, wanted: size }) } else { Ok(file) }
}

fn check_mode(fd: BorrowedFd<'_>, read_only: bool) -> Result<(), BlkError> {
    let flags = fcntl(fd, FcntlArg::F_GETFL).map_err(|e| BlkError::Examine(e.into()))?;
    let flags = OFlag::from_bits_retain(flags);
    // With O_APPEND, Linux appends whatever offset a write names.
    let found = if flags.contains(OFlag::O_APPEND) {
        "for appending"
    } else {
        match flags & OFlag::O_ACCMODE {
            OFlag::O_RDONLY => "read-only",
            OFlag::O_RDWR => "for writing",
            _ => "write-only",
        }
    };
    let wanted = if read_only { "read-only" } else { "for writing" };
    if found == wanted { Ok(()) } else { Err(BlkError::Mode { found, wanted }) }
}

impl Blk {
    /// Guest memory is still to come, and is registered when it is mapped.
    pub fn memory_comes(&mut self, lazy: Option<Lazy>) {
        self.backend().lazy = lazy;
    }

    /// Serves the front end and the VMM until either closes its socket; then every
    /// ring has stopped, with all that was taken from it answered.
    pub fn serve(mut self, cell: &Channel) -> Result<(), BlkError> {
        let result = self.serve_messages(cell);
        let stopped = self.backend().stop().map_err(BlkError::FrontEnd);
        result.and(stopped)
    }

    fn serve_messages(&mut self, cell: &Channel) -> Result<(), BlkError> {
        loop {
            let (front_end, vmm) = self.wait(cell)?;
            if vmm && !self.serve_cell(cell)? {
                return Ok(());
            }
            if front_end && !self.serve_front_end()? {
                return Ok(());
            }
        }
    }

    /// Sleeps until one of the sockets has something: the front end's, the VMM's.
    fn wait(&self, cell: &Channel) -> Result<(bool, bool), BlkError> {
        let watch = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [watch(self.socket.as_fd()), watch(cell.as_fd())];
        loop {
            match poll_fds(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(BlkError::Wait(e)),
                Ok(_) => {
                    let [front_end, vmm] = fds.map(|fd| fd.any().unwrap_or(true));
                    return Ok((front_end, vmm));
                }
            }
        }
    }

    /// Answers the VMM; false when it is gone.
    fn serve_cell(&self, cell: &Channel) -> Result<bool, BlkError> {
        let message = match cell.try_recv::<ToCell>() {
            Ok(Some((message, _fds))) => message,
            Ok(None) => return Ok(true),
            Err(ChannelError::Closed) => return Ok(false),
            Err(e) => return Err(BlkError::Cell(e)),
        };
        let answer = match message {
            ToCell::Throttle(limits) => {
                self.throttle.set(&limits, throttle::now());
                self.backend().wake();
                return Ok(true);
            }
            ToCell::Serial(serial) => {
                self.disk.set_id(id_of(&serial)?);
                return Ok(true);
            }
            ToCell::Part => return Ok(true), // not for a disk
            // It counts in shared memory.
            ToCell::Stats => FromCell::Stats(CellStats::None),
            ToCell::Ping => FromCell::Alive,
            ToCell::Quiesce { epoch } => self.quiesced(epoch),
            ToCell::Thaw { .. } => return Ok(true), // its rings are started by the front end
            ToCell::Load(load) => FromCell::Loaded(self.load(*load)),
            // A block device holds no output back.
            ToCell::Drain { epoch, .. } => FromCell::Drained { epoch, dropped: 0, unread: 0 },
        };
        match cell.send(&answer, &[]) {
            Ok(()) => Ok(true),
            Err(ChannelError::Closed) => Ok(false),
            Err(e) => Err(BlkError::Cell(e)),
        }
    }

    /// Handles one message of the front end; false when it is gone.
    fn serve_front_end(&mut self) -> Result<bool, BlkError> {
        let told = self.wants_reply();
        match self.handler.handle_request() {
            Ok(()) => Ok(true),
            Err(vhost::vhost_user::Error::Disconnected) => Ok(false),
            Err(_) if self.backend().take_refusal() && told => Ok(true),
            Err(e) => Err(BlkError::FrontEnd(e)),
        }
    }

    /// Whether the sender of the message that is there waits for its result. One that
    /// does not would never learn of a refusal, but by the connection's end.
    fn wants_reply(&self) -> bool {
        const NEED_REPLY: u32 = 1 << 3; // vhost-user: request, flags, size; 32 bits each
        let mut header = [0; 8];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL;
        let len = recv(self.socket.as_raw_fd(), &mut header, flags);
        let [_, _, _, _, flags @ ..] = header;
        len == Ok(header.len()) && u32::from_ne_bytes(flags) & NEED_REPLY != 0
    }

    fn backend(&self) -> MutexGuard<'_, Backend> {
        // Only this thread ever takes it; the handler's type asks for a lock.
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Blk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blk").finish_non_exhaustive()
    }
}

/// An error with its sources, on one line.
fn chain(error: &dyn StdError) -> impl fmt::Display + '_ {
    struct Chain<'a>(&'a dyn StdError);
    impl fmt::Display for Chain<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{}", self.0)?;
            let mut next = self.0.source();
            while let Some(error) = next {
                write!(f, ": {error}")?;
                next = error.source();
            }
            Ok(())
        }
    }
    Chain(error)
}
