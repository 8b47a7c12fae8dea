//! Asking the spawner for a jailed process, and waiting until it serves.
//!
//! Every cell is asked for before any is waited for, and the VMM sets KVM up in
//! between: the jails are built on the other CPU meanwhile.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use cellblock_devices::protocol::{CellStats, FromCell, Hello, LogLevel, SeccompMode, Start};
use cellblock_seccomp::spawner::{Event, ExitStatus, Request, Spawner};
use cellblock_seccomp::violation;
use cellblock_wire::{Access, Channel, ChannelError, Mapping};

use super::{Cell, CellError};
use crate::snapshot::dirty::WriteLogs;
use crate::snapshot::pager::{Invitation, Inviter};
use crate::throttle::Throttle;

/// The longest a cell may take from being asked for to serving.
const START_LIMIT: Duration = Duration::from_secs(10);

/// What every cell of a VM has in common.
#[derive(Clone, Copy, Debug)]
pub struct Common {
    /// What a violation does.
    pub seccomp: SeccompMode,
    /// False only with `--disable-sandbox`.
    pub sandbox: bool,
    /// Most detailed level logged.
    pub log: LogLevel,
    /// Who brings guest memory, where it is still to come. One VM's, for as long as the
    /// process lives.
    pub lazy: Option<&'static Inviter>,
    /// The logs of what processes write to guest memory; as above.
    pub writes: Option<&'static WriteLogs>,
}

/// Asks for a process that becomes what `start` says. `fds` are those `start`
/// documents; `vhost_user` is the device's end of the vhost-user connection.
pub fn launch(
    spawner: &mut Spawner,
    common: Common,
    id: &str,
    start: Start,
    fds: &[BorrowedFd<'_>],
    vhost_user: Option<UnixStream>,
) -> Result<Cell, CellError> {
    let role = match &start {
        Start::Blk(_) => "blk",
        Start::Serial(_) => "serial",
    };
    let channel_error = |source| CellError::Channel { role, id: id.to_string(), source };
    let shm_error = |source| CellError::Shm { role, id: id.to_string(), source };

    let (near, far) = Channel::pair().map_err(channel_error)?;
    let page = violation::new_page().map_err(shm_error)?;
    let violation = Mapping::new(&page, violation::PAGE, Access::ReadOnly).map_err(shm_error)?;
    let invited = common.lazy.filter(|_| role == "blk").map(Inviter::invite).transpose();
    let invited = invited.map_err(|error| CellError::Refused {
        role,
        id: id.to_string(),
        step: "inviting it to lazy memory".into(),
        message: crate::remedy::chain(&error),
    })?;
    let logs = common.writes.filter(|_| role == "blk");
    let log = logs.map(|logs| logs.issue(id)).transpose().map_err(shm_error)?;
    let hello = Hello {
        logged: log.as_ref().map(|(memory, _)| *memory),
        lazy: invited.as_ref().map(|invitation| invitation.chunks as u64),
        id: id.to_string(),
        seccomp: common.seccomp,
        sandbox: common.sandbox,
        log: common.log,
        start,
    };
    let mut all = vec![page.as_fd()];
    all.extend(invited.iter().flat_map(Invitation::fds));
    all.extend(log.iter().map(|(_, fd)| fd.as_fd()));
    all.extend_from_slice(fds);
    // Sent before the process exists: it waits in the socket.
    near.send(&hello, &all).map_err(channel_error)?;

    let far: OwnedFd = far.into_fd();
    let mut given = vec![far.as_fd()];
    given.extend(vhost_user.as_ref().map(|socket| socket.as_fd()));
    let request = Request { role: role.to_string(), id: id.to_string(), sandbox: common.sandbox };
    let ticket = spawner.spawn(&request, &given).map_err(|source| CellError::Spawner {
        role,
        id: id.to_string(),
        source,
    })?;
    Ok(Cell {
        role,
        id: id.to_string(),
        ticket,
        channel: near,
        violation,
        process: None,
        open: true,
        stats: CellStats::None,
        owes_stats: false,
        owes_answer: false,
        lines: Throttle::default(),
        counters: None,
        held: None,
        client: None,
        last_mark: None,
    })
}

/// Waits until every cell serves and its pid is known.
pub fn wait_ready(cells: &mut [&mut Cell], spawner: &mut Spawner) -> Result<(), CellError> {
    let end = Instant::now() + START_LIMIT;
    for cell in cells.iter_mut() {
        if let Err(error) = wait_served(cell, end) {
            return Err(why(cell, spawner, error));
        }
    }
    while cells.iter().any(|cell| cell.process.is_none()) {
        let event = spawner.next_event(end.saturating_duration_since(Instant::now())).map_err(
            |source| CellError::Spawner { role: cells[0].role, id: cells[0].id.clone(), source },
        )?;
        match event {
            Event::Started { ticket, pid, pidfd } => {
                if let Some(cell) = cells.iter_mut().find(|cell| cell.ticket == ticket) {
                    cell.process = Some((pid, pidfd));
                }
            }
            // Nobody would hear of it again.
            Event::Exited { pid, status } => {
                if let Some(cell) = cells.iter().find(|cell| cell.pid() == Some(pid)) {
                    return Err(died(cell, status));
                }
            }
            _ => {} // answers to what was not asked for yet
        }
    }
    Ok(())
}

fn died(cell: &Cell, status: ExitStatus) -> CellError {
    CellError::Died { role: cell.role, id: cell.id.clone(), how: cell.obituary(status) }
}

/// Why a cell is not serving yet.
enum NotServed {
    Refused { step: String, message: String },
    Channel(ChannelError),
}

fn wait_served(cell: &mut Cell, end: Instant) -> Result<(), NotServed> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(NotServed::Channel(ChannelError::TimedOut(START_LIMIT)));
        }
        match cell.channel.recv_timeout::<FromCell>(left) {
            Ok((FromCell::Ready, _)) => return Ok(()),
            Ok((FromCell::Log { level, message }, _)) => cell.log(level, &message),
            Ok((FromCell::Failed { step, message }, _)) => {
                return Err(NotServed::Refused { step, message });
            }
            Ok(_) => {} // nothing else is said before Ready; a cell that does is only odd
            Err(error) => return Err(NotServed::Channel(error)),
        }
    }
}

/// Finds the best explanation: the cell's own, the spawner's, the exit status.
fn why(cell: &mut Cell, spawner: &mut Spawner, error: NotServed) -> CellError {
    let (role, id) = (cell.role, cell.id.clone());
    let error = match error {
        NotServed::Refused { step, message } => {
            return CellError::Refused { role, id, step, message };
        }
        NotServed::Channel(ChannelError::Closed) => ChannelError::Closed,
        NotServed::Channel(error) => return CellError::Channel { role, id, source: error },
    };
    let end = Instant::now() + Duration::from_secs(1);
    while let Ok(event) = spawner.next_event(end.saturating_duration_since(Instant::now())) {
        match event {
            Event::Failed { ticket, step, message } if ticket == cell.ticket => {
                return CellError::Refused { role, id, step, message };
            }
            Event::Started { ticket, pid, pidfd } if ticket == cell.ticket => {
                cell.process = Some((pid, pidfd));
            }
            Event::Exited { pid, status } if Some(pid) == cell.pid() => {
                return died(cell, status);
            }
            _ => {}
        }
    }
    CellError::Channel { role, id, source: error }
}
