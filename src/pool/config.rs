//! What a pool is made of, and what is wrong with that.

use std::io;
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
use crate::remedy::Remedy;
use crate::snapshot::format::{Chain, FormatError, SnapshotId};
use crate::vm::metadata::MAX_DATA;
use crate::vmm::VmmError;
use crate::vmm::restore::{DiskOverride, RestoreError};

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
    /// Most bytes of guest memory of all shells and VMs, each counted in full with some for its
    /// processes; seven eighths of what the host has available where not given.
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
        let mut specs = Vec::new();
        for device in &state.device_states {
            let Some(disk) = device.as_disk().map_err(damaged)? else { continue };
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
            spec.cow = named.and_then(|named| named.cow.clone()).or(spec.cow);
            if copy.is_some() && other.is_none() && !spec.read_only {
                spec.cow.get_or_insert_default(); // the snapshot is not to change with the guest
            }
            specs.push(spec);
        }
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
}

/// Checks everything that can be wrong with a pool, before anything is made.
pub(super) fn prepare(base: BaseConfig, config: &PoolConfig) -> Result<Prepared, PoolError> {
    let (stage, memory, primed, disks) = match base.machine {
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
            let (id, memory) = (chain.manifest().id, chain.manifest().memory);
            let track = config.release == Release::Reset;
            let stage = Stage::Primed { snapshot: path.clone(), id: id.0, disks, track };
            (stage, memory, Some((path, id)), same)
        }
        Machine::Shape(mut shape) => {
            for disk in &mut shape.disks {
                disk.path = absolute(&disk.path)?;
            }
            no_shared_disk(&shape)?;
            let memory = shape.memory;
            (Stage::Shape(shape), memory, None, Vec::new())
        }
    };
    let limits = Limits {
        min_size: config.min_size,
        max_size: config.max_size,
        max_live: config.max_live,
        memory: config.memory.unwrap_or_else(|| available_memory() / 8 * 7),
        charge: memory.saturating_add(OVERHEAD),
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
    Ok(Prepared { recipe, limits, primed, disks })
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
