//! Which plugin has which addresses.

use std::collections::BTreeMap;
use std::sync::Arc;

use cellblock_plugin_api::Space;
use nix::errno::Errno;

use super::session::Session;

/// A reserved range.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    last: u64,
    pub(super) session: Arc<Session>,
    /// Writes are reported without waiting.
    pub(super) is_async: bool,
}

/// All reserved ranges.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    ports: BTreeMap<u64, Claim>,
    mmio: BTreeMap<u64, Claim>,
}

/// The most ranges one plugin has reserved.
const MOST: usize = 1024;

/// The last address of a range; EINVAL where it is past the end of the address space.
pub(super) fn last(start: u64, length: u64) -> Result<u64, Errno> {
    length.checked_sub(1).and_then(|room| start.checked_add(room)).ok_or(Errno::EINVAL)
}

impl Ranges {
    /// The range that `address` is in.
    pub(super) fn find(&self, space: Space, address: u64) -> Option<&Claim> {
        let (_, claim) = self.space(space).range(..=address).next_back()?;
        (address <= claim.last).then_some(claim)
    }

    pub(super) fn reserve(
        &mut self,
        session: &Arc<Session>,
        space: Space,
        start: u64,
        length: u64,
        is_async: bool,
    ) -> Result<(), Errno> {
        let last = last(start, length)?;
        let before = self.space(space).range(..=last).next_back();
        if before.is_some_and(|(_, claim)| claim.last >= start) {
            return Err(Errno::EPERM);
        }
        let its = |claim: &&Claim| claim.session.id() == session.id();
        if self.ports.values().chain(self.mmio.values()).filter(its).count() >= MOST {
            return Err(Errno::ENOSPC);
        }
        let claim = Claim { last, session: session.clone(), is_async };
        self.space_mut(space).insert(start, claim);
        Ok(())
    }

    pub(super) fn release(
        &mut self,
        session: &Session,
        space: Space,
        start: u64,
    ) -> Result<(), Errno> {
        let ranges = self.space_mut(space);
        match ranges.get(&start) {
            Some(claim) if claim.session.id() == session.id() => {
                ranges.remove(&start);
                Ok(())
            }
            _ => Err(Errno::ENOENT),
        }
    }

    /// Whether a plugin has reserved any.
    pub(super) fn has_any(&self, session: &Session) -> bool {
        let has = |claim: &Claim| claim.session.id() == session.id();
        self.ports.values().any(has) || self.mmio.values().any(has)
    }

    /// Releases everything a plugin has.
    pub(super) fn forget(&mut self, session: &Session) {
        self.ports.retain(|_, claim| claim.session.id() != session.id());
        self.mmio.retain(|_, claim| claim.session.id() != session.id());
    }

    fn space(&self, space: Space) -> &BTreeMap<u64, Claim> {
        match space {
            Space::Port => &self.ports,
            Space::Mmio => &self.mmio,
        }
    }

    fn space_mut(&mut self, space: Space) -> &mut BTreeMap<u64, Claim> {
        match space {
            Space::Port => &mut self.ports,
            Space::Mmio => &mut self.mmio,
        }
    }
}
