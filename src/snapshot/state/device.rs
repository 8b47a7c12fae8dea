//! What a device is made of and where it stands.
//!
//! The VMM reads these from its own side of each device and from what the device's process
//! says; the latter is checked before it is kept.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use cellblock_devices::protocol::counters::VirtioBlkCountersSnapshot;
use cellblock_devices::protocol::overlay::Extent;
use cellblock_devices::protocol::state::SerialState;
use cellblock_devices::protocol::{EngineKind, ThrottleLimits};
use cellblock_wire::{decode_within, encode_within};
use nix::sys::stat::{SFlag, fstat};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{MAX_BYTES, StateError};
use crate::cell::overlay::Place;
use crate::spec::DiskSpec;
use crate::transport::mmio::TransportState;

/// A device's part of a state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Its place in the machine: 0 for COM1, then the virtio slots from 1 on.
    pub slot: u32,
    /// Its id, unique in the VM.
    pub id: String,
    /// What it is.
    pub kind: String,
    /// Of the encoding of `data`.
    pub version: u16,
    data: Vec<u8>,
}

/// COM1.
pub const UART: &str = "uart-16550";
/// A disk.
pub const VIRTIO_BLK: &str = "virtio-blk-mmio";
/// A disk that another program serves.
pub const VHOST_USER: &str = "virtio-blk-vhost-user";
const VERSION: u16 = 1;
/// Most extents of all `cow` disks of a VM: with these, and all else at its largest, a state is
/// within [`MAX_BYTES`], encoded and decoded.
pub const MAX_EXTENTS: usize = 3 << 20;

/// A disk's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// What it is made of.
    pub record: DiskRecord,
    /// Registers, queues and configuration.
    pub transport: TransportState,
    /// What each queue has counted.
    pub counters: Vec<VirtioBlkCountersSnapshot>,
    /// Tokens its throttle had: of bytes, of requests.
    pub balance: [i64; 2],
    /// What its guest had written, of a `cow` disk: the data is kept as the disk's copy.
    pub written: Option<Vec<Extent>>,
}

/// The part of a disk that another program serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackEndState {
    /// Where that program was connected to, absolute.
    pub socket: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Refuses writes.
    pub read_only: bool,
    /// Registers, queues and configuration.
    pub transport: TransportState,
    /// What the program keeps to itself, opaque to us.
    pub state: Vec<u8>,
}

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The image, absolute.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Changes whenever the image does.
    pub fingerprint: Fingerprint,
    /// Refuses writes.
    pub read_only: bool,
    /// The guest's writes are kept beside the image: in memory, or in this directory.
    pub cow: Option<Option<PathBuf>>,
    /// What the guest reads as its serial number.
    pub serial: String,
    /// Longest busy wait, in microseconds.
    pub poll_us: u32,
    /// Request queues.
    pub queues: u16,
    /// Reads and writes past the page cache.
    pub direct: bool,
    /// What carries requests out.
    pub engine: Option<EngineKind>,
    /// What it may do.
    pub throttle: ThrottleLimits,
}

/// What shows that an image was written: the time of its last change. A block device has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Nanoseconds since the Unix epoch; `None` where the image does not tell.
    pub modified_ns: Option<i128>,
}

impl DiskRecord {
    /// The disk again, with the image at `path`.
    pub fn spec(&self, id: &str, path: PathBuf) -> DiskSpec {
        DiskSpec {
            path,
            id: Some(id.to_string()),
            read_only: self.read_only,
            cow: self.cow.as_ref().map(|directory| match directory {
                Some(directory) => Place::Directory(directory.clone()),
                None => Place::Memory,
            }),
            serial: Some(self.serial.clone()),
            poll_us: self.poll_us,
            queues: Some(self.queues),
            direct: self.direct,
            engine: self.engine,
            throttle: self.throttle,
            vhost_user: None,
        }
    }
}

impl Fingerprint {
    /// Of an open image, as it is now.
    pub fn of(image: BorrowedFd<'_>) -> nix::Result<Fingerprint> {
        let stat = fstat(image)?;
        let is_file = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        let modified = i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec);
        Ok(Fingerprint { modified_ns: is_file.then_some(modified) })
    }
}

impl DeviceState {
    /// COM1's.
    pub fn serial(id: &str, state: &SerialState) -> Result<DeviceState, StateError> {
        DeviceState::of(0, id, UART, state)
    }

    /// That of the disk in virtio slot `slot`, counted from 0.
    pub fn disk(slot: usize, id: &str, state: &DiskState) -> Result<DeviceState, StateError> {
        DeviceState::of(1 + slot as u32, id, VIRTIO_BLK, state)
    }

    /// That of one which another program serves.
    pub fn back_end(
        slot: usize,
        id: &str,
        state: &BackEndState,
    ) -> Result<DeviceState, StateError> {
        DeviceState::of(1 + slot as u32, id, VHOST_USER, state)
    }

    fn of(
        slot: u32,
        id: &str,
        kind: &str,
        value: &impl Serialize,
    ) -> Result<DeviceState, StateError> {
        let data = encode_within::<MAX_BYTES, _>(value)
            .map_err(|e| StateError::Codec("encoding a device", e))?;
        Ok(DeviceState { slot, id: id.into(), kind: kind.into(), version: VERSION, data })
    }

    /// The state of COM1; `None` of another device.
    pub fn as_serial(&self) -> Result<Option<SerialState>, StateError> {
        self.read(UART)
    }

    /// The state of a disk; `None` of another device.
    pub fn as_disk(&self) -> Result<Option<DiskState>, StateError> {
        self.read(VIRTIO_BLK)
    }

    /// The state of a disk that another program serves; `None` of another device.
    pub fn as_back_end(&self) -> Result<Option<BackEndState>, StateError> {
        self.read(VHOST_USER)
    }

    fn read<T: DeserializeOwned>(&self, kind: &str) -> Result<Option<T>, StateError> {
        if self.kind != kind {
            return Ok(None);
        }
        if self.version > VERSION {
            let kind = kind.to_string();
            return Err(StateError::Version { kind, found: self.version, known: VERSION });
        }
        decode_within::<MAX_BYTES, _>(&self.data)
            .map(Some)
            .map_err(|e| StateError::Codec("decoding a device", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many extents as there may be, in the place that takes most to say, fit a state: when it is
    /// made as well as when it is read.
    #[test]
    fn the_most_scattered_disk_fits() {
        let extent = |n: usize| Extent { offset: (1 << 40) + n as u64 * 8192, len: 4096 };
        let record = DiskRecord {
            path: "/disk".into(),
            size: 1 << 41,
            fingerprint: Fingerprint { modified_ns: Some(i128::MAX) },
            read_only: false,
            cow: Some(None),
            serial: "disk0".into(),
            poll_us: 0,
            queues: 1,
            direct: false,
            engine: None,
            throttle: ThrottleLimits::default(),
        };
        let state = DiskState {
            record,
            transport: TransportState::default(),
            counters: Vec::new(),
            balance: [0; 2],
            written: Some((0..MAX_EXTENTS).map(extent).collect()),
        };
        let device = DeviceState::disk(0, "disk0", &state).expect("encodes");
        let bytes = encode_within::<MAX_BYTES, _>(&device).expect("is made");
        let device: DeviceState = decode_within::<MAX_BYTES, _>(&bytes).expect("is read");
        assert_eq!(device.as_disk().expect("decodes"), Some(state));
    }
}
