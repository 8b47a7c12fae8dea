//! Wrong input to the program: one clear line on standard error, status 1 or 2, no panic.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory with a kernel and a disk to be wrong about.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("kernel"), "not looked at").unwrap();
        File::create(dir.path().join("disk")).unwrap().set_len(1024).unwrap();
        Place { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        command.current_dir(self.dir.path()).env_remove("CELLBLOCK_LOG");
        command
    }

    /// Runs the program with `args`, and where they do not say otherwise with a kernel
    /// that opens and no console.
    fn run(&self, args: &[&str]) -> Output {
        let mut command = self.command();
        command.arg("run");
        for default in [["--kernel", "kernel"], ["--serial", "null"]] {
            if !args.contains(&default[0]) {
                command.args(default);
            }
        }
        command.args(args).output().unwrap()
    }
}

/// One line on standard error with every one of `parts`, nothing on standard output.
#[track_caller]
fn refused(output: &Output, status: i32, parts: &[&str]) {
    let line = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(status), "{line}");
    assert_eq!(line.lines().count(), 1, "one line, not: {line}");
    assert!(line.starts_with("cellblock: error: ") && line.ends_with('\n'), "{line}");
    assert!(!line.contains("panicked"), "{line}");
    for part in parts {
        assert!(line.contains(part), "no '{part}' in: {line}");
    }
    assert!(output.stdout.is_empty());
}

#[test]
fn wrong_options_are_usage_errors() {
    let place = Place::new();
    for (args, parts) in [
        (&["--cpus", "0"][..], &["'0'", "--cpus", "1 to 32"][..]),
        (&["--cpus", "1000"], &["'1000'", "1 to 32"]),
        (&["-c", "-1"], &["1 to 32"]),
        (&["--memory", "0"], &["at least 32M"]),
        (&["--memory", "1M"], &["at least 32M"]),
        (&["--memory", "lots"], &["'lots' is not a size"]),
        (&["--memory", "99999999999999T"], &["more than 64 bits"]),
        (&["--disk", "disk,colour=red"], &["unknown key 'colour'", "known keys are ro,"]),
        (&["--disk", "disk,engine=io_uring"], &["'engine' is not supported yet"]),
        (&["--disk", "disk,bw=100M"], &["'bw' is not supported yet"]),
        (&["--disk", "disk,id=Root"], &["'id' cannot be 'Root'"]),
        (&["--disk", "disk,id=a", "--disk", "x,id=a"], &["the id 'a' is used by two devices"]),
        (&["--disk", ""], &["starts with no path"]),
        (&["--serial", "vga"], &["unknown serial endpoint 'vga'", "stdout"]),
        (&["--serial", "file"], &["file=FILE"]),
        (&["--seccomp", "off"], &["kill or log"]),
        (&["--log", "loud"], &["error, warn, info, debug, trace"]),
        (&["--plugin", "x"], &["--plugin"]),
        (&["surplus"], &["surplus"]),
    ] {
        refused(&place.run(args), 2, parts);
    }
}

#[test]
fn usage_of_the_program_itself() {
    let place = Place::new();
    let ran = |args: &[&str]| place.command().args(args).output().unwrap();
    refused(&ran(&[]), 2, &["no command given", "cellblock demo"]);
    refused(&ran(&["explode"]), 2, &["'explode'"]);
    refused(&ran(&["run"]), 2, &["no kernel given", "--kernel FILE"]);
    refused(&ran(&["pause"]), 2, &["<CONTROL>"]);
    let mut loud = place.command();
    refused(
        &loud.args(["demo"]).env("CELLBLOCK_LOG", "x").output().unwrap(),
        2,
        &["CELLBLOCK_LOG"],
    );

    let help = ran(&["run", "--help"]);
    assert!(help.status.success() && help.stderr.is_empty());
    let text = String::from_utf8(help.stdout).unwrap();
    for part in ["--kernel", "--disk", "--serial", "Examples:", "Exit status"] {
        assert!(text.contains(part), "{part}");
    }
    let version = ran(&["--version"]);
    assert_eq!(
        String::from_utf8(version.stdout).unwrap(),
        format!("cellblock {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn files_that_do_not_serve_are_named_with_a_remedy() {
    let place = Place::new();
    File::create(place.path("ragged")).unwrap().set_len(513).unwrap();
    File::create(place.path("empty")).unwrap();
    for (args, parts) in [
        (&["--disk", "none"][..], &["disk none", "No such file", "check the path"][..]),
        (&["--disk", "."], &["disk . is a directory"]),
        (&["--disk", "ragged"], &["513 bytes", "multiple of 512", "truncate -s 1024"]),
        (&["--disk", "empty"], &["disk empty is empty"]),
        (&["--disk", "disk", "--disk", "disk"], &["disk disk is in use"]),
        (&["--initrd", "none"], &["opening the initrd none", "No such file"]),
        (&["--kernel", "none"], &["opening the kernel none", "No such file"]),
        (&["--memory", "1000000T"], &["more than this host's", "--memory"]),
        (&["--serial", "file=none/log"], &["none/log", "make its directory"]),
        (&["--serial", "file=disk", "--disk", "disk"], &["output file disk is in use"]),
        (&["--control", "kernel"], &["the socket path kernel exists and is no socket"]),
        (&["--control", "none/c"], &["the socket none/c", "make the directory"]),
        (&["--config", "none"], &["reading the configuration file none", "No such file"]),
    ] {
        refused(&place.run(args), 1, parts);
    }
    assert_eq!(fs::metadata(place.path("disk")).unwrap().len(), 1024, "the disk is as it was");
}

#[test]
fn kernels_and_initrds_that_cannot_boot() {
    let place = Place::new();
    let guest = cellblock::guest::BARE_GUEST;
    fs::write(place.path("guest"), guest).unwrap();
    fs::write(place.path("empty"), "").unwrap();
    fs::write(place.path("cut"), &guest[..guest.len() / 2]).unwrap();
    // ELFCLASS32 in the same file.
    let mut narrow = guest.to_vec();
    narrow[4] = 1;
    fs::write(place.path("narrow"), narrow).unwrap();
    File::create(place.path("large")).unwrap().set_len(100 << 20).unwrap();
    for (args, parts) in [
        (&["--kernel", "empty"][..], &["kernel", "empty"][..]),
        (&["--kernel", "cut"], &["kernel", "truncated"]),
        (&["--kernel", "narrow"], &["kernel", "32-bit"]),
        (&["--kernel", "kernel"], &["kernel", "neither"]),
        (&["--kernel", "guest", "--initrd", "empty"], &["initrd", "empty"]),
        (&["--kernel", "guest", "--initrd", "large", "-m", "64M"], &["initrd", "more memory"]),
    ] {
        refused(&place.run(args), 1, parts);
    }
}

#[test]
fn a_configuration_file_is_held_to_the_same_rules() {
    let place = Place::new();
    for (text, parts) in [
        ("kernel = 'kernel'\ncolour = 'red'\n", &["line 2", "unknown field `colour`"][..]),
        ("kernel = 'kernel'\ncpus = 1000\n", &["line 2", "1 to 32"]),
        ("kernel = [", &["line 1"]),
        ("cpus = 1", &["no kernel given"]),
    ] {
        fs::write(place.path("vm.toml"), text).unwrap();
        let output = place.command().args(["run", "--config", "vm.toml"]).output().unwrap();
        refused(&output, 2, parts);
    }
}

#[test]
fn a_control_path_in_use_is_left_alone() {
    let place = Place::new();
    let listener = std::os::unix::net::UnixListener::bind(place.path("live")).unwrap();
    refused(&place.run(&["--control", "live"]), 1, &["live is in use by a running program"]);
    drop(listener);
    refused(&place.run(&["--control", "live"]), 1, &["left over", "rm live"]);
    assert!(place.path("live").exists());
}

#[test]
fn no_vm_behind_the_control_path() {
    let place = Place::new();
    drop(std::os::unix::net::UnixListener::bind(place.path("stale")).unwrap());
    for command in ["pause", "resume", "stop", "stats", "ps", "events"] {
        let ran = |path: &str| place.command().args([command, path]).output().unwrap();
        refused(&ran("none"), 1, &["control socket none", "No such file", "--control"]);
        refused(&ran("stale"), 1, &["control socket stale", "refused", "is gone"]);
    }
}

/// Puts the program where other users reach it. Another process copies it: a file that
/// this one has open for writing, a child forked meanwhile has too, and is not executable.
fn copy_program(to: &Path) {
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_cellblock")).arg(to).status();
    assert!(copied.unwrap().success());
}

/// What another user of the host sees. Only root can try.
#[test]
fn files_of_another_user() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let place = Place::new();
    let program = place.path("cellblock");
    copy_program(&program);
    let ran = |args: &[&str]| {
        let base = ["run", "--kernel", "kernel", "--serial", "null"];
        let mut command = Command::new(&program);
        command.current_dir(place.dir.path()).uid(65534).gid(65534);
        command.args(base).args(args).output().unwrap()
    };
    let mode = |name: &Path, mode| {
        fs::set_permissions(place.dir.path().join(name), fs::Permissions::from_mode(mode)).unwrap()
    };
    mode(Path::new("disk"), 0o644);
    refused(&ran(&["--disk", "disk"]), 1, &["for reading and writing", "denied", "add ',ro'"]);
    mode(Path::new("disk"), 0o600);
    refused(&ran(&["--disk", "disk,ro"]), 1, &["for reading: Permission denied", "readable"]);
    refused(&ran(&["--control", "c"]), 1, &["the socket c", "this user may write"]);
}
