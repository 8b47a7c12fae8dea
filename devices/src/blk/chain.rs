//! A descriptor chain, by the number of its first descriptor.
//!
//! virtio-queue makes chains from the available ring only. A request that a process
//! left unfinished has to be taken up again by its number alone: its entry in the
//! available ring may be another's by now.

use std::iter::FusedIterator;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use super::view::View;

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// The descriptors of a chain, each read once. Ends at the last one, and also at a link
/// that leads nowhere: then the last descriptor it gave says that there is a next.
#[derive(Debug)]
pub(super) struct Chain<'m> {
    memory: &'m View<'m>,
    table: GuestAddress,
    entries: u16,
    head: u16,
    next: u16,
    /// Descriptors that may follow before the chain must be a loop.
    left: u16,
    indirect: bool,
    bytes: u32,
}

impl<'m> Chain<'m> {
    /// The chain that starts at `head` of a table of so many entries.
    pub fn new(memory: &'m View<'m>, table: GuestAddress, entries: u16, head: u16) -> Chain<'m> {
        let (next, left) = (head, entries);
        Chain { memory, table, entries, head, next, left, indirect: false, bytes: 0 }
    }

    /// Number of the first descriptor.
    pub fn head_index(&self) -> u16 {
        self.head
    }

    fn load(&self) -> Option<Descriptor> {
        if self.left == 0 || self.next >= self.entries {
            return None;
        }
        let at = self.table.checked_add(u64::from(self.next) * u64::from(DESCRIPTOR))?;
        self.memory.read_obj(at).ok()
    }

    /// Goes on in the table that `descriptor` is about; false where it is not one, or
    /// is in such a table itself (virtio 1.2 section 2.7.5.3.1).
    fn enter(&mut self, descriptor: &Descriptor) -> bool {
        let len = descriptor.len();
        let entries = u16::try_from(len / DESCRIPTOR).unwrap_or(0);
        if self.indirect || entries == 0 || !len.is_multiple_of(DESCRIPTOR) {
            return false;
        }
        (self.table, self.next, self.indirect) = (descriptor.addr(), 0, true);
        (self.entries, self.left) = (entries, entries);
        true
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    #[inline]
    fn next(&mut self) -> Option<Descriptor> {
        let mut descriptor = self.load();
        if let Some(table) = descriptor.filter(Descriptor::refers_to_indirect_table) {
            descriptor = if self.enter(&table) { self.load() } else { None };
            // A table in a table is none.
            descriptor = descriptor.filter(|inner| !inner.refers_to_indirect_table());
        }
        // No chain is longer than a used entry can say (virtio 1.2 section 2.7.5.2).
        let bytes = descriptor.and_then(|descriptor| self.bytes.checked_add(descriptor.len()));
        descriptor = descriptor.filter(|_| bytes.is_some());
        self.bytes = bytes.unwrap_or(0);
        match &descriptor {
            Some(descriptor) if descriptor.has_next() => {
                self.next = descriptor.next();
                self.left -= 1;
            }
            _ => self.left = 0,
        }
        descriptor
    }
}

impl FusedIterator for Chain<'_> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::memory::Memory;
    use proptest::prelude::*;
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueOwnedT};

    fn raw(at: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&at.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }

    fn descriptor() -> impl Strategy<Value = [u8; 16]> {
        let at = prop_oneof![(0u64..0x400).prop_map(|n| n * 16), any::<u64>()];
        let len = prop_oneof![(0u32..8).prop_map(|n| n * 16), 0u32..0x20000];
        (at, len, 0u16..8, 0u16..10).prop_map(|(at, len, flags, next)| raw(at, len, flags, next))
    }

    proptest! {
        /// It gives the descriptors that virtio-queue gives.
        #[test]
        fn it_agrees_with_virtio_queue(
            table in proptest::collection::vec(descriptor(), 40),
            head in 0u16..8,
        ) {
            let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).expect("memory");
            let view = View::new(&memory).expect("view");
            let mock = MockSplitQueue::new(&memory, 8);
            for (n, bytes) in table.iter().enumerate() {
                memory.write_slice(bytes, GuestAddress(16 * n as u64)).expect("write");
            }
            mock.avail().ring().ref_at(0).expect("entry").store(head);
            mock.avail().idx().store(1);
            let mut queue: Queue = mock.create_queue().expect("queue");
            let theirs = queue.iter(&view).expect("available").next().expect("a chain");
            let ours = Chain::new(&view, mock.desc_table_addr(), 8, head);
            prop_assert_eq!(ours.head_index(), head);
            let show = |d: Descriptor| (d.addr().0, d.len(), d.flags(), d.next());
            let theirs: Vec<_> = theirs.map(show).collect();
            let ours: Vec<_> = ours.map(show).collect();
            prop_assert_eq!(ours, theirs);
        }
    }
}
