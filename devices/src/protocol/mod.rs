//! The cell channel: what the VMM and a device process say to each other.
//!
//! One [`Hello`] with all fds, answered by [`FromCell::Ready`] once the jail is
//! sealed (or [`FromCell::Failed`]); afterwards [`ToCell`] and [`FromCell`]
//! messages in both directions. A message that does not decode ends the channel,
//! and with it the process; never the VM.

pub mod counters;
pub mod overlay;
pub mod presence;
pub mod ring;
pub mod state;
pub mod write_log;

use serde::{Deserialize, Serialize};

use self::state::{CellLoad, CellState};

/// The fd number of the cell channel in a device process.
pub const CELL_FD: i32 = 3;
/// The fd number of the vhost-user socket in a virtio device process.
pub const VHOST_USER_FD: i32 = 4;
/// First argument of a device process; the second is the role, the third the device id.
pub const CELL_ARG: &str = "@cell";

/// The first message a device process receives.
///
/// Its fds are, in order: the violation page (a sealed memfd of one page), with
/// [`Hello::lazy`] the three of [`crate::lazy`], with [`Hello::logged`] the log, then those
/// that [`Start`] lists for the role.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The device's id, unique in the VM: `disk0`, `com1`.
    pub id: String,
    /// What happens on a system call outside the policy.
    pub seccomp: SeccompMode,
    /// False only with `--disable-sandbox`: no namespaces, no filter.
    pub sandbox: bool,
    /// The most detailed level the device process logs.
    pub log: LogLevel,
    /// For a process that maps guest memory which is still to come: its number of chunks.
    pub lazy: Option<u64>,
    /// For a process that maps guest memory: how many bytes of it its log of what it
    /// writes ([`write_log`]) is for.
    pub logged: Option<u64>,
    /// What to be.
    pub start: Start,
}

/// What happens on a system call outside the policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompMode {
    /// The process ends after writing the call to its violation page.
    #[default]
    Kill,
    /// The kernel logs the call and it goes on: for finding a missing call.
    Log,
}

/// Role and configuration of a device process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Start {
    /// fds: the disk image, opened as [`BlkStart::read_only`] says (and with O_DIRECT if
    /// the page cache is not to be used), then the page of [`counters`]; with
    /// [`BlkStart::cow`], and an image opened read-only, the overlay, and its map, as
    /// [`overlay`] describes them. Then pipes: one to hold until nothing of the process is
    /// in flight on the image, and those that its predecessors held, of which the process
    /// waits for the end before it begins.
    Blk(BlkStart),
    /// fds: ring memfd, ring doorbell eventfd, interrupt eventfd, a sealed memfd of
    /// [`JOURNAL_BYTES`], and both ends of two non-blocking pipes, one for output and one for
    /// input (what is in all of these outlives the process), then, where [`SerialStart`] says
    /// so, the input, the output, the listening socket and the client it had.
    Serial(SerialStart),
}

/// Configuration of a block device process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlkStart {
    /// Offer VIRTIO_BLK_F_RO and refuse writes.
    pub read_only: bool,
    /// Bytes of the image; a multiple of 512.
    pub size: u64,
    /// What GET_ID answers: at most 20 bytes of ASCII.
    pub serial: String,
    /// Number of queues (and workers).
    pub queues: u16,
    /// How long, in microseconds, a worker polls the avail ring before it sleeps.
    pub poll_us: u32,
    /// What the disk may do.
    pub throttle: ThrottleLimits,
    /// Answer every request with an I/O error, and do not keep the image: processes of
    /// this disk died too often.
    pub failed: bool,
    /// What the guest writes goes to a private overlay.
    pub cow: bool,
    /// What carries requests out; none for what suits the image and the host.
    pub engine: Option<EngineKind>,
}

/// What carries a disk's requests out on its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EngineKind {
    /// One system call after the other, on the queue's thread.
    Sync,
    /// io_uring: many at once.
    IoUring,
}

/// What a disk may do at most, over all its queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ThrottleLimits {
    /// Bytes read and written; `None` for as many as can be.
    pub bytes: Option<Rate>,
    /// Valid requests of any kind; `None` for as many as can be.
    pub requests: Option<Rate>,
}

/// A steady rate and what may go beyond it for a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rate {
    /// Tokens a second, at least one.
    pub per_second: u64,
    /// Most tokens saved up while nothing is asked for, at least `per_second`.
    pub burst: u64,
}

/// Bytes of the memory in which a serial process keeps what its successor needs.
pub const JOURNAL_BYTES: usize = 8192 + (192 << 10) + OUTPUT_MAX as usize;
/// Most guest output that is kept for a slow reader.
pub const OUTPUT_MAX: u32 = 1 << 20;

/// Configuration of a serial device process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SerialStart {
    /// Where guest output goes and input comes from.
    pub endpoint: SerialEndpoint,
    /// Watch the input for the escape sequence (ctrl-a x) that quits the VM.
    pub escape: bool,
    /// Bytes of guest output kept for a slow reader before more is dropped and counted; at
    /// most [`OUTPUT_MAX`].
    pub buffer: u32,
}

/// The kind of console endpoint, and so which fds follow in the hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SerialEndpoint {
    /// No fds: output is discarded, there is no input.
    Null,
    /// Two fds: input, then output (they may be the same file).
    Stdio,
    /// One fd: output only.
    File,
    /// One fd, both ways: the master side of a pseudo-terminal.
    Pty,
    /// One fd: a listening Unix stream socket; one client at a time, the newest refused. A
    /// second one where a process before this one had a client: that.
    Socket,
}

/// A mapping of guest memory in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultWindow {
    /// Its address.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Where it starts in guest memory's memfd.
    pub offset: u64,
}

/// What a device process has registered with the userfaultfd that comes with it, on the
/// channel to the pager of a VM whose memory is still to come. A later one replaces it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Registered {
    /// All mappings of guest memory.
    pub windows: Vec<FaultWindow>,
}

/// VMM to device process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToCell {
    /// Take everything out of the ring and hand it to the endpoint; answer
    /// [`FromCell::Drained`] with the same epoch, at the latest after `limit_ms`.
    Drain {
        /// Echoed in the answer.
        epoch: u64,
        /// Longest time to wait for a slow reader, in milliseconds.
        limit_ms: u32,
    },
    /// A block process only, and not answered: from now on the disk may do this much.
    Throttle(ThrottleLimits),
    /// A block process only, and not answered: from now on this is the disk's serial number.
    Serial(String),
    /// Come to rest: carry out what was asked for so far, answer [`FromCell::Quiesced`] with
    /// the same epoch, and touch neither the guest nor its devices until [`ToCell::Thaw`]. The
    /// rings of a block process have been stopped through its front end before.
    Quiesce {
        /// Echoed in the answer.
        epoch: u64,
    },
    /// Go on after the quiesce of this epoch. Not answered; one of another epoch is ignored.
    Thaw {
        /// Of the quiesce.
        epoch: u64,
    },
    /// Go on from where a device of this kind once stood; answer [`FromCell::Loaded`]. Only for
    /// a process that has served nothing yet, or is quiesced.
    Load(Box<CellLoad>),
    /// A serial process only: whoever listens and types has no business here any more, and what
    /// the guest wrote is nobody else's. Answer [`FromCell::Parted`].
    Part,
    /// Answer [`FromCell::Stats`]. A block process counts in the page of [`counters`]
    /// instead.
    Stats,
    /// Answer [`FromCell::Alive`].
    Ping,
}

/// Device process to VMM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromCell {
    /// The jail is sealed; the device serves from now on.
    Ready,
    /// The process cannot start, and exits.
    Failed {
        /// Jail step or preparation that failed.
        step: String,
        /// One line: what went wrong, and the remedy.
        message: String,
    },
    /// One log line.
    Log {
        /// Severity.
        level: LogLevel,
        /// The text, one line.
        message: String,
    },
    /// Answer to [`ToCell::Drain`].
    Drained {
        /// Of the request.
        epoch: u64,
        /// Bytes dropped because the reader did not keep up, since the start.
        dropped: u64,
        /// Bytes that the reader has not taken within the time of the request. They are
        /// lost if the process ends now.
        unread: u64,
    },
    /// Answer to [`ToCell::Quiesce`].
    Quiesced {
        /// Of the request.
        epoch: u64,
        /// Where the device stands.
        state: Box<CellState>,
    },
    /// Answer to [`ToCell::Load`]: whether it was possible.
    Loaded(bool),
    /// Answer to [`ToCell::Part`]: the client is gone, and nothing is kept for another.
    Parted,
    /// Answer to [`ToCell::Stats`].
    Stats(CellStats),
    /// The user typed the escape sequence at the console.
    Quit,
    /// The guest printed a marker line `cellblock:NAME`. A process that died may have said so
    /// already: its successor repeats the number.
    Marker {
        /// Of this one, among those of the device.
        number: u32,
        /// Which.
        marker: Marker,
    },
    /// A serial process has this client now, which comes with the message, or none: for its
    /// successor.
    Client,
    /// Answer to [`ToCell::Ping`].
    Alive,
}

/// Readiness markers a guest gives by port 0xCB0 or by a console line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Marker {
    /// `cellblock:heartbeat`, byte 1.
    Heartbeat,
    /// `cellblock:pre-exec`, byte 2.
    PreExec,
    /// `cellblock:listener`, byte 3.
    Listener,
    /// Byte 4 (no console line).
    ListenerGone,
    /// `cellblock:parked`, byte 5.
    Parked,
}

/// Counters of a device process, cumulative.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CellStats {
    /// Nothing counted yet, or not here.
    #[default]
    None,
    /// A serial process.
    Serial {
        /// Bytes the guest wrote.
        output: u64,
        /// Bytes handed to the guest.
        input: u64,
        /// Bytes of output dropped because the reader did not keep up.
        dropped: u64,
    },
}

/// Severity of a log line, most severe first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something is wrong but handled.
    Warn,
    /// What a user may want to know.
    Info,
    /// For developers.
    Debug,
    /// Everything.
    Trace,
}
