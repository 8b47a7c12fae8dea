//! Reading the state of a machine that stands still, and holding its memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use cellblock_devices::protocol::overlay::Extent;
use cellblock_devices::protocol::state::CellState;
use cellblock_wire::{CodecError, ShmError, sealed_memfd};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::super::event_loop::{DiskFacts, Vm};
use super::devices::Frozen;
use crate::cell::overlay::{OverlayError, Place};
use crate::snapshot::state::device::{BackEndState, DiskState, Fingerprint, MAX_EXTENTS};
use crate::snapshot::state::{
    DeviceState, DiskRecord, Metadata, MicrovmState, StateError, VmInfo, machine, vcpu,
};
use crate::vcpu::WorkError;
use crate::vm::memory::GuestRam;

/// What copying is thought to take at most, in bytes a second: with the limit of a phase it makes
/// the deadline of this one.
const SLOW: u64 = 100 << 20;
/// What of memory is copied between two looks at the time.
const STEP: u64 = 64 << 20;

/// A state that could not be read, or memory that could not be held.
#[derive(Debug, thiserror::Error)]
pub(super) enum CaptureError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Vcpu(#[from] WorkError),
    #[error("device {0} gave no state")]
    NoState(String),
    #[error(
        "what the guest has written to cow disk '{0}' is in {1} pieces, and a state has room for \
         {MAX_EXTENTS}: have the guest discard or rewrite it (fstrim), or give it the disk without \
         cow"
    )]
    Scattered(String, usize),
    #[error("looking at the image of {0}")]
    Image(String, #[source] Errno),
    #[error("making room for the copy")]
    Room(#[from] ShmError),
    #[error("copying guest memory")]
    Copy(#[source] io::Error),
    #[error("there was no time to copy all of it")]
    Late,
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error("it does not come any more")]
    Broken,
    #[error("reading what has not come yet")]
    Chain(#[from] crate::snapshot::format::FormatError),
    #[error(transparent)]
    Log(#[from] crate::vm::kvm::KvmError),
    #[error("encoding")]
    Encode(#[from] CodecError),
}

/// Until when something has to be done.
#[derive(Clone, Copy)]
pub(super) struct Until(pub(super) Instant);

impl Until {
    /// To be asked between steps of something long.
    pub(super) fn check(self) -> Result<(), CaptureError> {
        if Instant::now() < self.0 { Ok(()) } else { Err(CaptureError::Late) }
    }
}

impl Vm {
    /// When capturing has to be over: that takes longer the more there is to copy.
    pub(super) fn capture_until(&self, limit: Duration) -> Until {
        let is_cow = |disk: &&DiskFacts| disk.image.as_ref().is_some_and(|i| i.overlay.is_some());
        let disks = self.disks.iter().filter(is_cow).map(|disk| disk.size);
        let bytes = disks.fold(self.ram.len(), u64::saturating_add);
        Until(Instant::now() + limit + Duration::from_secs(bytes / SLOW))
    }

    /// The encoded state of the machine: vCPUs, then what belongs to all of them.
    pub(super) fn capture(
        &self,
        frozen: &Frozen,
        metadata: Metadata,
        until: Until,
    ) -> Result<Vec<u8>, CaptureError> {
        let facts = self.snapshots.facts.clone();
        let vcpu_states = self
            .vcpus
            .with_each_until(Some(until.0), move |id, vcpu| vcpu::capture(id as u8, vcpu, &facts))?
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        let irqchip_state = machine::capture(self.machine.vm())?;
        let mut host = self.snapshots.host.clone();
        host.tsc_khz = vcpu_states.first().map_or(0, |vcpu| vcpu.tsc_khz);
        let vm_info = VmInfo {
            program: env!("CARGO_PKG_VERSION").to_string(),
            cpus: vcpu_states.len() as u8,
            memory: self.ram.len(),
            host,
            boot_id: self.snapshots.boot_id.clone(),
        };
        let state = MicrovmState {
            vm_info,
            vcpu_states,
            device_states: self.device_states(frozen)?,
            irqchip_state,
            plugin_states: frozen.plugin_states.clone(),
            metadata,
        };
        Ok(state.encode()?)
    }

    fn device_states(&self, frozen: &Frozen) -> Result<Vec<DeviceState>, CaptureError> {
        let said = |id: &str| {
            let at = self.cells.iter().position(|cell| cell.id() == id)?;
            Some((&self.cells[at], frozen.states.get(at)?.as_ref()?))
        };
        let none = |id: &str| CaptureError::NoState(id.to_string());
        self.refuse_scattered()?;
        let mut states = Vec::new();
        for cell in self.cells.iter().filter(|cell| cell.role() == "serial") {
            let Some((_, CellState::Serial(state))) = said(cell.id()) else {
                return Err(none(cell.id()));
            };
            states.push(DeviceState::serial(cell.id(), state)?);
        }
        for (slot, (id, device)) in self.devices.iter().enumerate() {
            let facts = self.disks.iter().find(|disk| disk.id == *id).ok_or_else(|| none(id))?;
            if let Some((_, state)) = frozen.strangers.iter().find(|(of, _)| of == id) {
                let back_end = self.back_ends.iter().find(|back_end| back_end.id == *id);
                let state = BackEndState {
                    socket: back_end.ok_or_else(|| none(id))?.path.clone(),
                    size: facts.size,
                    read_only: facts.read_only,
                    transport: device.save(),
                    state: state.clone(),
                };
                states.push(DeviceState::back_end(slot, id, &state)?);
                continue;
            }
            let Some((cell, CellState::Blk { balance, .. })) = said(id) else {
                return Err(none(id));
            };
            let state = DiskState {
                record: record(facts)?.ok_or_else(|| none(id))?,
                written: written(facts),
                transport: device.save(),
                counters: cell.queues(),
                balance: *balance,
            };
            states.push(DeviceState::disk(slot, id, &state)?);
        }
        Ok(states)
    }
}

impl Vm {
    /// A state has room for so many extents, of all disks together.
    fn refuse_scattered(&self) -> Result<(), CaptureError> {
        let pieces = self.disks.iter().map(|disk| (written(disk).map_or(0, |all| all.len()), disk));
        let pieces: Vec<_> = pieces.collect();
        let all: usize = pieces.iter().map(|(pieces, _)| pieces).sum();
        match pieces.iter().max_by_key(|(pieces, _)| pieces) {
            Some((pieces, disk)) if all > MAX_EXTENTS => {
                Err(CaptureError::Scattered(disk.id.clone(), *pieces))
            }
            _ => Ok(()),
        }
    }
}

/// What the guest has written to a `cow` disk.
fn written(disk: &DiskFacts) -> Option<Vec<Extent>> {
    let (overlay, _) = disk.image.as_ref()?.overlay.as_ref()?;
    Some(overlay.extents())
}

/// What a disk is made of, with the image's fingerprint as of now.
fn record(disk: &DiskFacts) -> Result<Option<DiskRecord>, CaptureError> {
    let Some(image) = &disk.image else { return Ok(None) };
    let fingerprint =
        Fingerprint::of(image.fd.as_fd()).map_err(|e| CaptureError::Image(disk.id.clone(), e))?;
    Ok(Some(DiskRecord {
        path: image.path.clone(),
        size: disk.size,
        fingerprint,
        read_only: disk.read_only,
        cow: image.overlay.as_ref().map(|(_, place)| match place {
            Place::Memory => None,
            Place::Directory(directory) => Some(directory.clone()),
        }),
        serial: image.serial.clone(),
        poll_us: image.poll_us,
        queues: image.queues,
        direct: image.direct,
        engine: image.engine,
        throttle: disk.throttle,
    }))
}

/// Guest memory itself, for as long as nobody writes to it.
pub(super) fn shared(ram: &GuestRam) -> Result<OwnedFd, CaptureError> {
    ram.fd().try_clone_to_owned().map_err(CaptureError::Copy)
}

/// Room for a copy of guest memory.
pub(super) fn room(ram: &GuestRam) -> Result<OwnedFd, CaptureError> {
    Ok(sealed_memfd("snapshot-memory", ram.len())?)
}

/// A copy of guest memory: of what has pages, so that a guest costs what it uses.
pub(super) fn copy(ram: &GuestRam, until: Until) -> Result<OwnedFd, CaptureError> {
    let copy = room(ram)?;
    let mut whole = Whole::default();
    while whole.copy(ram, &copy, STEP)? > 0 {
        until.check()?;
    }
    Ok(copy)
}

/// How far a copy of all of memory is.
#[derive(Default)]
pub(super) struct Whole {
    at: i64,
    /// Where the pages end that begin before it.
    stop: i64,
}

impl Whole {
    /// Copies up to `most` bytes; how many those are, and 0 at the end.
    pub(super) fn copy(
        &mut self,
        ram: &GuestRam,
        to: &OwnedFd,
        most: u64,
    ) -> Result<u64, CaptureError> {
        let failed = |errno: Errno| CaptureError::Copy(errno.into());
        if self.at == self.stop {
            if self.at >= ram.len() as i64 {
                return Ok(0);
            }
            self.at = match lseek(ram.fd(), self.at, Whence::SeekData) {
                Ok(start) => start,
                Err(Errno::ENXIO) => return Ok(0), // nothing but holes
                Err(errno) => return Err(failed(errno)),
            };
            self.stop = lseek(ram.fd(), self.at, Whence::SeekHole).map_err(failed)?;
        }
        let len = most.min((self.stop - self.at) as u64) as i64;
        copy_range(ram.fd(), to, self.at, self.at + len).map_err(CaptureError::Copy)?;
        self.at += len;
        Ok(len as u64)
    }
}

#[allow(unsafe_code)] // sendfile, from page cache to page cache
fn copy_range(from: BorrowedFd<'_>, to: &OwnedFd, start: i64, stop: i64) -> io::Result<()> {
    lseek(to, start, Whence::SeekSet)?;
    let mut at = start;
    while at < stop {
        let left = (stop - at) as usize;
        // SAFETY: both fds are open and `at` outlives the call.
        let n = unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), &mut at, left) };
        match n {
            1.. => {}
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
    Ok(())
}

/// `bytes` as a file that nobody can change.
pub(super) fn as_file(bytes: &[u8]) -> Result<OwnedFd, CaptureError> {
    let fd = sealed_memfd("snapshot-state", bytes.len() as u64)?;
    io::Write::write_all(&mut File::from(fd.try_clone().map_err(CaptureError::Copy)?), bytes)
        .map_err(CaptureError::Copy)?;
    Ok(fd)
}
