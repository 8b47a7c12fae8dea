//! What a pool is made of, and what is wrong with that.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cellblock_devices::protocol::{LogLevel, SeccompMode};

use super::engine::{ClaimError, Release};
use super::ledger::{Limits, LimitsError};
use super::parts::PartsError;
use super::protocol::{Shape, Stage};
use super::scratch::Scratch;
use super::shell::{Recipe, ShellError};
use crate::cell::overlay::Place;
use crate::remedy::Remedy;
use crate::snapshot::format::{Chain, FormatError, SnapshotId};
use crate::spec::DiskSpec;
use crate::vm::metadata::MAX_DATA;
use crate::vmm::VmmError;
use crate::vmm::restore::{DiskOverride, RestoreError, overrides};
use crate::vmm::shell::EmptyError;
use crate::vmm::snapshot::Kept;

/// What a shell is counted as beyond guest memory.
const OVERHEAD: u64 = 8 << 20;
/// Room in the address of a Unix socket for the directory.
const MOST_DIRECTORY: usize = 107 - "/0123456789abcdef.console".len();

/// How many VMs, and for how long somebody waits for one.
#[derive(Clone, Debug)]
pub struct PoolConfig {
    /// Idle shells that are kept ready.
    pub min_size: usize,
    /// Most idle shells.
    pub max_size: usize,
    /// Most VMs that somebody has.
    pub max_live: usize,
    /// How long a claim waits for one.
    pub acquire_timeout: Duration,
    /// Most bytes of memory of all shells and VMs. Each is counted as all that its guest can make it
    /// take: guest memory, the whole size of every cow disk whose writes are in memory, and with
    /// [`Release::Reset`] the pages that are kept to put back, up to 64 MiB.
    ///
    /// Where not given it is seven eighths of what the host has available, and cow disks and kept
    /// pages are left out: they take what is written, as a rule little, and are counted in full only
    /// for who has said how much there is.
    pub memory: Option<u64>,
    /// What becomes of a VM that is given back.
    pub release: Release,
}

impl Default for PoolConfig {
    fn default() -> Self {
        PoolConfig {
            min_size: 1,
            max_size: 4,
            max_live: 64,
            acquire_timeout: Duration::from_secs(5),
            memory: None,
            release: Release::Destroy,
        }
    }
}

/// What shells are made of.
#[derive(Clone, Debug)]
pub struct BaseConfig {
    /// The `cellblock` program; this one where not given.
    pub program: Option<PathBuf>,
    /// Where consoles and control sockets are; a private directory, which exists. A temporary
    /// one where not given.
    pub directory: Option<PathBuf>,
    /// The machines.
    pub machine: Machine,
    /// False for no jails: for debugging only.
    pub sandbox: bool,
    /// What happens on a system call outside a policy.
    pub seccomp: SeccompMode,
    /// What shells log, on this process's standard error.
    pub log: LogLevel,
}

/// What machines a pool has.
#[derive(Clone, Debug)]
pub enum Machine {
    /// Primed with one snapshot.
    Primed {
        /// Its directory.
        snapshot: PathBuf,
        /// Disks that are to be others than it says.
        disks: Vec<DiskOverride>,
    },
    /// Of a shape, for any snapshot of such a machine.
    Shape(Shape),
}

impl BaseConfig {
    /// With all jails, and warnings logged.
    pub fn new(machine: Machine) -> BaseConfig {
        BaseConfig {
            program: None,
            directory: None,
            machine,
            sandbox: true,
            seccomp: SeccompMode::default(),
            log: LogLevel::Warn,
        }
    }

    /// Primed with `snapshot`, with the disks that it says.
    pub fn primed(snapshot: impl Into<PathBuf>) -> BaseConfig {
        BaseConfig::new(Machine::Primed { snapshot: snapshot.into(), disks: Vec::new() })
    }
}

/// A pool that cannot be, or a claim that came to nothing.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum PoolError {
    #[error(transparent)]
    Limits(#[from] LimitsError),
    #[error("starting the pool's threads")]
    Thread(#[source] io::Error),
    #[error("making a directory for the pool's sockets")]
    Directory(#[source] io::Error),
    #[error("the path {} is too long for sockets in it", .0.display())]
    LongDirectory(PathBuf),
    #[error("finding {}", .0.display())]
    Path(PathBuf, #[source] io::Error),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("snapshot {} is not the one that the pool is primed with, {}", path.display(), primed.display())]
    OtherSnapshot { path: PathBuf, primed: PathBuf },
    #[error("the pool is primed with {}, and has no VMs of anything else", .0.display())]
    Primed(PathBuf),
    #[error("the pool is not primed with a snapshot, and the claim names none")]
    NotPrimed,
    #[error("disk '{0}' would be written to by all VMs of the pool")]
    SharedDisk(String),
    #[error("the pool is of shells of a shape, whose disks are what they are")]
    DisksOfShape,
    #[error("shells of a shape have no snapshot of their own that they could be reset to")]
    ResetOfShape,
    #[error(
        "what is written to disk '{0}' would be in memory that the pool's limit does not count"
    )]
    Uncounted(String),
    #[error(transparent)]
    Fit(Box<EmptyError>),
    #[error("{0} bytes for the guest are more than the {MAX_DATA} that its metadata has room for")]
    Data(usize),
    #[error("opening its disks")]
    Disks(#[from] Box<VmmError>),
    #[error("a VM of bytes")]
    Parts(#[source] PartsError),
    #[error(transparent)]
    Claim(#[from] ClaimError<ShellError>),
    #[error("restoring a VM in its shell")]
    Shell(#[from] ShellError),
}

impl Remedy for PoolError {
    fn remedy(&self) -> Option<String> {
        match self {
            PoolError::Format(error) => error.remedy(),
            PoolError::Restore(error) => error.remedy(),
            PoolError::Disks(error) => error.remedy(),
            PoolError::Fit(error) => error.remedy(),
            PoolError::ResetOfShape => {
                Some("prime the pool with the snapshot, or have VMs destroyed".into())
            }
            PoolError::Uncounted(id) => {
                Some(format!("keep the writes in a file: '--disk id={id},cow=DIR'"))
            }
            PoolError::Shell(error) => error.remedy(),
            PoolError::SharedDisk(id) => {
                Some(format!("keep each VM's writes to itself with '--disk id={id},cow'"))
            }
            PoolError::LongDirectory(_) => {
                Some(format!("choose one of at most {MOST_DIRECTORY} bytes"))
            }
            PoolError::OtherSnapshot { .. } | PoolError::Primed(_) => {
                Some("make a pool for it, or one of shells of its shape".into())
            }
            PoolError::Claim(ClaimError::Make(error)) => error.remedy(),
            PoolError::Claim(ClaimError::TimedOut { .. }) => {
                Some("try again, or allow more VMs".into())
            }
            PoolError::Claim(ClaimError::Memory(_)) => {
                Some("give VMs back, or allow more memory".into())
            }
            _ => None,
        }
    }
}

impl Shape {
    /// Of the machine that the snapshot at `path` is of, with disks changed as `disks` says.
    pub fn of(path: &Path, disks: &[DiskOverride]) -> Result<Shape, PoolError> {
        let path = absolute(path)?;
        let chain = Chain::open(&path)?;
        let state = crate::vmm::restore::read_state(&path, &chain)?;
        let damaged = |error| RestoreError::State(path.clone(), error);
        let (mut specs, mut ids) = (Vec::new(), Vec::new());
        for device in &state.device_states {
            if device.as_back_end().map_err(damaged)?.is_some() {
                return Err(RestoreError::NotCloned(device.id.clone()).into());
            }
            let Some(disk) = device.as_disk().map_err(damaged)? else { continue };
            ids.push(device.id.as_str());
            let named = disks.iter().find(|named| named.id == device.id);
            let copy = chain.manifest().disks.iter().find(|copy| copy.id == device.id);
            // The copy of a cow disk is of what was written to it.
            let copy = copy.filter(|_| disk.written.is_none());
            let other = named.and_then(|named| named.path.clone());
            let image = match (&other, copy) {
                (Some(path), _) => path.clone(),
                (None, Some(copy)) => path.join(copy.file()),
                (None, None) => disk.record.path.clone(),
            };
            let mut spec = disk.record.spec(&device.id, image);
            // The snapshot is not to change with the guest.
            let ours = copy.is_some() && other.is_none() && !spec.read_only;
            let place = named.and_then(|named| named.cow.clone()).or(spec.cow.take());
            if let Some(place) = place.or_else(|| ours.then(Place::default)) {
                spec.keep_writes(place);
            }
            specs.push(spec);
        }
        overrides::check(disks, &ids)?;
        Ok(Shape { memory: state.vm_info.memory, cpus: state.vm_info.cpus, disks: specs })
    }
}

/// What [`super::RestorePool::new`] goes on from.
pub(super) struct Prepared {
    pub(super) recipe: Recipe,
    pub(super) limits: Limits,
    pub(super) primed: Option<(PathBuf, SnapshotId)>,
    /// What can be wished of its disks and is so already.
    pub(super) disks: Vec<DiskOverride>,
    /// Disks whose writes in memory would not be counted.
    pub(super) uncounted: Vec<String>,
}

/// Checks everything that can be wrong with a pool, before anything is made.
pub(super) fn prepare(base: BaseConfig, config: &PoolConfig) -> Result<Prepared, PoolError> {
    if matches!(base.machine, Machine::Shape(_)) && config.release == Release::Reset {
        return Err(PoolError::ResetOfShape);
    }
    let (stage, shape, primed, disks) = match base.machine {
        Machine::Primed { snapshot, disks } => {
            let path = absolute(&snapshot)?;
            let chain = Chain::open(&path)?;
            let shape = Shape::of(&path, &disks)?;
            no_shared_disk(&shape)?;
            let cow = shape.disks.iter().filter(|disk| disk.cow.is_some());
            let cow = cow.map(|disk| DiskOverride {
                id: disk.id().to_string(),
                path: None,
                cow: disk.cow.clone(),
            });
            let same = disks.iter().cloned().chain(cow).collect();
            let id = chain.manifest().id;
            let track = config.release == Release::Reset;
            let stage = Stage::Primed { snapshot: path.clone(), id: id.0, disks, track };
            (stage, shape, Some((path, id)), same)
        }
        Machine::Shape(mut shape) => {
            for disk in &mut shape.disks {
                disk.path = absolute(&disk.path)?;
            }
            no_shared_disk(&shape)?;
            (Stage::Shape(shape.clone()), shape, None, Vec::new())
        }
    };
    let limits = Limits {
        min_size: config.min_size,
        max_size: config.max_size,
        max_live: config.max_live,
        memory: config.memory.unwrap_or_else(|| available_memory() / 8 * 7),
        charge: charge(&shape, config)?,
    };
    limits.check()?;
    let (directory, keep) = directory(base.directory)?;
    let recipe = Recipe {
        program: base.program.unwrap_or_else(|| "/proc/self/exe".into()),
        directory,
        claimers: Arc::default(),
        _keep: keep,
        stage,
        sandbox: base.sandbox,
        seccomp: base.seccomp,
        log: base.log,
    };
    let counted = |disk: &DiskSpec| config.memory.is_none() || in_memory(disk);
    let uncounted = shape.disks.iter().filter(|disk| !counted(disk));
    let uncounted = uncounted.map(|disk| disk.id().to_string()).collect();
    Ok(Prepared { recipe, limits, primed, disks, uncounted })
}

/// Whether what is written to the disk is kept in memory.
fn in_memory(disk: &DiskSpec) -> bool {
    disk.cow == Some(Place::Memory)
}

/// What a VM is counted as: see [`PoolConfig::memory`].
fn charge(shape: &Shape, config: &PoolConfig) -> Result<u64, PoolError> {
    let mut charge = shape.memory.saturating_add(OVERHEAD);
    if config.memory.is_none() {
        return Ok(charge);
    }
    for disk in shape.disks.iter().filter(|disk| in_memory(disk)) {
        // Of a block device metadata say nothing.
        let size = File::open(&disk.path).and_then(|mut file| file.seek(SeekFrom::End(0)));
        let size = size.map_err(|error| PoolError::Path(disk.path.clone(), error))?;
        charge = charge.saturating_add(size);
    }
    if config.release == Release::Reset {
        charge = charge.saturating_add(shape.memory.min(Kept::MOST));
    }
    Ok(charge)
}

/// VMs of one image that each write to it would be no clones, and are none but the first.
fn no_shared_disk(shape: &Shape) -> Result<(), PoolError> {
    let shared = shape.disks.iter().find(|disk| !disk.read_only && disk.cow.is_none());
    shared.map_or(Ok(()), |disk| Err(PoolError::SharedDisk(disk.id().to_string())))
}

fn directory(given: Option<PathBuf>) -> Result<(PathBuf, Option<Arc<Scratch>>), PoolError> {
    let (path, keep) = match given {
        Some(path) => (absolute(&path)?, None),
        None => {
            let made = Scratch::new(&std::env::temp_dir()).map_err(PoolError::Directory)?;
            (made.path().to_path_buf(), Some(Arc::new(made)))
        }
    };
    match path.as_os_str().len() > MOST_DIRECTORY {
        true => Err(PoolError::LongDirectory(path)),
        false => Ok((path, keep)),
    }
}

/// Of what exists: shells have no business with this process's own directory.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, PoolError> {
    path.canonicalize().map_err(|error| PoolError::Path(path.into(), error))
}

/// Bytes that the host has to give; much where it does not say.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with a disk of 1 GiB, which takes no room.
    fn shape(dir: &Path, cow: Option<Place>) -> Shape {
        let path = dir.join("disk");
        let file = File::create(&path).expect("file");
        file.set_len(1 << 30).expect("a hole");
        let spec = format!("{},id=disk0", path.display());
        let mut disk: DiskSpec = spec.parse().expect("a disk");
        disk.read_only = cow.is_none();
        disk.cow = cow;
        Shape { memory: 64 << 20, cpus: 1, disks: vec![disk] }
    }

    #[test]
    fn all_that_a_guest_can_make_a_vm_take_is_counted_where_there_is_a_limit() {
        let dir = tempfile::tempdir().expect("directory");
        let charged = |cow, memory| {
            let base = BaseConfig::new(Machine::Shape(shape(dir.path(), cow)));
            let prepared = prepare(base, &PoolConfig { memory, ..PoolConfig::default() });
            prepared.map(|prepared| (prepared.limits.charge, prepared.uncounted))
        };
        let (plain, limit) = ((64 << 20) + OVERHEAD, Some(8 << 30));
        let disk0 = vec!["disk0".to_string()];
        assert_eq!(charged(Some(Place::Memory), limit).expect("room"), (plain + (1 << 30), vec![]));
        let at = Some(Place::Directory(dir.path().into()));
        assert_eq!(charged(at, limit).expect("room"), (plain, disk0.clone()));
        assert_eq!(charged(None, limit).expect("room"), (plain, disk0));
        assert_eq!(charged(Some(Place::Memory), None).expect("room"), (plain, vec![]));
        let little = charged(Some(Place::Memory), Some(1 << 30)).expect_err("no room for one");
        assert!(little.to_string().contains("one VM counts as 1096 MiB"), "{little}");
        let config = PoolConfig { memory: limit, release: Release::Reset, ..PoolConfig::default() };
        let kept = charge(&shape(dir.path(), None), &config).expect("a charge");
        assert_eq!(kept, plain + (64 << 20));
    }

    #[test]
    fn a_pool_of_a_shape_cannot_reset() {
        let dir = tempfile::tempdir().expect("directory");
        let base = BaseConfig::new(Machine::Shape(shape(dir.path(), None)));
        let config = PoolConfig { release: Release::Reset, ..PoolConfig::default() };
        let error = prepare(base, &config).err().expect("refused");
        let line = crate::remedy::one_line(&error);
        assert!(line.contains("no snapshot of their own") && line.contains("prime"), "{line}");
    }
}
