//! The life of a device process: hello, jail, prepare, seal, serve.
//!
//! | step | what | after it |
//! |---|---|---|
//! | hello | stray fds closed, parent-death signal set, [`Hello`] received | it knows what to be |
//! | jail | empty root, limits, no capabilities | nothing of the host can be named |
//! | prepare | memory mapped, threads started | everything it will ever need is there |
//! | seal | seccomp, all threads | only what the role's policy names can be asked of the kernel |
//! | serve | [`FromCell::Ready`], then the device | the first byte a guest can influence is read |
//!
//! Up to the seal a failure is told by [`FromCell::Failed`]; afterwards by a log
//! line. The process ends with status 0 when the VMM closes the channel, 1 on an
//! error, 101 on a panic, 159 on a refused system call.

mod log;

use std::error::Error;
use std::fmt::Write as _;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

use cellblock_seccomp::filter::{self, Mode, Policy};
use cellblock_seccomp::jail::{self, JailError};
use cellblock_seccomp::violation;
use cellblock_wire::{Access, Channel, Mapping};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::blk::{self, Blk};
use crate::lazy::Lazy;
use crate::protocol::write_log::{self, WriteLog};
use crate::protocol::{
    CELL_ARG, CELL_FD, FromCell, Hello, LogLevel, SeccompMode, Start, VHOST_USER_FD,
};
use crate::serial::{self, Serial};

/// The hello was sent before the process was asked for.
const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// The channel lives as long as the process: the log and the panic hook use it too.
static CHANNEL: OnceLock<Channel> = OnceLock::new();

/// Why a process ends other than by being told to.
enum Failure {
    /// It never served.
    Start { step: String, message: String },
    /// It served until this happened.
    Serve(String),
}

impl Failure {
    fn start(step: &str, error: &dyn Error) -> Failure {
        Failure::Start { step: step.into(), message: chain(error) }
    }

    /// A step that is part of a [`Result`] chain.
    fn at<E: Error>(step: &'static str) -> impl FnOnce(E) -> Failure {
        move |error| Failure::start(step, &error)
    }
}

impl From<JailError> for Failure {
    fn from(error: JailError) -> Failure {
        let message = format!("{}; {}", error.errno, error.remedy);
        Failure::Start { step: error.step.into(), message }
    }
}

/// The device, whichever it is.
enum Device {
    Blk(Blk),
    Serial(Box<Serial>),
}

/// Runs a device process. `args` are those of the process: its name, [`CELL_ARG`],
/// role, id. Must be called on the main thread, while it is the only one.
pub fn main(args: &[String]) -> ! {
    let Some(channel) = take_fd(CELL_FD) else {
        eprintln!("cellblock: {CELL_ARG} is for processes that cellblock itself starts");
        std::process::exit(2);
    };
    let channel = CHANNEL.get_or_init(|| Channel::from_fd(channel));
    let role = args.get(2).map_or("", String::as_str);
    let status = match live(role, channel) {
        Ok(()) => 0,
        Err(failure) => {
            // The VMM may be gone, or not listening: then nobody is left to be told.
            let _ = channel.try_send(
                &match failure {
                    Failure::Start { step, message } => FromCell::Failed { step, message },
                    Failure::Serve(message) => FromCell::Log { level: LogLevel::Error, message },
                },
                &[],
            );
            1
        }
    };
    exit_now(status)
}

fn live(role: &str, channel: &'static Channel) -> Result<(), Failure> {
    let is_virtio = role == "blk";
    let fds: &[RawFd] =
        if is_virtio { &[0, 1, 2, CELL_FD, VHOST_USER_FD] } else { &[0, 1, 2, CELL_FD] };
    jail::close_others(fds)?;
    jail::die_with_parent()?;
    ignore_terminal();

    let (hello, fds) =
        channel.recv_timeout::<Hello>(HELLO_LIMIT).map_err(Failure::at("receive hello"))?;
    log::start(channel, hello.log);
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        log::send(channel, LogLevel::Error, &format!("thread {name}: {panic}"));
        exit_now(101)
    }));
    let (policy, name) = match hello.start {
        Start::Blk(_) => (Policy::Blk, c"blk"),
        Start::Serial(_) => (Policy::Serial, c"serial"),
    };
    if name.to_str() != Ok(role) {
        let message = format!("hello is for a {name:?} process, and this is one for {role:?}");
        return Err(Failure::Start { step: "receive hello".into(), message });
    }
    // Cosmetic: exec by fd leaves a number as the name that ps shows.
    let _ = prctl::set_name(name);

    let mut fds = fds.into_iter();
    let page = fds.next();
    if hello.sandbox {
        jail::enter()?;
        install_violation(page, &format!("{role} {}", hello.id))?;
    }
    let lazy = hello.lazy.map(|chunks| Lazy::receive(&mut fds, chunks));
    let lazy = lazy.transpose().map_err(Failure::at("prepare for memory to come"))?;
    if let Some(memory) = hello.logged {
        log_writes(fds.next(), memory)?;
    }
    let mut device = prepare(hello.start, fds.collect())?;
    if let Device::Blk(blk) = &mut device {
        blk.memory_comes(lazy);
    }
    if hello.sandbox {
        let mode = match hello.seccomp {
            SeccompMode::Kill => Mode::Kill,
            SeccompMode::Log => Mode::Log,
        };
        filter::seal(policy, mode).map_err(Failure::at("seal with seccomp"))?;
    }
    let serving = |error: &dyn Error| Failure::Serve(chain(error));
    channel.send(&FromCell::Ready, &[]).map_err(|e| serving(&e))?;
    match device {
        Device::Blk(blk) => blk.serve(channel).map_err(|e| serving(&e)),
        Device::Serial(serial) => serial.serve(channel).map_err(|e| serving(&e)),
    }
}

fn prepare(start: Start, fds: Vec<OwnedFd>) -> Result<Device, Failure> {
    const STEP: &str = "prepare the device";
    match start {
        Start::Blk(config) => {
            let socket = take_fd(VHOST_USER_FD).ok_or_else(|| Failure::Start {
                step: STEP.into(),
                message: format!("fd {VHOST_USER_FD} should be a vhost-user socket"),
            })?;
            let socket = UnixStream::from(socket);
            blk::prepare(config, fds, socket).map(Device::Blk).map_err(Failure::at(STEP))
        }
        Start::Serial(config) => {
            let serial = serial::prepare(config, fds).map_err(Failure::at(STEP))?;
            Ok(Device::Serial(Box::new(serial)))
        }
    }
}

fn log_writes(log: Option<OwnedFd>, memory: u64) -> Result<(), Failure> {
    const STEP: &str = "prepare the log of writes to guest memory";
    let log = log.ok_or_else(|| Failure::Start {
        step: STEP.into(),
        message: "hello came without it".into(),
    })?;
    let mut log = WriteLog::map(log.as_fd(), memory).map_err(Failure::at(STEP))?;
    log.take_part();
    write_log::set_own(log);
    Ok(())
}

fn install_violation(page: Option<OwnedFd>, process: &str) -> Result<(), Failure> {
    const STEP: &str = "install the violation report";
    let page = page.ok_or_else(|| Failure::Start {
        step: STEP.into(),
        message: "hello came without a page for it".into(),
    })?;
    let page = Mapping::new(page, violation::PAGE, Access::ReadWrite).map_err(Failure::at(STEP))?;
    violation::install(page, process).map_err(Failure::at(STEP))
}

/// What the keyboard sends to the whole foreground process group is for the VMM to
/// act on; it ends its devices when they have said their last.
#[allow(unsafe_code)] // setting signal actions
fn ignore_terminal() {
    use Signal::{SIGHUP, SIGINT, SIGQUIT, SIGTSTP, SIGTTIN, SIGTTOU};
    for number in [SIGHUP, SIGINT, SIGQUIT, SIGTSTP, SIGTTIN, SIGTTOU] {
        // SAFETY: no handler is installed that could run anything.
        let _ = unsafe { signal(number, SigHandler::SigIgn) };
    }
}

#[allow(unsafe_code)] // owning an fd by its number
fn take_fd(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: borrowed for one fcntl, which fails where the number is no open fd.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_GETFD).ok()?;
    // SAFETY: it is open; whoever started this process left it there for us, and
    // each number is taken once.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Ends all threads at once, whatever they do and hold.
#[allow(unsafe_code)] // _exit has no wrapper
fn exit_now(status: i32) -> ! {
    // SAFETY: takes a number, runs nothing of this process any more.
    unsafe { libc::_exit(status) }
}

/// An error and its sources, on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(text, ": {error}"); // writing to a String cannot fail
        source = error.source();
    }
    text
}
