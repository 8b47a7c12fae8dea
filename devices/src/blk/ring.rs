//! One virtqueue from the device's side: chains out, used entries in, and who
//! has to be woken for it.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::chain::Chain;
use super::config::QUEUE_SIZE;
use super::inflight::{InflightError, Record, Tracker};
use super::memory::Slice;
use super::prefetch::prefetch;
use super::view::View;

/// Most chains that are looked ahead to.
const AHEAD: usize = 8;

/// Where the parts of a ring are, and where to go on in it.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Entries: a power of two up to [`QUEUE_SIZE`].
    pub size: u16,
    /// Descriptor table.
    pub descriptors: GuestAddress,
    /// Available ring.
    pub avail: GuestAddress,
    /// Used ring.
    pub used: GuestAddress,
    /// First available entry not taken yet.
    pub next_avail: u16,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Where requests in flight are recorded. One that was used before says where to go
    /// on, whatever `next_avail` does.
    pub record: Option<Record>,
}

impl Layout {
    /// Whether two of the parts share bytes. All were checked to be in guest memory.
    fn overlaps(&self) -> bool {
        let (size, event) = (u64::from(self.size), if self.event_idx { 2 } else { 0 });
        let parts = [
            (self.descriptors.0, 16 * size),
            (self.avail.0, 4 + 2 * size + event),
            (self.used.0, 4 + 8 * size + event),
        ];
        let overlap = |a: (u64, u64), b: (u64, u64)| a.0 < b.0 + b.1 && b.0 < a.0 + a.1;
        overlap(parts[0], parts[1]) || overlap(parts[1], parts[2]) || overlap(parts[0], parts[2])
    }
}

/// A ring that cannot be used, or not any longer.
#[derive(Debug, thiserror::Error)]
pub(super) enum RingError {
    /// A part is misaligned, or the size is not one a queue may have.
    #[error("setting up a ring of {size} entries")]
    Setup {
        /// Entries asked for.
        size: u16,
        /// What is wrong with it.
        #[source]
        source: virtio_queue::Error,
    },
    /// A part is not in guest memory.
    #[error("a ring of {size} entries is not wholly in guest memory")]
    Outside {
        /// Entries asked for.
        size: u16,
    },
    /// Two parts share bytes: what the device writes to one would change the other.
    #[error("parts of a ring of {size} entries overlap")]
    Overlap {
        /// Entries asked for.
        size: u16,
    },
    /// The driver made more entries available than the ring has, or used a
    /// descriptor number beyond its table.
    #[error("driver broke the ring")]
    Poisoned(#[source] virtio_queue::Error),
    /// The record of the requests in flight makes no sense.
    #[error("finding the requests that were left unfinished")]
    Record(#[source] InflightError),
    /// The timer of a request that has to wait was refused.
    #[error("arming the throttle's timer")]
    Timer(#[source] nix::errno::Errno),
    /// Guest memory refused an access.
    #[error("accessing the ring")]
    Access(#[source] GuestMemoryError),
}

impl RingError {
    /// The driver made more chains available than the ring has entries.
    pub fn is_invalid_avail_idx(&self) -> bool {
        matches!(self, RingError::Poisoned(virtio_queue::Error::InvalidAvailRingIndex))
    }
}

/// A ring in use. All of it was checked to be in guest memory.
#[derive(Debug)]
pub(super) struct Ring<'m> {
    memory: &'m View<'m>,
    /// What of it is written to.
    used_ring: Vec<Slice<'m>>,
    queue: Queue,
    tracker: Option<Tracker>,
    /// Chains that a process before this one took and did not answer, the first last.
    unfinished: Vec<u16>,
    /// Chains whose used entries are written, and that the used index does not cover yet.
    batch: Vec<u16>,
    /// Chains published since they were last asked for.
    answered: u64,
    /// The used index when the driver was last thought of.
    announced: u16,
    /// The chain taken last.
    last: Taken,
    /// A chain was seen to be available and not taken yet.
    promised: bool,
}

#[derive(Clone, Copy, Debug)]
enum Taken {
    Nothing,
    Available(u16),
    Unfinished(u16),
}

impl<'m> Ring<'m> {
    /// Whether `layout` is one that a ring can have.
    pub fn check(memory: &'m View<'m>, layout: &Layout) -> Result<(), RingError> {
        queue(memory, layout).map(|_| ())
    }

    /// Checks `layout` and goes on where it says; used entries go on behind those
    /// the used ring has. What a process before this one left unfinished comes first.
    pub fn new(memory: &'m View<'m>, layout: &Layout) -> Result<Ring<'m>, RingError> {
        let mut queue = queue(memory, layout)?;
        let used = queue.next_used();
        let (mut tracker, mut unfinished) = (None, Vec::new());
        if let Some(record) = &layout.record {
            let past = record.recover(layout.size, used).map_err(RingError::Record)?;
            if past.known {
                // No more than the ring has entries.
                queue.set_next_avail(used.wrapping_add(past.unfinished.len() as u16));
            }
            (tracker, unfinished) = (Some(past.tracker), past.unfinished);
        }
        let used_ring = memory.slices(layout.used, 6 + 8 * usize::from(layout.size));
        let used_ring: Vec<_> = used_ring.flatten().collect();
        used_ring.iter().for_each(|slice| memory.will_write(slice));
        let (batch, last) = (Vec::with_capacity(usize::from(layout.size)), Taken::Nothing);
        let (answered, announced, promised) = (0, used, false);
        Ok(Ring {
            memory,
            used_ring,
            queue,
            tracker,
            unfinished,
            batch,
            answered,
            announced,
            last,
            promised,
        })
    }

    /// Guest memory.
    pub fn memory(&self) -> &'m View<'m> {
        self.memory
    }

    /// Notes that the used ring was written to.
    fn has_written(&self) {
        self.used_ring.iter().for_each(|slice| self.memory.has_written(slice));
    }

    /// First available entry not taken yet.
    pub fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Chains that are left of those that were unfinished.
    pub fn left(&self) -> usize {
        self.unfinished.len()
    }

    /// Entries, which is also the most chains one batch can have.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Chains that are left, and that the driver has made available, as it says: unchecked.
    pub fn available(&self) -> Result<u16, RingError> {
        let idx =
            self.queue.avail_idx(self.memory, Ordering::Acquire).map_err(RingError::Poisoned)?;
        let new = idx.0.wrapping_sub(self.queue.next_avail());
        Ok(new.saturating_add(u16::try_from(self.unfinished.len()).unwrap_or(u16::MAX)))
    }

    /// True when the driver has made a chain available, or one is left. One load.
    pub fn has_work(&self) -> Result<bool, RingError> {
        let idx =
            self.queue.avail_idx(self.memory, Ordering::Acquire).map_err(RingError::Poisoned)?;
        Ok(idx.0 != self.queue.next_avail() || !self.unfinished.is_empty())
    }

    /// Begins to fetch what the next chains start with, up to [`AHEAD`] of them, all at
    /// once. Nothing that is read here is used for anything else.
    #[inline]
    pub fn look_ahead(&self, chains: u16) {
        let (size, next) = (self.queue.size(), self.queue.next_avail());
        let (heads, table) = (self.queue.avail_ring() + 4, self.queue.desc_table());
        let chains = usize::from(chains).min(AHEAD);
        let mut found = [const { None }; AHEAD];
        for (n, found) in found.iter_mut().enumerate().take(chains) {
            let entry = u64::from(next.wrapping_add(n as u16) % size);
            let head = self.memory.load::<u16>(GuestAddress(heads + 2 * entry), Ordering::Relaxed);
            let Ok(head) = head.map(u16::from_le) else { return };
            if head < size {
                let at = GuestAddress(table + 16 * u64::from(head));
                *found = self.memory.read_obj::<Descriptor>(at).ok();
            }
        }
        // The table of an indirect one, else the header of the request.
        let first = |descriptor: &Descriptor| self.memory.slices(descriptor.addr(), 16).next();
        found.iter().flatten().filter_map(first).flatten().for_each(|slice| prefetch(&slice));
        for table in found.iter().flatten().filter(|d| d.refers_to_indirect_table()) {
            let header = self.memory.read_obj::<Descriptor>(table.addr()).ok();
            header
                .as_ref()
                .and_then(first)
                .into_iter()
                .flatten()
                .for_each(|slice| prefetch(&slice));
        }
    }

    /// Takes the next chain: one that was left unfinished, or else the next available.
    pub fn pop(&mut self) -> Result<Option<Chain<'m>>, RingError> {
        if let Some(head) = self.unfinished.pop() {
            self.last = Taken::Unfinished(head);
            return Ok(Some(self.chain(head)));
        }
        let mut available = self.queue.iter(self.memory).map_err(RingError::Poisoned)?;
        let Some(head) = available.next().map(|chain| chain.head_index()) else {
            // The driver took back what it had made available. Looking again could go on
            // for ever.
            return match std::mem::take(&mut self.promised) {
                true => Err(RingError::Poisoned(virtio_queue::Error::InvalidAvailRingIndex)),
                false => Ok(None),
            };
        };
        if head >= self.queue.size() {
            return Err(RingError::Poisoned(virtio_queue::Error::InvalidDescriptorIndex));
        }
        self.promised = false;
        self.last = Taken::Available(head);
        if let Some(tracker) = &mut self.tracker {
            tracker.take(head);
        }
        Ok(Some(self.chain(head)))
    }

    fn chain(&self, head: u16) -> Chain<'m> {
        let table = GuestAddress(self.queue.desc_table());
        Chain::new(self.memory, table, self.queue.size(), head)
    }

    /// Whether the chain taken last was taken before, by a process that died.
    pub fn was_taken_before(&self) -> bool {
        matches!(self.last, Taken::Unfinished(_))
    }

    /// Puts the chain that was taken last back: it is taken again next.
    pub fn put_back(&mut self) {
        match std::mem::replace(&mut self.last, Taken::Nothing) {
            Taken::Available(head) => {
                self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
                if let Some(tracker) = &mut self.tracker {
                    tracker.put_back(head);
                }
            }
            // It stays marked: nobody but the record knows of it.
            Taken::Unfinished(head) => self.unfinished.push(head),
            Taken::Nothing => debug_assert!(false, "no chain was taken"),
        }
    }

    /// Gives the chain that starts at `head` back. The driver sees it after
    /// [`Ring::publish`]: it looks at the used index while it waits, and every change of
    /// that takes the line from its CPU and brings it back.
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        if head >= self.queue.size() {
            return Err(RingError::Poisoned(virtio_queue::Error::InvalidDescriptorIndex));
        }
        // More than a ring full is no batch.
        if self.batch.len() >= usize::from(self.queue.size()) {
            self.publish()?;
        }
        let slot = self.queue.next_used().wrapping_add(self.batch.len() as u16) % self.queue.size();
        let at = self.used(4 + 8 * u64::from(slot))?;
        // Number, then length.
        let entry = u64::from(head) | u64::from(len) << 32;
        self.memory.write_obj(entry.to_le(), at).map_err(RingError::Access)?;
        if let Some(tracker) = &self.tracker {
            tracker.join(head, self.batch.last().copied());
        }
        self.batch.push(head);
        Ok(())
    }

    /// Shows the driver what was given back since the last time, all at once.
    #[inline]
    pub fn publish(&mut self) -> Result<(), RingError> {
        let Some(&last) = self.batch.last() else { return Ok(()) };
        let used = self.queue.next_used().wrapping_add(self.batch.len() as u16);
        let index = self.used(2)?;
        if let Some(tracker) = &self.tracker {
            tracker.publishing(last);
        }
        self.memory.store(used.to_le(), index, Ordering::Release).map_err(RingError::Access)?;
        self.queue.set_next_used(used);
        self.answered += self.batch.len() as u64;
        if let Some(tracker) = &mut self.tracker {
            tracker.published(&self.batch, used);
        }
        self.batch.clear();
        self.has_written();
        Ok(())
    }

    /// How many chains were published since the last call.
    pub fn take_answered(&mut self) -> u64 {
        std::mem::take(&mut self.answered)
    }

    /// A place in the used ring, all of which is in guest memory.
    fn used(&self, offset: u64) -> Result<GuestAddress, RingError> {
        let at = self.queue.used_ring().checked_add(offset);
        at.map(GuestAddress).ok_or(RingError::Access(GuestMemoryError::GuestAddressOverflow))
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    pub fn wants_interrupt(&mut self) -> Result<bool, RingError> {
        // The used index must be visible before it is read what the driver wants.
        fence(Ordering::SeqCst);
        let load = |at| self.memory.load::<u16>(GuestAddress(at), Ordering::Relaxed);
        let avail = self.queue.avail_ring();
        if self.queue.event_idx_enabled() {
            // Its index is one of those published since (virtio 1.2, 2.7.7.1).
            let at = avail + 4 + 2 * u64::from(self.queue.size());
            let event = u16::from_le(load(at).map_err(RingError::Access)?);
            let used = self.queue.next_used();
            let before = std::mem::replace(&mut self.announced, used);
            return Ok(used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before));
        }
        let flags = u16::from_le(load(avail).map_err(RingError::Access)?);
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver for no kicks: the ring is being looked at anyway.
    pub fn suppress_kicks(&mut self) -> Result<(), RingError> {
        let done = self.queue.disable_notification(self.memory).map_err(RingError::Poisoned);
        self.has_written();
        done
    }

    /// Asks the driver for a kick at the next chain. True if one came meanwhile.
    pub fn request_kicks(&mut self) -> Result<bool, RingError> {
        self.promised = self.queue.enable_notification(self.memory).map_err(RingError::Poisoned)?;
        self.has_written();
        Ok(self.promised)
    }
}

/// Checks a layout: all parts are in guest memory.
fn queue(memory: &View<'_>, layout: &Layout) -> Result<Queue, RingError> {
    let size = layout.size;
    let setup = |source| RingError::Setup { size, source };
    // To `Queue` an available ring there is one that was never set up.
    if layout.avail == GuestAddress(0) {
        return Err(setup(virtio_queue::Error::QueueNotReady));
    }
    let mut queue = Queue::new(QUEUE_SIZE).map_err(setup)?;
    queue.try_set_size(size).map_err(setup)?;
    queue.try_set_desc_table_address(layout.descriptors).map_err(setup)?;
    queue.try_set_avail_ring_address(layout.avail).map_err(setup)?;
    queue.try_set_used_ring_address(layout.used).map_err(setup)?;
    queue.set_event_idx(layout.event_idx);
    queue.set_next_avail(layout.next_avail);
    queue.set_ready(true);
    if !queue.is_valid(memory) {
        return Err(RingError::Outside { size });
    }
    if layout.overlaps() {
        return Err(RingError::Overlap { size });
    }
    let used = queue.used_idx(memory, Ordering::Acquire).map_err(setup)?;
    queue.set_next_used(used.0);
    Ok(queue)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::memory::Memory;
    use virtio_queue::mock::MockSplitQueue;

    /// Not where the mock puts it, which is over its own available ring.
    const USED: GuestAddress = GuestAddress(0x8000);

    fn layout(queue: &MockSplitQueue<'_, Memory>, event_idx: bool) -> Layout {
        Layout {
            size: 16,
            descriptors: queue.desc_table_addr(),
            avail: queue.avail_addr(),
            used: USED,
            next_avail: 0,
            event_idx,
            record: None,
        }
    }

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).expect("memory")
    }

    #[test]
    fn bad_layouts_are_refused() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let queue = MockSplitQueue::new(&memory, 16);
        let good = layout(&queue, false);
        assert!(Ring::new(&view, &good).is_ok());
        let odd = |l: Layout| matches!(Ring::new(&view, &l), Err(RingError::Setup { .. }));
        assert!(odd(Layout { size: 0, ..good.clone() }));
        assert!(odd(Layout { size: 12, ..good.clone() }));
        assert!(odd(Layout { size: 512, ..good.clone() }));
        assert!(odd(Layout { descriptors: GuestAddress(8), ..good.clone() }));
        assert!(odd(Layout { avail: GuestAddress(1), ..good.clone() }));
        assert!(odd(Layout { avail: GuestAddress(0), ..good.clone() }));
        assert!(odd(Layout { used: GuestAddress(2), ..good.clone() }));
        let out = |l: Layout| matches!(Ring::new(&view, &l), Err(RingError::Outside { .. }));
        assert!(out(Layout { descriptors: GuestAddress(0xfff0), ..good.clone() }));
        assert!(out(Layout { avail: GuestAddress(0xfff0), ..good.clone() }));
        assert!(out(Layout { used: GuestAddress(u64::MAX - 3), ..good.clone() }));
    }

    #[test]
    fn parts_that_overlap_are_refused() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let good = layout(&MockSplitQueue::new(&memory, 16), true);
        let at = |part: GuestAddress, by: i64| GuestAddress(part.0.wrapping_add_signed(by));
        // Sizes with 16 entries: 256, 4 + 32 + 2, 4 + 128 + 2; each part is aligned.
        for (avail, used, fits) in [
            (at(good.descriptors, 256), good.used, true),
            (at(good.descriptors, 254), good.used, false),
            (good.avail, good.descriptors, false),
            (at(good.used, -38), good.used, true),
            (at(good.used, -36), good.used, false),
            (at(good.used, 134), good.used, true),
            (at(good.used, 132), good.used, false),
        ] {
            let layout = Layout { avail, used, ..good.clone() };
            let made = Ring::new(&view, &layout);
            assert_eq!(made.is_ok(), fits, "{layout:?}: {made:?}");
            assert!(fits || matches!(made, Err(RingError::Overlap { size: 16 })));
        }
        // The event fields are only there where they were agreed on.
        let close = Layout { avail: at(good.used, -36), event_idx: false, ..good.clone() };
        assert!(Ring::new(&view, &close).is_ok());
    }

    #[test]
    fn a_chain_that_is_taken_back_poisons() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let queue = MockSplitQueue::new(&memory, 16);
        let mut ring = Ring::new(&view, &layout(&queue, false)).expect("ring");
        queue.avail().idx().store(1);
        assert!(ring.request_kicks().expect("request"));
        queue.avail().idx().store(0);
        assert!(matches!(ring.pop(), Err(error) if error.is_invalid_avail_idx()));
    }

    #[test]
    fn an_index_too_far_ahead_poisons() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let queue = MockSplitQueue::new(&memory, 16);
        let mut ring = Ring::new(&view, &layout(&queue, false)).expect("ring");
        assert!(!ring.has_work().expect("look"));
        queue.avail().idx().store(16);
        assert!(ring.pop().expect("a full ring is fine").is_some());
        queue.avail().idx().store(18);
        assert!(ring.has_work().expect("look"));
        assert!(matches!(ring.pop(), Err(RingError::Poisoned(_))));
    }

    #[test]
    fn a_head_beyond_the_table_poisons() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let queue = MockSplitQueue::new(&memory, 16);
        let mut ring = Ring::new(&view, &layout(&queue, false)).expect("ring");
        queue.avail().ring().ref_at(0).expect("entry").store(16);
        queue.avail().idx().store(1);
        assert!(matches!(ring.pop(), Err(RingError::Poisoned(_))));
    }

    #[test]
    fn a_chain_put_back_is_taken_again() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let queue = MockSplitQueue::new(&memory, 16);
        let start = Layout { next_avail: u16::MAX, ..layout(&queue, true) };
        let mut ring = Ring::new(&view, &start).expect("ring");
        queue.avail().ring().ref_at(15).expect("entry").store(7);
        queue.avail().idx().store(0);
        for _ in 0..2 {
            let chain = ring.pop().expect("pop").expect("chain");
            assert_eq!((chain.head_index(), ring.next_avail()), (7, 0));
            ring.put_back();
            assert_eq!(ring.next_avail(), u16::MAX);
            assert!(ring.has_work().expect("look"));
        }
    }

    #[test]
    fn used_entries_go_on_behind_the_old_ones() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let queue = MockSplitQueue::new(&memory, 16);
        let read = |at: u64| memory.read_obj::<u32>(GuestAddress(USED.0 + at)).expect("read");
        memory.write_obj(5u16, GuestAddress(USED.0 + 2)).expect("write");
        let mut ring = Ring::new(&view, &layout(&queue, false)).expect("ring");
        ring.push_used(3, 77).expect("used");
        ring.push_used(1, 78).expect("used");
        assert_eq!(read(0) >> 16, 5, "nothing is shown before all is");
        ring.publish().expect("publish");
        assert_eq!(read(0) >> 16, 7);
        assert_eq!((read(4 + 8 * 5), read(4 + 8 * 5 + 4)), (3, 77));
        assert_eq!((read(4 + 8 * 6), read(4 + 8 * 6 + 4)), (1, 78));
        // A batch is no longer than the ring, whatever the driver made available.
        (0..20).for_each(|_| ring.push_used(2, 1).expect("used"));
        assert_eq!(read(0) >> 16, 7 + 16);
        assert!(ring.push_used(16, 0).is_err(), "there is no such descriptor");
    }

    #[test]
    fn the_no_interrupt_flag_counts_without_event_idx() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let queue = MockSplitQueue::new(&memory, 16);
        let mut ring = Ring::new(&view, &layout(&queue, false)).expect("ring");
        ring.push_used(0, 0).expect("used");
        ring.publish().expect("publish");
        assert!(ring.wants_interrupt().expect("flags"));
        memory.write_obj(VRING_AVAIL_F_NO_INTERRUPT as u16, queue.avail_addr()).expect("write");
        assert!(!ring.wants_interrupt().expect("flags"));
    }

    #[test]
    fn event_idx_decides_with_event_idx() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let queue = MockSplitQueue::new(&memory, 16);
        let mut ring = Ring::new(&view, &layout(&queue, true)).expect("ring");
        let used_event = GuestAddress(queue.avail_addr().0 + 4 + 2 * 16);
        memory.write_obj(1u16, used_event).expect("write");
        ring.push_used(0, 0).expect("used");
        ring.publish().expect("publish");
        assert!(!ring.wants_interrupt().expect("index"));
        ring.push_used(1, 0).expect("used");
        assert!(!ring.wants_interrupt().expect("not published"));
        ring.push_used(2, 0).expect("used");
        ring.publish().expect("publish");
        assert!(ring.wants_interrupt().expect("within the batch"));
        assert!(!ring.wants_interrupt().expect("nothing new"));
    }

    #[test]
    fn kicks_are_asked_for_only_before_sleep() {
        let memory = memory();
        let view = View::new(&memory).expect("view");
        let queue = MockSplitQueue::new(&memory, 16);
        let used_flags = || memory.read_obj::<u16>(USED).expect("flags");
        let mut ring = Ring::new(&view, &layout(&queue, false)).expect("ring");
        ring.suppress_kicks().expect("suppress");
        assert_eq!(used_flags(), 1);
        assert!(!ring.request_kicks().expect("request"));
        assert_eq!(used_flags(), 0);
        queue.avail().idx().store(1);
        assert!(ring.request_kicks().expect("request"), "a chain in the gap is not lost");
    }
}
