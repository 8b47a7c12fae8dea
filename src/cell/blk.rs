//! A virtio disk: the VMM's end of a block cell.

use std::io::{PipeReader, pipe};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cellblock_devices::protocol::{BlkStart, Start, ThrottleLimits};
use cellblock_seccomp::filter::FilterError;
use cellblock_seccomp::spawner::Spawner;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;

use super::counters::BlkCounters;
use super::launch::{Common, launch};
use super::overlay::Overlay;
use super::{Cell, CellError};
use crate::event::event;
use crate::spec::{DiskSpec, OpenedDisk};
use crate::transport::front_end::{Answer, DeviceInfo, FrontEnd, FrontEndError, Needs};
use crate::transport::mmio::{INTERRUPT_ACK, Identity, QUEUE_NOTIFY, VirtioMmio, Wiring};
use crate::vcpu::Kicks;
use crate::vm::kvm::{KvmError, Machine};
use crate::vm::layout::VirtioSlot;
use crate::vm::memory::GuestRam;

/// Bytes of `struct virtio_blk_config` (virtio 1.2 section 5.2.4).
const CONFIG_LEN: u32 = 60;
/// Topology and the alignment of discards: they are of the image's file system, and another image
/// can be on another.
const CONFIG_ADVICE: &[Range<usize>] = &[24..32, 44..48];
/// Its only byte that a driver writes: the cache mode, `writeback`.
const CONFIG_WRITEBACK: Range<u64> = 32..33;
/// How many queues it has, `num_queues`.
const NUM_QUEUES: Range<usize> = 34..36;

/// A disk that could not be brought up.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Its process.
    #[error(transparent)]
    Cell(#[from] CellError),
    /// Its vhost-user connection.
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    /// A socket or an event.
    #[error("creating the connections of {id}")]
    Connect {
        /// The disk.
        id: String,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The user asked for more queues than another program's back end has.
    #[error(
        "the back end of {id} has {found} queues, not {wanted}: give queues={found}, or leave it away for what there is"
    )]
    Queues {
        /// The disk.
        id: String,
        /// What it has.
        found: u16,
        /// What was asked for.
        wanted: u16,
    },
    /// Its doorbell or interrupt.
    #[error("connecting {id} to the guest")]
    Kvm {
        /// The disk.
        id: String,
        /// The reason.
        #[source]
        source: KvmError,
    },
}

/// A disk whose process has been asked for.
#[derive(Debug)]
pub struct StartingDisk {
    /// The process, where it is ours.
    pub cell: Option<Cell>,
    /// How to make it again.
    pub recipe: Option<Recipe>,
    id: String,
    /// How many it has; with another program's back end, how many it may have.
    queues: u16,
    /// It may have no less.
    all: bool,
    socket: Option<UnixStream>,
    front_end: Option<(FrontEnd, Answer<DeviceInfo>)>,
}

/// All it takes to make the process of a disk, and to make it again.
#[derive(Debug)]
pub struct Recipe {
    id: String,
    start: BlkStart,
    /// Its lock is held for as long as the machine lives, whoever else has it.
    image: OwnedFd,
    /// Of a `cow` disk.
    overlay: Vec<OwnedFd>,
    held: Arc<Held>,
}

/// For each process of a disk the reading end of a pipe, of which it and its rings in the
/// kernel hold the other for as long as they have requests in flight.
#[derive(Debug, Default)]
pub struct Held(Mutex<Vec<PipeReader>>);

impl Held {
    fn pipes(&self) -> MutexGuard<'_, Vec<PipeReader>> {
        let mut pipes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pipes.retain(|pipe| is_held(pipe, PollTimeout::ZERO));
        pipes
    }

    /// Whether a process that has ended has requests under way in the kernel.
    pub fn any(&self) -> bool {
        !self.pipes().is_empty()
    }

    /// Waits until nothing is held any more, for so long at most: the image is free then.
    pub fn wait_released(&self, limit: Duration) {
        let end = Instant::now() + limit;
        for pipe in &*self.pipes() {
            let left = end.saturating_duration_since(Instant::now());
            if is_held(pipe, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)) {
                tracing::warn!("requests of a process that has ended are still under way");
                return;
            }
        }
    }
}

impl Recipe {
    /// For `disk`, with so many queues.
    pub fn new(spec: &DiskSpec, disk: &OpenedDisk, queues: u16) -> Result<Recipe, CellError> {
        let id = spec.id().to_string();
        let keep = |source| CellError::Image { id: id.clone(), source };
        let image = disk.fd.try_clone().map_err(keep)?;
        let overlay = disk.overlay.iter().flat_map(Overlay::fds);
        let overlay = overlay.map(|fd| fd.try_clone_to_owned()).collect::<Result<_, _>>();
        let overlay = overlay.map_err(keep)?;
        let start = BlkStart {
            read_only: disk.read_only,
            size: disk.size,
            serial: disk.serial.clone(),
            queues,
            poll_us: spec.poll_us,
            throttle: spec.throttle,
            failed: false,
            cow: disk.overlay.is_some(),
            engine: spec.engine,
        };
        Ok(Recipe { id, start, image, overlay, held: disk.held.clone() })
    }

    /// The serial number that its processes begin with from now on.
    pub fn set_serial(&mut self, serial: &str) {
        self.start.serial = serial.into();
    }

    /// For a disk in the place of this one: its processes wait for those of this as well.
    pub fn held(&self) -> Arc<Held> {
        self.held.clone()
    }

    /// Whether a process that has ended has requests under way in the kernel.
    pub fn is_held(&self) -> bool {
        self.held.any()
    }

    /// Asks for a process that serves the front end at the other end of `socket` under
    /// `throttle`; one that `failed` gives nothing but errors.
    pub fn launch(
        &self,
        spawner: &mut Spawner,
        common: Common,
        counters: &BlkCounters,
        throttle: ThrottleLimits,
        failed: bool,
        socket: UnixStream,
    ) -> Result<Cell, CellError> {
        let start = Start::Blk(BlkStart { throttle, failed, ..self.start.clone() });
        let mut fds = vec![self.image.as_fd(), counters.fd()];
        fds.extend(self.overlay.iter().map(OwnedFd::as_fd));
        // The process holds one, and waits for those of its predecessors to close: for those
        // that ended while this one was being asked for.
        let (far, near) =
            pipe().map_err(|source| CellError::Image { id: self.id.clone(), source })?;
        let mut held = self.held.pipes();
        fds.push(near.as_fd());
        fds.extend(held.iter().map(AsFd::as_fd));
        let cell = launch(spawner, common, &self.id, start, &fds, Some(socket));
        drop(fds);
        held.push(far);
        drop(held);
        let mut cell = cell?;
        cell.held = Some(self.held.clone());
        Ok(cell)
    }

    /// The first process, with a page to count in.
    fn begin(
        &self,
        spawner: &mut Spawner,
        common: Common,
        socket: UnixStream,
    ) -> Result<Cell, CellError> {
        let counters = page(&self.id, self.start.queues)?;
        let throttle = self.start.throttle;
        let mut cell = self.launch(spawner, common, &counters, throttle, false, socket)?;
        cell.counters = Some(counters);
        Ok(cell)
    }
}

/// A page for the processes of the disk `id` to count in.
pub fn page(id: &str, queues: u16) -> Result<BlkCounters, CellError> {
    BlkCounters::new(queues).map_err(|source| CellError::Shm {
        role: "blk",
        id: id.to_string(),
        source,
    })
}

/// Asks for a process that serves `disk` to the front end at the other end of `socket`. It
/// goes on with what `counters`, a page for as many queues, have and with the throttle's
/// balance beside them.
pub fn process(
    spawner: &mut Spawner,
    common: Common,
    spec: &DiskSpec,
    disk: &OpenedDisk,
    counters: &BlkCounters,
    queues: u16,
    socket: UnixStream,
) -> Result<Cell, CellError> {
    let recipe = Recipe::new(spec, disk, queues)?;
    recipe.launch(spawner, common, counters, spec.throttle, false, socket)
}

/// Whether somebody has the other end of a pipe, until then.
fn is_held(pipe: &PipeReader, until: PollTimeout) -> bool {
    poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::empty())], until) == Ok(0)
}

/// A disk of ours that some other program's back end serves, in a VM with `cpus` vCPUs.
pub fn back_end(spec: &DiskSpec, socket: UnixStream, cpus: u8) -> StartingDisk {
    let (id, socket) = (spec.id().to_string(), Some(socket));
    let (queues, all) = (spec.queues(cpus), spec.queues.is_some());
    StartingDisk { cell: None, recipe: None, id, queues, all, socket, front_end: None }
}

/// Asks for the process of `disk`, for a device of our own in a VM with `cpus` vCPUs.
pub fn start(
    spawner: &mut Spawner,
    common: Common,
    spec: &DiskSpec,
    disk: &OpenedDisk,
    cpus: u8,
) -> Result<StartingDisk, DiskError> {
    let id = spec.id();
    let queues = spec.queues(cpus);
    let (near, far) =
        UnixStream::pair().map_err(|source| DiskError::Connect { id: id.to_string(), source })?;
    let recipe = Recipe::new(spec, disk, queues)?;
    let cell = Some(recipe.begin(spawner, common, far)?);
    let id = id.to_string();
    let recipe = Some(recipe);
    Ok(StartingDisk { cell, recipe, id, queues, all: true, socket: Some(near), front_end: None })
}

/// Bytes of a disk as its back end gives them, and whether it is read-only.
pub fn facts(info: &DeviceInfo) -> (u64, bool) {
    let sectors = info.config.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    (sectors.saturating_mul(512), info.features & 1 << VIRTIO_BLK_F_RO != 0)
}

impl StartingDisk {
    /// Starts the front-end thread and its negotiation, which goes on while the jail
    /// is still being built. `confine` runs on that thread first.
    pub fn negotiate(
        &mut self,
        ram: &GuestRam,
        confine: impl FnOnce() -> Result<(), FilterError> + Send + 'static,
    ) -> Result<(), DiskError> {
        if let Some(socket) = self.socket.take() {
            // What another program lacks is said when it has said what it has.
            let least = if self.cell.is_some() { self.queues } else { 1 };
            let (config_len, advice, most) = (CONFIG_LEN, CONFIG_ADVICE, self.queues);
            let needs = Needs { config_len, advice, least, most };
            let front_end = FrontEnd::start(&self.id, socket, needs, ram.clone(), confine)?;
            let answer = front_end.open();
            self.front_end = Some((front_end, answer));
        }
        Ok(())
    }

    /// Connects doorbell and interrupt at `slot` once the negotiation is over.
    pub fn connect(
        self,
        machine: &Machine,
        ram: &GuestRam,
        slot: VirtioSlot,
        kicks: Arc<Kicks>,
    ) -> Result<(Option<Cell>, VirtioMmio), DiskError> {
        let id = self.id;
        let (front_end, answer) =
            self.front_end.ok_or_else(|| FrontEndError::Gone { id: id.clone() })?;
        let event = || event().map_err(|source| DiskError::Connect { id: id.clone(), source });
        let kvm = |source| DiskError::Kvm { id: id.clone(), source };

        let mut info = front_end.wait(&answer)?;
        if self.cell.is_none() {
            restrict(&mut info);
            let (found, wanted) = (info.queues, self.queues);
            if self.all && found < wanted {
                return Err(DiskError::Queues { id, found, wanted });
            }
        }
        let (call, err) = (event()?, event()?);
        machine.irqfd(&call, slot.gsi).map_err(kvm)?;
        let mut queue_kicks = Vec::new();
        for queue in 0..info.queues {
            let kick = event()?;
            machine.ioeventfd(&kick, slot.base + QUEUE_NOTIFY, Some(queue.into())).map_err(kvm)?;
            queue_kicks.push(Arc::new(kick));
        }
        // Nobody reads it: acknowledging a used buffer needs no one's attention.
        machine
            .ioeventfd(&event()?, slot.base + INTERRUPT_ACK, Some(VIRTIO_MMIO_INT_VRING))
            .map_err(kvm)?;
        let wiring = Wiring { kicks: queue_kicks, call: Arc::new(call), err: Arc::new(err) };
        let device = VirtioMmio::new(
            Identity {
                id,
                device_type: VIRTIO_ID_BLOCK,
                info,
                writable: CONFIG_WRITEBACK,
                adapt: first_cache_mode,
            },
            front_end,
            wiring,
            ram.clone(),
            kicks,
        );
        Ok((self.cell, device))
    }
}

/// A driver that chooses the cache mode and cannot flush finds the cache off (virtio 1.2, 5.2.5.2):
/// so has the device it.
pub fn first_cache_mode(config: &mut [u8], features: u64) {
    const WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
    if features & (WCE | 1 << VIRTIO_BLK_F_FLUSH) == WCE
        && let Some(mode) = config.get_mut(CONFIG_WRITEBACK.start as usize)
    {
        *mode = 0;
    }
}

/// Of what another program offers, what our device has.
fn restrict(info: &mut DeviceInfo) {
    // Writes to the configuration end here, and a driver that switched the cache off in vain
    // would take for durable what is not.
    info.features &= !(1 << VIRTIO_BLK_F_CONFIG_WCE);
    let queues = info.config.get_mut(NUM_QUEUES).and_then(|bytes| bytes.first_chunk_mut());
    let said = queues.as_ref().map_or(1, |bytes| u16::from_le_bytes(**bytes));
    // Without the feature a driver uses one, whatever there is.
    info.queues = match info.features & 1 << VIRTIO_BLK_F_MQ {
        0 => 1,
        _ => info.queues.min(said).max(1),
    };
    // A driver that was told of more than our device has would fail at the first of those.
    if info.queues == 1 {
        info.features &= !(1 << VIRTIO_BLK_F_MQ);
    }
    if let Some(bytes) = queues {
        *bytes = info.queues.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_told_of_as_many_queues_as_there_are() {
        const MQ: u64 = 1 << VIRTIO_BLK_F_MQ;
        // (offered, negotiated, said in its configuration; what our device has)
        for (offered, queues, said, wanted) in [
            (MQ, 4, 4, 4),
            (MQ, 2, 4, 2),
            (MQ, 4, 2, 2),
            (MQ, 1, 4, 1),
            (MQ, 4, 0, 1),
            (0, 4, 4, 1),
        ] {
            let mut config = vec![0xee; CONFIG_LEN as usize];
            config[NUM_QUEUES].copy_from_slice(&u16::to_le_bytes(said));
            let features = 1 << 9 | 1 << VIRTIO_BLK_F_CONFIG_WCE | offered;
            let mut info = DeviceInfo { features, config, queues, has_state: false };
            restrict(&mut info);
            let features = 1 << 9 | if wanted > 1 { MQ } else { 0 };
            assert_eq!((info.queues, info.features), (wanted, features));
            assert_eq!(info.config[NUM_QUEUES], wanted.to_le_bytes());
            assert_eq!((info.config[33], info.config[36]), (0xee, 0xee));
        }
        // One that has no such field.
        let mut info = DeviceInfo { features: MQ, config: vec![0; 8], queues: 4, has_state: false };
        restrict(&mut info);
        assert_eq!((info.queues, info.features), (1, 0));
    }
}
