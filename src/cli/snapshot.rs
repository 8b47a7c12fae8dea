//! `cellblock snapshot`.
//!
//! The VM makes the cut and hands it over; writing it down is done here, with the rights of
//! whoever asked, while the guest runs on.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use super::control::{Target, duration};
use super::{Failure, output};
use crate::control::client::{Client, Cut};
use crate::control::protocol::{Reply, Request, SnapshotDisk};
use crate::snapshot::format::{Base, CHUNK, Chain, Contents, Manifest, Writer};
use crate::snapshot::state::device::Fingerprint;
use crate::snapshot::state::{DiskRecord, MicrovmState, StateError};
use crate::spec::time;

/// What the VM may take beyond the phases' own limits: copying its memory.
const COPYING: Duration = Duration::from_secs(600);
/// Longest wait for a VM that is stopped to end.
const END: Duration = Duration::from_secs(30);

/// What becomes of the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Disks {
    /// The snapshot names them; it can be restored as long as they are not changed
    Reference,
    /// The snapshot holds a copy of each, shared with the image where the file system can
    Copy,
}

/// Write a running VM down: its memory, its vCPUs, its devices.
///
/// All processes of the VM stand still for one moment, all or none; the guest notices a pause.
/// What follows, the writing, goes on beside it. On a failure, or when interrupted, nothing is
/// left at DIR, and the VM goes on.
#[derive(Debug, Args)]
pub(super) struct Snapshot {
    #[command(flatten)]
    target: Target,
    /// The directory to be made; nothing may be there
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Write down only what was written since PARENT, the last snapshot of this VM or the one
    /// that it was restored from (with '--track'); PARENT has to stay where it is
    #[arg(long, value_name = "PARENT")]
    diff: Option<PathBuf>,
    /// Copy memory while the guest runs; it stands still for the rest only
    #[arg(long, conflicts_with = "stop")]
    live: bool,
    /// Stop the VM afterwards: the guest does not run on
    #[arg(long)]
    stop: bool,
    /// What becomes of the disks
    #[arg(long, value_enum, default_value = "reference")]
    disks: Disks,
    /// How long vCPUs and device processes may take to come to rest: 500ms, 5s
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = time)]
    timeout: Duration,
    /// Wait until the VM says that it is time, on the connection that is standard input
    #[arg(long, hide = true)]
    when_triggered: bool,
}

impl Snapshot {
    pub(super) fn execute(&self) -> Result<(), Failure> {
        let mut client = self.connect()?;
        let mut trigger = "command".to_string();
        if self.when_triggered {
            match client.await_trigger().map_err(Failure::error)? {
                Some(told) => trigger = told,
                None => return Ok(()),
            }
        }
        let begun = Instant::now();
        let stats = match client.ask(Request::Stats).map_err(Failure::error)?.0 {
            Reply::Stats(stats) => stats,
            _ => return Err(Failure::Error("the VM answered another question".into())),
        };
        let vcpus = u32::try_from(stats.vcpus.len()).unwrap_or(u32::MAX);
        if self.live && self.disks == Disks::Copy {
            return Err(Failure::Usage(
                "'--live' cannot be used with '--disks copy', for which the VM stands still".into(),
            ));
        }
        let contents = Contents { memory: stats.memory, vcpus, live: self.live };
        // Before the VM is disturbed: whether there is a place to write to.
        let parent = self.diff.as_deref().map(Chain::open).transpose().map_err(Failure::error)?;
        let base = parent.as_ref().map(|chain| Base::of(chain, &self.directory));
        let base = base.transpose().map_err(Failure::error)?;
        let mut writer = Writer::create(&self.directory, contents, base).map_err(Failure::error)?;
        let cancel = writer.cancel();
        super::cancel_on_signals(&cancel)?;
        let hold = self.holds();
        let limit = self.timeout * 2 + COPYING;
        let cut = client.snapshot_unless(&cancel, hold, self.live, self.timeout, &trigger, limit);
        let cut = cut.map_err(Failure::error)?;
        let held = Instant::now();
        self.fill(&mut writer, &cut, parent.as_ref())?;
        if hold {
            // What was read is of one moment only if the VM has not gone on meanwhile.
            client.ask(Request::Held).map_err(Failure::error)?;
        }
        let mut still_us = cut.report.still_us;
        if hold && !self.stop {
            client.ask(Request::Resume).map_err(Failure::error)?;
            let report = &cut.report;
            still_us = report.pause_us
                + report.drain_us
                + report.capture_us
                + report.memory_us
                + held.elapsed().as_micros() as u64;
        }
        if self.disks == Disks::Reference {
            make_durable(&cut)?;
        }
        let manifest = writer.commit().map_err(Failure::error)?;
        if self.stop {
            stop(&mut client)?;
        } else {
            // If it is not told, the next diff will have to be to another.
            let _ = client.ask(Request::Kept { id: manifest.id.to_string() });
        }
        self.report(&cut, &manifest, still_us, begun.elapsed())
    }

    /// Whether the VM stands still until all is read. Whoever holds it has to be connected: it goes
    /// on when we end, however that is.
    fn holds(&self) -> bool {
        self.stop || self.disks == Disks::Copy
    }

    fn connect(&self) -> Result<Client, Failure> {
        if !self.when_triggered {
            return self.target.connect();
        }
        let stream = std::io::stdin().as_fd().try_clone_to_owned();
        let stream =
            stream.map_err(|e| Failure::Error(format!("taking the connection over: {e}")))?;
        Ok(Client::from_stream(stream.into()))
    }

    /// Everything that has to be read while the cut is held.
    fn fill(&self, writer: &mut Writer, cut: &Cut, parent: Option<&Chain>) -> Result<(), Failure> {
        match parent {
            Some(parent) => {
                let pages = pages_since(parent, cut)?;
                writer.copy_pages(cut.memory.as_fd(), &pages).map_err(Failure::error)?;
            }
            None => writer.copy_all(cut.memory.as_fd()).map_err(Failure::error)?,
        }
        let mut state = Vec::new();
        let mut file = File::from(cut.state.try_clone().map_err(state_error)?);
        file.rewind().and_then(|()| file.read_to_end(&mut state)).map_err(state_error)?;
        writer.state(&state).map_err(Failure::error)?;
        let records = if self.holds() { records(&state)? } else { Vec::new() };
        let mut written = cut.written.iter();
        for disk in &cut.report.disks {
            let mut record = records.iter().filter(|(id, _)| !disk.cow && *id == disk.id);
            let image = record.next().map(|(_, record)| open_image(disk, record)).transpose()?;
            // The image of a cow disk is never written to: a reference will do.
            let image = match (disk.cow, self.disks) {
                (true, _) => written.next().map(|fd| fd.try_clone().map(File::from)).transpose(),
                (false, Disks::Copy) => Ok(image),
                (false, Disks::Reference) => Ok(None),
            };
            if let Some(image) = image.map_err(state_error)? {
                writer.disk(&disk.id, &image).map_err(Failure::error)?;
            }
        }
        Ok(())
    }

    fn report(
        &self,
        cut: &Cut,
        manifest: &Manifest,
        still_us: u64,
        took: Duration,
    ) -> Result<(), Failure> {
        if !self.target.json {
            let still = if self.stop {
                "the VM is stopped".to_string()
            } else {
                format!("the guest stood still for {}", duration(still_us))
            };
            let without = match &cut.report.without[..] {
                [] => String::new(),
                names => {
                    let names = crate::remedy::printable(&names.join(", "));
                    format!("; for inspection only: no state of {names}")
                }
            };
            return output::print(&format!(
                "snapshot {} in {}, {still}{without}\n",
                manifest.id,
                duration(took.as_micros() as u64)
            ));
        }
        // The VM's report, and what became of it here.
        let mut line: serde_json::Value = serde_json::from_str(&cut.line)
            .map_err(|e| Failure::Error(format!("reading the VM's report: {e}")))?;
        line["still_us"] = still_us.into();
        line["id"] = manifest.id.to_string().into();
        line["took_us"] = (took.as_micros() as u64).into();
        output::print_line(&line.to_string())
    }
}

/// The pages that were written since `parent`, if the VM knows.
fn pages_since(parent: &Chain, cut: &Cut) -> Result<Vec<u64>, Failure> {
    let wanted = parent.manifest().id.to_string();
    let (Some(pages), Some(base)) = (&cut.pages, &cut.report.base) else {
        return Err(Failure::Error(
            "the VM does not know what was written since PARENT: it has taken no snapshot yet, or \
             a program that attached writes to its memory untold; take a full one first, or \
             restore with '--track'"
                .into(),
        ));
    };
    if *base != wanted {
        return Err(Failure::Error(format!(
            "the VM knows what was written since snapshot {}, and PARENT is {wanted}; give that \
             one, or take a full snapshot",
            crate::remedy::printable(base)
        )));
    }
    // A bit for each page, no more.
    let mut bytes = vec![0; (cut.report.memory / CHUNK as u64 * 8) as usize];
    File::from(pages.try_clone().map_err(state_error)?)
        .read_exact_at(&mut bytes, 0)
        .map_err(state_error)?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

fn state_error(error: std::io::Error) -> Failure {
    Failure::Error(format!("reading the state of the VM: {error}"))
}

/// A reference is worth nothing if what it refers to is lost with the power.
fn make_durable(cut: &Cut) -> Result<(), Failure> {
    for disk in cut.report.disks.iter().filter(|disk| !disk.cow) {
        open(&disk.id, &disk.path)?
            .sync_all() // its time of last change too, by which it is known again
            .map_err(|e| Failure::Error(format!("making disk '{}' durable: {e}", disk.id)))?;
    }
    Ok(())
}

/// What the disks of a VM are made of, but for those of other programs.
fn records(state: &[u8]) -> Result<Vec<(String, DiskRecord)>, Failure> {
    let read = |error: StateError| {
        Failure::Error(format!("reading the state of the VM: {}", crate::remedy::chain(&error)))
    };
    let mut records = Vec::new();
    for device in MicrovmState::decode(state).map_err(read)?.device_states {
        if let Some(disk) = device.as_disk().map_err(read)? {
            records.push((device.id, disk.record));
        }
    }
    Ok(records)
}

/// Opens the image of a VM that stands still: what has its name may be another file by now.
fn open_image(disk: &SnapshotDisk, record: &DiskRecord) -> Result<File, Failure> {
    let image = open(&disk.id, &disk.path)?;
    match Fingerprint::of(image.as_fd()) {
        Ok(found) if found == record.fingerprint => Ok(image),
        Ok(_) => Err(Failure::Error(format!(
            "the file at {} is not the image that disk '{}' has: it was put there since; put that \
             image back",
            crate::remedy::printable(&disk.path.to_string_lossy()),
            disk.id
        ))),
        Err(errno) => Err(Failure::Error(format!("looking at disk '{}': {errno}", disk.id))),
    }
}

fn open(id: &str, path: &Path) -> Result<File, Failure> {
    let nonblock = nix::libc::O_NONBLOCK; // of a pipe, whose other end nobody has
    File::options().read(true).custom_flags(nonblock).open(path).map_err(|e| {
        let path = crate::remedy::printable(&path.to_string_lossy());
        Failure::Error(format!("opening disk '{id}' at {path}: {e}"))
    })
}

fn stop(client: &mut Client) -> Result<(), Failure> {
    client.ask(Request::Stop).map_err(Failure::error)?;
    if client.wait_closed(END) {
        return Ok(());
    }
    Err(Failure::Error(format!(
        "the snapshot is there, but the VM did not end within {} s; kill its VMM process",
        END.as_secs()
    )))
}
