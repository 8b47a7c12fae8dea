//! A snapshot with all it is a diff to.

use std::path::{Path, PathBuf};

use super::{CHUNK, Fault, FormatError, MAX_CHAIN, Manifest, Snapshot};

/// A snapshot and its parents, up to one that is no diff.
#[derive(Debug)]
pub struct Chain {
    /// The snapshot itself first.
    links: Vec<Snapshot>,
}

impl Chain {
    /// Opens the snapshot at `path` and, one after the other, its parents: each where its
    /// child says, and only the one the child was made on.
    pub fn open(path: &Path) -> Result<Chain, FormatError> {
        let mut links = vec![Snapshot::open(path)?];
        while let Some((wanted, place)) = links.last().and_then(parent) {
            if links.len() == MAX_CHAIN {
                return Err(Fault::Depth(MAX_CHAIN).at(path));
            }
            let link = Snapshot::open(&place).map_err(|e| Fault::Parent(Box::new(e)).at(path))?;
            let found = link.manifest().id;
            if found != wanted {
                return Err(Fault::WrongParent { path: place, found, wanted }.at(path));
            }
            let (found, wanted) = (link.manifest().memory, links[0].manifest().memory);
            if found != wanted {
                return Err(Fault::ParentMemory { found, wanted }.at(path));
            }
            links.push(link);
        }
        Ok(Chain { links })
    }

    /// The snapshot itself.
    pub fn snapshot(&self) -> &Snapshot {
        &self.links[0]
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        self.links[0].manifest()
    }

    /// The snapshot itself, then its parents.
    pub fn links(&self) -> &[Snapshot] {
        &self.links
    }

    /// Number of chunks.
    pub fn chunks(&self) -> usize {
        self.links[0].chunks()
    }

    /// Whether all pages of a chunk are zero, by the tables alone.
    pub fn is_zero(&self, index: usize) -> bool {
        let mut wanted = u64::MAX;
        for link in &self.links {
            let Some(entry) = link.entries().get(index) else { return false };
            if entry.data & wanted != 0 {
                return false;
            }
            wanted &= !entry.own;
        }
        true
    }

    /// Fills `into` with chunk `index`, every part of it checked before it is used.
    pub fn read_chunk(&self, index: usize, into: &mut [u8]) -> Result<(), FormatError> {
        let mut spoken_for = self.links[0].read_chunk(index, into)?;
        if spoken_for == u64::MAX {
            return Ok(());
        }
        let mut lower = vec![0; CHUNK];
        for link in &self.links[1..] {
            let own = link.read_chunk(index, &mut lower)?;
            for (page, pages) in super::table::runs(own & !spoken_for) {
                let range = page * super::PAGE..(page + pages) * super::PAGE;
                into[range.clone()].copy_from_slice(&lower[range]);
            }
            spoken_for |= own;
            if spoken_for == u64::MAX {
                return Ok(());
            }
        }
        // The last link is no diff, and speaks for all pages.
        Err(Fault::NoChunk(index as u64).at(self.snapshot().path()))
    }

    /// Checks everything of every link. See [`Snapshot::verify_all`].
    pub fn verify_all(&self, mut progress: impl FnMut(u64, u64)) -> Result<(), FormatError> {
        let total = self.links.len() as u64 * self.manifest().memory;
        let mut before = 0;
        for link in &self.links {
            link.verify_all(|done, _| progress((before + done).min(total), total))?;
            before += link.manifest().memory;
        }
        Ok(())
    }
}

/// The parent's id and where it should be.
fn parent(link: &Snapshot) -> Option<(super::SnapshotId, PathBuf)> {
    let (id, path) = link.manifest().parent.as_ref()?;
    Some((*id, link.path().join(path)))
}
