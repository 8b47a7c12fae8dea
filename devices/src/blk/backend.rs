//! The vhost-user back end: what the front end may ask for, and in which state.
//!
//! A ring runs while it has memory, addresses, a kick descriptor and is enabled,
//! in whichever order these come. GET_VRING_BASE stops it and forgets its
//! descriptors. Size, addresses, base and features change only while it is
//! stopped; descriptors and memory may be replaced at any time, for which the
//! ring is stopped and goes on where it was.

mod device_state;
mod messages;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vhost::vhost_user::message::{
    VhostUserInflight, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags,
};
use vhost::vhost_user::{Error, Result};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::config::{self, CONFIG_BYTES, QUEUE_SIZE, SECTOR, WRITEBACK, has};
use super::execute::Disk;
use super::inflight::{Offer, Record, Records};
use super::memory::MemTable;
use super::request::Limits;
use super::ring::{Layout, Ring};
use super::view::View;
use super::worker::{Start, Worker};
use crate::lazy::Lazy;

/// The feature bit that says that there are protocol features.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Where the parts of a ring are in the front end's address space.
#[derive(Clone, Copy, Debug)]
struct Addresses {
    descriptors: u64,
    avail: u64,
    used: u64,
}

/// One ring as the front end has set it up.
#[derive(Debug)]
struct Vring {
    worker: Worker,
    size: u16,
    addresses: Option<Addresses>,
    next_avail: u16,
    /// The driver broke it.
    broken: bool,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<File>>,
    err: Option<Arc<File>>,
    enabled: bool,
}

/// The device as the front end sees it.
#[derive(Debug)]
pub(super) struct Backend {
    disk: Arc<Disk>,
    offered: u64,
    config: [u8; CONFIG_BYTES],
    acked: u64,
    protocol: VhostUserProtocolFeatures,
    memory: Option<MemTable>,
    /// While guest memory is still to come.
    pub lazy: Option<Lazy>,
    vrings: Vec<Vring>,
    offer: Offer,
    records: Option<Records>,
    refused: bool,
    /// Every request is answered with an I/O error.
    failed: bool,
    /// The last transfer of its state went well.
    transferred: bool,
    /// Where a state comes from that is still to be taken.
    incoming: Option<File>,
    /// The cache mode of one that was taken before its driver's features were told.
    loaded: Option<u8>,
}

impl Backend {
    /// A device with one ring for each of `workers`, and a record to give away.
    pub fn new(disk: Arc<Disk>, workers: Vec<Worker>, offer: Offer) -> Backend {
        let queues = workers.len() as u16;
        let vring = |worker| Vring {
            worker,
            size: QUEUE_SIZE,
            addresses: None,
            next_avail: 0,
            broken: false,
            kick: None,
            call: None,
            err: None,
            enabled: false,
        };
        Backend {
            offered: config::features(disk.read_only, queues) | PROTOCOL_FEATURES,
            config: config::space(&disk, queues),
            acked: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            memory: None,
            lazy: None,
            vrings: workers.into_iter().map(vring).collect(),
            offer,
            records: None,
            refused: false,
            failed: false,
            transferred: false,
            incoming: None,
            loaded: None,
            disk,
        }
    }

    /// From now on every request is answered with an I/O error.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// True if the last message was well-formed but refused, and its sender was
    /// told so; the connection can go on.
    pub fn take_refusal(&mut self) -> bool {
        std::mem::take(&mut self.refused)
            && self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK)
    }

    /// Stops every ring; all that was taken from them is answered.
    pub fn stop(&mut self) -> Result<()> {
        for index in 0..self.vrings.len() {
            self.pause(index)?;
        }
        Ok(())
    }

    /// Number of rings, and of those that run.
    pub fn rings(&self) -> (usize, usize) {
        let running = self.vrings.iter().filter(|vring| vring.worker.is_running()).count();
        (self.vrings.len(), running)
    }

    /// Has every worker that waits for tokens look again.
    pub fn wake(&self) {
        self.vrings.iter().for_each(|vring| vring.worker.wake());
    }

    /// Remembers a refusal of a message whose answer is an acknowledgement.
    fn acknowledge(&mut self, result: Result<()>) -> Result<()> {
        self.refused = result.is_err();
        if let Err(error) = &result {
            tracing::warn!(%error, "refused a vhost-user message");
        }
        result
    }

    fn index(&self, index: u32) -> Result<usize> {
        let index = index as usize;
        if index < self.vrings.len() {
            Ok(index)
        } else {
            Err(Error::InvalidOperation("there is no ring of this number"))
        }
    }

    fn stopped(&mut self, index: u32) -> Result<&mut Vring> {
        let index = self.index(index)?;
        let vring = &mut self.vrings[index];
        if vring.worker.is_running() {
            return Err(Error::InvalidOperation("the ring is running"));
        }
        Ok(vring)
    }

    fn any_running(&self) -> bool {
        self.vrings.iter().any(|vring| vring.worker.is_running())
    }

    /// Stops a ring, if it runs, and remembers where it was.
    fn pause(&mut self, index: usize) -> Result<bool> {
        let vring = &mut self.vrings[index];
        match vring.worker.stop().map_err(internal)? {
            Some(stopped) => {
                (vring.next_avail, vring.broken) = (stopped.next_avail, stopped.broken);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Starts a ring if nothing is missing.
    fn settle(&mut self, index: usize, interrupt: bool) -> Result<()> {
        let vring = &self.vrings[index];
        let (Some(table), Some(addresses), Some(kick)) =
            (&self.memory, vring.addresses, &vring.kick)
        else {
            return Ok(());
        };
        // Without the protocol features there is no message to enable a ring.
        if vring.worker.is_running() || !(vring.enabled || self.acked & PROTOCOL_FEATURES == 0) {
            return Ok(());
        }
        let outside = Error::InvalidOperation("a part of the ring is outside guest memory");
        let at = |user| table.guest_address(user);
        let (Some(descriptors), Some(avail), Some(used)) =
            (at(addresses.descriptors), at(addresses.avail), at(addresses.used))
        else {
            return Err(outside);
        };
        let layout = Layout {
            size: vring.size,
            descriptors,
            avail,
            used,
            next_avail: vring.next_avail,
            event_idx: has(self.acked, VIRTIO_RING_F_EVENT_IDX),
            record: self.records.as_ref().and_then(|records| records.queue(index)),
        };
        let view = View::new(table.memory()).map_err(internal)?;
        Ring::check(&view, &layout).map_err(internal)?;
        // A process that died may have published an answer and not said so.
        let interrupt = interrupt || layout.record.as_ref().is_some_and(Record::is_used);
        let broken = vring.broken || layout.record.as_ref().is_some_and(Record::is_broken);
        let start = Start {
            memory: table.memory().clone(),
            layout,
            limits: Limits { failed: self.failed, ..limits(self.acked, &self.disk) },
            write_through: write_through(self.acked, self.writeback()),
            kick: kick.clone(),
            call: vring.call.clone(),
            err: vring.err.clone(),
            interrupt,
            broken,
        };
        self.vrings[index].worker.start(start).map_err(internal)
    }

    /// Replaces a descriptor of a ring, which may run.
    fn replace(&mut self, index: u8, change: impl FnOnce(&mut Vring)) -> Result<()> {
        let index = self.index(index.into())?;
        let was_running = self.pause(index)?;
        change(&mut self.vrings[index]);
        self.settle(index, was_running)
    }

    fn try_set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered != 0 {
            return Err(Error::InvalidOperation("a feature was not offered"));
        }
        if features != self.acked && self.any_running() {
            return Err(Error::InvalidOperation("features cannot change while a ring runs"));
        }
        // Without flushes there is no cache to begin with (virtio 1.2, 5.2.5.2).
        if features != self.acked && has(features, VIRTIO_BLK_F_CONFIG_WCE) {
            let first = has(features, VIRTIO_BLK_F_FLUSH).into();
            self.config[WRITEBACK] = self.loaded.take().unwrap_or(first);
            self.record_cache_mode();
        }
        self.acked = features;
        Ok(())
    }

    fn writeback(&self) -> bool {
        self.config[WRITEBACK] != 0
    }

    /// Takes a new cache mode, which holds for every request taken from now on.
    fn try_set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        let [value] = bytes else {
            return Err(Error::InvalidOperation("only a byte of the configuration can be written"));
        };
        if offset as usize != WRITEBACK || !has(self.offered, VIRTIO_BLK_F_CONFIG_WCE) {
            return Err(Error::InvalidOperation("this field cannot be written"));
        }
        let writeback = *value != 0;
        if writeback == self.writeback() {
            return Ok(());
        }
        self.config[WRITEBACK] = writeback.into();
        self.record_cache_mode();
        for index in 0..self.vrings.len() {
            if self.pause(index)? {
                self.settle(index, false)?;
            }
        }
        Ok(())
    }

    fn try_set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<()> {
        let table = MemTable::map(regions, files).map_err(internal)?;
        if let Some(lazy) = &self.lazy {
            lazy.register(table.memory()).map_err(internal)?;
        }
        self.stop()?;
        self.memory = Some(table);
        (0..self.vrings.len()).try_for_each(|index| self.settle(index, false))
    }

    fn try_set_inflight(&mut self, told: &VhostUserInflight, file: &File) -> Result<()> {
        if self.any_running() {
            return Err(Error::InvalidOperation("the record cannot change while a ring runs"));
        }
        let queues = self.vrings.len() as u16;
        let records = Records::map(told, file, queues).map_err(internal)?;
        // The first ring's says it for the disk.
        let first = records.queue(0);
        if let Some(record) = first.filter(Record::is_used)
            && has(self.acked, VIRTIO_BLK_F_CONFIG_WCE)
        {
            self.config[WRITEBACK] = (!record.is_durable()).into();
        }
        self.records = Some(records);
        self.record_cache_mode();
        Ok(())
    }

    /// For a process that comes after this one.
    fn record_cache_mode(&self) {
        if let Some(record) = self.records.as_ref().and_then(|records| records.queue(0)) {
            record.set_durable(!self.writeback());
        }
    }

    fn try_set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let vring = self.stopped(index)?;
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && size <= QUEUE_SIZE => vring.size = size,
            _ => return Err(Error::InvalidOperation("a ring has 1, 2, 4, ... or 256 entries")),
        }
        Ok(())
    }

    fn try_set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        addresses: Addresses,
    ) -> Result<()> {
        if !flags.is_empty() {
            return Err(Error::InvalidOperation("logging was not offered"));
        }
        self.stopped(index)?.addresses = Some(addresses);
        self.settle(index as usize, false)
    }

    fn try_set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let vring = self.stopped(index)?;
        vring.next_avail =
            u16::try_from(base).map_err(|_| Error::InvalidOperation("a ring index has 16 bits"))?;
        Ok(())
    }

    fn try_set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = fd.ok_or(Error::InvalidOperation("a ring without a kick descriptor"))?;
        self.replace(index, |vring| vring.kick = Some(Arc::new(fd.into())))
    }

    fn try_set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let index = self.index(index)?;
        self.vrings[index].enabled = enable;
        if enable { self.settle(index, false) } else { self.pause(index).map(|_| ()) }
    }

    /// Everything but the memory is as it was before the front end came.
    fn reset(&mut self) -> Result<()> {
        self.stop()?;
        self.acked = 0;
        (self.records, self.loaded) = (None, None);
        self.config = config::space(&self.disk, self.vrings.len() as u16);
        for vring in &mut self.vrings {
            vring.forget();
            (vring.size, vring.addresses, vring.next_avail) = (QUEUE_SIZE, None, 0);
            (vring.err, vring.enabled) = (None, false);
        }
        Ok(())
    }
}

impl Vring {
    /// Closes the descriptors of a ring that has stopped. Only the record knows further
    /// whether it is broken: the driver may have set another up when it starts again.
    fn forget(&mut self) {
        (self.kick, self.call) = (None, None);
        self.broken = false;
    }
}

/// What requests are held to under the features agreed on.
fn limits(acked: u64, disk: &Disk) -> Limits {
    Limits {
        sectors: disk.size / SECTOR,
        read_only: disk.read_only,
        size_max: has(acked, VIRTIO_BLK_F_SIZE_MAX).then_some(config::SIZE_MAX),
        discard: has(acked, VIRTIO_BLK_F_DISCARD),
        write_zeroes: has(acked, VIRTIO_BLK_F_WRITE_ZEROES),
        failed: false,
    }
}

/// A driver that cannot flush relies on every write being durable, and one that
/// turned the cache off too (virtio 1.2, 5.2.6.2).
fn write_through(acked: u64, writeback: bool) -> bool {
    if has(acked, VIRTIO_BLK_F_CONFIG_WCE) { !writeback } else { !has(acked, VIRTIO_BLK_F_FLUSH) }
}

fn internal(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(std::io::Error::other(super::chain(&error).to_string()))
}

/// Makes writing to a descriptor of the front end's never wait.
fn non_blocking(fd: Option<File>) -> Result<Option<Arc<File>>> {
    let Some(file) = fd else { return Ok(None) };
    let wrap = |e| Error::ReqHandlerError(std::io::Error::from(e));
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(wrap)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(file.as_fd(), FcntlArg::F_SETFL(flags)).map_err(wrap)?;
    Ok(Some(Arc::new(file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_follow_the_features_agreed_on() {
        let file = tempfile::tempfile().expect("file");
        let disk = Disk {
            file,
            size: 1024,
            block_size: 512,
            read_only: true,
            id: Default::default(),
            direct: None,
            overlay: None,
        };
        let plain = limits(0, &disk);
        assert_eq!((plain.sectors, plain.read_only, plain.size_max), (2, true, None));
        let bounded = limits(1 << VIRTIO_BLK_F_SIZE_MAX, &disk);
        assert_eq!(bounded.size_max, Some(config::SIZE_MAX));
        let (flush, wce) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
        assert!(write_through(0, true) && write_through(0, false));
        assert!(!write_through(flush, true) && !write_through(flush, false));
        assert!(!write_through(flush | wce, true) && write_through(flush | wce, false));
        assert!(!plain.discard && limits(1 << VIRTIO_BLK_F_DISCARD, &disk).discard);
        assert!(!plain.write_zeroes && limits(1 << VIRTIO_BLK_F_WRITE_ZEROES, &disk).write_zeroes);
    }
}
