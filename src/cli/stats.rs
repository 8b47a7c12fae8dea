//! `cellblock stats`.

use std::fmt::Write as _;

use clap::Args;

use super::Failure;
use super::control::{Target, duration};
use super::output::Table;
use crate::control::protocol::{self, DeviceState, Reply, Request, State};
use crate::remedy::printable;

/// Show a VM's state and the counters of its vCPUs and devices.
#[derive(Debug, Args)]
pub(super) struct Stats {
    #[command(flatten)]
    target: Target,
}

impl Stats {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let mut client = self.target.connect()?;
        self.target.ask(&mut client, Request::Stats, |reply| match reply {
            Reply::Stats(stats) => Some(text(&stats)),
            _ => None,
        })
    }
}

fn text(stats: &protocol::Stats) -> String {
    // Writing to a string cannot fail.
    let mut out = String::new();
    let _ = writeln!(out, "state    {}", state(stats.state));
    let _ = writeln!(out, "uptime   {}", duration(stats.uptime_us));
    let _ = writeln!(out, "memory   {} MiB", stats.memory >> 20);
    let _ = writeln!(out, "pauses   {}", stats.epoch);
    let _ = writeln!(out, "vmm      pid {}, version {}", stats.pid, printable(&stats.version));

    let mut vcpus = Table::new(&["VCPU", "STATE", "EXITS"]);
    for vcpu in &stats.vcpus {
        let exits = match &vcpu.exits {
            Some(kinds) if !kinds.is_empty() => {
                kinds.iter().map(|(kind, n)| format!("{kind}={n}")).collect::<Vec<_>>().join(" ")
            }
            _ => String::new(),
        };
        vcpus.row(vec![vcpu.id.to_string(), state(vcpu.state).into(), exits]);
    }
    let _ = write!(out, "\n{}", vcpus.render());

    if !stats.disks.is_empty() {
        let mut disks = Table::new(&[
            "DISK", "PID", "STATE", "MODE", "SIZE", "READS", "WRITES", "FLUSHES", "READ",
            "WRITTEN", "ERRORS",
        ]);
        for disk in &stats.disks {
            disks.row(vec![
                disk.id.clone(),
                pid(disk.pid),
                device(disk.state).into(),
                if disk.read_only { "ro" } else { "rw" }.into(),
                bytes(disk.size),
                disk.reads.to_string(),
                disk.writes.to_string(),
                disk.flushes.to_string(),
                bytes(disk.counters.bytes_read),
                bytes(disk.counters.bytes_written),
                disk.errors.to_string(),
            ]);
        }
        let _ = write!(out, "\n{}", disks.render());
    }
    if !stats.serials.is_empty() {
        let mut serials = Table::new(&["SERIAL", "PID", "STATE", "OUTPUT", "INPUT", "DROPPED"]);
        for serial in &stats.serials {
            serials.row(vec![
                serial.id.clone(),
                pid(serial.pid),
                device(serial.state).into(),
                serial.output.to_string(),
                serial.input.to_string(),
                serial.dropped.to_string(),
            ]);
        }
        let _ = write!(out, "\n{}", serials.render());
    }
    out
}

fn pid(pid: Option<i32>) -> String {
    pid.map_or_else(|| "-".into(), |pid| pid.to_string())
}

fn state(state: State) -> &'static str {
    match state {
        State::Created => "created",
        State::Running => "running",
        State::Pausing => "pausing",
        State::Paused => "paused",
        State::Stopped => "stopped",
    }
}

fn device(state: DeviceState) -> &'static str {
    match state {
        DeviceState::Starting => "starting",
        DeviceState::Running => "running",
        DeviceState::Dead => "dead",
        DeviceState::Failed => "failed",
    }
}

/// Bytes for people, in the largest unit that leaves a number.
pub(super) fn bytes(n: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.iter().find(|(shift, _)| n >> shift > 0) {
        Some((shift, unit)) => format!("{:.1} {unit}", n as f64 / (1u64 << shift) as f64),
        None => format!("{n} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_a_number_before_the_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(64 << 20), "64.0 MiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
    }
}
