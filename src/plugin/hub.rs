//! What vCPU threads and the server share: who has which range, who wants which vCPU.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use cellblock_plugin_api::{MemoryAccess, Rights, Space, wake_private};
use nix::errno::Errno;

use super::ranges::{self, Claim, Ranges};
use super::session::{Session, SessionError};
use super::tap::Tap;
use super::watches::Watches;
use crate::bus::Bus;
use crate::vcpu::{Attendant, Kicks};

/// How long telling plugins of the end may take.
const TELL_LIMIT: Duration = Duration::from_millis(200);

/// See the module.
pub struct Hub {
    kicks: Arc<Kicks>,
    vcpus: Box<[Place]>,
    ranges: RwLock<Ranges>,
    watches: RwLock<Watches>,
    watched: AtomicBool,
    sessions: Mutex<Vec<Arc<Session>>>,
    /// The plugin that the VM was started for.
    owner: Option<Arc<Session>>,
    /// vCPUs that have not been resumed from their first event.
    created: AtomicUsize,
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    next_id: AtomicUsize,
    /// What plugins are to go on from, by name.
    restored: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Pieces of memory that plugins have made.
    pieces: AtomicUsize,
}

/// What concerns one vCPU, out of any plugin's reach.
#[derive(Default)]
#[repr(align(64))]
struct Place {
    /// A plugin wants it to stop.
    wanted: AtomicBool,
    /// A plugin has not answered an event of it.
    open: AtomicBool,
    /// Whose request was taken last.
    turn: AtomicUsize,
    /// Rises with everything its thread is to notice.
    calls: AtomicU32,
    sleeps: AtomicBool,
}

impl Hub {
    /// A hub for a VM with these devices; with an owner in a VM that is a plugin's.
    ///
    /// # Errors
    /// When there is no shared memory for the owner.
    pub fn new(
        kicks: Arc<Kicks>,
        pio: Arc<Bus>,
        mmio: Arc<Bus>,
        has_owner: bool,
    ) -> Result<Arc<Hub>, SessionError> {
        let vcpus = kicks.len();
        let owner = has_owner
            .then(|| Session::new(0, vcpus, Rights::Control, MemoryAccess::None, true))
            .transpose()?;
        let hub = Arc::new(Hub {
            vcpus: (0..vcpus).map(|_| Place::default()).collect(),
            ranges: RwLock::default(),
            watches: RwLock::default(),
            watched: AtomicBool::new(false),
            sessions: Mutex::new(owner.iter().cloned().collect()),
            created: AtomicUsize::new(if has_owner { vcpus } else { 0 }),
            owner,
            pio,
            mmio,
            next_id: AtomicUsize::new(1),
            restored: Mutex::default(),
            pieces: AtomicUsize::new(0),
            kicks: kicks.clone(),
        });
        let woken = hub.clone();
        kicks.on_kick(move |vcpu| woken.call(vcpu));
        Ok(hub)
    }

    /// What a vCPU's thread needs to take part.
    pub(crate) fn attendant(self: &Arc<Self>, vcpu: usize) -> Box<dyn Attendant> {
        Box::new(Tap::new(self.clone(), vcpu))
    }

    /// Number of vCPUs.
    pub(super) fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    pub(super) fn owner(&self) -> Option<&Arc<Session>> {
        self.owner.as_ref()
    }

    /// Lets a plugin in that has attached.
    pub(super) fn join(
        &self,
        rights: Rights,
        memory: MemoryAccess,
    ) -> Result<Arc<Session>, SessionError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let session = Session::new(id, self.vcpus.len(), rights, memory, false)?;
        self.sessions().push(session.clone());
        Ok(session)
    }

    /// Releases what a plugin held, and lets go of the vCPUs it stopped. Those of the VM's owner
    /// stay: they end with the VM.
    pub(super) fn leave(&self, session: &Session) {
        session.end();
        if !session.is_owner() {
            self.sessions().retain(|other| other.id() != session.id());
            self.with_ranges(|ranges| ranges.forget(session));
            self.with_watches(|watches| watches.forget(session));
        }
        // Who waits for it looks up; a vCPU it debugs is made to.
        for vcpu in 0..self.vcpus.len() {
            self.want(vcpu);
        }
    }

    /// Everybody is told that the VM ends. Who lets himself be told is by the time this returns.
    pub fn ending(&self) {
        let sessions = self.sessions().clone();
        let (told, all_told) = crossbeam_channel::bounded(0);
        sessions.iter().for_each(|session| session.signal_shutdown(told.clone()));
        drop(told);
        let _ = all_told.recv_timeout(TELL_LIMIT);
    }

    /// Whether the guest has memory that a plugin made.
    pub fn has_memory(&self) -> bool {
        self.pieces.load(Ordering::Acquire) != 0
    }

    pub(super) fn memory_made(&self) {
        self.pieces.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn memory_gone(&self) {
        self.pieces.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn reserve(
        &self,
        session: &Arc<Session>,
        space: Space,
        start: u64,
        length: u64,
        is_async: bool,
    ) -> Result<(), Errno> {
        if length == 0 {
            return self.with_ranges(|ranges| ranges.release(session, space, start));
        }
        self.leave_devices_alone(space, start, length)?;
        self.with_ranges(|ranges| ranges.reserve(session, space, start, length, is_async))
    }

    /// EPERM where one of the VMM's own devices has part of a range.
    pub(super) fn leave_devices_alone(
        &self,
        space: Space,
        start: u64,
        length: u64,
    ) -> Result<(), Errno> {
        let last = ranges::last(start, length)?;
        let devices = match space {
            Space::Port => &self.pio,
            Space::Mmio => &self.mmio,
        };
        if devices.holds(start, last) { Err(Errno::EPERM) } else { Ok(()) }
    }

    pub(super) fn watch(
        &self,
        session: &Arc<Session>,
        space: Space,
        start: u64,
        length: u64,
    ) -> Result<(), Errno> {
        self.with_watches(|watches| match length {
            0 => watches.remove(session, space, start),
            _ => watches.add(session, space, start, length),
        })
    }

    fn with_ranges<R>(&self, change: impl FnOnce(&mut Ranges) -> R) -> R {
        change(&mut self.ranges.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn with_watches<R>(&self, change: impl FnOnce(&mut Watches) -> R) -> R {
        let mut watches = self.watches.write().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut watches);
        self.watched.store(!watches.is_empty(), Ordering::Release);
        result
    }

    pub(super) fn claim(&self, space: Space, address: u64) -> Option<Claim> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        ranges.find(space, address).cloned()
    }

    /// The first plugin from number `from` on that watches an address.
    pub(super) fn watcher(&self, space: Space, address: u64, from: usize) -> Option<Arc<Session>> {
        if !self.watched.load(Ordering::Acquire) {
            return None;
        }
        let watches = self.watches.read().unwrap_or_else(PoisonError::into_inner);
        watches.next(space, address, from)
    }

    /// Asks a vCPU to stop for a plugin.
    pub(super) fn pause(&self, session: &Session, vcpu: usize, user: u64) {
        session.seat(vcpu).request_pause(user);
        self.want(vcpu);
    }

    /// Makes a vCPU look who wants it. The reason is in place by now.
    fn want(&self, vcpu: usize) {
        self.vcpus[vcpu].wanted.swap(true, Ordering::AcqRel);
        self.kicks.interrupt(vcpu); // calls as well, by the hook
    }

    #[inline]
    pub(super) fn is_wanted(&self, vcpu: usize) -> bool {
        // A read-modify-write, because it must not be a value from before immediate_exit was
        // cleared: then nobody would interrupt the vCPU for it again. The models show that.
        self.vcpus[vcpu].wanted.fetch_or(false, Ordering::AcqRel)
    }

    /// The next request for a vCPU, with the plugin that made it. With none, the vCPU is not wanted
    /// any more; whoever wants it from here on says so anew.
    pub(super) fn take_request(&self, vcpu: usize) -> Option<(Arc<Session>, u64)> {
        if !self.vcpus[vcpu].wanted.swap(false, Ordering::AcqRel) {
            return None;
        }
        let found = {
            // In turns, so that one who asks without end does not keep the vCPU from the others.
            let sessions = self.sessions();
            let last = self.vcpus[vcpu].turn.load(Ordering::Relaxed);
            let (before, after): (Vec<_>, Vec<_>) = sessions.iter().partition(|s| s.id() <= last);
            let mut turns = after.into_iter().chain(before);
            turns.find_map(|session| Some((session.clone(), session.seat(vcpu).take_request()?)))
        };
        if let Some((session, _)) = &found {
            self.vcpus[vcpu].turn.store(session.id(), Ordering::Relaxed);
            // There may be more.
            self.vcpus[vcpu].wanted.swap(true, Ordering::AcqRel);
        }
        found
    }

    /// A vCPU was resumed from its first event.
    pub(super) fn arrived(&self) {
        if self.created.fetch_sub(1, Ordering::AcqRel) == 1 {
            (0..self.vcpus.len()).for_each(|vcpu| self.call(vcpu));
        }
    }

    /// Whether the guest may run: every vCPU was resumed from its first event.
    pub(super) fn may_run(&self) -> bool {
        self.created.load(Ordering::Acquire) == 0
    }

    pub(super) fn kicked(&self, vcpu: usize) -> bool {
        self.kicks.kicked(vcpu)
    }

    /// Wakes a vCPU's thread where it waits for a plugin.
    fn call(&self, vcpu: usize) {
        let Some(place) = self.vcpus.get(vcpu) else { return };
        place.calls.fetch_add(1, Ordering::SeqCst);
        if place.sleeps.load(Ordering::SeqCst) {
            wake_private(&place.calls);
        }
    }

    pub(super) fn calls(&self, vcpu: usize) -> &AtomicU32 {
        &self.vcpus[vcpu].calls
    }

    pub(super) fn set_sleeps(&self, vcpu: usize, sleeps: bool) {
        self.vcpus[vcpu].sleeps.store(sleeps, Ordering::SeqCst);
    }

    pub(super) fn set_open(&self, vcpu: usize, open: bool) {
        self.vcpus[vcpu].open.store(open, Ordering::Release);
    }

    /// A vCPU of which a plugin has an event that it has not answered. To be asked while they are
    /// parked.
    pub fn has_open_event(&self) -> Option<usize> {
        self.vcpus.iter().position(|place| place.open.load(Ordering::Acquire))
    }

    /// Whether a plugin has a range of addresses.
    pub(super) fn holds_range(&self, session: &Session) -> bool {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        ranges.has_any(session)
    }

    pub(super) fn restored(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.restored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn sessions(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("vcpus", &self.vcpus.len()).finish_non_exhaustive()
    }
}
