//! A machine that goes on from a snapshot.
//!
//! Everything is opened and checked first, then the shell is built: processes start in their
//! jails while memory is filled and KVM set up. Last, what the state says is set in it.

mod copies;
pub(crate) mod overrides;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cellblock_devices::protocol::overlay::Extent;
use cellblock_devices::protocol::{LogLevel, SeccompMode};
use cellblock_seccomp::filter::Policy;
use serde::{Deserialize, Serialize};

use super::assemble;
use super::event_loop::Vm;
use super::hardware::Hardware;
use super::parts::{Begun, Switches};
use super::plugins::Guests;
use super::snapshot::{Kept, LoadError, Origin};
use super::{VmEnd, VmmError};
use crate::cell::launch::Common;
use crate::cell::overlay::{OverlayError, Place};
use crate::config::OpenError;
use crate::console;
use crate::control::server::ControlServer;
use crate::plugin::{self, Arrived};
use crate::plugin_process::{self, PluginConfig};
use crate::remedy::Remedy;
use crate::snapshot::eager::{self, FillError};
use crate::snapshot::format::{Chain, FormatError, SnapshotId, describe};
use crate::snapshot::pager::{self, Pager, PagerError, Prefetch, Source};
use crate::snapshot::state::compat::Incompatible;
use crate::snapshot::state::device::{BackEndState, DiskState, Fingerprint};
use crate::snapshot::state::{MicrovmState, StateError};
use crate::spec::{Backing, DiskSpec, OpenedDisk, PluginSocketSpec, SerialSpec};
use crate::vm::kvm;
use crate::vm::memory::GuestRam;
pub(super) use copies::Copies;

/// A VM to be restored.
#[derive(Clone, Debug)]
pub struct RestoreConfig {
    /// The snapshot's directory.
    pub snapshot: PathBuf,
    /// Disks that are to be others than the snapshot says.
    pub disks: Vec<DiskOverride>,
    /// Endpoint of the serial line.
    pub serial: SerialSpec,
    /// Where to make the control socket.
    pub control: Option<PathBuf>,
    /// Where programs may attach.
    pub plugin_socket: Option<PluginSocketSpec>,
    /// The program of the VM's plugin, where it has one.
    pub plugin: Option<PluginConfig>,
    /// How memory comes.
    pub memory: MemoryMode,
    /// Note what is written from the start, so that a diff to the snapshot can be taken.
    pub track: bool,
    /// It is a pool's and waits for its claim: its `cow` disks have this serial number.
    pub shell: Option<String>,
    /// A device fails when its process dies so often within 10 s.
    pub max_deaths: u16,
    /// A device process that gives no sign of life for so long is replaced; zero for never.
    pub device_timeout: Duration,
    /// False only with `--disable-sandbox`.
    pub sandbox: bool,
    /// What happens on a system call outside a policy.
    pub seccomp: SeccompMode,
    /// What is logged.
    pub log: LogLevel,
}

/// How a restored VM gets its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryMode {
    /// Lazily where that is possible.
    Auto,
    /// When it is touched.
    Lazy,
    /// All of it before the guest runs, and all of it checked.
    Eager,
}

/// What is to be different about a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOverride {
    /// Its id.
    pub id: String,
    /// Another image, which the user says is the right one.
    pub path: Option<PathBuf>,
    /// Leave the image alone, and keep the guest's writes here.
    pub cow: Option<Place>,
}

/// A snapshot that no VM can go on from, here and now.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum RestoreError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("snapshot {}", .0.display())]
    State(PathBuf, #[source] StateError),
    #[error("snapshot {}", .0.display())]
    Host(PathBuf, #[source] Incompatible),
    #[error("snapshot {}: its state is of {state} bytes of memory, its memory of {memory}", .path.display())]
    Memory { path: PathBuf, state: u64, memory: u64 },
    #[error("snapshot {}: its state is of another machine than its manifest", .0.display())]
    Other(PathBuf),
    #[error("the snapshot has no disk '{0}': its disks are {1}")]
    NoDisk(String, String),
    #[error("disk '{0}' is changed twice")]
    Twice(String),
    #[error("disk '{id}' ({}) has {found} bytes, and had {wanted} when the snapshot was taken", .path.display())]
    DiskSize { id: String, path: PathBuf, found: u64, wanted: u64 },
    #[error("disk '{id}' ({}) was changed since the snapshot was taken", .path.display())]
    DiskChanged { id: String, path: PathBuf },
    #[error("looking at disk '{0}'")]
    Disk(String, #[source] nix::Error),
    #[error("the snapshot lacks what was written to its cow disk '{0}'")]
    NoWrites(String),
    #[error("disk '{0}'")]
    Writes(String, #[source] OverlayError),
    #[error("the snapshot has the state of plugin '{0}', which is not there to go on from it")]
    NeedsPlugin(String),
    #[error("the snapshot is of a VM without a plugin of its own")]
    NoPlugin,
    #[error("plugin '{0}' gave no state that it could go on from: the snapshot is for inspection")]
    Plugin(String),
    #[error(transparent)]
    Fill(#[from] FillError),
    #[error("opening /dev/userfaultfd, for lazy memory")]
    Userfaultfd(#[source] std::io::Error),
    #[error("disk '{0}' is served by another program, which cannot take part in lazy memory")]
    NotLazy(String),
    #[error("disk '{0}' is served by another program, which clones would share")]
    NotCloned(String),
    #[error("disk '{0}' is served by another program, which has the image")]
    NotKept(String),
    #[error(transparent)]
    Pager(#[from] PagerError),
    #[error("setting the machine's state")]
    Load(#[from] LoadError),
}

impl Remedy for RestoreError {
    fn remedy(&self) -> Option<String> {
        match self {
            RestoreError::Format(error) | RestoreError::Fill(FillError::Format(error)) => {
                error.remedy()
            }
            RestoreError::Userfaultfd(_) | RestoreError::NotLazy(_) => {
                Some("use '--memory-mode eager'; lazy memory needs to open that device".into())
            }
            RestoreError::NotKept(_) => {
                Some("leave 'cow' away here, and give it to 'cellblock vhost-user-blk'".into())
            }
            RestoreError::NeedsPlugin(name) if name == plugin::OWNER => {
                Some("give its program with '--plugin PATH', and its arguments with '-p'".into())
            }
            RestoreError::NeedsPlugin(_) => {
                Some("let it attach with '--plugin-socket PATH': the VM runs when all have".into())
            }
            RestoreError::NoPlugin => Some("leave '--plugin' away".into()),
            RestoreError::Twice(_) => Some("say all that is different about it at once".into()),
            RestoreError::Host(..) => Some("restore it on a host like the one it is from".into()),
            RestoreError::DiskSize { id, .. } | RestoreError::DiskChanged { id, .. } => {
                Some(format!(
                    "name a copy from that time with '--disk id={id},path=FILE' (that says that the \
                     file is right, as it is), or snapshot with '--disks copy'"
                ))
            }
            _ => None,
        }
    }
}

/// What a restore tells of itself while it fills memory.
pub trait Progress: Sync {
    /// So many chunks there are.
    fn begin(&self, chunks: usize);
    /// So many more are there.
    fn advance(&self, chunks: usize);
    /// All are.
    fn end(&self);
}

/// Runs a restored VM to its end. The caller must still be single-threaded.
pub fn restore(config: RestoreConfig, progress: &dyn Progress) -> Result<VmEnd, VmmError> {
    let mut vm = assemble(config, progress)?;
    let end = vm.run();
    vm.shut_down(&end);
    end
}

pub(super) fn assemble(config: RestoreConfig, progress: &dyn Progress) -> Result<Vm, VmmError> {
    let plan = |plugin| plugin_process::plan(plugin, config.sandbox);
    let plan = config.plugin.as_ref().map(plan).transpose()?;
    let begun = Begun::new(&config.serial, &[], plan)?;
    let path = &config.snapshot;
    let (ram, hardware) = begin_hardware(path)?;
    let chain = Arc::new(Chain::open(path).map_err(RestoreError::from)?);
    let state = read_state(path, &chain)?;
    check_plugins(&config, &state)?;
    if (ram.len(), hardware.cpus) != (state.vm_info.memory, state.vm_info.cpus) {
        return Err(RestoreError::Other(path.clone()).into());
    }
    let (specs, disks) = open_disks(&state, &chain, &config.disks, config.shell.as_deref())?;
    let control = config.control.as_deref().map(ControlServer::bind).transpose();
    let control = control.map_err(OpenError::Control)?;
    let mut console = console::open(&config.serial).map_err(OpenError::Console)?;
    if config.shell.is_some() {
        console.note = None; // whoever claims it is told
    }
    let lazy = lazy_source(&config, &chain, &specs, &disks)?;
    let arrived = lazy.as_ref().map(|source| -> Arrived { Box::new(source.completion()) });
    let states = state.plugin_states.iter();
    let states = states.filter_map(|p| Some((p.name.clone(), p.state.clone()?))).collect();
    let guests = Guests::restored(&config, &ram, arrived, states)?;
    let inviter = lazy.as_ref().map(Source::inviter).transpose().map_err(RestoreError::from)?;
    let RestoreConfig { sandbox, seccomp, log, .. } = config;
    let switches = Switches { sandbox, seccomp, log };
    let parts = begun
        .parts(switches, (ram, hardware), console, (specs, disks))
        .control(control)
        .max_deaths(config.max_deaths)
        .device_timeout(config.device_timeout)
        .guests(guests, config.plugin_socket)
        .lazy(inviter);
    let common = parts.common;
    let state = Arc::new(state);
    let written = written(&state, &chain)?;
    let copies = Copies::of(&state, &chain, &config.disks)?;
    let mut pager = None;
    let mut vm = assemble::build(parts, |machine, _, host, _| {
        let compatible = state.verify_compatible(host);
        compatible.map_err(|e| RestoreError::Host(path.clone(), e))?;
        match lazy {
            Some(source) => {
                // Of a shell nobody knows yet whether it will run.
                let all = config.shell.is_none();
                let ahead = if all { Prefetch::All } else { Prefetch::Recorded };
                pager = Some(start_pager(source, machine.ram(), common, ahead)?);
            }
            None => {
                progress.begin(copies.chunks() + chain.chunks());
                let filled = copies.check(&|chunks| progress.advance(chunks)).and_then(|()| {
                    let advance = |chunks| progress.advance(chunks);
                    Ok(eager::fill(&chain, machine.ram(), &advance)?)
                });
                progress.end();
                filled?;
            }
        }
        state
            .vcpu_states
            .iter()
            .map(|saved| {
                let vcpu = machine.create_vcpu(saved.id)?;
                match saved.identify(&vcpu) {
                    Ok(()) => Ok(vcpu),
                    Err(StateError::Host(e)) => Err(RestoreError::Host(path.clone(), e).into()),
                    Err(error) => Err(error.into()),
                }
            })
            .collect()
    })?;
    vm.pager = pager;
    if config.track {
        vm.track_since(chain.manifest().id)?;
    }
    // With a plugin of its own the vCPUs come to be when that starts them.
    match vm.starts_later {
        true => vm.to_load = Some(state.clone()),
        false => vm.go_on_from(&state, config.shell.is_none())?,
    }
    vm.origin = Some(Origin { chain, state, written, kept: Kept::default() });
    Ok(vm)
}

/// Whether everybody will be there whose state is in the snapshot.
fn check_plugins(config: &RestoreConfig, state: &MicrovmState) -> Result<(), RestoreError> {
    let states = &state.plugin_states;
    let owned = states.iter().any(|plugin| plugin.name == plugin::OWNER);
    if config.plugin.is_some() && !owned {
        return Err(RestoreError::NoPlugin);
    }
    let missing = states.iter().find(|plugin| match plugin.name == plugin::OWNER {
        true => config.plugin.is_none(),
        false => config.plugin_socket.is_none(),
    });
    match missing {
        Some(plugin) => Err(RestoreError::NeedsPlugin(crate::remedy::printable(&plugin.name))),
        None => Ok(()),
    }
}

impl Vm {
    /// Sets the state of a machine that has not run.
    /// With `nudge` everybody is told to look, which is to be done before the guest runs.
    pub(super) fn go_on_from(
        &mut self,
        state: &Arc<MicrovmState>,
        nudge: bool,
    ) -> Result<(), VmmError> {
        self.load(state).map_err(RestoreError::from)?;
        if nudge {
            self.nudge();
        }
        self.phases.end("state");
        Ok(())
    }
}

/// Begins to make the machine of the snapshot at `path`, by what its manifest says of it.
fn begin_hardware(path: &Path) -> Result<(GuestRam, Hardware), VmmError> {
    let described = describe(path).map_err(RestoreError::from)?;
    let manifest = match (described.manifest, described.fault) {
        (Some(manifest), None) => manifest,
        (_, Some(fault)) => return Err(RestoreError::from(fault).into()),
        (None, None) => return Err(RestoreError::Other(path.into()).into()),
    };
    let ram = GuestRam::new(manifest.memory)?;
    let hardware = Hardware::begin(kvm::open()?, manifest.vcpus, &ram)?;
    Ok((ram, hardware))
}

/// What memory will come from, if it is to come lazily.
fn lazy_source(
    config: &RestoreConfig,
    chain: &Arc<Chain>,
    specs: &[DiskSpec],
    disks: &[Backing],
) -> Result<Option<Source>, RestoreError> {
    let wanted = config.memory == MemoryMode::Lazy;
    if config.memory == MemoryMode::Eager {
        return Ok(None);
    }
    let stranger = disks.iter().position(|disk| matches!(disk, Backing::BackEnd(_)));
    if let Some(n) = stranger {
        let refused = RestoreError::NotLazy(specs[n].id().to_string());
        return if wanted { Err(refused) } else { Ok(None) };
    }
    match File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => Ok(Some(Source::new(chain.clone(), device.into())?)),
        Err(error) if wanted => Err(RestoreError::Userfaultfd(error)),
        Err(error) => {
            tracing::info!(%error, "no userfaultfd: memory is restored before the guest runs");
            Ok(None)
        }
    }
}

pub(super) fn start_pager(
    source: Source,
    ram: &GuestRam,
    common: Common,
    prefetch: Prefetch,
) -> Result<Pager, RestoreError> {
    let mode = assemble::filter_mode(common);
    let config = pager::Config {
        confine: move || assemble::confine(Policy::VmmPager, mode),
        prefetch,
        stall_limit: pager::STALL_LIMIT,
        last_resort: Some(|why: &str| {
            // Whoever was to end the VM waits for memory itself.
            crate::logging::tell(&format!("guest memory does not come any more: {why}"));
            std::process::exit(1)
        }),
    };
    Ok(source.start(ram, config)?)
}

/// What had been written to each `cow` disk, for a reset.
pub(super) fn written(
    state: &MicrovmState,
    chain: &Chain,
) -> Result<Vec<(String, Vec<Extent>, File)>, RestoreError> {
    let at = || chain.snapshot().path().to_path_buf();
    let mut all = Vec::new();
    for device in &state.device_states {
        let disk = device.as_disk().map_err(|e| RestoreError::State(at(), e))?;
        if let Some(extents) = disk.and_then(|disk| disk.written) {
            let data = chain.snapshot().disk(&device.id)?;
            let data = data.ok_or_else(|| RestoreError::NoWrites(device.id.clone()))?;
            all.push((device.id.clone(), extents, data));
        }
    }
    Ok(all)
}

pub(crate) fn read_state(path: &Path, chain: &Chain) -> Result<MicrovmState, RestoreError> {
    let bytes = chain.snapshot().state()?;
    let state = MicrovmState::decode(&bytes).map_err(|e| RestoreError::State(path.into(), e))?;
    let (of_state, memory) = (state.vm_info.memory, chain.manifest().memory);
    if of_state != memory {
        return Err(RestoreError::Memory { path: path.into(), state: of_state, memory });
    }
    if let Some(plugin) = state.plugin_states.iter().find(|plugin| plugin.state.is_none()) {
        return Err(RestoreError::Plugin(crate::remedy::printable(&plugin.name)));
    }
    Ok(state)
}

/// Opens the disks that `named` makes others than those of the VM that the snapshot at `path`
/// was of. The serial numbers of those of them that are cow are the caller's affair.
pub(crate) fn open_others(
    path: &Path,
    id: SnapshotId,
    named: &[DiskOverride],
) -> Result<Vec<(DiskSpec, OpenedDisk)>, VmmError> {
    let chain = Chain::open(path).map_err(RestoreError::from)?;
    if chain.manifest().id != id {
        return Err(RestoreError::Other(path.into()).into());
    }
    let state = read_state(path, &chain)?;
    let (specs, disks) = open_disks(&state, &chain, named, Some(""))?;
    let both = specs.into_iter().zip(disks).filter_map(|(mut spec, disk)| match disk {
        Backing::Image(image) if named.iter().any(|disk| disk.id == spec.id()) => {
            spec.path = spec.path.canonicalize().unwrap_or(spec.path);
            spec.cow = spec.cow.map(|place| place.absolute().unwrap_or(place));
            Some((spec, image))
        }
        _ => None,
    });
    Ok(both.collect())
}

/// A disk of the snapshot.
enum Saved {
    Image(Box<DiskState>),
    BackEnd(BackEndState),
}

/// Opens the image of every disk: the one the user names, the one in the snapshot, or the
/// one that was used, if it is as it was.
fn open_disks(
    state: &MicrovmState,
    chain: &Chain,
    named: &[DiskOverride],
    clone_serial: Option<&str>,
) -> Result<(Vec<DiskSpec>, Vec<Backing>), VmmError> {
    let malformed = |e| RestoreError::State(chain.snapshot().path().into(), e);
    let mut saved = Vec::new();
    for device in &state.device_states {
        if let Some(disk) = device.as_disk().map_err(malformed)? {
            saved.push((device.id.clone(), Saved::Image(Box::new(disk))));
        } else if let Some(disk) = device.as_back_end().map_err(malformed)? {
            saved.push((device.id.clone(), Saved::BackEnd(disk)));
        }
    }
    overrides::check(named, &saved.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>())?;
    let (mut specs, mut disks) = (Vec::new(), Vec::new());
    for (id, disk) in saved {
        let disk = match disk {
            Saved::Image(disk) => *disk,
            Saved::BackEnd(_) if clone_serial.is_some() => {
                return Err(RestoreError::NotCloned(id).into());
            }
            Saved::BackEnd(disk) => {
                let other = named.iter().find(|other| other.id == id);
                if other.is_some_and(|other| other.cow.is_some()) {
                    return Err(RestoreError::NotKept(id).into());
                }
                let socket = other.and_then(|other| other.path.clone()).unwrap_or(disk.socket);
                // No more than any disk has, or it is not opened.
                let queues = u16::try_from(disk.transport.queues.len()).unwrap_or(u16::MAX);
                let spec = DiskSpec::far(&id, socket, queues);
                disks.push(spec.open_backing().map_err(OpenError::Disk)?);
                specs.push(spec);
                continue;
            }
        };
        let other = named.iter().find(|other| other.id == id);
        let by_user = other.and_then(|other| other.path.as_ref());
        let copied = chain.manifest().disks.iter().find(|copy| copy.id == id);
        // The copy of a cow disk is of what was written to it.
        let copied = copied.filter(|_| disk.written.is_none());
        let path = match (by_user, copied) {
            (Some(path), _) => path.clone(),
            (None, Some(copy)) => chain.snapshot().path().join(copy.file()),
            (None, None) => disk.record.path.clone(),
        };
        let mut spec = disk.record.spec(&id, path.clone());
        // The snapshot is not to change with the guest.
        let ours = copied.is_some() && by_user.is_none() && !spec.read_only;
        let place = other.and_then(|other| other.cow.clone()).or(spec.cow.take());
        if let Some(place) = place.or_else(|| ours.then(Place::default)) {
            spec.keep_writes(place);
        }
        // From its first write on, a clone's disk is another one.
        if let (Some(serial), Some(_)) = (clone_serial, &spec.cow) {
            spec.serial = Some(serial.to_string());
        }
        let backing = spec.open_backing().map_err(OpenError::Disk)?;
        if let Backing::Image(image) = &backing {
            let (found, wanted) = (image.size, disk.record.size);
            if found != wanted {
                return Err(RestoreError::DiskSize { id, path, found, wanted }.into());
            }
            if by_user.is_none() && copied.is_none() {
                use std::os::fd::AsFd;
                let now = Fingerprint::of(image.fd.as_fd());
                let now = now.map_err(|e| RestoreError::Disk(id.clone(), e))?;
                // A block device does not tell: its user has to.
                if now != disk.record.fingerprint || now.modified_ns.is_none() {
                    return Err(RestoreError::DiskChanged { id, path }.into());
                }
            }
            if let (Some(extents), Some(overlay)) = (&disk.written, &image.overlay) {
                let data = chain.snapshot().disk(&id).map_err(RestoreError::from)?;
                let data = data.ok_or_else(|| RestoreError::NoWrites(id.clone()))?;
                let checked = chain.snapshot().check_disk(&id, |_| ());
                checked.map_err(RestoreError::from)?;
                overlay.load(&data, extents).map_err(|e| RestoreError::Writes(id.clone(), e))?;
            }
        }
        specs.push(spec);
        disks.push(backing);
    }
    Ok((specs, disks))
}
