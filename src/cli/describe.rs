//! `cellblock describe`.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::{Value, json};

use super::Failure;
use super::output;
use super::stats::bytes;
use crate::remedy::{one_line, printable};
use crate::snapshot::format::{self, Manifest};

/// Say what a snapshot is, damaged or not: reads its manifest only.
#[derive(Debug, Args)]
#[command(after_help = "Exit status: 2 if the snapshot's manifest is damaged or cannot be used.")]
pub(super) struct Describe {
    /// The snapshot's directory
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// One line of JSON
    #[arg(long)]
    json: bool,
}

impl Describe {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let found = format::describe(&self.dir).map_err(Failure::error)?;
        let fault = found.fault.as_ref().map(one_line);
        if self.json {
            output::print_line(&object(found.manifest.as_ref(), fault.as_deref()).to_string())?;
        } else if let Some(manifest) = &found.manifest {
            output::print(&text(manifest, fault.is_some()))?;
        }
        fault.map_or(Ok(()), |line| Err(Failure::Damaged(line)))
    }
}

fn text(manifest: &Manifest, damaged: bool) -> String {
    let mut lines = vec![
        ("id", manifest.id.to_string()),
        ("format", version(manifest)),
        ("made", format!("{}, by version {}", when(manifest), printable(&manifest.program))),
        ("memory", bytes(manifest.memory)),
        ("vcpus", manifest.vcpus.to_string()),
        ("state", bytes(manifest.state_len)),
    ];
    if manifest.live {
        lines.push(("live", "made while the guest ran".into()));
    }
    if let Some((id, path)) = &manifest.parent {
        lines.push(("parent", format!("{id} at {}", printable(&path.to_string_lossy()))));
    }
    for disk in &manifest.disks {
        lines.push(("disk", format!("{}, copied, {}", printable(&disk.id), bytes(disk.len))));
    }
    lines.push(("manifest", if damaged { "not to be used" } else { "whole" }.into()));
    lines.iter().map(|(name, value)| format!("{name:<9} {value}\n")).collect()
}

/// Damaged as it may be, it says what can be read.
fn object(manifest: Option<&Manifest>, fault: Option<&str>) -> Value {
    let Some(manifest) = manifest else {
        return json!({ "reply": "describe", "whole": false, "fault": fault });
    };
    let parent = manifest.parent.as_ref();
    let disks = manifest.disks.iter().map(|disk| json!({ "id": disk.id, "size": disk.len }));
    json!({
        "reply": "describe",
        "id": manifest.id.to_string(),
        "format": version(manifest),
        "created_us": manifest.created_us,
        "version": manifest.program,
        "memory": manifest.memory,
        "vcpus": manifest.vcpus,
        "state": manifest.state_len,
        "live": manifest.live,
        "parent": parent.map(|(id, _)| id.to_string()),
        "parent_path": parent.map(|(_, path)| path.to_string_lossy()),
        "disks": disks.collect::<Vec<_>>(),
        "whole": fault.is_none(),
        "fault": fault,
    })
}

fn version(manifest: &Manifest) -> String {
    format!("{}.{}", manifest.version.0, manifest.version.1)
}

/// The time of day, in UTC; the plain number where no calendar has it.
fn when(manifest: &Manifest) -> String {
    let time = UNIX_EPOCH.checked_add(Duration::from_micros(manifest.created_us));
    match time.and_then(calendar) {
        Some(text) => text,
        None => format!("{} us after 1970", manifest.created_us),
    }
}

fn calendar(time: SystemTime) -> Option<String> {
    let seconds = time.duration_since(UNIX_EPOCH).ok()?.as_secs();
    let (days, of_day) = ((seconds / 86_400) as i64, seconds % 86_400);
    // Years that begin in March have their odd day last.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    (year <= 9999)
        .then(|| format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        let at = |seconds| calendar(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0).as_deref(), Some("1970-01-01 00:00:00 UTC"));
        assert_eq!(at(951_782_400).as_deref(), Some("2000-02-29 00:00:00 UTC"));
        assert_eq!(at(1_790_000_000).as_deref(), Some("2026-09-21 14:13:20 UTC"));
        assert_eq!(at(300_000_000_000), None);
    }
}
