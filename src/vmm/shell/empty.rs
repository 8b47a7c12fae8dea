//! A shell without state: a machine of a shape, that gets a snapshot of one like it.
//!
//! Its main thread is confined at the claim, after the snapshot is open: until then there is
//! nothing in the machine that a guest has had a hand in.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use cellblock_seccomp::filter::Policy;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use crate::cell::launch::Common;
use crate::cell::overlay::OverlayError;
use crate::config::OpenError;
use crate::console;
use crate::control::server::ControlServer;
use crate::pool::protocol::{Origin as From, Shape};
use crate::remedy::Remedy;
use crate::snapshot::format::{CHUNK, Chain, MAX_STATE, PAGE};
use crate::snapshot::pager::{PagerError, Prefetch, Prospect};
use crate::snapshot::state::compat::Incompatible;
use crate::snapshot::state::device::Fingerprint;
use crate::snapshot::state::{MicrovmState, StateError};
use crate::spec::{Backing, SerialSpec};
use crate::vcpu::WorkError;
use crate::vm::kvm;
use crate::vm::layout;
use crate::vm::memory::{GuestRam, MemoryError};
use crate::vmm::VmmError;
use crate::vmm::assemble;
use crate::vmm::event_loop::Vm;
use crate::vmm::hardware::Hardware;
use crate::vmm::parts::{Begun, Switches};
use crate::vmm::restore::{self, Copies, RestoreError};
use crate::vmm::snapshot::{Kept, LoadError, Origin};

/// What of a claim does not fit the shell, or could not be carried out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum EmptyError {
    #[error("the snapshot has {found} {what}, and the pool's shells have {shell}")]
    Shape { what: &'static str, found: u64, shell: u64 },
    #[error("the snapshot has a disk '{0}', which the pool's shells have not")]
    NoDisk(String),
    #[error("disk '{0}' of the snapshot is another one than that of the pool's shells")]
    OtherDisk(String),
    #[error("looking at disk '{0}'")]
    Disk(String, #[source] Errno),
    #[error("disk '{0}'")]
    Writes(String, #[source] OverlayError),
    #[error("disk '{0}' is served by another program, which no pool can wait for")]
    BackEnd(String),
    #[error("the snapshot cannot go on here")]
    Host(#[source] Incompatible),
    #[error("reading {0}")]
    Read(&'static str, #[source] io::Error),
    #[error("guest memory and the state are to come along")]
    NoParts,
    #[error("a state of {0} bytes is too long")]
    Long(u64),
    #[error("cow disk '{0}' has been written to, which only a snapshot's directory can hold")]
    PartsWithWrites(String),
    #[error("the state")]
    State(#[from] StateError),
    #[error(transparent)]
    Vcpu(#[from] WorkError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("setting the machine's state")]
    Load(#[from] LoadError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("preparing for memory that comes when it is touched")]
    Prospect(#[from] PagerError),
    #[error(transparent)]
    Vmm(#[from] Box<VmmError>),
}

impl Remedy for EmptyError {
    fn remedy(&self) -> Option<String> {
        match self {
            EmptyError::Shape { .. } | EmptyError::NoDisk(_) | EmptyError::OtherDisk(_) => {
                Some("claim it from a pool that was made for machines like it".into())
            }
            EmptyError::Host(_) => Some("restore it on a host like the one it is from".into()),
            EmptyError::Restore(error) => error.remedy(),
            EmptyError::Vmm(error) => error.remedy(),
            _ => None,
        }
    }
}

/// What a claim still needs.
pub(super) struct Empty {
    /// Of memory that comes when it is touched, where that is possible.
    prospect: Option<Prospect>,
    common: Common,
}

fn vmm(error: impl Into<VmmError>) -> EmptyError {
    EmptyError::Vmm(Box::new(error.into()))
}

/// A machine of this shape, with its control socket and its console at `places`.
pub(super) fn assemble(
    mut shape: Shape,
    places: (PathBuf, PathBuf),
    switches: Switches,
    serial: &str,
) -> Result<(Vm, Empty), EmptyError> {
    let endpoint = SerialSpec::Socket(places.1);
    let begun = Begun::new(&endpoint, &[], None).map_err(vmm)?;
    let ram = GuestRam::new(shape.memory)?;
    let kvm = kvm::open().map_err(vmm)?;
    let hardware = Hardware::begin(kvm, shape.cpus.into(), &ram).map_err(vmm)?;
    let mut disks = Vec::new();
    for spec in &mut shape.disks {
        if spec.cow.is_some() {
            spec.serial = Some(serial.to_string());
        }
        let backing = spec.open_backing().map_err(|e| vmm(OpenError::Disk(e)))?;
        if matches!(backing, Backing::BackEnd(_)) {
            return Err(EmptyError::BackEnd(spec.id().to_string()));
        }
        disks.push(backing);
    }
    let control = ControlServer::bind(&places.0).map_err(|e| vmm(OpenError::Control(e)))?;
    let mut console = console::open(&endpoint).map_err(|e| vmm(OpenError::Console(e)))?;
    console.note = None;
    let prospect = match File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => Some(Prospect::new((ram.len() / CHUNK as u64) as usize, device.into())?),
        Err(error) => {
            tracing::info!(%error, "no userfaultfd: memory is restored before the guest runs");
            None
        }
    };
    // Nobody attaches to it.
    let parts = begun
        .parts(switches, (ram, hardware), console, (shape.disks, disks))
        .control(Some(control))
        .lazy(prospect.as_ref().map(Prospect::inviter).transpose()?)
        .confine_later();
    let common = parts.common;
    let vm = assemble::build(parts, |machine, _, _, _| {
        (0..shape.cpus).map(|id| Ok(machine.create_vcpu(id)?)).collect()
    });
    Ok((vm.map_err(vmm)?, Empty { prospect, common }))
}

impl Vm {
    /// Gives the machine its state and its memory, and confines the main thread.
    pub(super) fn fill(
        &mut self,
        empty: Empty,
        from: From,
        fds: Vec<OwnedFd>,
    ) -> Result<(), EmptyError> {
        let common = empty.common;
        match from {
            From::Snapshot(path) => self.fill_from_snapshot(empty, path)?,
            From::Parts => self.fill_from_parts(empty, fds)?,
        }
        assemble::confine(Policy::VmmMain, assemble::filter_mode(common)).map_err(vmm)
    }

    fn fill_from_snapshot(&mut self, empty: Empty, path: PathBuf) -> Result<(), EmptyError> {
        let chain = Arc::new(Chain::open(&path).map_err(RestoreError::from)?);
        let state = Arc::new(restore::read_state(&path, &chain)?);
        self.check_fit(&state, Some(&chain))?;
        let written = restore::written(&state, &chain)?;
        for (id, extents, data) in &written {
            let disk = self.disks.iter().find(|disk| disk.id == *id);
            let overlay = disk.and_then(|disk| disk.image.as_ref()?.overlay.as_ref());
            let (overlay, _) = overlay.ok_or_else(|| EmptyError::OtherDisk(id.clone()))?;
            chain.snapshot().check_disk(id, |_| ()).map_err(RestoreError::from)?;
            overlay.load(data, extents).map_err(|e| EmptyError::Writes(id.clone(), e))?;
        }
        self.untouch_memory()?;
        match empty.prospect {
            Some(prospect) => {
                let (source, ahead) = (prospect.settle(chain.clone()), Prefetch::Recorded);
                let pager = restore::start_pager(source, &self.ram, empty.common, ahead)?;
                self.pager = Some(pager);
            }
            None => {
                Copies::of(&state, &chain, &[])?.check(&|_| ())?;
                let filled = crate::snapshot::eager::fill(&chain, &self.ram, &|_| ());
                filled.map_err(RestoreError::from)?;
            }
        }
        self.set_state(&state)?;
        self.origin = Some(Origin { chain, state, written, kept: Kept::default() });
        Ok(())
    }

    fn fill_from_parts(&mut self, empty: Empty, fds: Vec<OwnedFd>) -> Result<(), EmptyError> {
        let mut files = fds.into_iter().map(File::from);
        let (Some(memory), Some(state)) = (files.next(), files.next()) else {
            return Err(EmptyError::NoParts);
        };
        let read = |what| move |error| EmptyError::Read(what, error);
        let len = state.metadata().map_err(read("the state"))?.len();
        if len > MAX_STATE {
            return Err(EmptyError::Long(len));
        }
        let mut bytes = vec![0; len as usize];
        state.read_exact_at(&mut bytes, 0).map_err(read("the state"))?;
        let state = Arc::new(MicrovmState::decode(&bytes)?);
        self.check_fit(&state, None)?;
        let found = memory.metadata().map_err(read("guest memory"))?.len();
        if found > self.ram.len() {
            let (what, shell) = ("bytes of memory", self.ram.len());
            return Err(EmptyError::Shape { what, found, shell });
        }
        copy_data(&memory, found, &self.ram)?;
        if let Some(prospect) = empty.prospect {
            prospect.nothing_to_come();
        }
        self.set_state(&state)
    }

    /// Takes back what the machine was given as its life began: where memory is to come from a
    /// snapshot there must be nothing yet.
    fn untouch_memory(&self) -> Result<(), EmptyError> {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // Low memory is at the beginning of its file.
        fallocate(self.ram.fd(), hole, layout::VMGENID as i64, PAGE as i64)
            .map_err(|errno| EmptyError::Read("guest memory", errno.into()))
    }

    /// Whether the state is of a machine like this one, with these very disks.
    fn check_fit(&self, state: &MicrovmState, chain: Option<&Chain>) -> Result<(), EmptyError> {
        let same = |what, found: u64, shell: u64| match found == shell {
            true => Ok(()),
            false => Err(EmptyError::Shape { what, found, shell }),
        };
        same("bytes of memory", state.vm_info.memory, self.ram.len())?;
        same("vCPUs", state.vm_info.cpus.into(), self.vcpus.states().len() as u64)?;
        state.verify_compatible(&self.snapshots.host).map_err(EmptyError::Host)?;
        if let Some(plugin) = state.plugin_states.first() {
            return Err(RestoreError::Plugin(crate::remedy::printable(&plugin.name)).into());
        }
        let mut count = 0;
        for device in &state.device_states {
            let Some(disk) = device.as_disk()? else { continue };
            count += 1;
            let own = self.disks.iter().find(|own| own.id == device.id);
            let own = own.ok_or_else(|| EmptyError::NoDisk(device.id.clone()))?;
            let other = || EmptyError::OtherDisk(device.id.clone());
            let image = own.image.as_ref().ok_or_else(other)?;
            let record = &disk.record;
            if own.size != record.size
                || own.read_only != record.read_only
                || image.queues != record.queues
            {
                return Err(other());
            }
            let copies = chain.map_or(&[][..], |chain| &chain.manifest().disks);
            let copy = copies.iter().find(|copy| copy.id == device.id && disk.written.is_none());
            if let (Some(copy), Some(chain)) = (copy, chain) {
                if image.path != chain.snapshot().path().join(copy.file()) {
                    return Err(other());
                }
                continue;
            }
            if chain.is_none() && disk.written.as_ref().is_some_and(|all| !all.is_empty()) {
                return Err(EmptyError::PartsWithWrites(device.id.clone()));
            }
            let now = Fingerprint::of(image.fd.as_fd());
            let now = now.map_err(|e| EmptyError::Disk(device.id.clone(), e))?;
            let same = image.path == record.path && now == record.fingerprint;
            if !same || now.modified_ns.is_none() {
                return Err(other());
            }
        }
        same("disks", count, self.disks.len() as u64)
    }

    fn set_state(&mut self, state: &Arc<MicrovmState>) -> Result<(), EmptyError> {
        let saved = state.clone();
        let done = self.vcpus.with_each(move |id, vcpu| saved.vcpu_states[id].identify(vcpu))?;
        done.into_iter().collect::<Result<(), _>>().map_err(|error| match error {
            StateError::Host(error) => EmptyError::Host(error),
            error => error.into(),
        })?;
        Ok(self.load(state)?)
    }
}

/// Copies what `from`, of `len` bytes, has to guest memory, at the offsets of its file.
fn copy_data(from: &File, len: u64, ram: &GuestRam) -> Result<(), EmptyError> {
    let read = |errno: Errno| EmptyError::Read("guest memory", errno.into());
    let mut at = 0;
    while at < len {
        let start = match lseek(from, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(read(errno)),
        };
        let end = (lseek(from, start as i64, Whence::SeekHole).map_err(read)? as u64).min(len);
        for region in ram.regions() {
            let (first, last) = (start.max(region.offset), end.min(region.offset + region.len));
            if first < last {
                ram.fill_from(region.gpa + (first - region.offset), from, first, last - first)?;
            }
        }
        at = end.max(at + 1);
    }
    Ok(())
}
