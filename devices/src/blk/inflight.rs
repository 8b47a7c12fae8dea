//! The record of requests in flight, by which a successor goes on where a process died.
//!
//! It is vhost-user's region for split rings, in memory that outlives the process
//! (SET_INFLIGHT_FD): for each queue a header and an entry for every descriptor.
//!
//! | bytes | header | | bytes | entry |
//! |---|---|---|---|---|
//! | 8 | features: none, but see below | | 1 | in flight, or not |
//! | 2 | version: 1; 0 before it is used | | 5 | |
//! | 2 | entries | | 2 | the one before in its batch |
//! | 2 | head of the last batch | | 8 | counter |
//! | 2 | used index | | | |
//!
//! **Taking** a chain writes the counter, then the mark, and only then is the request
//! looked at. **Giving back** a batch writes the used entries and links their requests,
//! writes the last one's head, publishes the used index, clears the marks, and writes the
//! used index here. Whoever finds the record after a death between any two of these steps
//! sees either that the answers were not published, and carries the requests out (again),
//! or that they were, by how far the used index has come, and clears the marks along the
//! links. So an answer appears exactly once.
//!
//! Split rings have no features here, so that bits of ours are there: [`BROKEN`] and
//! [`DURABLE`].
//!
//! What is found is not to be believed: it may be another front end's, or a process's
//! that a guest had taken over. Every figure is bounded before it is used.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cellblock_wire::{Access, Mapping, ShmError, sealed_memfd};
use vhost::vhost_user::message::VhostUserInflight;

use super::config::QUEUE_SIZE;

/// Bytes of a header, and of an entry.
const ENTRY: usize = 16;
/// A queue's part begins on a cache line of its own.
const LINE: usize = 64;
/// The only version there is.
const VERSION: u16 = 1;
/// The driver broke the ring: nobody serves it before the driver has reset the device.
const BROKEN: u64 = 1 << 63;
/// The driver turned the disk's write cache off. Not every front end says so again to a process
/// that comes after.
const DURABLE: u64 = 1 << 62;

/// A record that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum InflightError {
    /// Not of a shape that this device gave out.
    #[error("record of {queues} queues with {entries} entries in {bytes} bytes at {offset}")]
    Shape {
        /// Queues it is for.
        queues: u16,
        /// Entries of each.
        entries: u16,
        /// Bytes it has.
        bytes: u64,
        /// Where in its file it begins.
        offset: u64,
    },
    /// It may not be mapped.
    #[error("mapping the record")]
    Map(#[source] ShmError),
    /// Not a layout that is known here.
    #[error("record has version {version} and {entries} entries where the ring has {ring}")]
    Header {
        /// Of the layout.
        version: u16,
        /// Entries the record says it has.
        entries: u16,
        /// Entries of the ring.
        ring: u16,
    },
    /// More answers since the record was last right than can have been.
    #[error("used index {used} of the ring does not follow {recorded} of the record")]
    Used {
        /// In the ring.
        used: u16,
        /// In the record.
        recorded: u16,
    },
    /// A mark that is neither there nor not, or of a descriptor the ring has not.
    #[error("mark {mark:#x} of descriptor {head} is not one")]
    Mark {
        /// The descriptor.
        head: u16,
        /// What is there.
        mark: u8,
    },
}

/// Bytes of the record of so many queues.
pub(super) fn record_bytes(queues: u16, entries: u16) -> usize {
    usize::from(queues) * stride(entries)
}

fn stride(entries: u16) -> usize {
    (ENTRY * (1 + usize::from(entries))).next_multiple_of(LINE)
}

/// A record that a device has to give away (GET_INFLIGHT_FD), made before the process is
/// sealed. Sealed against resizing before anyone maps it.
#[derive(Debug)]
pub(super) struct Offer {
    file: File,
    bytes: usize,
}

impl Offer {
    /// For a device with so many queues.
    pub fn new(queues: u16) -> Result<Offer, ShmError> {
        let bytes = record_bytes(queues, QUEUE_SIZE);
        Ok(Offer { file: sealed_memfd("cellblock-inflight", bytes as u64)?.into(), bytes })
    }

    /// The record, as new, in the shape asked for.
    pub fn give(&self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File), Refused> {
        let bytes = self.bytes as u64;
        let shape = VhostUserInflight::new(bytes, 0, asked.num_queues, asked.queue_size);
        let queues = asked.num_queues;
        Records::map(&shape, &self.file, queues).map_err(Refused::Shape)?.clear();
        Ok((shape, self.file.try_clone().map_err(Refused::Copy)?))
    }
}

/// Why no record is given away.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// None of the shape asked for.
    #[error("making a record")]
    Shape(#[source] InflightError),
    /// No descriptor to be had.
    #[error("copying a descriptor")]
    Copy(#[source] std::io::Error),
}

/// The records of a device's queues, mapped.
#[derive(Clone, Debug)]
pub(super) struct Records {
    mapping: Arc<Mapping>,
    queues: u16,
    entries: u16,
}

impl Records {
    /// Maps what SET_INFLIGHT_FD brings for a device with at most `queues`.
    pub fn map(
        told: &VhostUserInflight,
        file: &File,
        queues: u16,
    ) -> Result<Records, InflightError> {
        let bytes = record_bytes(told.num_queues, told.queue_size);
        let fits = (1..=queues).contains(&told.num_queues)
            && (1..=QUEUE_SIZE).contains(&told.queue_size)
            && told.mmap_offset == 0
            && told.mmap_size >= bytes as u64;
        if !fits {
            return Err(InflightError::Shape {
                queues: told.num_queues,
                entries: told.queue_size,
                bytes: told.mmap_size,
                offset: told.mmap_offset,
            });
        }
        let mapping = Mapping::new(file, bytes, Access::ReadWrite).map_err(InflightError::Map)?;
        let (queues, entries) = (told.num_queues, told.queue_size);
        Ok(Records { mapping: Arc::new(mapping), queues, entries })
    }

    /// The record of a queue; `None` for one that is not covered.
    pub fn queue(&self, index: usize) -> Option<Record> {
        (index < usize::from(self.queues)).then(|| Record {
            mapping: self.mapping.clone(),
            base: index * stride(self.entries),
            entries: self.entries,
        })
    }

    /// Makes all of it as new.
    pub fn clear(&self) {
        for word in (0..self.mapping.len()).step_by(8) {
            self.mapping.u64(word).store(0, Ordering::Relaxed);
        }
    }
}

/// The record of one queue.
#[derive(Clone, Debug)]
pub(super) struct Record {
    mapping: Arc<Mapping>,
    base: usize,
    entries: u16,
}

/// What a record says of a ring's past.
#[derive(Debug)]
pub(super) struct Recovery {
    /// Keeps the record from here on.
    pub tracker: Tracker,
    /// Descriptors of the unfinished requests, the first that was taken last.
    pub unfinished: Vec<u16>,
    /// Whether there was a past.
    pub known: bool,
}

/// Second word of the header.
#[derive(Clone, Copy)]
struct Header {
    version: u16,
    entries: u16,
    last_head: u16,
    used: u16,
}

impl Header {
    fn unpack(word: u64) -> Header {
        let part = |n: u32| (word >> (16 * n)) as u16;
        Header { version: part(0), entries: part(1), last_head: part(2), used: part(3) }
    }

    fn pack(self) -> u64 {
        [self.used, self.last_head, self.entries, self.version]
            .iter()
            .fold(0, |word, part| word << 16 | u64::from(*part))
    }
}

impl Record {
    /// Whether a ring was served under it.
    pub fn is_used(&self) -> bool {
        self.header().version != 0
    }

    /// Whether the ring was broken when it was served last.
    pub fn is_broken(&self) -> bool {
        self.word(0).load(Ordering::Acquire) & BROKEN != 0
    }

    /// Says so to whoever comes to serve it.
    pub fn set_broken(&self) {
        self.word(0).fetch_or(BROKEN, Ordering::Release);
    }

    /// Whether the driver had turned the write cache off.
    pub fn is_durable(&self) -> bool {
        self.word(0).load(Ordering::Acquire) & DURABLE != 0
    }

    /// Says so.
    pub fn set_durable(&self, durable: bool) {
        match durable {
            true => self.word(0).fetch_or(DURABLE, Ordering::Release),
            false => self.word(0).fetch_and(!DURABLE, Ordering::Release),
        };
    }

    /// Whether nothing is marked.
    #[cfg(any(test, fuzzing))]
    pub fn is_at_rest(&self) -> bool {
        (0..self.entries).all(|head| self.mark(head).load(Ordering::Acquire) as u8 == 0)
    }

    /// Reads what was left unfinished of a ring of `ring` entries whose used index is
    /// `used`, and brings the record up to date.
    pub fn recover(&self, ring: u16, used: u16) -> Result<Recovery, InflightError> {
        let header = self.header();
        if header.version == 0 {
            return self.begin(ring, used);
        }
        let tracker = Tracker { record: self.clone(), counter: 0, used };
        if header.version != VERSION || header.entries != self.entries || ring > self.entries {
            let (version, entries) = (header.version, header.entries);
            return Err(InflightError::Header { version, entries, ring });
        }
        // A batch is no more than a ring full.
        let published = used.wrapping_sub(header.used);
        if published > ring {
            return Err(InflightError::Used { used, recorded: header.used });
        }
        self.forget_published(header.last_head, published, ring);
        tracker.show(header.last_head);
        crash::point();
        let unfinished = self.unfinished(ring)?;
        let mut tracker = tracker;
        // Counted anew from zero, which keeps their order even if it ends half-way.
        for head in unfinished.iter().rev() {
            tracker.count(*head);
            crash::point();
        }
        Ok(Recovery { tracker, unfinished, known: true })
    }

    fn begin(&self, ring: u16, used: u16) -> Result<Recovery, InflightError> {
        if ring > self.entries {
            return Err(InflightError::Header { version: 0, entries: self.entries, ring });
        }
        for head in 0..self.entries {
            self.mark(head).store(0, Ordering::Relaxed);
        }
        let tracker = Tracker { record: self.clone(), counter: 0, used };
        tracker.show(0);
        Ok(Recovery { tracker, unfinished: Vec::new(), known: false })
    }

    /// Clears the marks of the last batch, whose used entries the driver has seen.
    fn forget_published(&self, last_head: u16, published: u16, ring: u16) {
        let mut head = last_head;
        for _ in 0..published {
            if head >= ring {
                return;
            }
            head = self.clear_mark(head);
            crash::point();
        }
    }

    /// Takes the mark of a descriptor away; returns the one before in its batch. The link
    /// stays for whoever has to go through the batch again after a death in the middle.
    fn clear_mark(&self, head: u16) -> u16 {
        let word = self.mark(head).load(Ordering::Relaxed);
        self.mark(head).store(word & !0xff, Ordering::Release);
        (word >> 48) as u16
    }

    /// The descriptors marked, latest first.
    fn unfinished(&self, ring: u16) -> Result<Vec<u16>, InflightError> {
        let mut found = Vec::new();
        for head in 0..self.entries {
            match self.mark(head).load(Ordering::Acquire) as u8 {
                0 => {}
                1 if head < ring => {
                    found.push((self.counter(head).load(Ordering::Relaxed), head));
                }
                mark => return Err(InflightError::Mark { head, mark }),
            }
        }
        found.sort_unstable_by(|a, b| b.cmp(a));
        Ok(found.into_iter().map(|(_, head)| head).collect())
    }

    fn header(&self) -> Header {
        Header::unpack(self.word(8).load(Ordering::Acquire))
    }

    fn mark(&self, head: u16) -> &AtomicU64 {
        self.word(ENTRY * (1 + usize::from(head)))
    }

    fn counter(&self, head: u16) -> &AtomicU64 {
        self.word(ENTRY * (1 + usize::from(head)) + 8)
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        self.mapping.u64(self.base + offset)
    }
}

/// Keeps the record of a ring that is being served. Its callers name descriptors of the
/// ring only.
#[derive(Debug)]
pub(super) struct Tracker {
    record: Record,
    counter: u64,
    /// The used index that the record shows.
    used: u16,
}

impl Tracker {
    /// A chain was taken.
    pub fn take(&mut self, head: u16) {
        self.count(head);
        crash::point();
        self.record.mark(head).store(1, Ordering::Release);
        crash::point();
    }

    /// The chain taken last goes back to the available ring.
    pub fn put_back(&mut self, head: u16) {
        self.record.mark(head).store(0, Ordering::Release);
        crash::point();
    }

    /// The used entry of a chain is written; it is shown together with that of `before`.
    #[inline]
    pub fn join(&self, head: u16, before: Option<u16>) {
        if let Some(before) = before {
            self.record.mark(head).store(1 | u64::from(before) << 48, Ordering::Release);
        }
        crash::point();
    }

    /// The answers of a batch, whose last is `head`'s, are published next.
    #[inline]
    pub fn publishing(&self, head: u16) {
        self.show(head);
        crash::point();
    }

    /// They were, and `used` is the used index since then.
    #[inline]
    pub fn published(&mut self, batch: &[u16], used: u16) {
        crash::point();
        for head in batch {
            self.record.clear_mark(*head);
            crash::point();
        }
        self.used = used;
        self.show(batch.last().copied().unwrap_or(0));
        crash::point();
    }

    fn count(&mut self, head: u16) {
        self.record.counter(head).store(self.counter, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// Writes the header.
    fn show(&self, last_head: u16) {
        let entries = self.record.entries;
        let header = Header { version: VERSION, entries, last_head, used: self.used };
        self.record.word(8).store(header.pack(), Ordering::Release);
    }
}

/// Places at which a test has the process die.
pub(super) mod crash {
    #[cfg(not(test))]
    #[inline(always)]
    pub fn point() {}

    #[cfg(test)]
    pub use under_test::*;

    #[cfg(test)]
    mod under_test {
        use std::cell::Cell;

        thread_local! {
            static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
        }

        /// What a process that died left by.
        pub struct Died;

        /// Dies at the `nth` point from now on; `None` lives.
        pub fn at(nth: Option<u32>) {
            LEFT.set(nth);
        }

        /// Dies here, if it is time.
        pub fn point() {
            match LEFT.get() {
                Some(0) => {
                    LEFT.set(None);
                    std::panic::resume_unwind(Box::new(Died));
                }
                Some(left) => LEFT.set(Some(left - 1)),
                None => {}
            }
        }
    }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
