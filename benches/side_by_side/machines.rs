//! The machines that are compared, and how to talk to their guests.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// As shipped: two jailed device processes.
    Cellblock,
    /// The same processes without namespaces and seccomp.
    WithoutJails,
    /// One process: `-M microvm` with KVM.
    Qemu,
}

impl Machine {
    /// For the table.
    pub fn name(self) -> &'static str {
        match self {
            Machine::Cellblock => "cellblock",
            Machine::WithoutJails => "cellblock, no jails",
            Machine::Qemu => "qemu -M microvm",
        }
    }
}

/// The files every machine uses.
pub struct Bench {
    /// Removed at the end.
    pub dir: tempfile::TempDir,
    kernel: PathBuf,
    disk: PathBuf,
    ram_mib: u64,
}

/// Whether Debian's `qemu-system-x86` is installed.
pub fn qemu_available() -> bool {
    Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

impl Bench {
    /// Writes the guest and a disk image whose pages are all in the page cache.
    pub fn prepare(disk_bytes: u64, ram_mib: u64) -> Bench {
        // In memory where that is possible, so that no write-back is measured.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let dir = dir.expect("temporary directory");
        let kernel = dir.path().join("guest");
        std::fs::write(&kernel, cellblock::guest::BARE_GUEST).expect("guest");
        let disk = dir.path().join("disk");
        let mut file = File::create(&disk).expect("disk");
        let mib: Vec<u8> = (0..1 << 20).map(|n| (n * 31 % 251) as u8).collect();
        for _ in 0..disk_bytes >> 20 {
            file.write_all(&mib).expect("disk");
        }
        Bench { dir, kernel, disk, ram_mib }
    }

    /// The command that runs the bare-metal guest with `cmdline`, console on stdio.
    pub fn command(&self, machine: Machine, cpus: u32, cmdline: &str) -> Command {
        match machine {
            Machine::Cellblock => self.cellblock(cpus, cmdline, &[]),
            Machine::WithoutJails => self.cellblock(cpus, cmdline, &["--disable-sandbox"]),
            Machine::Qemu => self.qemu(cpus, cmdline),
        }
    }

    fn cellblock(&self, cpus: u32, cmdline: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        command
            .arg("run")
            .arg("--kernel")
            .arg(&self.kernel)
            .args(["--cmdline", cmdline])
            .args(["-c", &cpus.to_string()])
            .args(["-m", &format!("{}M", self.ram_mib)])
            .arg("--disk")
            .arg(&self.disk)
            .args(more)
            .stdin(Stdio::null());
        command
    }

    fn qemu(&self, cpus: u32, cmdline: &str) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", "microvm,accel=kvm,acpi=off,ioapic2=off,memory-backend=ram", "-cpu"])
            // A model whose features this kind of host can all give; the guest needs none.
            .args(["qemu64,pni=off", "-smp"])
            .arg(cpus.to_string())
            .args(["-m", &self.ram_mib.to_string()])
            .arg("-object")
            .arg(format!("memory-backend-memfd,id=ram,size={}M,share=on", self.ram_mib))
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-serial", "stdio", "-global", "virtio-mmio.force-legacy=false"])
            .arg("-kernel")
            .arg(&self.kernel)
            .args(["-append", cmdline])
            .arg("-drive")
            .arg(format!("if=none,id=disk,format=raw,file={}", self.disk.display()))
            .args(["-device", "virtio-blk-device,drive=disk"])
            .stdin(Stdio::null());
        command
    }

    /// Starts a machine with a dialogue.
    pub fn start(&self, machine: Machine, cpus: u32, cmdline: &str) -> Guest {
        Guest::start(machine, self.command(machine, cpus, cmdline))
    }

    /// Starts Cellblock with more options.
    pub fn start_with(&self, machine: Machine, cpus: u32, cmdline: &str, more: &[&str]) -> Guest {
        Guest::start(machine, self.cellblock(cpus, cmdline, more))
    }
}

/// A running machine and its console.
pub struct Guest {
    /// The machine's first process.
    pub child: Child,
    machine: Machine,
    input: ChildStdin,
    output: Option<BufReader<ChildStdout>>,
}

impl Guest {
    fn start(machine: Machine, mut command: Command) -> Guest {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the machine starts");
        let input = child.stdin.take().expect("piped");
        let output = child.stdout.take().map(BufReader::new);
        Guest { child, machine, input, output }
    }

    /// The next line that contains `text`.
    pub fn wait_for(&mut self, text: &str) -> String {
        let output = self.output.as_mut().expect("console");
        let mut line = String::new();
        loop {
            line.clear();
            let got = output.read_line(&mut line).expect("console");
            assert!(got > 0, "{} ended before it printed {text:?}", self.machine.name());
            assert!(!line.contains("FAIL"), "{}: {line}", self.machine.name());
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Types at the console.
    pub fn say(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).expect("console");
    }

    /// Reads and forgets the console from now on.
    pub fn drain(&mut self) -> JoinHandle<()> {
        let mut output = self.output.take().expect("console");
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut output, &mut std::io::sink());
        })
    }

    /// Waits for the machine to end by itself.
    pub fn end(mut self) {
        if let Some(mut output) = self.output.take() {
            let _ = std::io::copy(&mut output, &mut std::io::sink());
        }
        let status = self.child.wait().expect("ends");
        assert!(status.success(), "{} ended with {status}", self.machine.name());
    }
}
