//! The thread that serves one queue.
//!
//! A worker is made once, before the process is sealed, and lives as long as the
//! device. It is idle until it is handed a ring ([`Worker::start`]), serves that
//! until it is stopped, hands back where it got to, and is idle again. Kicks and
//! interrupts are eventfds between it and the guest; nobody else is involved.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

use super::engine::{Uring, UringError};
use super::execute::Disk;
use super::memory::Memory;
use super::request::Limits;
use super::ring::Layout;
use super::server::Server;
use super::throttle::Throttle;
use crate::protocol::EngineKind;
use crate::protocol::counters::VirtioBlkCounters;

/// A worker that could not be made, or no longer answers.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Its event descriptors could not be made.
    #[error("preparing to wait for kicks")]
    Events(#[source] Errno),
    /// The thread could not be started.
    #[error("starting a queue thread")]
    Thread(#[source] std::io::Error),
    /// The file descriptor given for kicks cannot be waited for.
    #[error("waiting for the kick file descriptor")]
    Kick(#[source] Errno),
    /// Its io_uring could not be made.
    #[error(transparent)]
    Uring(#[from] UringError),
    /// The thread is gone.
    #[error("queue thread has ended")]
    Gone,
}

/// Everything a worker needs to serve a ring.
#[derive(Debug)]
pub(super) struct Start {
    pub memory: Arc<Memory>,
    pub layout: Layout,
    pub limits: Limits,
    /// Writes are durable before they are answered.
    pub write_through: bool,
    pub kick: Arc<OwnedFd>,
    /// Interrupts; none for a driver that polls.
    pub call: Option<Arc<File>>,
    /// Told when the ring is found broken.
    pub err: Option<Arc<File>>,
    /// Interrupt once at the start: the driver may have missed one.
    pub interrupt: bool,
    /// The driver broke the ring before: it is not to be touched.
    pub broken: bool,
}

/// How the service of a ring ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopped {
    /// The first available entry not taken; all that was taken is answered.
    pub next_avail: u16,
    /// The driver broke the ring.
    pub broken: bool,
}

/// What a queue's thread works with, besides what it makes itself.
#[derive(Debug)]
pub(super) struct Equipment {
    /// Number of the queue.
    pub queue: u16,
    pub disk: Arc<Disk>,
    /// The disk's cached data could not be written, and no request was told so.
    pub sync_failed: Arc<AtomicBool>,
    pub counters: VirtioBlkCounters,
    pub throttle: Arc<Throttle>,
    pub poll: Duration,
    pub engine: Option<EngineKind>,
    /// For a ring to hold as long as anything is in flight.
    pub hold: Option<Arc<OwnedFd>>,
}

impl Equipment {
    fn server(self, control: Arc<Control>) -> Result<Server, WorkerError> {
        let uring = match self.engine {
            Some(EngineKind::IoUring) => Some(Uring::new(&self.disk, self.hold.as_deref())?),
            // What has to be waited for is better waited for in number.
            None if self.disk.direct.is_some() => {
                match Uring::new(&self.disk, self.hold.as_deref()) {
                    Err(UringError::Unavailable(error)) => {
                        tracing::info!(%error, "doing without io_uring");
                        None
                    }
                    uring => Some(uring?),
                }
            }
            None | Some(EngineKind::Sync) => None,
        };
        if let Some(uring) = &uring {
            watch(&control.epoll, uring).map_err(WorkerError::Events)?;
        }
        Ok(Server::new(control, self, uring))
    }
}

/// Shared with the thread.
#[derive(Debug)]
pub(super) struct Control {
    /// The thread is to give its ring back.
    pub stop: AtomicBool,
    /// What the thread sleeps on: `wake`, `timer` and the kicks of its ring.
    pub epoll: Epoll,
    /// Ends the wait for tokens.
    pub timer: TimerFd,
    wake: EventFd,
}

impl Control {
    pub fn new() -> Result<Control, Errno> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        watch(&epoll, &wake)?;
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        watch(&epoll, &timer)?;
        Ok(Control { stop: AtomicBool::new(false), epoll, timer, wake })
    }
}

/// Handle of a queue's thread. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Worker {
    control: Arc<Control>,
    starts: Option<Sender<Start>>,
    ends: Receiver<Stopped>,
    running: Option<Arc<OwnedFd>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Makes the idle thread of a queue.
    pub fn spawn(equipment: Equipment) -> Result<Worker, WorkerError> {
        let control = Arc::new(Control::new().map_err(WorkerError::Events)?);
        let (starts, start) = channel();
        let (end, ends) = channel();
        let (ready, is_ready) = channel();
        let of_thread = control.clone();
        let thread = thread::Builder::new()
            .name(format!("blk-q{}", equipment.queue))
            .spawn(move || {
                equipment.counters.excuse(true); // until it has a ring
                let server = equipment.server(of_thread);
                let mut server = match server {
                    Ok(server) => server,
                    Err(error) => return drop(ready.send(Err(error))),
                };
                // It runs, with all that a thread's start takes behind it.
                if ready.send(Ok(())).is_err() {
                    return;
                }
                while let Ok(ring) = start.recv() {
                    let stopped = server.serve(&ring);
                    server.control().stop.store(false, Ordering::Relaxed);
                    if end.send(stopped).is_err() {
                        return;
                    }
                }
            })
            .map_err(WorkerError::Thread)?;
        // A filter put on now must not meet a thread that is still being set up.
        is_ready.recv().map_err(|_| WorkerError::Gone)??;
        Ok(Worker { control, starts: Some(starts), ends, running: None, thread: Some(thread) })
    }

    /// Hands the idle worker a ring, whose layout the caller has checked.
    pub fn start(&mut self, start: Start) -> Result<(), WorkerError> {
        debug_assert!(self.running.is_none(), "a worker serves one ring at a time");
        let kick = start.kick.clone();
        watch(&self.control.epoll, &*kick).map_err(WorkerError::Kick)?;
        let starts = self.starts.as_ref().ok_or(WorkerError::Gone)?;
        starts.send(start).map_err(|_| WorkerError::Gone)?;
        self.running = Some(kick);
        Ok(())
    }

    /// Has it look whether what it waits for is there.
    pub fn wake(&self) {
        // Fails only when the counter is full, and then the thread is awake already.
        let _ = self.control.wake.write(1);
    }

    /// Whether it has a ring.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Takes the ring back after the request it is at; `None` if it has none.
    pub fn stop(&mut self) -> Result<Option<Stopped>, WorkerError> {
        let Some(kick) = self.running.take() else { return Ok(None) };
        self.control.stop.store(true, Ordering::Release);
        self.wake();
        let stopped = self.ends.recv().map_err(|_| WorkerError::Gone)?;
        // The thread waits for a ring now, not for kicks. A closed fd would have
        // left the set by itself only with its last duplicate, which others hold.
        self.control.epoll.delete(&*kick).map_err(WorkerError::Events)?;
        Ok(Some(stopped))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.stop();
        self.starts = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Adds an eventfd, edge-triggered: each write to it wakes, and it is never read,
/// which saves a system call a kick and cannot block whatever the fd really is.
fn watch(epoll: &Epoll, fd: impl AsFd) -> Result<(), Errno> {
    epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))
}

/// Adds one to an eventfd of the front end's, which was made non-blocking. A full
/// counter means that nobody has looked for 2^64 events.
pub(super) fn signal(event: Option<&Arc<File>>) {
    if let Some(file) = event {
        let _ = nix::unistd::write(&**file, &1u64.to_ne_bytes());
    }
}
