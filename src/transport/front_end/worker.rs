//! The thread that speaks with a back end.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use crossbeam_channel::Receiver;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Error as ProtocolError, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use super::{
    Activation, Answer, Connection, DeviceInfo, F_PROTOCOL_FEATURES, FrontEndError, GUEST_FEATURES,
    Job, Link, Needs, QueueSetup, Watcher,
};
use crate::transport::queue::QUEUE_SIZE_MAX;
use crate::vm::memory::GuestRam;

pub(super) struct Worker {
    id: String,
    ram: GuestRam,
    needs: Needs,
    /// Number of the connection.
    number: u64,
    end: UnixStream,
    pub(super) frontend: Frontend,
    state: State,
    watcher: Option<Watcher>,
    /// Jobs of a watched front end that has lost its connection.
    waiting: VecDeque<Job>,
    /// What the back end said of itself at first.
    info: Option<DeviceInfo>,
    /// Protocol features agreed on.
    protocol: VhostUserProtocolFeatures,
    pub(super) active: Option<Active>,
    /// Where the rings stand that are stopped for a snapshot.
    pub(super) frozen: Vec<(usize, u16)>,
    /// What the driver has written to the configuration, and where.
    written: BTreeMap<(u32, usize), Vec<u8>>,
    /// Whoever is at the other end has guest memory: it keeps it over resets.
    shared: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Connected,
    /// Another connection may come.
    Lost,
    /// None will.
    Over,
}

/// What was set up for the driver, and has to be again over another connection.
pub(super) struct Active {
    pub(super) activation: Activation,
    /// Rings that were started.
    pub(super) live: Vec<usize>,
    record: Option<(VhostUserInflight, File)>,
}

impl Worker {
    pub(super) fn new(id: &str, to: Connection, needs: Needs, ram: GuestRam) -> Worker {
        Worker {
            id: id.to_string(),
            number: 0,
            end: to.end,
            frontend: Frontend::from_stream(to.stream, needs.most.into()),
            ram,
            needs,
            state: State::Connected,
            watcher: None,
            waiting: VecDeque::new(),
            info: None,
            protocol: VhostUserProtocolFeatures::empty(),
            active: None,
            frozen: Vec::new(),
            written: BTreeMap::new(),
            shared: false,
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Does jobs until nobody has any more. Where the thread is not confined it refuses them.
    pub(super) fn run(mut self, inbox: &Receiver<Job>, confined: bool) {
        if !confined {
            self.state = State::Over;
        }
        while let Ok(job) = inbox.recv() {
            match job {
                Job::Watch(watcher) => self.watcher = Some(watcher),
                Job::Reconnect(..) if self.state == State::Over => {}
                Job::Reconnect(number, to) => self.reconnect(number, to),
                Job::Abandon => self.abandon(),
                job => match self.state {
                    State::Connected => self.work(job),
                    State::Lost => self.keep(job),
                    State::Over => self.refuse(job),
                },
            }
        }
    }

    fn work(&mut self, job: Job) {
        match job {
            Job::Open(answer) => {
                let result = self.open();
                self.settle(result, answer, Job::Open);
            }
            Job::Activate(activation, answer) => {
                let result = self.activate(activation);
                // What it is about is kept: a reconnect sets it up.
                self.settle(result, answer, Job::Resume);
            }
            Job::Resume(answer) => answer.complete(match self.active {
                Some(_) => Ok(()),
                None => Err(FrontEndError::Gone { id: self.id.clone() }),
            }),
            Job::SetConfig(offset, bytes, answer) => {
                let result = self.set_config(offset, &bytes);
                self.settle(result, answer, |answer| Job::SetConfig(offset, bytes, answer));
            }
            Job::Freeze(answer) => {
                let result = self.freeze();
                if let Err(error) = &result
                    && self.watcher.is_some()
                    && is_fatal(error)
                {
                    self.lose();
                }
                answer.complete(result);
            }
            Job::Thaw(answer) => match self.thaw() {
                Err(error) if self.watcher.is_some() && is_fatal(&error) => {
                    self.lose();
                    self.keep(Job::Thaw(answer));
                }
                result => answer.complete(result),
            },
            Job::Transfer(direction, fd, answer) => self.transfer(direction, fd, &answer),
            Job::CheckState(answer) => self.check_state(&answer),
            Job::Reset(answer) => {
                let result = self.reset();
                self.settle(result, answer, Job::Reset);
            }
            Job::Watch(_) | Job::Reconnect(..) | Job::Abandon => {}
        }
    }

    /// Keeps a job for another connection. Not a thaw: a reconnect sets all rings up running,
    /// and whoever thaws is the one to bring it about. Nor a freeze, which would stop them after
    /// that, when nobody wants it any more: the cut that asked for it cannot be had.
    fn keep(&mut self, job: Job) {
        match job {
            Job::Thaw(answer) => answer.complete(Ok(())),
            job @ Job::Freeze(_) => self.refuse(job),
            job => self.waiting.push_back(job),
        }
    }

    /// Answers a job, or keeps it for another connection.
    fn settle<T>(
        &mut self,
        result: Result<T, FrontEndError>,
        answer: Answer<T>,
        again: impl FnOnce(Answer<T>) -> Job,
    ) {
        match &result {
            Err(error) if self.watcher.is_some() && is_fatal(error) => {
                tracing::debug!(device = self.id, error = crate::remedy::chain(error), "lost");
                self.waiting.push_front(again(answer));
                self.lose();
            }
            _ => answer.complete(result),
        }
    }

    fn lose(&mut self) {
        self.state = State::Lost;
        // One that is only confused has to see that it is over.
        let _ = self.end.shutdown(Shutdown::Both);
        self.tell(Link::Lost(self.number));
    }

    fn tell(&self, link: Link) {
        if let Some(watcher) = &self.watcher {
            watcher(link);
        }
    }

    fn abandon(&mut self) {
        if self.state == State::Lost {
            self.state = State::Over;
        }
        self.watcher = None;
        for job in std::mem::take(&mut self.waiting) {
            self.refuse(job);
        }
    }

    fn refuse(&self, job: Job) {
        let gone = || FrontEndError::Gone { id: self.id.clone() };
        match job {
            Job::Open(answer) => answer.complete(Err(gone())),
            Job::Freeze(answer) => answer.complete(Err(gone())),
            Job::Transfer(_, _, answer) => answer.complete(Err(gone())),
            Job::CheckState(answer)
            | Job::Activate(_, answer)
            | Job::Thaw(answer)
            | Job::SetConfig(_, _, answer)
            | Job::Reset(answer)
            | Job::Resume(answer) => answer.complete(Err(gone())),
            Job::Watch(_) | Job::Reconnect(..) | Job::Abandon => {}
        }
    }

    /// Sets everything up over another connection, and goes on with the jobs.
    fn reconnect(&mut self, number: u64, to: Connection) {
        self.number = number;
        self.end = to.end;
        self.shared = false;
        self.frozen.clear();
        self.frontend = Frontend::from_stream(to.stream, self.needs.most.into());
        // A driver that is resetting the device wants nothing of what was.
        if self.waiting.iter().any(|job| matches!(job, Job::Reset(_))) {
            self.active = None;
            self.written.clear();
        }
        match self.restore() {
            Ok(resumed) => {
                self.state = State::Connected;
                self.tell(if resumed { Link::Restored(number) } else { Link::Fresh(number) });
            }
            Err(error) => {
                let error = crate::remedy::chain(&error);
                tracing::warn!(device = self.id, error, "cannot go on over a new connection");
                return self.lose();
            }
        }
        while self.state == State::Connected
            && let Some(job) = self.waiting.pop_front()
        {
            self.work(job);
        }
    }

    /// True where the rings go on, or there are none; false where they cannot.
    fn restore(&mut self) -> Result<bool, FrontEndError> {
        let before = self.info.clone();
        let info = self.open()?;
        if let Some(before) = before {
            // Also for whoever comes after one that is refused.
            let before = self.info.insert(before);
            let changed = |what| FrontEndError::Changed { id: self.id.clone(), what };
            if before.features & !info.features != 0 {
                return Err(changed("fewer features than before"));
            }
            let same = is_same(&before.config, &info.config, self.needs.advice);
            if !same || info.queues < before.queues {
                return Err(changed("another configuration than before"));
            }
        }
        let Some(mut active) = self.active.take() else { return Ok(true) };
        let result = match active.record {
            Some(_) => self.set_up(&mut active),
            None if active.live.is_empty() => self.begin(&mut active),
            // Without a record nobody knows what was left unfinished.
            None => {
                self.written.clear();
                return Ok(false);
            }
        };
        self.active = Some(active);
        result.map(|()| true)
    }

    pub(super) fn exchange<T>(
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
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::DEVICE_STATE;
        let missing = |what| FrontEndError::Missing { id: self.id.clone(), what };
        if !offered.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(missing("its configuration (VHOST_USER_PROTOCOL_F_CONFIG)"));
        }
        let set = self.frontend.set_protocol_features(offered & wanted);
        self.exchange("setting protocol features", set)?;
        self.protocol = offered & wanted;
        let queues = if offered.contains(VhostUserProtocolFeatures::MQ) {
            let queues = self.frontend.get_queue_num();
            self.exchange("reading the number of queues", queues)?
        } else {
            1
        };
        // Kicks of a queue without a worker would go nowhere.
        if queues < self.needs.least.into() {
            return Err(missing("as many queues as its guest is to have"));
        }
        let len = self.needs.config_len;
        let space = vec![0; len as usize];
        let config = self.frontend.get_config(0, len, VhostUserConfigFlags::empty(), &space);
        let (_, config) = self.exchange("reading the configuration", config)?;
        let info = DeviceInfo {
            features: features & GUEST_FEATURES,
            config,
            queues: u16::try_from(queues).unwrap_or(u16::MAX).min(self.needs.most),
            has_state: self.protocol.contains(VhostUserProtocolFeatures::DEVICE_STATE),
        };
        self.info = Some(info.clone());
        Ok(info)
    }

    fn activate(&mut self, activation: Activation) -> Result<(), FrontEndError> {
        let mut active = Active { activation, live: Vec::new(), record: None };
        let result = self.begin(&mut active);
        match &result {
            Err(error) if !is_fatal(error) => self.take_back(&active)?,
            _ => self.active = Some(active),
        }
        result
    }

    /// Stops and forgets the rings of an activation that the back end refused: what is left of
    /// it would be in the way of the next, or of a process that comes after.
    fn take_back(&self, refused: &Active) -> Result<(), FrontEndError> {
        for queue in &refused.activation.queues {
            let base = self.frontend.get_vring_base(queue.index);
            self.exchange("stopping a queue", base)?;
        }
        Ok(())
    }

    /// Sets rings up that have not run yet.
    fn begin(&mut self, active: &mut Active) -> Result<(), FrontEndError> {
        if self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            let queues = self.info.as_ref().map_or(self.needs.least, |info| info.queues);
            let shape = VhostUserInflight::new(0, 0, queues, QUEUE_SIZE_MAX);
            let record = self.frontend.get_inflight_fd(&shape);
            active.record = Some(self.exchange("asking for a record of requests", record)?);
        }
        self.set_up(active)
    }

    fn set_up(&mut self, active: &mut Active) -> Result<(), FrontEndError> {
        active.live.clear();
        let activation = &active.activation;
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        let features = self.frontend.set_features(activation.features | F_PROTOCOL_FEATURES);
        self.exchange("setting features", features)?;
        for ((offset, _), bytes) in &self.written.clone() {
            self.write_config(*offset, bytes)?;
        }
        self.share_memory()?;
        if let Some((shape, file)) = &active.record {
            let set = self.frontend.set_inflight_fd(shape, file.as_raw_fd());
            self.exchange("handing the record of requests over", set)?;
        }
        let all: Vec<usize> = activation.queues.iter().map(|queue| queue.index).collect();
        self.set_queues_up(active, &all)
    }

    /// Hands guest memory over, once over each connection: to map it again takes its pages out
    /// of the page tables of whoever has it.
    fn share_memory(&mut self) -> Result<(), FrontEndError> {
        if self.shared {
            return Ok(());
        }
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
        self.shared = true;
        Ok(())
    }

    /// Sets some queues up, and starts them.
    pub(super) fn set_queues_up(
        &mut self,
        active: &mut Active,
        which: &[usize],
    ) -> Result<(), FrontEndError> {
        let queues = active.activation.queues.iter().filter(|queue| which.contains(&queue.index));
        for queue in queues.clone() {
            self.set_up_queue(queue)?;
        }
        // The stream keeps its order and a back end that fails a message closes the
        // connection, so the answer to the last message vouches for all of them.
        let last = queues.clone().next_back().map(|queue| queue.index);
        for queue in queues {
            if Some(queue.index) == last {
                self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
            let enabled = self.frontend.set_vring_enable(queue.index, true);
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
            self.exchange("starting a queue", enabled)?;
            active.live.push(queue.index);
        }
        Ok(())
    }

    fn set_up_queue(&self, queue: &QueueSetup) -> Result<(), FrontEndError> {
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
        // Where to go on in a queue that has run under this record is in the record.
        self.exchange("positioning a queue", frontend.set_vring_base(index, queue.base))?;
        self.exchange("connecting an interrupt", frontend.set_vring_call(index, &queue.call))?;
        self.exchange("connecting an error event", frontend.set_vring_err(index, &queue.err))?;
        self.exchange("connecting a doorbell", frontend.set_vring_kick(index, &queue.kick))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontEndError> {
        self.write_config(offset, bytes)?;
        self.written.insert((offset, bytes.len()), bytes.to_vec());
        Ok(())
    }

    fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontEndError> {
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let set = self.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes);
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        self.exchange("writing the configuration", set)
    }

    fn reset(&mut self) -> Result<(), FrontEndError> {
        self.frozen.clear();
        let live = self.active.take().map(|active| active.live).unwrap_or_default();
        for index in live {
            let base = self.frontend.get_vring_base(index);
            self.exchange("stopping a queue", base)?;
        }
        let config = self.info.as_ref().map(|info| info.config.clone()).unwrap_or_default();
        for (offset, len) in std::mem::take(&mut self.written).into_keys() {
            let at = offset as usize;
            if let Some(bytes) = config.get(at..at + len) {
                self.write_config(offset, bytes)?;
            }
        }
        Ok(())
    }
}

/// Whether two configurations differ in nothing but `advice`.
fn is_same(one: &[u8], other: &[u8], advice: &[Range<usize>]) -> bool {
    let given = |(at, (one, other)): (usize, (&u8, &u8))| {
        one == other || advice.iter().any(|range| range.contains(&at))
    };
    one.len() == other.len() && one.iter().zip(other).enumerate().all(given)
}

/// Whether the connection is of no more use: everything but a polite refusal.
fn is_fatal(error: &FrontEndError) -> bool {
    match error {
        FrontEndError::Exchange { source, .. } => {
            !matches!(source, vhost::Error::VhostUserProtocol(ProtocolError::BackendInternalError))
        }
        _ => false,
    }
}
