//! The serial process: a 16550 UART behind the register ring.
//!
//! ```text
//! vCPUs ── ring ──> uart ──> output ── serial-out ──> endpoint
//!            ^       |  ^
//!     reads answered |  └── input <── serial-in, or poll ── endpoint
//!                    └── interrupt (irqfd)
//! ```
//!
//! The main thread serves the ring and never blocks on anything else: a thread of
//! its own writes the output, another reads stdin. What the guest transmits is
//! kept in a bounded buffer; when that is full, or nobody is connected for long,
//! the oldest bytes are dropped and counted. What the user types waits until the
//! guest takes it.
//!
//! All of that is kept in a `journal` that outlives the process: its successor goes on
//! with the first access that was not carried out. Output and input cross the border of the
//! process through a pipe each, which outlives it too; a client of a socket is handed to the
//! VMM, for the successor.
//!
//! | endpoint | output while nobody reads | input |
//! |---|---|---|
//! | `Null` | discarded | none |
//! | `Stdio` | kept up to the buffer; dropped where a write fails | by `serial-in`, until end of file |
//! | `File` | as above | none |
//! | `Pty` | kept up to the buffer until somebody opens the slave | yes |
//! | `Socket` | kept up to the buffer until the next client | yes; a second client is closed at once |

mod endpoint;
mod input;
mod journal;
mod marker;
mod marks;
mod outbox;
mod output;
mod quiesce;
mod serve;
mod uart;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use cellblock_wire::{Access, Channel, ChannelError, Mapping, ShmError};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use crate::protocol::ring::{Consumer, Corrupt, RING_BYTES, RingError};
use crate::protocol::{OUTPUT_MAX, SerialEndpoint, SerialStart};
use endpoint::Endpoint;
use input::{Input, Pipe};
use journal::{Journal, State};
use marks::Marks;
use outbox::Outbox;
use output::{Kept, Output};
use serve::Drain;
use uart::Uart;

/// How long the ring is watched after an access before the process sleeps. A guest
/// that prints comes back well within that; to be woken costs both sides more.
const POLL: Duration = Duration::from_micros(50);

/// What ends a serial process.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The hello had fewer fds than its endpoint needs.
    #[error("hello lacks file descriptors for a {0:?} console")]
    MissingFd(SerialEndpoint),
    /// The ring's memory could not be mapped.
    #[error("mapping the register ring")]
    Map(#[source] ShmError),
    /// The ring cannot be used.
    #[error("setting up the register ring")]
    Ring(#[source] RingError),
    /// The journal could not be mapped.
    #[error("mapping the journal")]
    Journal(#[source] ShmError),
    /// More output to be kept than there is room for.
    #[error("{0} bytes of output are more than the {OUTPUT_MAX} that can be kept")]
    Buffer(u32),
    /// A thread of the process, or its event, could not be made.
    #[error("starting a console thread")]
    Thread(#[source] io::Error),
    /// The endpoint could not be made non-blocking.
    #[error("making the console endpoint non-blocking")]
    NonBlocking(#[source] Errno),
    /// The ring holds what no VMM writes.
    #[error("reading the register ring")]
    Corrupt(#[from] Corrupt),
    /// The cell channel failed, other than by being closed.
    #[error("talking to the VMM")]
    Channel(#[source] ChannelError),
    /// Waiting for events failed.
    #[error("waiting for events")]
    Poll(#[source] Errno),
}

/// A serial device, ready to be served.
pub struct Serial {
    ring: Consumer,
    uart: Uart,
    endpoint: Endpoint,
    output: Option<Output>,
    input: Input,
    outbox: Outbox,
    marks: Marks,
    drains: Vec<Drain>,
    journal: Journal,
    /// What input comes by.
    pipe: Arc<Pipe>,
    /// Where the output ends, and as far as `serial-out` knows, as the journal counts.
    end: u64,
    handed: u64,
    line_ended: bool,
    /// Bytes the guest transmitted.
    transmitted: u64,
    /// Bytes the guest was given.
    received: u64,
    /// vCPU, ticket and value of the answer given last.
    answer: Option<(u8, u32, u8)>,
    /// The quiesce it stands still for.
    quiesced: Option<u64>,
    poll: Duration,
    /// Where a process before this one was, and the input that it left in the pipe.
    before: Option<State>,
    left: usize,
}

/// Makes the device from the fds of [`crate::protocol::Start::Serial`] and starts
/// its threads. Nothing that a guest wrote is read but what a process before this one left,
/// which is bounded.
pub fn prepare(config: SerialStart, fds: Vec<OwnedFd>) -> Result<Serial, SerialError> {
    let kind = config.endpoint;
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or(SerialError::MissingFd(kind));
    let (memory, doorbell, interrupt) = (next()?, next()?, next()?);
    let (journal, output, input) = (next()?, (next()?, next()?), (next()?, next()?));
    if config.buffer > OUTPUT_MAX {
        return Err(SerialError::Buffer(config.buffer));
    }
    let mapping = Mapping::new(memory, RING_BYTES, Access::ReadWrite).map_err(SerialError::Map)?;
    let ring = Consumer::new(mapping, doorbell).map_err(SerialError::Ring)?;
    let journal = Journal::map(journal).map_err(SerialError::Journal)?;
    let before = journal.state();
    let end = before.as_ref().map_or(0, |state| state.end);
    let pipe = Arc::new(Pipe::new(input.0, input.1));
    let left = pipe.left().map_err(SerialError::Thread)?;
    let kept = Kept { journal: journal.clone(), pipe: output, end };
    let buffer = config.buffer as usize;
    let (endpoint, output) = Endpoint::new(kind, buffer, kept, &pipe, fds.collect())?;
    Ok(Serial {
        ring,
        uart: Uart::new(interrupt),
        endpoint,
        output,
        input: Input::new(config.escape, journal.clone(), pipe.clone()),
        outbox: Outbox::default(),
        marks: Marks::new(journal.clone(), before.as_ref().map(|state| state.marks)),
        drains: Vec::new(),
        journal,
        pipe,
        end,
        handed: end,
        line_ended: false,
        transmitted: 0,
        received: 0,
        answer: None,
        quiesced: None,
        poll: if has_one_cpu() { Duration::ZERO } else { POLL },
        before,
        left,
    })
}

impl Serial {
    /// Serves until the VMM closes the cell channel; then takes what is left in the
    /// ring, gives the reader a moment to read it, and returns.
    pub fn serve(mut self, cell: &Channel) -> Result<(), SerialError> {
        self.run(cell)
    }
}

/// Starts a thread and waits until it runs, so that what a thread does to set
/// itself up is done before the process is sealed.
fn start_thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let started = Arc::new(Barrier::new(2));
    let own = Arc::clone(&started);
    std::thread::Builder::new().name(name.into()).stack_size(64 * 1024).spawn(move || {
        own.wait();
        run();
    })?;
    started.wait();
    Ok(())
}

/// Watching the ring would keep the vCPU from the only CPU there is.
fn has_one_cpu() -> bool {
    sched_getaffinity(Pid::from_raw(0)).is_ok_and(|cpus| {
        (0..CpuSet::count()).filter(|&cpu| cpus.is_set(cpu).unwrap_or(false)).count() == 1
    })
}
