//! QEMU's migration to a file and from it, of the same guest on `-M microvm`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Extent;
use super::guest::{Files, Guest, cmdline, ms, wait_for_path};
use super::report::Report;

const MONITOR: &str = "qemu";

/// Whether Debian's `qemu-system-x86` is installed.
pub fn is_available() -> bool {
    let mut version = Command::new("qemu-system-x86_64");
    version.arg("--version").stdout(Stdio::null());
    version.status().is_ok_and(|status| status.success())
}

/// Measures a machine of one size.
pub fn measure(files: &Files, extent: Extent, report: &mut Report) {
    let state = files.path("migrated");
    let mut guest = Guest::start(&mut command(files, extent.mib, None));
    guest.wait_for("snap: ready");
    let mut monitor = Monitor::connect(&files.path("qmp"));
    let stopped = (0..extent.qemu).map(|_| ms(monitor.migrate_stopped(&state))).collect();
    report.add(extent.mib, MONITOR, "stopped: guest stands still", stopped);
    let live = (0..extent.qemu).map(|_| guest.beside(|| monitor.migrate_live(&state))).collect();
    report.add(extent.mib, MONITOR, "live: guest stands still", live);
    drop(guest);
    let (mut first, mut touched) = (Vec::new(), Vec::new());
    for _ in 0..extent.qemu {
        let restore = || Guest::start(&mut command(files, extent.mib, Some(&state)));
        first.push(ms(restore().first_output()));
        touched.push(ms(restore().touched()));
    }
    report.add(extent.mib, MONITOR, "restore: first output", first);
    report.add(extent.mib, MONITOR, "restore: 64 MiB touched", touched);
    std::fs::remove_file(&state).expect("migrated");
}

fn command(files: &Files, mib: u64, from: Option<&Path>) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm,accel=kvm,acpi=off,ioapic2=off,memory-backend=ram", "-cpu"])
        // A model whose features this kind of host can all give; the guest needs none.
        .args(["qemu64,pni=off", "-m", &mib.to_string(), "-object"])
        .arg(format!("memory-backend-memfd,id=ram,size={mib}M,share=on"))
        .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
        .args(["-serial", "stdio", "-global", "virtio-mmio.force-legacy=false", "-kernel"])
        .arg(files.path("guest"))
        .args(["-append", &cmdline(mib), "-drive"])
        .arg(format!(
            "if=none,id=disk,format=raw,snapshot=on,file={}",
            files.path("disk").display()
        ))
        .args(["-device", "virtio-blk-device,drive=disk"]);
    match from {
        Some(state) => {
            command.args(["-incoming", &format!("exec:cat {}", state.display())]);
        }
        None => {
            command.args(["-qmp"]);
            command.arg(format!("unix:{},server=on,wait=off", files.path("qmp").display()));
        }
    }
    command
}

/// A connection by QEMU's machine protocol.
struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(path: &Path) -> Monitor {
        wait_for_path(path);
        let stream = UnixStream::connect(path).expect("qmp");
        let mut monitor = Monitor { reader: BufReader::new(stream) };
        monitor.line();
        monitor.ask(&json!({ "execute": "qmp_capabilities" }));
        // As fast as it can: the default bounds the rate, and lets the guest stand for 300 ms.
        monitor.ask(&json!({ "execute": "migrate-set-parameters", "arguments":
            { "max-bandwidth": 1u64 << 40, "downtime-limit": 5 } }));
        monitor
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.reader.read_line(&mut line).expect("qmp") > 0, "QEMU ended");
        serde_json::from_str(&line).expect("JSON")
    }

    /// The answer; events are passed over.
    fn ask(&mut self, command: &Value) -> Value {
        self.reader.get_mut().write_all(format!("{command}\n").as_bytes()).expect("qmp");
        loop {
            let mut line = self.line();
            assert!(line.get("error").is_none(), "{command}: {line}");
            if let Some(value) = line.get_mut("return") {
                return value.take();
            }
        }
    }

    /// Migrates to `state`; what QEMU says of it when it is over.
    fn migrate(&mut self, state: &Path) -> Value {
        let to = format!("exec:cat > {}", state.display());
        self.ask(&json!({ "execute": "migrate", "arguments": { "uri": to } }));
        loop {
            let said = self.ask(&json!({ "execute": "query-migrate" }));
            match said["status"].as_str() {
                Some("completed") => return said,
                Some("failed" | "cancelled") => panic!("{said}"),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn migrate_stopped(&mut self, state: &Path) -> Duration {
        let begun = Instant::now();
        self.ask(&json!({ "execute": "stop" }));
        self.migrate(state);
        self.ask(&json!({ "execute": "cont" }));
        begun.elapsed()
    }

    /// Milliseconds, as QEMU reports them.
    fn migrate_live(&mut self, state: &Path) -> f64 {
        let said = self.migrate(state);
        self.ask(&json!({ "execute": "cont" }));
        said["downtime"].as_f64().expect("a time")
    }
}
