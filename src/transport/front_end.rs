//! The vhost-user front end: what the VMM says to a virtio device process.
//!
//! Each device has a thread of its own that holds the `vhost` crate's
//! `Frontend`, so that a device process that does not answer delays nobody else.
//! The thread is told what to do by jobs, and answers each through a
//! [`Completion`]. Every exchange has a deadline, kept by whoever waits: a
//! receive timeout on the socket would not do, because the `vhost` crate takes
//! EAGAIN for a reason to try again. Past the deadline [`FrontEnd::abort`] shuts
//! the socket down, which ends any exchange with an error.
//!
//! Only control messages pass here. Requests and interrupts never do.
//!
//! **A connection that ended** is the end of a front end, unless somebody watches over
//! it ([`FrontEnd::watch`]): then jobs wait, the one that was under way among them, until
//! there is another connection ([`FrontEnd::reconnect`]) or there will be none
//! ([`FrontEnd::abandon`]). Over the new one everything is set up as it was, with the
//! record of the requests in flight, before the jobs go on.

mod device_state;
mod freeze;
mod worker;

use std::fs::File;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cellblock_seccomp::filter::FilterError;
use crossbeam_channel::{Sender, unbounded};
use vhost::vhost_user::message::VhostTransferStateDirection;
use vmm_sys_util::eventfd::EventFd;

pub use self::device_state::TransferError;
use self::worker::Worker;
use super::queue::QueueConfig;
use super::wait::{Completion, Waited};
use crate::vm::memory::GuestRam;

/// The longest a device process may take over one job.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// Bit 30 of the feature word: the back end speaks protocol features. Never a
/// guest's business.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// What may reach a guest: the device type's own bits, indirect descriptors,
/// event index, and virtio 1.0. Packed rings, an IOMMU or dirty logging are not
/// ours to promise.
const GUEST_FEATURES: u64 = 0x00ff_ffff | 1 << 28 | 1 << 29 | 1 << 32;

/// A job a device process did not do.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// The thread could not be started.
    #[error("starting the vhost-user thread of {id}")]
    Thread {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A message failed, or was refused.
    #[error("{what} of {id} over vhost-user")]
    Exchange {
        /// The device.
        id: String,
        /// The step.
        what: &'static str,
        /// The reason.
        #[source]
        source: vhost::Error,
    },
    /// The back end lacks something we cannot do without.
    #[error("back end of {id} does not offer {what}")]
    Missing {
        /// The device.
        id: String,
        /// What it lacks.
        what: &'static str,
    },
    /// The back end that came after another is not what that was.
    #[error("back end of {id} came back with {what}")]
    Changed {
        /// The device.
        id: String,
        /// What is not as it was.
        what: &'static str,
    },
    /// No answer within [`DEADLINE`].
    #[error("{id} did not answer within {DEADLINE:?}")]
    Silent {
        /// The device.
        id: String,
    },
    /// The connection is gone.
    #[error("connection to {id} is closed")]
    Gone {
        /// The device.
        id: String,
    },
}

/// What a back end said of itself.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Feature bits a guest may be offered.
    pub features: u64,
    /// The device configuration space.
    pub config: Vec<u8>,
    /// Queues it serves, no more than were asked for.
    pub queues: u16,
    /// It can transfer what it keeps to itself.
    pub has_state: bool,
}

/// What we ask of a back end.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Bytes of the device configuration space.
    pub config_len: u32,
    /// Those of them that only advise a driver: they may differ in who comes after.
    pub advice: &'static [Range<usize>],
    /// Queues it has to serve.
    pub least: u16,
    /// Queues that there is a use for.
    pub most: u16,
}

/// One queue of an [`Activation`].
#[derive(Debug)]
pub struct QueueSetup {
    /// Index of the queue.
    pub index: usize,
    /// As the driver set it up, checked.
    pub config: QueueConfig,
    /// The first available entry that the device has not taken.
    pub base: u16,
    /// Rung by the guest.
    pub kick: Arc<EventFd>,
    /// Rung by the device: the interrupt.
    pub call: Arc<EventFd>,
    /// Rung by the device when it gives the queue up.
    pub err: Arc<EventFd>,
}

/// Everything a back end needs to serve.
#[derive(Debug)]
pub struct Activation {
    /// Features the driver accepted.
    pub features: u64,
    /// The queues it set up.
    pub queues: Vec<QueueSetup>,
}

/// What a job will be answered with.
pub type Answer<T> = Arc<Completion<Result<T, FrontEndError>>>;

enum Job {
    Open(Answer<DeviceInfo>),
    Activate(Activation, Answer<()>),
    SetConfig(u32, Vec<u8>, Answer<()>),
    Freeze(Answer<Vec<(usize, u16)>>),
    Thaw(Answer<()>),
    Transfer(VhostTransferStateDirection, OwnedFd, Answer<Option<File>>),
    CheckState(Answer<()>),
    Reset(Answer<()>),
    /// An activation that a reconnect was to make.
    Resume(Answer<()>),
    Watch(Watcher),
    Reconnect(u64, Connection),
    Abandon,
}

/// A connection, and a second descriptor of it to end it by. The thread may not make one.
struct Connection {
    stream: UnixStream,
    end: UnixStream,
}

impl Connection {
    fn new(stream: UnixStream) -> std::io::Result<Connection> {
        Ok(Connection { end: stream.try_clone()?, stream })
    }
}

/// What becomes of a connection, which goes by its number: 0, then what
/// [`FrontEnd::reconnect`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// It ended, or the exchange over it failed. Whoever is at the other end is of no more
    /// use, and may be alive.
    Lost(u64),
    /// It is there, and the device is as it was.
    Restored(u64),
    /// It is there, but what the driver had begun could not be resumed, for want of a
    /// record: it has to reset the device.
    Fresh(u64),
}

/// Who is told.
pub type Watcher = Box<dyn Fn(Link) + Send>;

/// Handle of a device's front-end thread. Dropping it ends the thread.
#[derive(Debug)]
pub struct FrontEnd {
    id: String,
    jobs: Sender<Job>,
    /// The connection there is, and its number.
    socket: Mutex<(u64, UnixStream)>,
}

impl FrontEnd {
    /// Starts the thread. `on_start` confines it, first of all; where that fails the
    /// thread does nothing but refuse its jobs.
    pub fn start(
        id: &str,
        socket: UnixStream,
        needs: Needs,
        ram: GuestRam,
        on_start: impl FnOnce() -> Result<(), FilterError> + Send + 'static,
    ) -> Result<FrontEnd, FrontEndError> {
        let wrap = |source| FrontEndError::Thread { id: id.to_string(), source };
        let handle = socket.try_clone().map_err(wrap)?;
        let (jobs, inbox) = unbounded();
        let worker = Worker::new(id, Connection::new(socket).map_err(wrap)?, needs, ram);
        std::thread::Builder::new()
            .name(format!("vu-{id}"))
            .spawn(move || {
                let confined = on_start();
                if let Err(error) = &confined {
                    tracing::error!(device = worker.id(), error = crate::remedy::chain(error));
                }
                worker.run(&inbox, confined.is_ok());
            })
            .map_err(wrap)?;
        Ok(FrontEnd { id: id.to_string(), jobs, socket: Mutex::new((0, handle)) })
    }

    /// Negotiates with the back end. The first job.
    pub fn open(&self) -> Answer<DeviceInfo> {
        self.post(Job::Open)
    }

    /// Hands queues and features over, and starts the rings.
    pub fn activate(&self, activation: Activation) -> Answer<()> {
        self.post(|answer| Job::Activate(activation, answer))
    }

    /// Writes to the device configuration space at `offset`, until the next reset.
    pub fn set_config(&self, offset: u32, bytes: Vec<u8>) -> Answer<()> {
        self.post(|answer| Job::SetConfig(offset, bytes, answer))
    }

    /// Stops every ring; requests that were taken are finished first. The configuration
    /// is again what it was.
    pub fn reset(&self) -> Answer<()> {
        self.post(Job::Reset)
    }

    /// From now on an end of the connection is told to `watcher`, and jobs wait for another.
    pub fn watch(&self, watcher: Watcher) {
        self.send(Job::Watch(watcher));
    }

    /// Goes on over another connection. To be called only when whoever was at the other end
    /// of the one before has ended, with all that it did.
    pub fn reconnect(&self, socket: UnixStream) -> Result<u64, FrontEndError> {
        let wrap = |source| FrontEndError::Thread { id: self.id.clone(), source };
        let handle = socket.try_clone().map_err(wrap)?;
        let connection = Connection::new(socket).map_err(wrap)?;
        let mut current = self.lock();
        let _ = current.1.shutdown(Shutdown::Both); // its end may not have been noticed yet
        let number = current.0 + 1;
        *current = (number, handle);
        self.send(Job::Reconnect(number, connection));
        Ok(number)
    }

    /// There will be no other connection: what waits for one fails, and so does what comes.
    pub fn abandon(&self) {
        self.send(Job::Abandon);
    }

    /// Gives the connection up: a job that waits for an answer fails now.
    pub fn abort(&self) {
        let _ = self.lock().1.shutdown(Shutdown::Both); // it may be closed already
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (u64, UnixStream)> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, job: Job) {
        // Without a thread there is nobody to tell, and nothing to go on with.
        let _ = self.jobs.send(job);
    }

    /// Waits for an answer on a thread that is not a vCPU.
    pub fn wait<T>(&self, answer: &Answer<T>) -> Result<T, FrontEndError> {
        loop {
            match answer.wait(DEADLINE) {
                Waited::Done(result) => return result,
                Waited::Kicked => {}
                Waited::TimedOut => {
                    self.abort();
                    return Err(self.silent());
                }
            }
        }
    }

    /// The error of a back end that missed the deadline.
    pub fn silent(&self) -> FrontEndError {
        FrontEndError::Silent { id: self.id.clone() }
    }

    fn post<T>(&self, job: impl FnOnce(Answer<T>) -> Job) -> Answer<T> {
        let answer = Completion::new();
        if self.jobs.send(job(answer.clone())).is_err() {
            answer.complete(Err(FrontEndError::Gone { id: self.id.clone() }));
        }
        answer
    }
}

impl Drop for FrontEnd {
    /// Ends an exchange under way too, and with it the thread.
    fn drop(&mut self) {
        self.abort();
    }
}

#[cfg(test)]
#[path = "front_end_tests.rs"]
mod tests;
