//! A device process of a VM whose memory is still to come.
//!
//! Before it touches guest memory it registers its mappings with a userfaultfd and hands
//! that to the pager. Whoever touches a page that is not there, this process or the kernel
//! on its behalf, then waits until the pager has brought it.
//!
//! The userfaultfd stays open here as well: if the VMM ends, a page that is missing must
//! not become zeros while this process still lives.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use cellblock_wire::{Channel, ChannelError, ShmError, Uffd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::protocol::presence::{self, Presence};
use crate::protocol::{FaultWindow, Registered};

/// Memory that could not be registered.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// Not all file descriptors came.
    #[error("lazy memory takes three file descriptors")]
    Fds,
    /// The map of what is there cannot be used.
    #[error("mapping the map of memory that is there")]
    Presence(#[source] ShmError),
    /// No userfaultfd.
    #[error("making a userfaultfd")]
    Uffd(#[source] io::Error),
    /// A mapping was refused.
    #[error("registering guest memory with userfaultfd")]
    Register(#[source] io::Error),
    /// The pager cannot be told.
    #[error("telling the pager")]
    Tell(#[source] ChannelError),
}

/// This process's part in bringing memory.
#[derive(Debug)]
pub struct Lazy {
    uffd: Uffd,
    presence: Presence,
    pager: Channel,
}

impl Lazy {
    /// From the fds of the hello: `/dev/userfaultfd`, the map of what is there, the channel
    /// to the pager.
    pub fn receive(
        fds: &mut impl Iterator<Item = OwnedFd>,
        chunks: u64,
    ) -> Result<Lazy, LazyError> {
        let mut next = || fds.next().ok_or(LazyError::Fds);
        let (device, presence, pager) = (next()?, next()?, next()?);
        let chunks = usize::try_from(chunks).map_err(|_| LazyError::Fds)?;
        Ok(Lazy {
            uffd: Uffd::new(device.as_fd()).map_err(LazyError::Uffd)?,
            presence: Presence::map(&presence, chunks).map_err(LazyError::Presence)?,
            pager: Channel::from_fd(pager),
        })
    }

    /// Registers `memory`, which nobody may have touched yet.
    pub(crate) fn register(&self, memory: &GuestMemoryMmap<()>) -> Result<(), LazyError> {
        if self.presence.is_complete() {
            return Ok(());
        }
        let windows: Vec<FaultWindow> = memory
            .iter()
            .map(|region| FaultWindow {
                start: region.as_ptr() as u64,
                len: region.len(),
                offset: region.file_offset().map_or(0, vm_memory::FileOffset::start),
            })
            .collect();
        presence::register(&self.uffd, &windows, &self.presence).map_err(LazyError::Register)?;
        let message = Registered { windows: windows.clone() };
        let told = self.pager.send(&message, &[self.uffd.as_fd()]);
        if self.presence.is_complete() {
            // The pager may have ended before it read this, and brings nothing any more.
            for window in &windows {
                self.uffd.unregister(window.start, window.len).map_err(LazyError::Register)?;
            }
            return Ok(());
        }
        told.map_err(LazyError::Tell)
    }
}
