//! From a descriptor chain to a request that may touch the disk, or a refusal.
//!
//! The guest is hostile: every descriptor and the header are read once, checked
//! as copies, and all checks are done before the disk is touched. Nothing relies
//! on how the driver cut its buffers into descriptors (virtio 1.2, 2.7.4): the
//! request is the concatenation of the readable ones, header first, and of the
//! writable ones, status byte last.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;

use super::clear::{self, Clear, Range};
use super::config::{SECTOR, SEG_MAX};
use super::memory::Slice;
use super::view::View;

/// Bytes of the request header: type, reserved word, sector, all little-endian.
const HEADER: usize = 16;
/// Most descriptors of a request: the data segments, the header and the status byte.
const MAX_DESCRIPTORS: usize = SEG_MAX as usize + 2;
/// How far a chain that is too long is followed to find where its status byte goes.
const MAX_WALK: usize = 4 * MAX_DESCRIPTORS;

/// What the disk is asked to do. Offsets are in bytes, and the range is on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Fill the data segments from the disk at this offset.
    Read(u64),
    /// Write the data segments to the disk at this offset.
    Write(u64),
    /// Make every write answered so far durable.
    Flush,
    /// Put the serial number into the data segments.
    GetId,
    /// Discard or zero the request's ranges.
    Clear(Clear),
}

impl Operation {
    /// Whether it writes to guest memory.
    #[inline]
    pub fn fills(self) -> bool {
        matches!(self, Operation::Read(_) | Operation::GetId)
    }
}

/// Why a request is answered with an error, without touching the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// More descriptors than `seg_max` allows.
    #[error("request has more than {MAX_DESCRIPTORS} descriptors")]
    TooManyDescriptors,
    /// The device does nothing any more.
    #[error("the device has failed")]
    Failed,
    /// A readable descriptor behind a writable one.
    #[error("request has a readable descriptor behind a writable one")]
    Order,
    /// Fewer than 16 readable bytes.
    #[error("request header is cut short")]
    Header,
    /// A descriptor outside guest memory.
    #[error("request has a buffer outside guest memory")]
    Address,
    /// A data segment longer than the negotiated `size_max`.
    #[error("request has a segment of {0} bytes")]
    Segment(usize),
    /// A type this device does not know.
    #[error("request has the unknown type {0}")]
    Type(u32),
    /// Flags of a discard or write-zeroes that do not belong there.
    #[error("request has the unknown flags {0:#x}")]
    Flags(u32),
    /// A discard or write-zeroes of more sectors than the device said it would do.
    #[error("request would clear {0} sectors at once")]
    Clear(u32),
    /// A discard or write-zeroes that is not one or more whole segments, or too many.
    #[error("request has {0} bytes of segments")]
    Segments(u64),
    /// A read, write or get-id without data.
    #[error("request has no data")]
    NoData,
    /// A flush with data.
    #[error("flush request has data")]
    UnexpectedData,
    /// Data that is not whole sectors.
    #[error("request is for {0} bytes, not whole sectors")]
    PartSector(u64),
    /// A write to a read-only disk.
    #[error("request would write to a read-only disk")]
    ReadOnly,
    /// Data to write where the device has to write, or the other way round.
    #[error("request has data in the wrong direction")]
    Direction,
    /// Beyond the end of the disk.
    #[error("request for {bytes} bytes at sector {sector} is beyond the end of the disk")]
    Range {
        /// First sector.
        sector: u64,
        /// Bytes of data.
        bytes: u64,
    },
}

impl Refusal {
    /// The status byte the driver gets.
    pub fn status(self) -> u8 {
        match self {
            Refusal::Type(_) | Refusal::Flags(_) => VIRTIO_BLK_S_UNSUPP as u8,
            _ => VIRTIO_BLK_S_IOERR as u8,
        }
    }
}

/// A chain with no place for a status byte. It is given back with length zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    /// The chain loops, leaves its table, or has an indirect table that is not one.
    #[error("descriptor chain does not end")]
    Endless,
    /// There is no writable byte, or it is outside guest memory.
    #[error("descriptor chain has no place for a status")]
    NoStatus,
}

/// What the disk and the negotiated features allow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Most bytes of a data segment, where the driver agreed to a bound.
    pub size_max: Option<u32>,
    /// The driver may discard.
    pub discard: bool,
    /// The driver may zero ranges.
    pub write_zeroes: bool,
    /// Nothing may be done: the device has failed.
    pub failed: bool,
}

/// A request that can be answered.
#[derive(Debug)]
pub(super) struct Request<'p, 'm> {
    /// Where the status byte goes.
    pub status: Slice<'m>,
    /// Bytes the device may write in front of the status byte.
    pub writable: u64,
    /// What is to be cleared.
    pub ranges: &'p [Range],
    /// What to do and with which memory, or why not.
    pub body: Result<(Operation, &'p [Slice<'m>]), Refusal>,
}

/// Turns chains into requests. Kept between requests for its buffers.
#[derive(Debug)]
pub(super) struct Parser<'m> {
    memory: &'m View<'m>,
    limits: Limits,
    readable: Vec<Slice<'m>>,
    writable: Vec<Slice<'m>>,
    ranges: Vec<Range>,
}

/// What walking a chain has shown, apart from the slices.
#[derive(Default)]
struct Walk {
    descriptors: usize,
    misordered: bool,
    bad_readable: bool,
    bad_writable: bool,
    /// The last writable descriptor is in guest memory.
    last_writable: bool,
}

impl<'m> Parser<'m> {
    pub fn new(memory: &'m View<'m>, limits: Limits) -> Parser<'m> {
        let room = || Vec::with_capacity(MAX_DESCRIPTORS);
        Parser { memory, limits, readable: room(), writable: room(), ranges: Vec::new() }
    }

    /// Walks and checks one chain.
    pub fn parse(
        &mut self,
        chain: impl Iterator<Item = Descriptor>,
    ) -> Result<Request<'_, 'm>, Broken> {
        let walk = self.walk(chain)?;
        let status = self.take_status(&walk)?;
        // The rings are the VMM's to mark, who knows where they are.
        self.memory.will_write(&status);
        self.writable.iter().for_each(|slice| self.memory.will_write(slice));
        let writable = total(&self.writable);
        let operation = self.check(&walk, writable);
        let this = &*self;
        let body = operation.map(|operation| {
            let data: &[Slice<'m>] = match operation {
                Operation::Read(_) | Operation::GetId => &this.writable,
                Operation::Write(_) => &this.readable,
                Operation::Flush | Operation::Clear(_) => &[],
            };
            (operation, data)
        });
        Ok(Request { status, writable, ranges: &this.ranges, body })
    }

    fn walk(&mut self, mut chain: impl Iterator<Item = Descriptor>) -> Result<Walk, Broken> {
        self.readable.clear();
        self.writable.clear();
        self.ranges.clear();
        let mut walk = Walk::default();
        let mut ended = false;
        for descriptor in chain.by_ref().take(MAX_WALK) {
            walk.descriptors += 1;
            ended = !descriptor.has_next();
            self.collect(&descriptor, &mut walk);
        }
        // The iterator stops quietly at a bad link: only a last descriptor that
        // points to no other one ends a chain.
        if ended { Ok(walk) } else { Err(Broken::Endless) }
    }

    fn collect(&mut self, descriptor: &Descriptor, walk: &mut Walk) {
        if descriptor.is_write_only() {
            let good = gather(self.memory, descriptor, &mut self.writable);
            walk.bad_writable |= !good;
            walk.last_writable = good;
        } else {
            walk.misordered |= !self.writable.is_empty() || walk.bad_writable;
            walk.bad_readable |= !gather(self.memory, descriptor, &mut self.readable);
        }
    }

    /// Cuts the status byte off the writable end.
    fn take_status(&mut self, walk: &Walk) -> Result<Slice<'m>, Broken> {
        let last = self.writable.pop().filter(|_| walk.last_writable).ok_or(Broken::NoStatus)?;
        let (data, status) = last.split_at(last.len() - 1).map_err(|_| Broken::NoStatus)?;
        if !data.is_empty() {
            self.writable.push(data);
        }
        Ok(status)
    }

    fn check(&mut self, walk: &Walk, writable: u64) -> Result<Operation, Refusal> {
        if walk.descriptors > MAX_DESCRIPTORS {
            return Err(Refusal::TooManyDescriptors);
        }
        let header = if walk.bad_readable { None } else { self.take_header() };
        let header = header.ok_or(Refusal::Header)?;
        if self.limits.failed {
            return Err(Refusal::Failed);
        }
        if walk.misordered {
            return Err(Refusal::Order);
        }
        if walk.bad_writable {
            return Err(Refusal::Address);
        }
        if let Some(max) = self.limits.size_max {
            let mut segments = self.readable.iter().chain(&self.writable).map(Slice::len);
            if let Some(len) = segments.find(|len| *len > max as usize) {
                return Err(Refusal::Segment(len));
            }
        }
        let readable = total(&self.readable);
        // A direction with no data in it at all was settled by "no data".
        let (bytes, other) = match header.kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_GET_ID => (writable, readable),
            VIRTIO_BLK_T_OUT => (readable, writable),
            VIRTIO_BLK_T_FLUSH if readable + writable > 0 => return Err(Refusal::UnexpectedData),
            VIRTIO_BLK_T_FLUSH => return Ok(Operation::Flush),
            VIRTIO_BLK_T_DISCARD if self.limits.discard || self.limits.read_only => {
                return self.clear(Clear::Discard, readable, writable);
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.limits.write_zeroes || self.limits.read_only => {
                return self.clear(Clear::Zero, readable, writable);
            }
            kind => return Err(Refusal::Type(kind)),
        };
        if bytes + other == 0 {
            return Err(Refusal::NoData);
        }
        if header.kind == VIRTIO_BLK_T_GET_ID {
            return if other == 0 { Ok(Operation::GetId) } else { Err(Refusal::Direction) };
        }
        if !(bytes + other).is_multiple_of(SECTOR) {
            return Err(Refusal::PartSector(bytes + other));
        }
        if header.kind == VIRTIO_BLK_T_OUT && self.limits.read_only {
            return Err(Refusal::ReadOnly);
        }
        if other > 0 {
            return Err(Refusal::Direction);
        }
        let end = header.sector.checked_add(bytes / SECTOR);
        if end.is_none_or(|end| end > self.limits.sectors) {
            return Err(Refusal::Range { sector: header.sector, bytes });
        }
        // In range of the disk, whose size in bytes is a u64.
        let offset = header.sector * SECTOR;
        let operation = match header.kind {
            VIRTIO_BLK_T_OUT => Operation::Write(offset),
            _ => Operation::Read(offset),
        };
        Ok(operation)
    }

    /// Copies and checks the segments of a discard or write-zeroes. All are checked
    /// before the first is obeyed.
    fn clear(&mut self, clear: Clear, bytes: u64, other: u64) -> Result<Operation, Refusal> {
        const SEGMENT: u64 = clear::SEGMENT as u64;
        if bytes + other == 0 {
            return Err(Refusal::NoData);
        }
        if self.limits.read_only {
            return Err(Refusal::ReadOnly);
        }
        if other > 0 {
            return Err(Refusal::Direction);
        }
        if !bytes.is_multiple_of(SEGMENT) || bytes / SEGMENT > clear.max_segments() as u64 {
            return Err(Refusal::Segments(bytes));
        }
        for _ in 0..bytes / SEGMENT {
            let segment = self.take().ok_or(Refusal::Address)?;
            self.ranges.push(Range::parse(clear, segment, self.limits.sectors)?);
        }
        Ok(Operation::Clear(clear))
    }

    /// Reads the header, once, and cuts it off the readable end.
    fn take_header(&mut self) -> Option<Header> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = self.take::<HEADER>()?;
        Some(Header {
            kind: u32::from_le_bytes([t0, t1, t2, t3]),
            sector: u64::from_le_bytes(sector),
        })
    }

    /// Reads the next bytes, once, and cuts them off the readable end.
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0u8; N];
        let mut got = 0;
        let mut used = 0;
        for slice in &mut self.readable {
            let n = slice.len().min(N - got);
            slice.read_slice(&mut bytes[got..got + n], 0).ok()?;
            got += n;
            if n < slice.len() {
                *slice = slice.offset(n).ok()?;
                break;
            }
            used += 1;
            if got == N {
                break;
            }
        }
        if got < N {
            return None;
        }
        self.readable.drain(..used);
        Some(bytes)
    }
}

struct Header {
    kind: u32,
    sector: u64,
}

fn total(slices: &[Slice<'_>]) -> u64 {
    slices.iter().map(|s| s.len() as u64).sum()
}

/// Adds the memory of one descriptor to `slices`; false if any of it is not guest memory.
fn gather<'m>(memory: &'m View<'m>, descriptor: &Descriptor, slices: &mut Vec<Slice<'m>>) -> bool {
    let room = slices.len();
    for slice in memory.slices(descriptor.addr(), descriptor.len() as usize) {
        match slice {
            Ok(slice) => slices.push(slice),
            Err(_) => {
                slices.truncate(room);
                return false;
            }
        }
    }
    true
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
