//! Starts the real program with the built-in guest, and watches it from outside.
//!
//! [`Vm::with`] says what to run; the [`Vm`] it starts has the guest's console on pipes
//! (or on a terminal), standard error collected, and a control socket. Whatever a test
//! waits for has a deadline, and a failure shows the console, standard error and the
//! exit status. Dropping a [`Vm`] ends all of its processes.
#![allow(dead_code, clippy::unwrap_used)] // every test uses a part of it; a test fails by panicking

pub mod deaths;
pub mod output;
pub mod proc;
pub mod snapshot;
pub mod trace;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cellblock::control::client::{Client, ClientError};
use cellblock::control::protocol::{Event, EventKind, Process, Reply, Request, Stats};
use cellblock::guest::BARE_GUEST;
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use output::{Events, Output};
use proc::Identity;

/// Longest wait for anything that is to happen: far more than it takes on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);
/// An ordinary user of the host.
pub const NOBODY: u32 = 65534;

/// What to run. Made by [`Vm::with`].
pub struct Options {
    cmdline: String,
    args: Vec<String>,
    disks: Vec<(u64, String)>,
    image: &'static [u8],
    memory: String,
    control: bool,
    terminal: Option<OpenptyResult>,
    kernel: PathBuf,
    user: bool,
    output: Option<OwnedFd>,
    program: Option<PathBuf>,
    prefix: Vec<String>,
    snapshot: Option<PathBuf>,
}

impl Options {
    /// vCPUs of the machine (the guest uses as many as its `cpus=` says).
    pub fn cpus(self, cpus: usize) -> Options {
        self.arg("--cpus").arg(cpus.to_string())
    }

    /// A further empty disk.
    pub fn disk(self, mib: u64) -> Options {
        self.disk_with(mib << 20, "")
    }

    /// A further empty disk of so many bytes, with `options` in its SPEC: `,ro,serial=x`.
    pub fn disk_with(mut self, bytes: u64, options: &str) -> Options {
        self.disks.push((bytes, options.into()));
        self
    }

    /// Another image than the guest with the PVH entry.
    pub fn image(mut self, image: &'static [u8]) -> Options {
        self.image = image;
        self
    }

    /// Memory other than 64M.
    pub fn memory(mut self, size: &str) -> Options {
        self.memory = size.into();
        self
    }

    /// A further argument of `cellblock run`.
    pub fn arg(mut self, arg: impl Into<String>) -> Options {
        self.args.push(arg.into());
        self
    }

    /// The console on a terminal: a pseudo-terminal the VMM is in the foreground of.
    pub fn terminal(self) -> Options {
        self.terminal_on(openpty(None, None).unwrap())
    }

    /// As [`Options::terminal`], on this one.
    pub fn terminal_on(mut self, pty: OpenptyResult) -> Options {
        self.terminal = Some(pty);
        self
    }

    /// The kernel at `path` instead of one of our images.
    pub fn kernel(mut self, path: &Path) -> Options {
        self.kernel = path.into();
        self
    }

    /// As an ordinary user, who may open /dev/kvm. Only root can.
    pub fn ordinary_user(mut self) -> Options {
        self.user = true;
        self
    }

    /// Another program to run than the one built for the tests.
    pub fn program(mut self, program: &Path) -> Options {
        self.program = Some(program.into());
        self
    }

    /// A command in front, that becomes the program by exec: `unshare -m`, `setpriv`...
    pub fn prefix(mut self, words: &[&str]) -> Options {
        self.prefix.extend(words.iter().map(|word| word.to_string()));
        self
    }

    /// No control socket.
    pub fn no_control(mut self) -> Options {
        self.control = false;
        self
    }

    /// Standard output is `to`, and nothing is collected from it.
    pub fn output(mut self, to: OwnedFd) -> Options {
        self.output = Some(to);
        self
    }

    /// Starts the program. It is alive on return; nothing has been waited for.
    #[track_caller]
    pub fn start(self) -> Vm {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(path("kernel"), self.image).unwrap();
        for (n, (bytes, _)) in self.disks.iter().enumerate() {
            File::create(path(&format!("disk{n}"))).unwrap().set_len(*bytes).unwrap();
        }

        let mut words: Vec<String> = Vec::new();
        let mut program =
            self.program.unwrap_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_cellblock")));
        if self.user {
            let copy = path("cellblock");
            copy_program(&program, &copy);
            program = copy;
            words.extend(become_user(dir.path()));
            for entry in fs::read_dir(dir.path()).unwrap() {
                chown(entry.unwrap().path(), Some(NOBODY), None).unwrap();
            }
            chown(dir.path(), Some(NOBODY), None).unwrap();
        }
        words.extend(self.prefix);
        if self.terminal.is_some() {
            words.extend(["setsid", "--ctty"].map(String::from));
        }
        words.push(program.to_str().unwrap().into());
        // A test that is killed leaves nothing behind.
        if let Some(snapshot) = &self.snapshot {
            words.extend(["restore", "--die-with-parent"].map(String::from));
            words.push(snapshot.to_str().unwrap().into());
        } else {
            words.extend(["run", "--die-with-parent", "--kernel"].map(String::from));
            words.push(self.kernel.to_str().unwrap().into());
            words.extend(["--memory".into(), self.memory, "--cmdline".into(), self.cmdline]);
        }
        for (n, (_, options)) in self.disks.iter().enumerate() {
            words.extend(["--disk".into(), format!("disk{n}{options}")]);
        }
        if self.control {
            words.extend(["--control", "control"].map(String::from));
        }
        words.extend(self.args);

        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).current_dir(dir.path()).env_remove("CELLBLOCK_LOG");
        command.stderr(Stdio::piped()).process_group(0);
        let (mut child, input, console, terminal);
        if let Some(pty) = self.terminal {
            // A group leader cannot start the session that the terminal belongs to.
            command.process_group(nix::unistd::getpgrp().as_raw());
            command.stdin(pty.slave.try_clone().unwrap());
            command.stdout(pty.slave.try_clone().unwrap());
            terminal = Some(pty.slave);
            child = command.spawn().unwrap();
            console = Output::collect(File::from(pty.master.try_clone().unwrap()));
            input = Some(File::from(pty.master));
        } else {
            terminal = None;
            command.stdin(Stdio::piped());
            command.stdout(self.output.map_or_else(Stdio::piped, Stdio::from));
            child = command.spawn().unwrap();
            console = match child.stdout.take() {
                Some(stdout) => Output::collect(File::from(OwnedFd::from(stdout))),
                None => Output::collect(std::io::empty()),
            };
            input = Some(File::from(OwnedFd::from(child.stdin.take().unwrap())));
        }
        let stderr = Output::collect(File::from(OwnedFd::from(child.stderr.take().unwrap())));
        Vm { child, status: None, input, console, stderr, terminal, client: None, dir }
    }
}

/// A running `cellblock run`.
pub struct Vm {
    child: Child,
    status: Option<ExitStatus>,
    input: Option<File>,
    /// What the guest prints.
    pub console: Output,
    /// What the VMM says.
    pub stderr: Output,
    terminal: Option<OwnedFd>,
    client: Option<Client>,
    dir: tempfile::TempDir,
}

impl Vm {
    /// A machine of one vCPU, 64 MiB and a control socket, whose guest's command line is
    /// `cmdline`: see `tests/guests/bare/src/main.rs` for what it can be.
    pub fn with(cmdline: &str) -> Options {
        Options {
            cmdline: cmdline.into(),
            args: Vec::new(),
            disks: Vec::new(),
            image: BARE_GUEST,
            memory: "64M".into(),
            control: true,
            terminal: None,
            kernel: "kernel".into(),
            user: false,
            output: None,
            program: None,
            prefix: Vec::new(),
            snapshot: None,
        }
    }

    /// The machine of a snapshot.
    pub fn restore(snapshot: &Path) -> Options {
        Options { snapshot: Some(snapshot.into()), ..Vm::with("") }
    }

    /// The VMM's process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// A file in the VM's directory: `control`, `disk0`, `kernel`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The terminal's slave side, of a VM that was started on one.
    pub fn terminal(&self) -> &OwnedFd {
        self.terminal.as_ref().expect("started with .terminal()")
    }

    /// Waits until the guest prints `text`, after what was waited for before; returns
    /// the whole line so far.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        self.wait_for_within(text, LIMIT)
    }

    /// As [`Vm::wait_for`], with another deadline.
    #[track_caller]
    pub fn wait_for_within(&mut self, text: &str, limit: Duration) -> String {
        match self.console.wait_for(text, limit) {
            Some(line) if !self.console.text().contains("FAIL") => line,
            Some(_) => self.fail("the guest found a fault"),
            None => self.fail(&format!("the guest did not print {text:?} within {limit:?}")),
        }
    }

    /// As [`Vm::wait_for`], and waits for the end of the line too.
    #[track_caller]
    pub fn wait_for_line(&mut self, text: &str) -> String {
        match self.console.wait_for_line(text, LIMIT) {
            Some(line) if !self.console.text().contains("FAIL") => line,
            Some(_) => self.fail("the guest found a fault"),
            None => self.fail(&format!("the guest did not print a line {text:?} within {LIMIT:?}")),
        }
    }

    /// Waits until the VMM says `text` on standard error; returns the line.
    #[track_caller]
    pub fn wait_for_error(&mut self, text: &str) -> String {
        match self.stderr.wait_for(text, LIMIT) {
            Some(line) => line,
            None => self.fail(&format!("standard error does not say {text:?}")),
        }
    }

    /// Types at the guest's console.
    #[track_caller]
    pub fn say(&mut self, bytes: &[u8]) {
        if let Err(error) = self.input.as_mut().expect("input is open").write_all(bytes) {
            self.fail(&format!("typing at the console: {error}"));
        }
    }

    /// The end at which the user types, for a thread of the test.
    pub fn take_input(&mut self) -> File {
        self.input.take().expect("input is open")
    }

    /// Ends the console's input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Asks over the control socket, on one connection for all requests.
    pub fn try_ask(&mut self, request: Request) -> Result<Reply, ClientError> {
        if self.client.is_none() {
            self.client = Some(Client::connect(&self.path("control"))?);
        }
        Ok(self.client.as_mut().unwrap().ask(request)?.0)
    }

    /// As [`Vm::try_ask`]; anything but an answer fails the test.
    #[track_caller]
    pub fn ask(&mut self, request: Request) -> Reply {
        match self.try_ask(request.clone()) {
            Ok(reply) => reply,
            Err(error) => self.fail(&format!("{request:?}: {}", cellblock::remedy::chain(&error))),
        }
    }

    /// Pauses; returns the epoch and how long it took.
    #[track_caller]
    pub fn pause(&mut self) -> (u64, Duration) {
        match self.ask(Request::Pause) {
            Reply::Pause { epoch, took_us } => (epoch, Duration::from_micros(took_us)),
            other => self.fail(&format!("pause was answered {other:?}")),
        }
    }

    /// Resumes; returns the epoch that ended.
    #[track_caller]
    pub fn resume(&mut self) -> u64 {
        match self.ask(Request::Resume) {
            Reply::Resume { epoch, .. } => epoch,
            other => self.fail(&format!("resume was answered {other:?}")),
        }
    }

    /// State and counters.
    #[track_caller]
    pub fn stats(&mut self) -> Stats {
        match self.ask(Request::Stats) {
            Reply::Stats(stats) => *stats,
            other => self.fail(&format!("stats was answered {other:?}")),
        }
    }

    /// Its processes, as it says itself.
    #[track_caller]
    pub fn ps(&mut self) -> Vec<Process> {
        match self.ask(Request::Ps) {
            Reply::Ps { processes } => processes,
            other => self.fail(&format!("ps was answered {other:?}")),
        }
    }

    /// The process id of `role` and `id`: (`vmm`, ``), (`spawner`, ``), (`blk`, `disk0`),
    /// (`serial`, `com1`).
    #[track_caller]
    pub fn pid_of(&mut self, role: &str, id: &str) -> i32 {
        let processes = self.ps();
        match processes.iter().find(|p| p.role == role && p.id == id) {
            Some(process) => process.pid,
            None => self.fail(&format!("no process {role} {id} in {processes:?}")),
        }
    }

    /// A further connection that receives events from the start of the VM.
    #[track_caller]
    pub fn events(&mut self) -> Events {
        let listen = || -> Result<Client, ClientError> {
            let mut client = Client::connect(&self.path("control"))?;
            client.ask(Request::Events)?;
            Ok(client)
        };
        match listen() {
            Ok(client) => Events::collect(client),
            Err(error) => self.fail(&format!("events: {}", cellblock::remedy::chain(&error))),
        }
    }

    /// Waits for an event that is `wanted`.
    #[track_caller]
    pub fn wait_for_event(
        &mut self,
        events: &Events,
        wanted: impl Fn(&EventKind) -> bool,
    ) -> Event {
        match events.wait_for(LIMIT, wanted) {
            Ok(event) => event,
            Err(seen) => self.fail(&format!("the event did not come, but {seen:?}")),
        }
    }

    /// Runs `cellblock COMMAND CONTROL ARGS...`; returns standard output.
    #[track_caller]
    pub fn cli(&mut self, command: &str, args: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_cellblock"))
            .arg(command)
            .arg(self.path("control"))
            .args(args)
            .output()
            .unwrap();
        if !output.status.success() {
            self.fail(&format!("cellblock {command}: {output:?}"));
        }
        String::from_utf8(output.stdout).unwrap()
    }

    /// Sends a signal to the VMM.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// All of its processes: the VMM and its descendants.
    pub fn processes(&self) -> Vec<Identity> {
        proc::family(self.pid())
    }

    /// Waits for the end; returns the exit status.
    #[track_caller]
    pub fn wait_exit(&mut self) -> ExitStatus {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.try_exit() {
                return status;
            }
            if Instant::now() > end {
                self.fail(&format!("the VMM did not end within {LIMIT:?}"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The exit status, if it has ended.
    pub fn try_exit(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().unwrap();
        }
        self.status
    }

    /// The end of a VM that ends well: status 0, no fault found by the guest, no process
    /// and no control path left.
    #[track_caller]
    pub fn ends_well(mut self) {
        let family = self.processes();
        let status = self.wait_exit();
        if status.code() != Some(0) {
            self.fail("the VM should have ended with status 0");
        }
        self.terminal = None; // its other side ends when nobody has it open any more
        if self.console.finished(LIMIT).contains("FAIL") {
            self.fail("the guest found a fault");
        }
        if let Err(left) = proc::wait_gone(&family, Duration::from_secs(1)) {
            self.fail(&format!("processes are left: {left:?}"));
        }
        if self.path("control").exists() {
            self.fail("the control path is still there");
        }
    }

    /// Fails the test with all there is to see.
    #[track_caller]
    pub fn fail(&mut self, why: &str) -> ! {
        let status = match self.try_exit() {
            Some(status) => {
                // What it said last may still be on its way to us.
                self.stderr.finished(Duration::from_secs(1));
                format!("ended with {status}")
            }
            None => "running".into(),
        };
        let console = self.console.text();
        let tail = console.char_indices().rev().nth(4000).map_or(0, |(at, _)| at);
        panic!(
            "{why}\n-- VMM {}: {status}\n-- console:\n{}\n-- standard error:\n{}\n--",
            self.child.id(),
            &console[tail..],
            self.stderr.text(),
        );
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let family = if self.status.is_none() { self.processes() } else { Vec::new() };
        let _ = self.child.kill();
        let _ = self.child.wait();
        if proc::wait_gone(&family, Duration::from_secs(2)).is_err() {
            family.iter().filter(|p| p.is_alive()).for_each(|p| send(p.pid, Signal::SIGKILL));
        }
    }
}

/// Sends a signal; a process that has ended is none to complain about.
pub fn send(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

/// Polls until `done`; `None` if that does not come within `limit`. For what the kernel
/// gives no notice of.
pub fn poll<T>(limit: Duration, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = done() {
            return Some(found);
        }
        if Instant::now() > end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// True for root, who alone can become other users; otherwise says what is skipped.
pub fn is_root(what: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped, because it needs root: {what}");
    }
    root
}

/// Puts the program where other users reach it. Another process copies it: a file that
/// this one has open for writing, a child forked meanwhile has too, and is not executable.
fn copy_program(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

/// The words in front of a command that make it an ordinary user's who may open
/// /dev/kvm: by its group, as everyone, or by a node of the user's own.
fn become_user(dir: &Path) -> Vec<String> {
    let kvm = fs::metadata("/dev/kvm").unwrap();
    let setpriv = |group: u32| format!("setpriv --reuid {NOBODY} --regid {group} --clear-groups");
    let words = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
    match kvm.mode() {
        mode if mode & 0o006 == 0o006 => words(&setpriv(NOBODY)),
        mode if mode & 0o060 == 0o060 => words(&setpriv(kvm.gid())),
        _ => {
            let node = dir.join("kvm");
            let (major, minor) =
                (nix::sys::stat::major(kvm.rdev()), nix::sys::stat::minor(kvm.rdev()));
            let script = format!(
                "mknod -m 666 {0} c {major} {minor} && mount --bind {0} /dev/kvm && exec {1} \"$@\"",
                node.display(),
                setpriv(NOBODY)
            );
            let mut all = words("unshare --mount sh -c");
            all.extend([script, "sh".into()]);
            all
        }
    }
}

/// Whether `fd` is a terminal in its usual mode (line by line, keys that signal).
pub fn is_cooked(fd: &OwnedFd) -> bool {
    use nix::sys::termios::{LocalFlags, tcgetattr};
    let usual = LocalFlags::ICANON | LocalFlags::ISIG | LocalFlags::ECHO;
    tcgetattr(fd.as_fd()).unwrap().local_flags.contains(usual)
}
