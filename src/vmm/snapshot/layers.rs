//! Copies of what the guest has written to its `cow` disks: made in the cut, or begun before a live one.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::super::event_loop::{DiskFacts, Vm};
use super::capture::{CaptureError, Until};
use crate::cell::overlay::Overlay;

/// A copy of one disk's overlay that was begun while the guest writes to it.
#[derive(Debug)]
pub(super) struct Layer {
    disk: usize,
    /// The process that wrote since: what one had under way that died is noted nowhere.
    process: Option<i32>,
    to: File,
}

/// How far a pass over all of them is.
#[derive(Clone, Copy, Default)]
pub(super) struct At {
    layer: usize,
    chunk: u64,
}

impl Vm {
    /// Empty copies of all overlays.
    pub(super) fn begin_layers(&self) -> Result<Vec<Layer>, CaptureError> {
        let mut layers = Vec::new();
        for (disk, facts) in self.disks.iter().enumerate() {
            if let Some(overlay) = overlay(facts) {
                let to = empty()?;
                overlay.make_room(&to)?;
                layers.push(Layer { disk, process: self.process_of(disk), to });
            }
        }
        Ok(layers)
    }

    /// Copies one chunk more, all of it or what was written since the last pass; how many bytes.
    /// `None` at the end of the pass.
    pub(super) fn copy_layers(
        &self,
        layers: &[Layer],
        at: &mut At,
        all: bool,
    ) -> Result<Option<u64>, CaptureError> {
        loop {
            let Some(layer) = layers.get(at.layer) else { return Ok(None) };
            let overlay = self.disks.get(layer.disk).and_then(overlay);
            match overlay.filter(|overlay| at.chunk < overlay.chunks()) {
                Some(overlay) => {
                    let copied = overlay.copy_chunk(at.chunk, &layer.to, all)?;
                    at.chunk += 1;
                    return Ok(Some(copied));
                }
                None => *at = At { layer: at.layer + 1, chunk: 0 },
            }
        }
    }

    /// A copy of each overlay, in the order of the disks, which stand still: what was begun is
    /// completed where that can be.
    pub(super) fn finish_layers(
        &self,
        begun: Vec<Layer>,
        until: Until,
    ) -> Result<Vec<OwnedFd>, CaptureError> {
        let mut begun = begun.into_iter().peekable();
        let mut copies = Vec::new();
        for (disk, facts) in self.disks.iter().enumerate() {
            let Some(overlay) = overlay(facts) else { continue };
            let layer = begun.next_if(|layer| layer.disk == disk);
            let process = self.process_of(disk);
            let to = match layer.filter(|layer| process.is_some() && layer.process == process) {
                Some(layer) => {
                    for chunk in 0..overlay.chunks() {
                        until.check()?;
                        overlay.copy_chunk(chunk, &layer.to, false)?;
                    }
                    layer.to
                }
                None => {
                    let to = empty()?;
                    overlay.save(&to)?;
                    to
                }
            };
            copies.push(to.into());
        }
        Ok(copies)
    }

    fn process_of(&self, disk: usize) -> Option<i32> {
        let id = &self.disks.get(disk)?.id;
        let cell = self.cells.iter().find(|cell| cell.role() == "blk" && cell.id() == id)?;
        cell.pid()
    }
}

fn overlay(disk: &DiskFacts) -> Option<&Overlay> {
    let (overlay, _) = disk.image.as_ref()?.overlay.as_ref()?;
    Some(overlay)
}

fn empty() -> Result<File, CaptureError> {
    let file = memfd_create(c"snapshot-disk", MFdFlags::MFD_CLOEXEC);
    Ok(file.map_err(|errno| CaptureError::Copy(errno.into()))?.into())
}
