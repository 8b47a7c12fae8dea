//! The machines that are compared: how each is started on the same guest and file.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// What serves the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// A jailed block process; the rest of its SPEC.
    Cellblock(&'static str, &'static str),
    /// In QEMU, on an iothread, with this `aio=`.
    Qemu(&'static str),
    /// QEMU as the front end of `qemu-storage-daemon`.
    StorageDaemon,
}

/// All of them, Cellblock first.
pub const MACHINES: [Machine; 7] = [
    Machine::Cellblock("cellblock", ""),
    Machine::Cellblock("cellblock engine=io_uring", ",engine=io_uring"),
    Machine::Cellblock("cellblock poll-us=0", ",poll-us=0"),
    Machine::Cellblock("cellblock poll-us=2000", ",poll-us=2000"),
    Machine::Qemu("io_uring"),
    Machine::Qemu("threads"),
    Machine::StorageDaemon,
];

const RAM_MIB: u64 = 128;
/// How long a daemon may take to have its socket.
const PATIENCE: Duration = Duration::from_secs(10);

impl Machine {
    /// For the table.
    pub fn name(self) -> String {
        match self {
            Machine::Cellblock(name, _) => name.into(),
            Machine::Qemu(aio) => format!("qemu virtio-blk aio={aio}"),
            Machine::StorageDaemon => "qemu + storage daemon".into(),
        }
    }

    /// Whether the programs it takes are installed.
    pub fn is_available(self) -> bool {
        let has = |program| {
            let version = Command::new(program).arg("--version").stdout(Stdio::null()).status();
            version.is_ok_and(|status| status.success())
        };
        match self {
            Machine::Cellblock(..) => true,
            Machine::Qemu(_) => has("qemu-system-x86_64"),
            Machine::StorageDaemon => has("qemu-system-x86_64") && has("qemu-storage-daemon"),
        }
    }
}

/// The files that every machine uses.
pub struct Files {
    dir: tempfile::TempDir,
    kernel: PathBuf,
    /// The disk's image.
    pub disk: PathBuf,
}

impl Files {
    /// Writes the guest, and an image of `bytes` whose pages are all in the page cache.
    pub fn prepare(dir: Option<&Path>, bytes: u64) -> Files {
        let dir = match dir {
            Some(dir) => tempfile::tempdir_in(dir),
            // In memory where that is possible, so that no write-back is measured.
            None => tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()),
        };
        let dir = dir.expect("temporary directory");
        let kernel = dir.path().join("guest");
        std::fs::write(&kernel, cellblock::guest::BARE_GUEST).expect("guest");
        let disk = dir.path().join("disk");
        let mut file = File::create(&disk).expect("disk");
        let mib: Vec<u8> = (0..1 << 20).map(|n| (n * 31 % 251) as u8).collect();
        for _ in 0..bytes >> 20 {
            file.write_all(&mib).expect("disk");
        }
        Files { dir, kernel, disk }
    }

    /// Starts a machine with a guest that does what `cmdline` says.
    pub fn start(&self, machine: Machine, queues: u32, cmdline: &str) -> Guest {
        let mut daemon = None;
        let mut command = match machine {
            Machine::Cellblock(_, options) => self.cellblock(queues, options, cmdline),
            Machine::Qemu(aio) => self.qemu_own(queues, aio, cmdline),
            Machine::StorageDaemon => {
                let socket = self.dir.path().join("export");
                daemon = Some(Daemon::start(self.storage_daemon(queues, &socket), &socket));
                self.qemu_far(queues, &socket, cmdline)
            }
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("the machine starts");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        Guest { machine, child, daemon, output }
    }

    fn cellblock(&self, queues: u32, options: &str, cmdline: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        command.arg("run").arg("--kernel").arg(&self.kernel).args(["--cmdline", cmdline]);
        command.arg("-m").arg(format!("{RAM_MIB}M"));
        command.arg("--disk").arg(format!("{},queues={queues}{options}", self.disk.display()));
        command
    }

    fn qemu(&self, cmdline: &str) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", "microvm,accel=kvm,acpi=off,ioapic2=off,memory-backend=ram", "-cpu"])
            // A model whose features this kind of host can all give; the guest needs none.
            .args(["qemu64,pni=off", "-m", &RAM_MIB.to_string(), "-object"])
            .arg(format!("memory-backend-memfd,id=ram,size={RAM_MIB}M,share=on"))
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-serial", "stdio", "-global", "virtio-mmio.force-legacy=false"])
            .arg("-kernel")
            .arg(&self.kernel)
            .args(["-append", cmdline]);
        command
    }

    fn qemu_own(&self, queues: u32, aio: &str, cmdline: &str) -> Command {
        let mut command = self.qemu(cmdline);
        command.args(["-object", "iothread,id=io", "-blockdev"]);
        command.arg(format!(
            "driver=file,node-name=disk,filename={},aio={aio},cache.direct=off",
            self.disk.display()
        ));
        command.arg("-device");
        command.arg(format!("virtio-blk-device,drive=disk,iothread=io,num-queues={queues}"));
        command
    }

    fn qemu_far(&self, queues: u32, socket: &Path, cmdline: &str) -> Command {
        let mut command = self.qemu(cmdline);
        command.arg("-chardev").arg(format!("socket,id=far,path={}", socket.display()));
        command.arg("-device");
        command.arg(format!("vhost-user-blk,chardev=far,num-queues={queues}"));
        command
    }

    fn storage_daemon(&self, queues: u32, socket: &Path) -> Command {
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--object", "iothread,id=io", "--blockdev"]);
        command.arg(format!(
            "driver=file,node-name=disk,filename={},aio=io_uring,cache.direct=off",
            self.disk.display()
        ));
        command.arg("--export");
        command.arg(format!(
            "vhost-user-blk,id=far,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={queues},iothread=io",
            socket.display()
        ));
        command
    }
}

/// A back end that runs beside a machine.
struct Daemon(Child);

impl Daemon {
    fn start(mut command: Command, socket: &Path) -> Daemon {
        let _ = std::fs::remove_file(socket);
        let daemon = Daemon(command.stdin(Stdio::null()).spawn().expect("the daemon starts"));
        let end = Instant::now() + PATIENCE;
        // Not by connecting: it serves one front end, the first that comes.
        while !is_listening(socket) {
            assert!(Instant::now() < end, "no socket at {}", socket.display());
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }
}

fn is_listening(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").expect("/proc/net/unix");
    let socket = socket.to_str().expect("utf-8");
    sockets.lines().any(|line| line.ends_with(socket) && line.contains(ACCEPTS))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running machine and its console.
pub struct Guest {
    machine: Machine,
    child: Child,
    daemon: Option<Daemon>,
    output: BufReader<ChildStdout>,
}

impl Guest {
    /// The next line of the console that starts with `text`.
    pub fn wait_for(&mut self, text: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let got = self.output.read_line(&mut line).expect("console");
            assert!(got > 0, "{} ended before it printed {text:?}", self.machine.name());
            assert!(!line.contains("FAIL"), "{}: {line}", self.machine.name());
            if line.starts_with(text) {
                return line;
            }
        }
    }

    /// Its processes that were started here; their children belong to them.
    pub fn roots(&self) -> Vec<u32> {
        let daemon = self.daemon.as_ref().map(|daemon| daemon.0.id());
        std::iter::once(self.child.id()).chain(daemon).collect()
    }

    /// Waits for the machine to end by itself.
    pub fn end(mut self) {
        let _ = std::io::copy(&mut self.output, &mut std::io::sink());
        let status = self.child.wait().expect("ends");
        assert!(status.success(), "{} ended with {status}", self.machine.name());
    }
}
