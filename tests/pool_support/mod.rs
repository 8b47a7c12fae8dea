//! A snapshot of the guest that is to be cloned, and what its clones say.
#![allow(dead_code, clippy::unwrap_used)] // every test uses a part of it; a test fails by panicking

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cellblock::control::client::Client;
use cellblock::control::protocol::{Reply, Request};
use cellblock::pool::{BaseConfig, Machine, PooledRestoreVm, Shape};

use crate::common::Vm;

/// Longest wait for anything that is to happen.
pub const LIMIT: Duration = Duration::from_secs(30);
/// Bytes of the guest's disk.
pub const DISK: u64 = 4 << 20;

/// A snapshot of a guest with one disk, that is about to run its workload.
pub struct Snapshot {
    dir: tempfile::TempDir,
    disk: String,
    memory: u64,
}

impl Snapshot {
    /// With 64 MiB, and `options` of the disk's SPEC.
    pub fn take(options: &str) -> Snapshot {
        Snapshot::with("mode=clone", options, 64)
    }

    pub fn with(cmdline: &str, options: &str, mib: u64) -> Snapshot {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(DISK).unwrap();
        let spec = format!("{}{options}", disk.display());
        let mut cmdline = cmdline.to_string();
        if options.contains("ro") {
            cmdline.push_str(" blocks=0");
        }
        let vm = Vm::with(&cmdline).memory(&format!("{mib}M"));
        let vm = vm.arg("--disk").arg(&spec).arg("--snapshot-on-pre-exec");
        let at = dir.path().join("snapshot");
        let mut vm = vm.arg("--snapshot-out").arg(at.to_str().unwrap()).start();
        // It is there by one rename.
        crate::common::poll(LIMIT, || at.join("manifest").exists().then_some(()))
            .unwrap_or_else(|| vm.fail("there is no snapshot"));
        drop(vm);
        Snapshot { dir, disk: spec, memory: mib << 20 }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("snapshot")
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }
}

/// With the program that is tested.
pub fn base(machine: Machine) -> BaseConfig {
    BaseConfig { program: Some(env!("CARGO_BIN_EXE_cellblock").into()), ..BaseConfig::new(machine) }
}

/// Of the snapshot's machine.
pub fn shape(snapshot: &Snapshot) -> Shape {
    Shape::of(&snapshot.path(), &[]).unwrap()
}

/// A guest's console.
pub struct Console {
    lines: BufReader<UnixStream>,
}

/// What a clone says of itself.
#[derive(Clone, Debug)]
pub struct Who {
    pub id: String,
    pub random: String,
    pub generation: String,
    pub ns: u64,
    pub data: String,
}

impl Console {
    pub fn of(vm: &PooledRestoreVm) -> Console {
        Console::new(vm.console().unwrap())
    }

    pub fn new(stream: UnixStream) -> Console {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Console { lines: BufReader::new(stream) }
    }

    /// Waits for a line with `text` in it; returns it.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            let read = self.lines.read_line(&mut line);
            assert!(matches!(read, Ok(1..)), "no line {text:?} came, but {seen:?}: {read:?}");
            assert!(!line.contains("FAIL"), "{line}");
            if line.contains(text) {
                return line.trim_end().to_string();
            }
            seen.push_str(&line);
        }
    }

    /// All that comes until its end.
    #[track_caller]
    pub fn rest(&mut self) -> String {
        let mut rest = Vec::new();
        std::io::Read::read_to_end(&mut self.lines, &mut rest).expect("its end");
        String::from_utf8_lossy(&rest).into_owned()
    }

    pub fn say(&mut self, bytes: &[u8]) {
        self.lines.get_mut().write_all(bytes).unwrap();
    }

    /// What a clone says first.
    #[track_caller]
    pub fn who(&mut self) -> Who {
        let line = self.wait_for("clone: id=");
        let (facts, data) = line.split_once(" data=").unwrap();
        let fact = |key: &str| {
            let word = facts.split(' ').find_map(|word| word.strip_prefix(key));
            word.unwrap_or_else(|| panic!("no {key} in {line:?}")).to_string()
        };
        Who {
            id: fact("id="),
            random: fact("random="),
            generation: fact("generation="),
            ns: fact("ns=").parse().unwrap(),
            data: data.to_string(),
        }
    }
}

/// `cellblock` with these words.
pub fn cellblock(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    command.args(words);
    command
}

/// The control socket of the one shell that has its sockets in `directory`.
pub fn idle(directory: &Path) -> PathBuf {
    let sockets = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut control: Vec<_> = sockets.filter(|path| path.extension().is_none()).collect();
    assert_eq!(control.len(), 1, "{control:?}");
    control.remove(0)
}

/// A process of a VM, if there is one at the moment.
pub fn pid_of(control: &Path, role: &str) -> Option<i32> {
    match Client::connect(control).ok()?.ask(Request::Ps).ok()?.0 {
        Reply::Ps { processes } => processes.iter().find(|p| p.role == role).map(|p| p.pid),
        other => panic!("{other:?}"),
    }
}
