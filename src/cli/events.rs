//! `cellblock events`.

use clap::Args;

use super::control::{Target, duration};
use super::{Failure, output};
use crate::control::client::ClientError;
use crate::control::protocol::{Event, EventKind, Request, Shutdown};
use crate::remedy::printable;

/// Follow what happens to a VM until it ends.
///
/// Starts with the events of the recent past (up to 256). Ends with status 0 at the
/// shutdown event, with status 1 if the VM goes away without one.
#[derive(Debug, Args)]
pub(super) struct Events {
    #[command(flatten)]
    target: Target,
}

impl Events {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let mut client = self.target.connect()?;
        client.ask(Request::Events).map_err(Failure::error)?;
        loop {
            let Some((event, line)) = client.next_event().map_err(Failure::error)? else {
                return Err(Failure::error(ClientError::Vanished));
            };
            output::print_line(&if self.target.json { line } else { text(&event) })?;
            if matches!(event.kind, EventKind::Shutdown { .. }) {
                return Ok(());
            }
        }
    }
}

fn text(event: &Event) -> String {
    let what = match &event.kind {
        EventKind::Start => "started".to_owned(),
        EventKind::Reset { took_us, pages, .. } => {
            format!("put back to its snapshot in {} ({pages} pages)", duration(*took_us))
        }
        EventKind::Snapshot { epoch, still_us } => {
            format!("snapshot {epoch} cut, guest stood still for {}", duration(*still_us))
        }
        EventKind::SnapshotFailed { phase, who, why } => {
            format!("snapshot given up: {phase}: {who}: {why}")
        }
        EventKind::Pause { epoch, took_us } => {
            format!("paused in {} (pause {epoch})", duration(*took_us))
        }
        EventKind::Resume { epoch } => format!("resumed (pause {epoch})"),
        EventKind::Marker { marker, source } => format!("guest marker {marker} by {source}"),
        EventKind::DeviceDied { role, id, pid, how } => {
            format!("device process {role} {id} (pid {pid}) died: {how}")
        }
        EventKind::DeviceReplaced { role, id, pid, took_us, .. } => {
            let took = duration(*took_us);
            format!("another process (pid {pid}) took over {role} {id} after {took}")
        }
        EventKind::DeviceFailed { role, id, deaths } => {
            format!("{role} {id} has failed: {deaths} of its processes died within 10 s")
        }
        EventKind::DeviceHung { role, id, pid } => {
            format!("device process {role} {id} (pid {pid}) hangs, and is ended")
        }
        EventKind::DeviceStalled { role, id } => {
            format!("device process {role} {id} does not answer the guest")
        }
        EventKind::BackEndGone { id } => format!("the vhost-user back end of {id} is gone"),
        EventKind::BackEndBack { id, resumed: true } => {
            format!("the vhost-user back end of {id} is back")
        }
        EventKind::BackEndBack { id, resumed: false } => {
            format!("the vhost-user back end of {id} is back; the driver has to reset the disk")
        }
        EventKind::NeedsReset { id } => {
            format!("the driver of {id} broke the rules of its queue and has to reset the device")
        }
        EventKind::Violation { process, syscall, thread } => {
            format!("{process} made a forbidden system call: {syscall}, thread {thread}")
        }
        EventKind::Shutdown { reason, message } => {
            let reason = match reason {
                Shutdown::PowerOff => "ended: the guest switched itself off",
                Shutdown::Reset => "ended: the guest asked for a reset",
                Shutdown::Stopped => "ended: stopped from outside",
                Shutdown::Error => "ended by an error",
            };
            match message {
                Some(message) => format!("{reason}: {message}"),
                None => reason.to_owned(),
            }
        }
    };
    let (seconds, us) = (event.time_us / 1_000_000, event.time_us % 1_000_000);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    printable(&format!("{:>4}  {hour:02}:{minute:02}:{second:02}.{us:06}Z  {what}", event.seq))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_with_its_time() {
        let event = Event {
            seq: 3,
            time_us: 1_700_000_000_000_042,
            kind: EventKind::Marker { marker: "heart\nbeat".into(), source: "port".into() },
        };
        assert_eq!(text(&event), "   3  22:13:20.000042Z  guest marker heart beat by port");
    }
}
