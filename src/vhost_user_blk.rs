//! A disk for other VMMs: our block process behind a listening vhost-user socket.
//!
//! This process opens the image, makes the socket and accepts. Each front end is handed
//! to a block process made for it, in the same jail as in a VM of ours, and is gone from
//! here: not one of its bytes is read by this process. What it shares (its memory, its
//! eventfds) only the jailed process ever holds, and it ends with the connection.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use cellblock_seccomp::filter::{self, Policy};
use cellblock_seccomp::spawner::{self, Event, ExitStatus, Spawner};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::SockType;
use nix::sys::stat::Mode;

use crate::cell::counters::BlkCounters;
use crate::cell::launch::{Common, wait_ready};
use crate::cell::{Cell, CellError, blk};
use crate::control::socket::{ListeningSocket, SocketError};
use crate::logging;
use crate::remedy::{Remedy, chain};
use crate::spec::{DiskError, DiskSpec, OpenedDisk};
use crate::vmm::VmmError;
use crate::vmm::signals::Signals;
use crate::vmm::{confine, drop_privileges};

/// How long a block process may take at the end over what it holds.
const END_LIMIT: Duration = Duration::from_secs(5);

/// How often it is looked whether requests of a process that has ended are over.
const DRAINING: Duration = Duration::from_millis(5);
/// Looks within the time that a process may be silent.
const LOOKS: u32 = 4;

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to make the socket.
    pub socket: PathBuf,
    /// The disk, with its id.
    pub disk: DiskSpec,
    /// How long a block process may give no sign of life; zero for ever.
    pub device_timeout: Duration,
    /// False only with `--disable-sandbox`.
    pub sandbox: bool,
    /// What happens on a system call outside a policy.
    pub seccomp: SeccompMode,
    /// What the block processes log.
    pub log: LogLevel,
}

/// A disk that cannot be served, or no longer.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum ServeError {
    #[error("starting the spawner")]
    Spawner(#[from] spawner::SpawnError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("making the vhost-user socket")]
    Socket(#[source] SocketError),
    #[error(transparent)]
    Cell(#[from] CellError),
    #[error(transparent)]
    Confine(#[from] VmmError),
    #[error("{what}")]
    System {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the spawner died, so no block process can be started")]
    SpawnerDied,
}

impl Remedy for ServeError {
    fn remedy(&self) -> Option<String> {
        match self {
            ServeError::Disk(error) => error.remedy(),
            ServeError::Socket(error) => error.remedy(),
            ServeError::SpawnerDied => Some("see the kernel log for who killed it".into()),
            _ => None,
        }
    }
}

/// Serves until a signal. The caller must still be single-threaded.
pub fn run(config: &Config) -> Result<(), ServeError> {
    let system = |what| move |source| ServeError::System { what, source };
    let spawner = spawner::fork(spawner::Options::default())?;
    let signals = Signals::install().map_err(system("taking signals over"))?;
    let image = config.disk.open()?;
    let common = Common {
        seccomp: config.seccomp,
        sandbox: config.sandbox,
        log: config.log,
        lazy: None,
        writes: None,
    };
    let disk = &config.disk;
    let counters = blk::page(disk.id(), queues(disk))?;
    let watch = Watch::new(config.device_timeout);
    let mut server = Server { spawner, signals, common, disk, image, counters, now: None, watch };
    server.try_out()?;
    let (listener, _node) = listen(config)?;
    if config.sandbox {
        drop_privileges()?;
        let mode = match config.seccomp {
            SeccompMode::Kill => filter::Mode::Kill,
            SeccompMode::Log => filter::Mode::Log,
        };
        confine(Policy::VmmMain, Some(mode)).map_err(VmmError::from)?;
    }
    logging::tell(&format!("serving {} on {}", config.disk.id(), config.socket.display()));
    let result = server.serve(&listener);
    server.end();
    result
}

fn listen(config: &Config) -> Result<(UnixListener, impl Drop + use<>), ServeError> {
    let socket =
        ListeningSocket::bind_as(&config.socket, SockType::Stream, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(ServeError::Socket)?;
    let (fd, node) = socket.into_parts();
    let listener = UnixListener::from(fd);
    // A front end may be gone again between the news of it and the accept.
    listener
        .set_nonblocking(true)
        .map_err(|source| ServeError::System { what: "preparing the vhost-user socket", source })?;
    Ok((listener, node))
}

/// Without a VM there are no vCPUs to count: one queue unless more are asked for.
fn queues(disk: &DiskSpec) -> u16 {
    disk.queues(1)
}

struct Server<'a> {
    spawner: Spawner,
    signals: Signals,
    common: Common,
    disk: &'a DiskSpec,
    image: OpenedDisk,
    /// Its throttle's balance too: no front end gets a full one by connecting again.
    counters: BlkCounters,
    /// The process of the front end that is served.
    now: Option<Cell>,
    watch: Watch,
}

/// Finds a process that hangs: it would keep every front end waiting that comes after its own.
struct Watch {
    limit: Option<Duration>,
    next: Instant,
    silent: u32,
}

impl Watch {
    fn new(limit: Duration) -> Watch {
        Watch { limit: (!limit.is_zero()).then_some(limit), next: Instant::now(), silent: 0 }
    }

    /// Whether it is time to look.
    fn is_due(&mut self) -> bool {
        let Some(limit) = self.limit.filter(|_| self.next <= Instant::now()) else { return false };
        self.next = Instant::now() + limit / LOOKS;
        true
    }
}

/// What there is to do.
struct Ready {
    signals: bool,
    spawner: bool,
    front_end: bool,
    cell: bool,
}

impl Server<'_> {
    /// A jail that cannot be built is found out before anybody connects.
    fn try_out(&mut self) -> Result<(), ServeError> {
        let pair = UnixStream::pair();
        let (_near, far) =
            pair.map_err(|source| ServeError::System { what: "creating a connection", source })?;
        self.start(far)?;
        self.finish();
        Ok(())
    }

    fn start(&mut self, front_end: UnixStream) -> Result<(), CellError> {
        let (disk, image, counters) = (self.disk, &self.image, &self.counters);
        let queues = queues(disk);
        let spawner = &mut self.spawner;
        let mut cell =
            blk::process(spawner, self.common, disk, image, counters, queues, front_end)?;
        wait_ready(&mut [&mut cell], &mut self.spawner)?;
        self.now = Some(cell);
        self.watch.silent = 0;
        Ok(())
    }

    fn serve(&mut self, listener: &UnixListener) -> Result<(), ServeError> {
        loop {
            let ready = self.wait(listener)?;
            if ready.signals && self.signals.take() {
                tracing::info!("stopping on a signal");
                return Ok(());
            }
            if ready.cell
                && let Some(cell) = &mut self.now
            {
                // Log lines, which are logged; a block process says nothing else by itself.
                while cell.next_message().is_some() {}
            }
            if ready.spawner {
                self.spawner_events()?;
            }
            if self.watch.is_due() {
                self.look_for_life();
            }
            if ready.front_end && self.now.is_none() {
                self.accept(listener)?;
            }
        }
    }

    fn wait(&self, listener: &UnixListener) -> Result<Ready, ServeError> {
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.spawner.as_fd(), PollFlags::POLLIN),
        ];
        let mut limit = None;
        match &self.now {
            // What it wrote last may come after what the next front end writes.
            None if self.image.held.any() => limit = Some(DRAINING),
            None => fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN)),
            Some(cell) if cell.is_open() => {
                fds.push(PollFd::new(cell.channel().as_fd(), PollFlags::POLLIN));
                let next = self.watch.next.saturating_duration_since(Instant::now());
                limit = self.watch.limit.map(|_| next + Duration::from_millis(1));
            }
            // It is ending; the spawner will say how.
            Some(_) => {}
        }
        let limit = limit.map(|limit| PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX));
        match poll(&mut fds, limit.unwrap_or(PollTimeout::NONE)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(ServeError::System {
                    what: "waiting for events",
                    source: errno.into(),
                });
            }
        }
        let is = |n: usize| fds.get(n).is_some_and(|fd| fd.any().unwrap_or(true));
        let served = self.now.is_some();
        Ok(Ready {
            signals: is(0),
            spawner: is(1),
            front_end: !served && is(2),
            cell: served && is(2),
        })
    }

    fn accept(&mut self, listener: &UnixListener) -> Result<(), ServeError> {
        let front_end = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // The front end's affair, or too many open files: the next may do better.
                if error.kind() != io::ErrorKind::WouldBlock {
                    tracing::warn!("accepting a front end: {error}");
                }
                return Ok(());
            }
        };
        match self.start(front_end) {
            Ok(()) => {
                let pid = self.now.as_ref().and_then(Cell::pid);
                tracing::info!(device = self.disk.id(), pid, "a front end connected");
                Ok(())
            }
            Err(CellError::Spawner { source: spawner::SpawnError::Gone, .. }) => {
                Err(ServeError::SpawnerDied)
            }
            Err(error) => {
                tracing::error!(error = chain(&error), "a front end was turned away");
                Ok(())
            }
        }
    }

    fn spawner_events(&mut self) -> Result<(), ServeError> {
        loop {
            match self.spawner.try_event() {
                Ok(Some(Event::Exited { pid, status })) => self.ended(pid, status),
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(error) => {
                    tracing::error!(error = chain(&error), "spawner");
                    return Err(ServeError::SpawnerDied);
                }
            }
        }
    }

    /// Ends a process that gave no sign of life for too long: its front end connects again.
    fn look_for_life(&mut self) {
        let (Some(cell), Some(limit)) = (&mut self.now, self.watch.limit) else { return };
        self.watch.silent = if cell.ping() { 0 } else { self.watch.silent + 1 };
        let (LOOKS.., Some(pid)) = (self.watch.silent, cell.pid()) else { return };
        self.watch.silent = 0;
        let device = self.disk.id();
        tracing::error!(role = "blk", device, pid, "no sign of life in {limit:?}: it is ended");
        if let Err(error) = self.spawner.kill(pid) {
            tracing::error!(device, error = chain(&error), "ending a process");
        }
    }

    fn ended(&mut self, pid: i32, status: ExitStatus) {
        let Some(mut cell) = self.now.take_if(|cell| cell.pid() == Some(pid)) else { return };
        while cell.next_message().is_some() {} // what it said last
        let device = self.disk.id();
        if status == ExitStatus::Code(0) {
            tracing::info!(device, pid, "the front end disconnected");
        } else {
            let how = cell.obituary(status);
            tracing::error!(role = "blk", device, pid, "device process died: {how}");
        }
    }

    /// Lets the process, if there is one, finish what it holds and end.
    fn finish(&mut self) {
        let Some(cell) = self.now.take() else { return };
        let pid = cell.pid();
        drop(cell); // end of file on its channel ends it
        let end = Instant::now() + END_LIMIT;
        loop {
            match self.spawner.next_event(end.saturating_duration_since(Instant::now())) {
                Ok(Event::Exited { pid: ended, .. }) if Some(ended) == pid => return,
                Ok(_) => {}
                Err(_) => {
                    tracing::warn!(device = self.disk.id(), "block process is slow to end");
                    return;
                }
            }
        }
    }

    fn end(mut self) {
        self.finish();
        if !self.spawner.shutdown(END_LIMIT) {
            tracing::warn!("the spawner is slow to end");
        }
        self.image.held.wait_released(END_LIMIT);
    }
}
