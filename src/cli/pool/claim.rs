//! `cellblock pool claim`.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cli::{Failure, output};
use crate::pool::service::client::PoolClient;
use crate::pool::service::protocol::{Answer, Request, to_hex};
use crate::slice;
use crate::spec::time;
use crate::vm::metadata::MAX_DATA;
use crate::vmm::restore::DiskOverride;
use crate::vmm::signals::Signals;

/// Claim a VM, say where it is, and hold it.
///
/// The VM is given back when this command ends: at the end of its standard input (ctrl-d on a
/// terminal; /dev/null has none), on a signal, or however else. When the VM ends by itself, so
/// does the command.
#[derive(Debug, Args)]
pub(super) struct Claim {
    /// The pool's socket, as given to 'cellblock pool serve --control'
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Hand this text to the guest, which finds it in its metadata (see README.md)
    #[arg(long, value_name = "TEXT", conflicts_with = "data_file")]
    data: Option<String>,
    /// Hand it the contents of this file
    #[arg(long, value_name = "FILE")]
    data_file: Option<PathBuf>,
    /// Change a disk, as for 'restore'; the VM is then made on demand. Again for more
    #[arg(long, value_name = "id=ID[,path=F][,cow]", value_parser = disk)]
    disk: Vec<String>,
    /// The snapshot, of a pool with '--mode shape'
    #[arg(long, value_name = "DIR")]
    snapshot: Option<PathBuf>,
    /// How long to wait for a VM: 5s, 500ms [default: what the pool says]
    #[arg(long, value_name = "TIME", value_parser = time)]
    timeout: Option<Duration>,
    /// Print the pool's answer as JSON, in its stable form (see README.md)
    #[arg(long)]
    json: bool,
}

impl Claim {
    pub(super) fn execute(self) -> Result<(), Failure> {
        // Before the VM says anything there is little to do, and that is waited for.
        slice::shorten_own();
        let mut signals = Signals::install()
            .map_err(|error| Failure::Error(format!("taking signals over: {error}")))?;
        let data = self.data()?;
        // The pool is somewhere else.
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        let snapshot = self.snapshot.map(absolute);
        let request = Request::Claim {
            data: None,
            data_hex: (!data.is_empty()).then(|| to_hex(&data)),
            disks: self.disk,
            snapshot,
            timeout_us: self.timeout.map(|time| time.as_micros() as u64),
        };
        let mut client = PoolClient::connect(&self.path).map_err(Failure::error)?;
        let (answer, line) = client.ask(&request).map_err(Failure::error)?;
        match answer {
            Answer::Claim(_) if self.json => output::print_line(&line)?,
            Answer::Claim(vm) => output::print(&format!(
                "id       {}\ncontrol  {}\nconsole  {}\n",
                vm.id,
                vm.control.display(),
                vm.console.display()
            ))?,
            _ => return Err(Failure::Error("the pool answered another question".into())),
        }
        hold(&mut client, &mut signals)
    }

    fn data(&self) -> Result<Vec<u8>, Failure> {
        let Some(path) = &self.data_file else {
            return Ok(self.data.clone().unwrap_or_default().into_bytes());
        };
        let read =
            |error: io::Error| Failure::Error(format!("reading {}: {error}", path.display()));
        let mut data = Vec::new();
        // One byte more than there is room for is told by the pool.
        File::open(path)
            .and_then(|file| file.take(MAX_DATA as u64 + 1).read_to_end(&mut data))
            .map_err(read)?;
        Ok(data)
    }
}

/// Until somebody ends it.
fn hold(client: &mut PoolClient, signals: &mut Signals) -> Result<(), Failure> {
    let stdin = io::stdin();
    let mut input = has_end(stdin.as_fd()).then_some(stdin.as_fd());
    loop {
        let watch = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![watch(client.as_fd()), watch(signals.as_fd())];
        fds.extend(input.map(watch));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Failure::Error(format!("waiting: {errno}"))),
        }
        let ready: Vec<bool> =
            fds.iter().map(|fd| fd.revents().is_some_and(|flags| !flags.is_empty())).collect();
        drop(fds);
        if ready[0] {
            return match client.hear().map_err(Failure::error)? {
                Some((Answer::Ended, _)) => Ok(()),
                _ => Err(Failure::Error("the pool has ended, and the VM with it".into())),
            };
        }
        if ready[1] && signals.take() {
            return Ok(());
        }
        if ready.get(2) == Some(&true) {
            let mut part = [0; 4096];
            match nix::unistd::read(stdin.as_fd(), &mut part) {
                Ok(0) => return Ok(()),
                Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) => {}
                // A terminal that is another program's at the moment.
                Err(_) => input = None,
            }
        }
    }
}

/// Whether the end of standard input means anything: that of /dev/null, or of one that is closed,
/// is there from the start.
fn has_end(stdin: BorrowedFd<'_>) -> bool {
    let Ok(file) = stdin.try_clone_to_owned().map(File::from) else { return false };
    let Ok(data) = file.metadata() else { return false };
    let null = std::fs::metadata("/dev/null");
    use std::os::unix::fs::MetadataExt;
    let is_null = null.is_ok_and(|null| null.rdev() == data.rdev());
    !(data.file_type().is_char_device() && is_null)
}

/// Checks it, and says it in words that mean the same to the pool, which is somewhere else.
fn disk(text: &str) -> Result<String, String> {
    text.parse::<DiskOverride>()?.absolute()
}
