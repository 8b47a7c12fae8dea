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

mod freeze;

use std::collections::BTreeSet;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use cellblock_seccomp::filter::FilterError;
use crossbeam_channel::{Receiver, Sender, unbounded};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{QUEUE_SIZE_MAX, QueueConfig};
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
    /// Queues it serves.
    pub queues: u16,
}

/// What we ask of a back end.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Bytes of the device configuration space.
    pub config_len: u32,
    /// Queues it has to serve.
    pub queues: u16,
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
    Thaw(Vec<QueueSetup>, Answer<()>),
    Reset(Answer<()>),
}

/// Handle of a device's front-end thread. Dropping it ends the thread.
#[derive(Debug)]
pub struct FrontEnd {
    id: String,
    jobs: Sender<Job>,
    socket: UnixStream,
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
        let worker = Worker {
            id: id.to_string(),
            frontend: Frontend::from_stream(socket, needs.queues.into()),
            ram,
            needs,
            live: Vec::new(),
            frozen: Vec::new(),
            config: Vec::new(),
            written: BTreeSet::new(),
        };
        std::thread::Builder::new()
            .name(format!("vu-{id}"))
            .spawn(move || {
                if let Err(error) = on_start() {
                    tracing::error!(device = worker.id, error = crate::remedy::chain(&error));
                    return worker.refuse(&inbox);
                }
                worker.run(&inbox);
            })
            .map_err(wrap)?;
        Ok(FrontEnd { id: id.to_string(), jobs, socket: handle })
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

    /// Gives the connection up: a job that waits for an answer fails now.
    pub fn abort(&self) {
        let _ = self.socket.shutdown(Shutdown::Both); // it may be closed already
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

struct Worker {
    id: String,
    frontend: Frontend,
    ram: GuestRam,
    needs: Needs,
    live: Vec<usize>,
    /// Where the queues stand that are stopped for a snapshot.
    frozen: Vec<(usize, u16)>,
    /// The configuration as it was found.
    config: Vec<u8>,
    /// Where the driver has written to it.
    written: BTreeSet<(u32, usize)>,
}

impl Worker {
    fn run(mut self, inbox: &Receiver<Job>) {
        while let Ok(job) = inbox.recv() {
            match job {
                Job::Open(answer) => answer.complete(self.open()),
                Job::Activate(activation, answer) => answer.complete(self.activate(&activation)),
                Job::SetConfig(offset, bytes, answer) => {
                    answer.complete(self.set_config(offset, &bytes));
                }
                Job::Freeze(answer) => answer.complete(self.freeze()),
                Job::Thaw(queues, answer) => answer.complete(self.thaw(queues)),
                Job::Reset(answer) => answer.complete(self.reset()),
            }
        }
    }

    fn refuse(self, inbox: &Receiver<Job>) {
        let gone = || FrontEndError::Gone { id: self.id.clone() };
        while let Ok(job) = inbox.recv() {
            match job {
                Job::Open(answer) => answer.complete(Err(gone())),
                Job::Freeze(answer) => answer.complete(Err(gone())),
                Job::Activate(_, answer)
                | Job::SetConfig(_, _, answer)
                | Job::Thaw(_, answer)
                | Job::Reset(answer) => answer.complete(Err(gone())),
            }
        }
    }

    fn exchange<T>(
        &self,
        what: &'static str,
        result: vhost::Result<T>,
    ) -> Result<T, FrontEndError> {
        result.map_err(|source| FrontEndError::Exchange { id: self.id.clone(), what, source })
    }

    fn open(&mut self) -> Result<DeviceInfo, FrontEndError> {
        self.exchange("taking ownership", self.frontend.set_owner())?;
        let features = self.exchange("reading features", self.frontend.get_features())?;
        if features & F_PROTOCOL_FEATURES == 0 {
            return Err(FrontEndError::Missing {
                id: self.id.clone(),
                what: "protocol features (VHOST_USER_F_PROTOCOL_FEATURES)",
            });
        }
        let offered = self.frontend.get_protocol_features();
        let offered = self.exchange("reading protocol features", offered)?;
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK;
        let missing = |what| FrontEndError::Missing { id: self.id.clone(), what };
        if !offered.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(missing("its configuration (VHOST_USER_PROTOCOL_F_CONFIG)"));
        }
        let set = self.frontend.set_protocol_features(offered & wanted);
        self.exchange("setting protocol features", set)?;
        let queues = if offered.contains(VhostUserProtocolFeatures::MQ) {
            let queues = self.frontend.get_queue_num();
            self.exchange("reading the number of queues", queues)?
        } else {
            1
        };
        // Kicks of a queue without a worker would go nowhere.
        if queues < self.needs.queues.into() {
            return Err(missing("as many queues as its guest is to have"));
        }
        let len = self.needs.config_len;
        let space = vec![0; len as usize];
        let config = self.frontend.get_config(0, len, VhostUserConfigFlags::empty(), &space);
        let (_, config) = self.exchange("reading the configuration", config)?;
        self.config.clone_from(&config);
        Ok(DeviceInfo {
            features: features & GUEST_FEATURES,
            config,
            queues: u16::try_from(queues).unwrap_or(u16::MAX),
        })
    }

    fn activate(&mut self, activation: &Activation) -> Result<(), FrontEndError> {
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        let features = self.frontend.set_features(activation.features | F_PROTOCOL_FEATURES);
        self.exchange("setting features", features)?;
        let regions: Vec<_> = self
            .ram
            .regions()
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.gpa,
                memory_size: region.len,
                // Any numbering will do that the ring addresses share. The guest's own
                // tells the jail nothing about where this process maps memory.
                userspace_addr: region.gpa,
                mmap_offset: region.offset,
                mmap_handle: self.ram.fd().as_raw_fd(),
            })
            .collect();
        self.exchange("sharing memory", self.frontend.set_mem_table(&regions))?;
        for queue in &activation.queues {
            self.set_up(queue)?;
        }
        self.enable(&activation.queues)
    }

    fn enable(&mut self, queues: &[QueueSetup]) -> Result<(), FrontEndError> {
        // The stream keeps its order and a back end that fails a message closes the
        // connection, so the answer to the last message vouches for all of them.
        for (n, queue) in queues.iter().enumerate() {
            if n + 1 == queues.len() {
                self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
            let enabled = self.frontend.set_vring_enable(queue.index, true);
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
            self.exchange("starting a queue", enabled)?;
            self.live.push(queue.index);
        }
        Ok(())
    }

    fn set_up(&self, queue: &QueueSetup) -> Result<(), FrontEndError> {
        let vring = VringConfigData {
            queue_max_size: QUEUE_SIZE_MAX,
            queue_size: queue.config.size,
            flags: 0,
            desc_table_addr: queue.config.desc,
            used_ring_addr: queue.config.used,
            avail_ring_addr: queue.config.avail,
            log_addr: None,
        };
        let frontend = &self.frontend;
        let index = queue.index;
        self.exchange("sizing a queue", frontend.set_vring_num(index, queue.config.size))?;
        self.exchange("placing a queue", frontend.set_vring_addr(index, &vring))?;
        self.exchange("positioning a queue", frontend.set_vring_base(index, queue.base))?;
        self.exchange("connecting an interrupt", frontend.set_vring_call(index, &queue.call))?;
        self.exchange("connecting an error event", frontend.set_vring_err(index, &queue.err))?;
        self.exchange("connecting a doorbell", frontend.set_vring_kick(index, &queue.kick))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontEndError> {
        self.written.insert((offset, bytes.len()));
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let set = self.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes);
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        self.exchange("writing the configuration", set)
    }

    fn reset(&mut self) -> Result<(), FrontEndError> {
        self.frozen.clear();
        for index in std::mem::take(&mut self.live) {
            let base = self.frontend.get_vring_base(index);
            self.exchange("stopping a queue", base)?;
        }
        for (offset, len) in std::mem::take(&mut self.written) {
            let at = offset as usize;
            if let Some(bytes) = self.config.get(at..at + len).map(<[u8]>::to_vec) {
                self.set_config(offset, &bytes)?;
            }
        }
        self.written.clear();
        Ok(())
    }
}

#[cfg(test)]
#[path = "front_end_tests.rs"]
mod tests;
