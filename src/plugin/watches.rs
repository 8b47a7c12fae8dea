//! Which plugin is told of accesses to which addresses.
//!
//! A plugin is told of an access once, however many of its watches hold the address. What an
//! access costs depends on the number of plugins that watch, not on what they watch.

use std::collections::BTreeMap;
use std::sync::Arc;

use cellblock_plugin_api::Space;
use nix::errno::Errno;

use super::ranges::last;
use super::session::Session;

/// The most ranges one plugin watches.
const MOST: usize = 256;

/// All watches, by the number of their plugin: that rises with each that attaches, so that "the
/// next after that one" stays true when plugins leave.
#[derive(Debug, Default)]
pub(super) struct Watches {
    sessions: BTreeMap<usize, Watcher>,
}

#[derive(Debug)]
struct Watcher {
    session: Arc<Session>,
    ports: Watched,
    mmio: Watched,
}

#[derive(Debug, Default)]
struct Watched {
    /// The last address of each range, by its first.
    ranges: BTreeMap<u64, u64>,
    /// The same, joined where they overlap or touch: in order.
    joined: Vec<(u64, u64)>,
}

impl Watched {
    fn holds(&self, address: u64) -> bool {
        let behind = self.joined.partition_point(|(start, _)| *start <= address);
        behind > 0 && address <= self.joined[behind - 1].1
    }

    fn join(&mut self) {
        self.joined.clear();
        for (&start, &last) in &self.ranges {
            match self.joined.last_mut() {
                Some((_, end)) if start <= end.saturating_add(1) => *end = (*end).max(last),
                _ => self.joined.push((start, last)),
            }
        }
    }
}

impl Watcher {
    fn space(&self, space: Space) -> &Watched {
        match space {
            Space::Port => &self.ports,
            Space::Mmio => &self.mmio,
        }
    }

    fn space_mut(&mut self, space: Space) -> &mut Watched {
        match space {
            Space::Port => &mut self.ports,
            Space::Mmio => &mut self.mmio,
        }
    }
}

impl Watches {
    /// ENOSPC where the plugin watches too much by now, EEXIST where it watches a range that begins
    /// there already.
    pub(super) fn add(
        &mut self,
        session: &Arc<Session>,
        space: Space,
        start: u64,
        length: u64,
    ) -> Result<(), Errno> {
        let last = last(start, length)?;
        let none = || Watcher {
            session: session.clone(),
            ports: Watched::default(),
            mmio: Watched::default(),
        };
        let watcher = self.sessions.entry(session.id()).or_insert_with(none);
        if watcher.space(space).ranges.contains_key(&start) {
            return Err(Errno::EEXIST);
        }
        if watcher.ports.ranges.len() + watcher.mmio.ranges.len() >= MOST {
            return Err(Errno::ENOSPC);
        }
        let watched = watcher.space_mut(space);
        watched.ranges.insert(start, last);
        watched.join();
        Ok(())
    }

    pub(super) fn remove(
        &mut self,
        session: &Session,
        space: Space,
        start: u64,
    ) -> Result<(), Errno> {
        let watcher = self.sessions.get_mut(&session.id()).ok_or(Errno::ENOENT)?;
        let watched = watcher.space_mut(space);
        watched.ranges.remove(&start).ok_or(Errno::ENOENT)?;
        watched.join();
        if watcher.ports.ranges.is_empty() && watcher.mmio.ranges.is_empty() {
            self.sessions.remove(&session.id());
        }
        Ok(())
    }

    pub(super) fn forget(&mut self, session: &Session) {
        self.sessions.remove(&session.id());
    }

    /// The first plugin from number `from` on that watches `address`.
    pub(super) fn next(&self, space: Space, address: u64, from: usize) -> Option<Arc<Session>> {
        let mut watchers = self.sessions.range(from..).map(|(_, watcher)| watcher);
        let found = watchers.find(|watcher| watcher.space(space).holds(address));
        found.map(|watcher| watcher.session.clone())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cellblock_plugin_api::{MemoryAccess, Rights};

    fn session(id: usize) -> Arc<Session> {
        Session::new(id, 1, Rights::Observe, MemoryAccess::None, false).unwrap()
    }

    #[test]
    fn each_watcher_is_found_once_and_in_order() {
        let (one, two, mut watches) = (session(3), session(7), Watches::default());
        for (start, length) in [(0x10, 4), (0x12, 8), (0x1a, 1), (0x30, 1), (u64::MAX, 1)] {
            watches.add(&one, Space::Port, start, length).unwrap();
        }
        watches.add(&two, Space::Port, 0, 0x20).unwrap();
        let told = |watches: &Watches, address| {
            let (mut ids, mut from) = (Vec::new(), 0);
            while let Some(session) = watches.next(Space::Port, address, from) {
                ids.push(session.id());
                from = session.id() + 1;
            }
            ids
        };
        assert_eq!(told(&watches, 0x0f), [7]);
        for address in [0x10, 0x13, 0x19, 0x1a] {
            assert_eq!(told(&watches, address), [3, 7], "{address:#x}");
        }
        assert_eq!(told(&watches, 0x1b), [7]);
        assert_eq!(told(&watches, 0x30), [3]);
        assert_eq!(told(&watches, u64::MAX), [3]);
        assert!(watches.next(Space::Mmio, 0x10, 0).is_none());
        // What another range holds as well is watched on.
        watches.remove(&one, Space::Port, 0x12).unwrap();
        assert_eq!(told(&watches, 0x13), [3, 7]);
        assert_eq!(told(&watches, 0x14), [7]);
        assert_eq!(watches.remove(&one, Space::Port, 0x12), Err(Errno::ENOENT));
        assert_eq!(watches.add(&one, Space::Port, 0x10, 9), Err(Errno::EEXIST));
        watches.forget(&one);
        assert_eq!(told(&watches, 0x10), [7]);
        watches.remove(&two, Space::Port, 0).unwrap();
        assert!(watches.is_empty());
    }

    #[test]
    fn watches_have_an_end() {
        let (one, mut watches) = (session(1), Watches::default());
        let full = (0..).find(|n| watches.add(&one, Space::Mmio, 2 * n, 1).is_err()).unwrap();
        assert_eq!(full, MOST as u64);
        assert_eq!(watches.add(&one, Space::Port, 1 << 20, 1), Err(Errno::ENOSPC));
        watches.remove(&one, Space::Mmio, 0).unwrap();
        watches.add(&one, Space::Port, 1 << 20, 1).unwrap();
        watches.add(&session(2), Space::Port, 1 << 20, 1).unwrap();
    }
}
