//! The demo's VM: a child process, its console and its control socket.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::show::{self, bad};
use super::{DemoError, PATIENCE};
use crate::control::client::Client;
use crate::control::protocol::{Process, Reply, Request};
use crate::guest::BARE_GUEST;

pub(super) struct DemoVm {
    /// When it was started.
    pub(super) started: Instant,
    child: Child,
    input: ChildStdin,
    lines: Receiver<(String, Instant)>,
    seen: Vec<String>,
    client: Option<Client>,
    control: PathBuf,
    dir: Rc<TemporaryDir>,
}

fn system(what: &'static str) -> impl Fn(std::io::Error) -> DemoError {
    move |source| DemoError::System { what, source }
}

/// This program.
fn program() -> Result<PathBuf, DemoError> {
    std::env::current_exe().map_err(system("finding the cellblock program"))
}

impl DemoVm {
    pub(super) fn start(memory: u64, disk: u64, work: u64) -> Result<DemoVm, DemoError> {
        let dir = Rc::new(TemporaryDir::new().map_err(system("making a temporary directory"))?);
        fs::write(dir.kernel(), BARE_GUEST).map_err(system("writing the built-in guest"))?;
        File::create(dir.disk())
            .and_then(|file| file.set_len(disk << 20))
            .map_err(system("making a disk image"))?;
        let mut command = Command::new(program()?);
        command
            .args(["run", "--die-with-parent", "-c", "1", "-m", &format!("{memory}M")])
            .args(["--cmdline", &format!("mode=demo mib={work}")])
            .arg("--kernel")
            .arg(dir.kernel())
            .arg("--disk")
            .arg(dir.disk());
        let control = dir.0.join("control");
        DemoVm::spawn(command, control, dir)
    }

    /// Takes a snapshot, as anyone would; returns how long the guest stood still.
    pub(super) fn snapshot(&self) -> Result<Duration, DemoError> {
        let output = Command::new(program()?)
            .arg("snapshot")
            .arg(&self.control)
            .arg(self.dir.snapshot())
            .args(["--disks", "copy", "--json"])
            .stderr(Stdio::inherit())
            .output()
            .map_err(system("starting cellblock snapshot"))?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .map_err(|_| bad("cellblock snapshot did not report".to_string()))?;
        let still = report["still_us"].as_u64().filter(|_| output.status.success());
        still
            .map(Duration::from_micros)
            .ok_or_else(|| bad(format!("cellblock snapshot ended with {}", output.status)))
    }

    /// Starts a second VM from the snapshot.
    pub(super) fn restore(&self) -> Result<DemoVm, DemoError> {
        let mut command = Command::new(program()?);
        command.args(["restore", "--die-with-parent"]).arg(self.dir.snapshot());
        DemoVm::spawn(command, self.dir.0.join("clone"), self.dir.clone())
    }

    fn spawn(
        mut command: Command,
        control: PathBuf,
        dir: Rc<TemporaryDir>,
    ) -> Result<DemoVm, DemoError> {
        let started = Instant::now();
        let mut child = command
            .arg("--control")
            .arg(&control)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(system("starting cellblock"))?;
        let input = child.stdin.take().expect("stdin was piped");
        let output = child.stdout.take().expect("stdout was piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let line = line.trim_end().to_string();
                if sender.send((line, Instant::now())).is_err() {
                    break;
                }
            }
        });
        Ok(DemoVm { started, child, input, lines, seen: Vec::new(), client: None, control, dir })
    }

    /// Waits for a console line that contains `text`; prints what comes.
    pub(super) fn wait_for(&mut self, text: &str) -> Result<(String, Instant), DemoError> {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok((line, at)) => {
                    show::console(&line);
                    self.seen.push(line.clone());
                    if line.contains("FAIL") {
                        return Err(bad(format!("the guest found a fault: {line}")));
                    }
                    if line.contains(text) {
                        return Ok((line, at));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(bad(format!("the guest did not print {text:?} in {PATIENCE:?}")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(bad(format!("the VM ended before it printed {text:?}")));
                }
            }
        }
    }

    /// A line that came within `time`, if one did.
    pub(super) fn quiet_for(&mut self, time: Duration) -> Option<String> {
        self.lines.recv_timeout(time).ok().map(|(line, _)| line)
    }

    /// The last line so far that contains `text`.
    pub(super) fn seen(&self, text: &str) -> Option<String> {
        self.seen.iter().rev().find(|line| line.contains(text)).cloned()
    }

    /// Types at the console.
    pub(super) fn say(&mut self, bytes: &[u8]) -> Result<(), DemoError> {
        self.input
            .write_all(bytes)
            .and_then(|()| self.input.flush())
            .map_err(system("typing at the guest's console"))
    }

    /// Asks over the control socket.
    pub(super) fn ask(&mut self, request: Request) -> Result<Reply, DemoError> {
        let client = match &mut self.client {
            Some(client) => client,
            none => none.insert(Client::connect(&self.control)?),
        };
        Ok(client.ask(request)?.0)
    }

    /// Guest memory that is counted in the processes' proportional sizes, in KiB.
    pub(super) fn resident_ram_kib(&self, processes: &[Process]) -> Result<u64, DemoError> {
        let mut total = 0;
        for process in processes {
            let smaps = match fs::read_to_string(format!("/proc/{}/smaps", process.pid)) {
                // It has died since it was listed, and has none.
                Err(error) if is_gone(&error) => continue,
                result => result.map_err(system("reading the memory map of a device process"))?,
            };
            let mut ram = false;
            for line in smaps.lines() {
                let mut words = line.split_whitespace();
                let first = words.next().unwrap_or_default();
                if first.contains('-') {
                    ram = line.contains(crate::vm::memory::MEMFD_NAME);
                } else if ram && first == "Pss:" {
                    total += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
                }
            }
        }
        Ok(total)
    }

    /// Checks that the first `mib` of the image are no longer empty.
    pub(super) fn check_disk(&self, mib: u64) -> Result<(), DemoError> {
        let reading = system("reading the disk image");
        let mut file = File::open(self.dir.disk()).map_err(&reading)?;
        let mut block = [0; 4096];
        for n in 0..mib << 8 {
            file.read_exact(&mut block).map_err(&reading)?;
            if block.iter().all(|byte| *byte == 0) {
                return Err(bad(format!("block {n} of the image is empty")));
            }
        }
        Ok(())
    }

    /// Waits for the end, and until none of `processes` is left.
    pub(super) fn finish(mut self, processes: &[Process]) -> Result<(), DemoError> {
        let end = Instant::now() + PATIENCE;
        let wait = |late: &str| match Instant::now() > end {
            true => Err(bad(format!("{late} after {PATIENCE:?}"))),
            false => {
                std::thread::sleep(Duration::from_millis(2));
                Ok(())
            }
        };
        loop {
            match self.child.try_wait().map_err(system("waiting for the VM"))? {
                Some(status) if status.success() => break,
                Some(status) => return Err(bad(format!("the VM ended with {status}"))),
                None => wait("the VM had not ended")?,
            }
        }
        for process in processes {
            while Path::new("/proc").join(process.pid.to_string()).exists() {
                wait(&format!("the {} process {} was still there", process.role, process.pid))?;
            }
        }
        Ok(())
    }
}

impl Drop for DemoVm {
    fn drop(&mut self) {
        // Already over, unless a step failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory only we can enter, removed with everything in it.
struct TemporaryDir(PathBuf);

impl TemporaryDir {
    fn new() -> std::io::Result<TemporaryDir> {
        let path = std::env::temp_dir().join(format!("cellblock-demo-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(TemporaryDir(path))
    }

    fn kernel(&self) -> PathBuf {
        self.0.join("guest")
    }

    fn disk(&self) -> PathBuf {
        self.0.join("disk")
    }

    fn snapshot(&self) -> PathBuf {
        self.0.join("snapshot")
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether there is no such process any more.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
