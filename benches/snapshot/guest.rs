//! A machine that runs, and its console.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const DISK_BYTES: u64 = 64 << 20;
/// The longest silence of a guest, in milliseconds.
const PATIENCE: u16 = 60_000;

/// What every machine uses.
pub struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    /// Writes the guest and an empty disk.
    pub fn prepare(dir: tempfile::TempDir) -> Files {
        let files = Files { dir };
        std::fs::write(files.path("guest"), cellblock::guest::BARE_GUEST).expect("guest");
        File::create(files.path("disk")).and_then(|f| f.set_len(DISK_BYTES)).expect("disk");
        files
    }

    /// A path among them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// What the guest is to be, with half of so much memory in use.
pub fn cmdline(mib: u64) -> String {
    format!("mode=snap touch={}", mib / 2)
}

/// A running machine. Dropping it ends it.
pub struct Guest {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
    /// Since its process was started.
    started: Instant,
    said: Vec<u8>,
}

impl Guest {
    /// Starts a machine with its console on pipes.
    pub fn start(command: &mut Command) -> Guest {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().expect("the machine starts");
        let output = child.stdout.take().expect("piped");
        let input = child.stdin.take().expect("piped");
        Guest { child, input, output, started, said: Vec::new() }
    }

    /// Waits for the first output; since the start.
    pub fn first_output(&mut self) -> Duration {
        self.more();
        self.started.elapsed()
    }

    /// Has it touch 64 MiB as soon as it says anything; since the start.
    pub fn touched(&mut self) -> Duration {
        // Not before: a console that is restored forgets what was typed at it.
        self.more();
        self.say("t");
        self.wait_for("touched")
    }

    /// Waits until it has said `word`, and forgets what it said so far; since the start.
    pub fn wait_for(&mut self, word: &str) -> Duration {
        while !self.said.windows(word.len()).any(|bytes| bytes == word.as_bytes()) {
            // What a word could begin in stays.
            let keep = self.said.len().saturating_sub(word.len());
            self.said.drain(..keep);
            self.more();
        }
        self.said.clear();
        self.started.elapsed()
    }

    fn more(&mut self) {
        let mut bytes = [0; 4096];
        let mut fds = [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(PATIENCE)), Ok(1), "the guest says nothing");
        let n = self.output.read(&mut bytes).expect("console");
        assert!(n > 0, "the guest ended");
        self.said.extend_from_slice(&bytes[..n]);
        assert!(!self.said.windows(5).any(|bytes| bytes == b"FAIL:"), "the guest failed");
    }

    /// Types at the console.
    pub fn say(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).expect("console");
    }

    /// Reads what it says while `act` runs, so that it is not held up.
    pub fn beside<R: Send>(&mut self, act: impl FnOnce() -> R + Send) -> R {
        let output = &mut self.output;
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut bytes = [0; 4096];
                loop {
                    let read = output.read(&mut bytes).unwrap_or(0);
                    if read == 0 || done.load(std::sync::atomic::Ordering::Relaxed) {
                        return;
                    }
                }
            });
            let result = act();
            // It prints without end, so that the reader sees this.
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            reader.join().expect("the reader");
            result
        })
    }

    /// Waits for it to end by itself.
    pub fn end(mut self) {
        let _ = std::io::copy(&mut self.output, &mut std::io::sink());
        let _ = self.child.wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Waits until there is something at `path`.
pub fn wait_for_path(path: &Path) {
    let end = Instant::now() + Duration::from_secs(10);
    while !path.exists() {
        assert!(Instant::now() < end, "nothing at {}", path.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}
