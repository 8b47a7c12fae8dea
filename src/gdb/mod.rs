//! `cellblock gdb`: a debugger on a running VM, by the remote protocol of gdb.
//!
//! A program of its own that attaches as any other may ([`cellblock_plugin_api`]): the VMM knows
//! nothing of gdb. vCPUs are threads. While gdb waits, every vCPU is stopped; when it detaches, or
//! this program dies, all of them run on without breakpoints.

mod machine;
mod registers;
mod target;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use gdbstub::common::Signal;
use gdbstub::conn::ConnectionExt;
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};

use crate::control::socket::{ListeningSocket, SocketError};
use crate::remedy::Remedy;
use machine::Machine;
use target::Debugged;

/// What ends a debugging session, or keeps it from starting.
#[derive(Debug, thiserror::Error)]
pub enum GdbError {
    /// The VM.
    #[error("attaching to the VM at {}", path.display())]
    Attach {
        /// Its plugin socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: cellblock_plugin_api::Error,
    },
    /// Its memory is kept from programs that attach.
    #[error("the VM at {} hands out no memory, which gdb cannot do without", .0.display())]
    NoMemory(PathBuf),
    /// The socket for gdb.
    #[error("making the socket for gdb")]
    Listen(#[from] SocketError),
    /// Somebody who connects to it.
    #[error("waiting for gdb")]
    Accept(#[source] io::Error),
    /// The VM while it is debugged.
    #[error("debugging the VM")]
    Vm(#[from] cellblock_plugin_api::Error),
    /// The connection to gdb, or what it says.
    #[error("talking to gdb: {0}")]
    Protocol(String),
}

impl Remedy for GdbError {
    fn remedy(&self) -> Option<String> {
        match self {
            GdbError::Attach { .. } => Some(
                "start it with --plugin-socket PATH, and give that path or its control socket"
                    .into(),
            ),
            GdbError::NoMemory(_) => {
                Some("start it with --plugin-socket PATH,memory=rw (or ro, to look only)".into())
            }
            GdbError::Listen(error) => error.remedy(),
            _ => None,
        }
    }
}

/// Serves gdb at `listen`, one after the other, until the VM ends.
///
/// # Errors
/// [`GdbError`].
pub fn serve(vm: &Path, listen: &Path, ready: impl FnOnce()) -> Result<(), GdbError> {
    // Tried out before anybody waits in vain.
    if attach(vm)?.guest_memory().is_err_and(|error| error.errno() == libc::EPERM) {
        return Err(GdbError::NoMemory(vm.to_owned()));
    }
    let socket = ListeningSocket::bind(listen)?;
    let (listener, _node) = socket.into_listener();
    ready();
    loop {
        let (stream, _) = listener.accept().map_err(GdbError::Accept)?;
        match attach(vm).and_then(Machine::stop).and_then(|machine| debug(stream, machine)) {
            Ok(reason) => tracing::info!(?reason, "gdb has left"),
            Err(GdbError::Vm(cellblock_plugin_api::Error::Closed)) => return Ok(()),
            Err(error @ GdbError::Attach { .. }) => return Err(error),
            // gdb is gone, or does not speak its protocol: the next one may.
            Err(error) => tracing::warn!(error = crate::remedy::chain(&error), "gdb"),
        }
    }
}

fn attach(path: &Path) -> Result<cellblock_plugin_api::Vm, GdbError> {
    let failed = |source| GdbError::Attach { path: path.to_owned(), source };
    cellblock_plugin_api::Vm::attach(path).map_err(failed)
}

fn debug(stream: UnixStream, machine: Machine) -> Result<DisconnectReason, GdbError> {
    let mut target = Debugged::new(machine);
    let stub = GdbStub::new(stream);
    match stub.run_blocking::<Loop>(&mut target) {
        Ok(DisconnectReason::Kill) => {
            // A debugger does not end a VM.
            Ok(DisconnectReason::Kill)
        }
        Ok(reason) => Ok(reason),
        Err(error) if error.is_target_error() => Err(match error.into_target_error() {
            Some(error) => GdbError::Vm(error),
            None => GdbError::Protocol("the target failed".into()),
        }),
        Err(error) => Err(GdbError::Protocol(error.to_string())),
    }
}

enum Loop {}

impl BlockingEventLoop for Loop {
    type Target = Debugged;
    type Connection = UnixStream;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut Debugged,
        conn: &mut UnixStream,
    ) -> Result<
        Event<MultiThreadStopReason<u64>>,
        WaitForStopReasonError<cellblock_plugin_api::Error, io::Error>,
    > {
        loop {
            if let Some(reason) = target.stopped().map_err(WaitForStopReasonError::Target)? {
                return Ok(Event::TargetStopped(reason));
            }
            if conn.peek().map_err(WaitForStopReasonError::Connection)?.is_some() {
                let byte = ConnectionExt::read(conn).map_err(WaitForStopReasonError::Connection)?;
                return Ok(Event::IncomingData(byte));
            }
        }
    }

    fn on_interrupt(
        target: &mut Debugged,
    ) -> Result<Option<MultiThreadStopReason<u64>>, cellblock_plugin_api::Error> {
        target.stop_all()?;
        Ok(Some(MultiThreadStopReason::Signal(Signal::SIGINT)))
    }
}
