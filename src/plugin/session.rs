//! One plugin: its slots, its rights, and all that it made.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::Builder;

use cellblock_plugin_api::slot::Slots;
use cellblock_plugin_api::wire::Handle;
use cellblock_plugin_api::{Hint, MemoryAccess, Rights};
use cellblock_wire::closer::Outside;
use cellblock_wire::{Access, Channel, Mapping, ShmError, sealed_memfd};
use crossbeam_channel::Sender;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::memory::Slab;
use super::seat::Seat;
use crate::event;
use crate::snapshot::write_logs::{Reader, Writing};

/// Shared memory or descriptors for a plugin that could not be made.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum SessionError {
    #[error("sharing memory with a plugin")]
    Memory(#[from] ShmError),
    #[error("making a plugin's descriptors")]
    Descriptors(#[source] Errno),
    #[error("making a plugin's shutdown event")]
    Shutdown(#[source] std::io::Error),
}

/// The channel by which a plugin takes part in snapshots.
pub(super) type Part = Arc<Outside<Channel>>;

/// fds that every plugin costs: its slots, the pipe of its life, its shutdown event.
const OWN_FDS: usize = 4;

/// See the module.
pub struct Session {
    id: usize,
    rights: Rights,
    memory: MemoryAccess,
    owner: bool,
    seats: Vec<Seat>,
    slots: OwnedFd,
    /// The end the plugin gets, and ours: closing it tells the plugin that we are gone.
    life: (OwnedFd, Mutex<Option<OwnedFd>>),
    shutdown: EventFd,
    hint: RwLock<Option<Hint>>,
    hinted: AtomicBool,
    ended: AtomicBool,
    pub(super) connections: AtomicUsize,
    made: Mutex<Made>,
    /// Of one that takes part in snapshots: its name, and the channel for that.
    part: Mutex<Option<(String, Part)>>,
}

/// What a plugin made.
#[derive(Default)]
pub(super) struct Made {
    next: Handle,
    pub(super) io_events: BTreeMap<Handle, IoEvent>,
    pub(super) irq_events: BTreeMap<Handle, (EventFd, u32)>,
    /// Interrupt lines that it holds up.
    pub(super) raised: BTreeSet<u32>,
    pub(super) memory: BTreeMap<Handle, Slab>,
    /// Writes to the VM's own memory that have begun.
    pub(super) writing: BTreeMap<Handle, Writing>,
    /// It is told what is written there.
    pub(super) log: Option<Reader>,
}

/// An ioeventfd, with what undoing it takes.
pub(super) struct IoEvent {
    pub(super) fd: EventFd,
    pub(super) raw: kvm_bindings::kvm_ioeventfd,
}

impl Made {
    pub(super) fn handle(&mut self) -> Handle {
        self.next += 1;
        self.next
    }

    /// How many things there are.
    pub(super) fn len(&self) -> usize {
        self.parts() + self.raised.len() + self.writing.len()
    }

    /// How many of them are part of the machine.
    pub(super) fn parts(&self) -> usize {
        self.io_events.len() + self.irq_events.len() + self.memory.len()
    }
}

impl Session {
    pub(super) fn new(
        id: usize,
        vcpus: usize,
        rights: Rights,
        memory: MemoryAccess,
        owner: bool,
    ) -> Result<Arc<Session>, SessionError> {
        let bytes = Slots::bytes(vcpus as u32);
        let memfd = sealed_memfd("cellblock-slots", bytes as u64)?;
        let slots = Slots::new(Mapping::new(&memfd, bytes, Access::ReadWrite)?, vcpus as u32);
        let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).map_err(SessionError::Descriptors)?;
        Ok(Arc::new(Session {
            id,
            rights,
            memory,
            owner,
            seats: (0..vcpus as u32).filter_map(|id| Some(Seat::new(slots.slot(id)?))).collect(),
            slots: memfd,
            life: (theirs, Mutex::new(Some(ours))),
            // Blocking: plugins wait for it by reading.
            shutdown: EventFd::new(EFD_CLOEXEC).map_err(SessionError::Shutdown)?,
            hint: RwLock::new(None),
            hinted: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            made: Mutex::default(),
            part: Mutex::default(),
        }))
    }

    pub(super) fn id(&self) -> usize {
        self.id
    }

    /// What it may do.
    pub fn rights(&self) -> Rights {
        self.rights
    }

    pub(super) fn memory(&self) -> MemoryAccess {
        self.memory
    }

    /// Whether the VM is this plugin's.
    pub fn is_owner(&self) -> bool {
        self.owner
    }

    pub(super) fn seat(&self, vcpu: usize) -> &Seat {
        &self.seats[vcpu]
    }

    /// What a plugin gets when it greets: the slots, and the pipe that tells of our end.
    pub(super) fn greeting(&self) -> [BorrowedFd<'_>; 2] {
        [self.slots.as_fd(), self.life.0.as_fd()]
    }

    pub(super) fn shutdown_event(&self) -> BorrowedFd<'_> {
        event::fd(&self.shutdown)
    }

    /// Tells the plugin that the VM ends.
    ///
    /// By a thread of its own: the plugin can fill the counter up at any moment, and a write to it
    /// waits then for as long as it likes. (It cannot be made not to wait: whether it does belongs
    /// to the open file, which plugins read with waiting.) Such a thread ends with the process.
    ///
    /// `told` is dropped once it is done.
    pub(super) fn signal_shutdown(&self, told: Sender<()>) {
        let signal = self.shutdown.try_clone().and_then(|event| {
            let write = move || {
                let _ = event.write(1);
                drop(told);
            };
            Builder::new().name("shutdown".into()).stack_size(64 << 10).spawn(write)
        });
        if let Err(error) = signal {
            tracing::error!(plugin = self.id, %error, "telling a plugin of the VM's end");
        }
    }

    pub(super) fn set_hint(&self, hint: Option<Hint>) {
        let mut current = self.hint.write().unwrap_or_else(PoisonError::into_inner);
        self.hinted.store(hint.is_some(), Ordering::Release);
        *current = hint;
    }

    /// Calls `look` with the hint, if there is one.
    pub(super) fn with_hint<R>(&self, look: impl FnOnce(&Hint) -> R) -> Option<R> {
        if !self.hinted.load(Ordering::Acquire) {
            return None;
        }
        self.hint.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(look)
    }

    /// Whether its last connection has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.seats.iter().for_each(Seat::close);
        self.life.1.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// fds that we hold on its behalf. Not to be asked by who has [`Session::made`].
    pub(super) fn fds(&self) -> usize {
        let made = self.made();
        let events = made.io_events.len() + made.irq_events.len();
        let part = usize::from(self.part().is_some());
        OWN_FDS + self.connections.load(Ordering::Relaxed) + events + part
    }

    pub(super) fn part(&self) -> Option<(String, Part)> {
        self.part.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_part(&self, name: &str, channel: Channel) {
        let mut part = self.part.lock().unwrap_or_else(PoisonError::into_inner);
        *part = Some((name.to_string(), Arc::new(channel.into())));
    }

    pub(super) fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("id", &self.id).field("rights", &self.rights).finish()
    }
}
