//! What a plugin's jail is made of.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::needs::{self, NeedsError};
use super::root;
use crate::minijail::{Code, Policy, PolicyError, Violation};

/// Device nodes every plugin has.
const DEVICES: [&str; 4] = ["/dev/full", "/dev/null", "/dev/urandom", "/dev/zero"];

/// A folder, file or device of the host to show in the plugin's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// On the host.
    pub source: PathBuf,
    /// In the plugin's root; absolute.
    pub destination: PathBuf,
    /// Whether it may be written to.
    pub writable: bool,
}

/// A range of group ids of the plugin, and what they are outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GidMap {
    /// First id inside.
    pub inside: u32,
    /// First id outside.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The program.
    pub program: PathBuf,
    /// All of its arguments: the first is its `argv[0]`.
    pub arguments: Vec<OsString>,
    /// Its environment besides CROSVM_SOCKET, as `NAME=VALUE`.
    pub environment: Vec<OsString>,
    /// What it sees besides its own files.
    pub mounts: Vec<Mount>,
    /// Its group ids besides 0.
    pub gid_maps: Vec<GidMap>,
    /// Its policy; ours where it is none.
    pub policy: Option<Policy>,
    /// What a call outside the policy does.
    pub violation: Violation,
    /// False only with `--disable-sandbox`.
    pub sandbox: bool,
}

/// A plan that could not be made.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum PlanError {
    #[error(transparent)]
    Needs(#[from] NeedsError),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error("opening {} for the plugin's root", path.display())]
    Mount {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{what} of the plugin has a zero byte in it")]
    ZeroByte { what: &'static str },
    #[error("the plugin's root shows {0} things, more than {max}", max = super::MAX_PLAN_FDS - 1)]
    TooMany(usize),
    #[error("the plugin's arguments, paths and policy together are too much")]
    TooLarge(#[source] cellblock_wire::CodecError),
    #[error("writing the plan of the plugin's jail")]
    Memory(#[source] Errno),
}

/// A plan: a sealed text, and the fds it speaks of. Held by the spawner.
#[derive(Debug)]
pub struct Plan {
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) gid_maps: Vec<GidMap>,
}

/// The text, as the stub reads it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Text {
    pub(super) program: Vec<u8>,
    pub(super) arguments: Vec<Vec<u8>>,
    pub(super) environment: Vec<Vec<u8>>,
    /// None without a sandbox.
    pub(super) jail: Option<JailText>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct JailText {
    pub(super) shown: Vec<Shown>,
    pub(super) filter: Code,
    /// Whether the filter asks, and so has a listener for the VMM.
    pub(super) asks: bool,
}

/// Something in the root.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Shown {
    pub(super) source: Source,
    pub(super) destination: Vec<u8>,
    pub(super) folder: bool,
    pub(super) writable: bool,
    pub(super) device: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Source {
    /// A detached mount: the next of the plan's fds.
    Mount,
    /// A path, for a user who may not make mounts; in a namespace of the same user the
    /// stub may.
    Path(Vec<u8>),
}

impl Plan {
    /// Opens and checks everything. To be called before the spawner is forked.
    pub fn new(spec: &Spec) -> Result<Plan, PlanError> {
        let mut builder = Builder { mounts: Vec::new(), shown: Vec::new() };
        let mut program = spec.program.clone();
        let jail = if spec.sandbox {
            for device in DEVICES {
                builder.show_path(Path::new(device), Path::new(device), true)?;
            }
            for mount in &spec.mounts {
                builder.show_path(&mount.source, &mount.destination, mount.writable)?;
            }
            // The program's own files on top of what a mount may show in their place.
            let needed = needs::of(&spec.program)?;
            program = needed[0].inside.clone();
            for needs::Needed { file, path, inside, .. } in needed {
                builder.show(file, Shown::file(path, &inside))?;
            }
            let policy = match &spec.policy {
                Some(policy) => policy.clone(),
                None => Policy::for_plugins()?,
            };
            let policy = policy.with_replacements()?.and(&Policy::for_startup()?);
            let filter = policy.compile(spec.violation)?;
            let asks = spec.violation == Violation::Notify;
            Some(JailText { shown: builder.shown, filter, asks })
        } else {
            // Looked at all the same, for an error that says what is wrong with it.
            needs::of(&spec.program).map(drop).or_else(runs_without_jail)?;
            program = std::path::absolute(&program)
                .map_err(|source| PlanError::Mount { path: program.clone(), source })?;
            None
        };
        if builder.mounts.len() >= super::MAX_PLAN_FDS {
            return Err(PlanError::TooMany(builder.mounts.len()));
        }
        let bytes = |what, list: &[OsString]| {
            let plain = |text: &OsString| match text.as_bytes().contains(&0) {
                true => Err(PlanError::ZeroByte { what }),
                false => Ok(text.clone().into_vec()),
            };
            list.iter().map(plain).collect::<Result<Vec<_>, _>>()
        };
        let text = Text {
            program: program.into_os_string().into_vec(),
            arguments: bytes("an argument", &spec.arguments)?,
            environment: bytes("the environment", &spec.environment)?,
            jail,
        };
        let text = sealed(&cellblock_wire::encode(&text).map_err(PlanError::TooLarge)?)
            .map_err(PlanError::Memory)?;
        let mut fds = vec![text];
        fds.append(&mut builder.mounts);
        Ok(Plan { fds, gid_maps: spec.gid_maps.clone() })
    }
}

/// Without a jail the kernel decides what runs: a script does.
fn runs_without_jail(error: NeedsError) -> Result<(), NeedsError> {
    match error {
        NeedsError::Open { .. } | NeedsError::NotAFile(_) => Err(error),
        _ => Ok(()),
    }
}

struct Builder {
    mounts: Vec<OwnedFd>,
    shown: Vec<Shown>,
}

impl Builder {
    /// A mount that was asked for, or a device.
    fn show_path(
        &mut self,
        path: &Path,
        destination: &Path,
        writable: bool,
    ) -> Result<(), PlanError> {
        let fail = |source| PlanError::Mount { path: path.to_owned(), source };
        let path = std::fs::canonicalize(path).map_err(fail)?;
        let file = root::open(&path).map_err(fail)?;
        let folder = file.metadata().map_err(fail)?.is_dir();
        let shown = Shown { folder, writable, device: true, ..Shown::file(path, destination) };
        self.show(file, shown)
    }

    fn show(&mut self, file: File, mut shown: Shown) -> Result<(), PlanError> {
        match root::detached(&file, shown.folder) {
            Ok(mount) => {
                self.mounts.push(mount);
                shown.source = Source::Mount;
            }
            Err(Errno::EPERM) => {}
            Err(errno) => {
                let path = shown.source.path();
                return Err(PlanError::Mount { path, source: errno.into() });
            }
        }
        self.shown.push(shown);
        Ok(())
    }
}

impl Shown {
    fn file(path: PathBuf, destination: &Path) -> Shown {
        Shown {
            source: Source::Path(path.into_os_string().into_vec()),
            destination: destination.as_os_str().as_bytes().to_vec(),
            folder: false,
            writable: false,
            device: false,
        }
    }
}

impl Source {
    fn path(&self) -> PathBuf {
        match self {
            Source::Mount => PathBuf::new(),
            Source::Path(bytes) => OsString::from_vec(bytes.clone()).into(),
        }
    }
}

/// A memfd with these bytes, which nobody can change.
fn sealed(bytes: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create(c"plugin-plan", flags)?;
    let io = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
    let mut file = File::from(fd);
    file.write_all(bytes).map_err(io)?;
    file.rewind().map_err(io)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all()))?;
    Ok(file.into())
}
