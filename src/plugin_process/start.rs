//! From a configuration to a plugin that runs.

use std::ffi::OsString;
use std::io::{IoSliceMut, pipe};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cellblock_devices::protocol::SeccompMode;
use cellblock_seccomp::minijail::{Policy, PolicyError, Violation};
use cellblock_seccomp::plugin::{self, NeedsError, Plan, PlanError, Spec, stub};
use cellblock_seccomp::spawner::{Event, ExitStatus, Request, SpawnError, Spawner};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};

use super::PluginProcess;
use super::config::PluginConfig;
use super::output::Output;
use super::tap::TapError;
use super::violations::Violations;
use crate::remedy::{Remedy, printable};
use crate::throttle::Throttle;

/// The longest from asking for the process to the plugin's first instruction.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Its id in `ps` and in events.
const ID: &str = "plugin0";

/// A plugin that could not be started, or ended badly.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum PluginError {
    #[error("preparing the plugin")]
    Plan(#[from] PlanError),
    #[error("preparing the plugin")]
    Policy(#[from] PolicyError),
    #[error("the plugin's root {} is not a folder", .0.display())]
    Root(PathBuf),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("starting the plugin: {what}")]
    System {
        what: &'static str,
        #[source]
        source: Errno,
    },
    #[error("starting the plugin")]
    Spawner(#[from] SpawnError),
    #[error("starting the plugin: {step}: {message}")]
    Refused { step: String, message: String },
    #[error("a device process ended while the plugin was being started: {0}")]
    Other(ExitStatus),
    #[error("the plugin {program} ended: {status}")]
    Ended { program: String, status: ExitStatus },
    #[error("the plugin {program} was ended: system call {call} is not in its seccomp policy")]
    Violation { program: String, call: String },
    #[error("plugin did not exit within timeout")]
    Hung,
}

impl Remedy for PluginError {
    fn remedy(&self) -> Option<String> {
        let text = match self {
            PluginError::Violation { .. } => {
                "--seccomp log lets such calls pass and names all of them; then give a policy that \
                 has them with --seccomp-policy-dir"
            }
            PluginError::Plan(PlanError::Needs(NeedsError::Missing { .. })) => {
                "install it, or link the plugin with -Wl,-rpath or statically"
            }
            PluginError::Plan(PlanError::Needs(NeedsError::Elf { .. })) => {
                "give a program for x86_64; a script needs --disable-sandbox"
            }
            PluginError::Plan(PlanError::Needs(_)) => "check the path given with --plugin",
            PluginError::Plan(PlanError::Mount { .. }) => {
                "check the paths given with --plugin-mount"
            }
            PluginError::Policy(PolicyError::Read { .. }) => {
                "--seccomp-policy-dir is a folder with a file plugin.policy"
            }
            PluginError::Root(_) => "give a folder with --plugin-root",
            PluginError::Tap(error) => return error.remedy().map(str::to_owned),
            PluginError::Hung => {
                "it has a second from the shutdown event (crosvm_get_shutdown_eventfd) on"
            }
            _ => return None,
        };
        Some(text.into())
    }
}

/// Opens and checks all that the plugin's jail is made of: before the spawner is forked.
pub fn plan(config: &PluginConfig, sandbox: bool) -> Result<Plan, PluginError> {
    if let Some(root) = &config.root
        && !root.is_dir()
    {
        return Err(PluginError::Root(root.clone()));
    }
    let policy = match &config.policy_dir {
        // Without a jail it is read all the same, so that what is wrong with it is told.
        Some(folder) => Some(Policy::read(&folder.join("plugin.policy"))?),
        None => None,
    };
    Ok(Plan::new(&Spec {
        program: config.program.clone(),
        arguments: config.parameters.clone(),
        environment: if sandbox { Vec::new() } else { environment() },
        mounts: config.mounts.clone(),
        gid_maps: config.gid_maps.clone(),
        policy,
        // We name the call, and then end the plugin or not.
        violation: Violation::Notify,
        sandbox,
    })?)
}

/// Ours, for a plugin that runs plain.
fn environment() -> Vec<OsString> {
    let pair = |(name, value): (OsString, OsString)| {
        let mut text = name.into_vec();
        text.push(b'=');
        text.extend(value.into_vec());
        OsString::from_vec(text)
    };
    std::env::vars_os().filter(|(name, _)| name != "CROSVM_SOCKET").map(pair).collect()
}

/// Starts the plugin of the spawner's plan and waits until it runs. With it comes our end
/// of its connection.
///
/// To be called when all device processes serve: what the spawner says of them meanwhile
/// would go unheard.
pub fn start(
    spawner: &mut Spawner,
    program: &Path,
    sandbox: bool,
    seccomp: SeccompMode,
) -> Result<(PluginProcess, OwnedFd), PluginError> {
    let system = |what| move |source| PluginError::System { what, source };
    let flags = SockFlag::SOCK_CLOEXEC;
    let pair = || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (channel, stub_end) = pair().map_err(system("making a socket"))?;
    let (connection, plugin_end) = pair().map_err(system("making a socket"))?;
    let errno = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
    let (reader, writer) = pipe().map_err(errno).map_err(system("making a pipe"))?;
    let output = Output::new(reader).map_err(system("making a pipe"))?;

    let request = Request { role: plugin::ROLE.into(), id: ID.into(), sandbox };
    let (input, print) = (std::io::stdin(), std::io::stdout());
    let fds = [stub_end.as_fd(), plugin_end.as_fd(), writer.as_fd(), input.as_fd(), print.as_fd()];
    let ticket = spawner.spawn(&request, &fds)?;
    drop((stub_end, plugin_end, writer));
    let end = Instant::now() + START_LIMIT;
    let pid = loop {
        match spawner.next_event(end.saturating_duration_since(Instant::now()))? {
            Event::Started { ticket: of, pid, .. } if of == ticket => break pid,
            Event::Failed { ticket: of, step, message } if of == ticket => {
                return Err(PluginError::Refused { step, message });
            }
            Event::Exited { status, .. } => return Err(PluginError::Other(status)),
            _ => {}
        }
    };
    let listener = running(&channel, end)?;
    let goes_on = seccomp == SeccompMode::Log;
    let program = printable(&program.display().to_string());
    let process = PluginProcess {
        pid,
        program,
        output,
        open: true,
        violations: listener.map(|listener| Violations::new(listener, goes_on)),
        refused: None,
        lines: Throttle::default(),
        deadline: None,
    };
    Ok((process, connection))
}

/// Waits for the end of the stub's channel: its exec. What comes before is the listener of
/// the plugin's filter, or a failure.
#[allow(unsafe_code)] // owning what was received
fn running(channel: &OwnedFd, end: Instant) -> Result<Option<OwnedFd>, PluginError> {
    let failed = |source| PluginError::System { what: "waiting for it", source };
    let mut listener = None;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Err(failed(Errno::ETIMEDOUT)),
            Ok(_) => {}
            Err(errno) => return Err(failed(errno)),
        }
        let mut report = [0; stub::MAX_REPORT];
        let mut space = nix::cmsg_space!(RawFd);
        let mut parts = [IoSliceMut::new(&mut report)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(channel.as_raw_fd(), &mut parts, Some(&mut space), flags);
        let message = message.map_err(failed)?;
        let len = message.bytes;
        for control in message.cmsgs().map_err(failed)? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: new fds that nobody else knows; there is room for one.
                listener = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
            }
        }
        if len == 0 {
            return Ok(listener);
        }
        if let Some((step, message)) = stub::parse_report(&report[..len]) {
            return Err(PluginError::Refused {
                step: printable(&step),
                message: printable(&message),
            });
        }
    }
}
