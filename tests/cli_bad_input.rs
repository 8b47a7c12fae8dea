//! Wrong input to the program: one clear line on standard error, status 1 or 2, no panic.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

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
        (&["--memory", "31M"], &["at least 32M"]),
        (&["--memory", "33000K"], &["whole number of MiB"]),
        (&["--memory", "99999999999999T"], &["more than 64 bits"]),
        (&["--memory", "17592186044416"], &["more than 64 bits"]),
        (&["--memory", "18446744073709551616"], &["more than 64 bits"]),
        (&["--memory", "-1"], &["'-1' is not a size"]),
        (&["--cpus", "33"], &["'33'", "1 to 32"]),
        (&["--cpus", "257"], &["'257'", "1 to 32"]),
        (&["--disk", "disk,colour=red"], &["unknown key 'colour'", "known keys are ro,"]),
        (&["--disk", "disk,engine=aio"], &["'engine' cannot be 'aio'", "sync or io_uring"]),
        (&["--disk", "disk,bw=fast"], &["'bw' cannot be 'fast'"]),
        (&["--disk", "disk,ro=maybe"], &["'ro'", "maybe"]),
        (&["--disk", "disk,poll-us=often"], &["'poll-us'", "often", "microseconds"]),
        (&["--disk", "disk,serial=a b"], &["'serial'", "20 printable"]),
        (&["--disk", "disk,id=com1"], &["'id' cannot be 'com1'"]),
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
        (&["--disk", "disk,ro", "--disk", "disk"], &["disk disk is in use"]),
        (&["--disk", "/dev/null"], &["disk /dev/null is a character device"]),
        (&["--initrd", "."], &["the initrd . is a directory", "--initrd"]),
        (&["--kernel", "."], &["the kernel . is a directory", "--kernel"]),
        (&["--kernel", "/dev/zero"], &["the kernel /dev/zero is a device"]),
        (&["--initrd", "none"], &["opening the initrd none", "No such file"]),
        (&["--kernel", "none"], &["opening the kernel none", "No such file"]),
        (&["--memory", "1000000T"], &["more than this host's", "--memory"]),
        (&["--serial", "file=none/log"], &["none/log", "make its directory"]),
        (&["--serial", "file=disk", "--disk", "disk"], &["output file disk is in use"]),
        (&["--control", "kernel"], &["the socket path kernel exists and is no socket"]),
        (&["--control", "."], &["the socket path . exists", "choose another path"]),
        (&["--control", &"x".repeat(108)], &["has 108 bytes", "at most 107 bytes"]),
        (&["--serial", &format!("socket={}", "x".repeat(108))], &["has 108 bytes"]),
        (&["--serial", "socket=none/s"], &["none/s", "make the directory"]),
        (&["--serial", "socket=disk"], &["disk exists and is no socket"]),
        (&["--serial", "file=."], &["give the name of a file in it"]),
        (&["--config", "."], &["reading the configuration file .", "directory"]),
        (&["--control", "none/c"], &["the socket none/c", "make the directory"]),
        (&["--config", "none"], &["reading the configuration file none", "No such file"]),
    ] {
        refused(&place.run(args), 1, parts);
    }
    assert_eq!(fs::metadata(place.path("disk")).unwrap().len(), 1024, "the disk is as it was");
}

/// The built-in guest's file.
const GUEST: &[u8] = cellblock::guest::BARE_GUEST;

#[test]
fn kernels_that_cannot_be_started_are_refused() {
    let place = Place::new();
    // Fixed, so that a failure can be had again; xorshift is as good as random here.
    let noise = std::iter::successors(Some(0x9e37_79b9_7f4a_7c15_u64), |x| {
        let x = x ^ x << 13;
        let x = x ^ x >> 7;
        Some(x ^ x << 17)
    });
    let noise: Vec<u8> = noise.take(2000).flat_map(u64::to_le_bytes).collect();
    let mut bits32 = GUEST.to_vec();
    bits32[4] = 1; // EI_CLASS
    let mut other_machine = GUEST.to_vec();
    other_machine[18] = 183; // e_machine: EM_AARCH64
    let mut noisy = GUEST.to_vec();
    noisy[16..64].copy_from_slice(&noise[..48]);
    let with_size = |bytes: u64| format!("needs memory up to {} MiB", bytes >> 20);
    let mut huge = GUEST.to_vec();
    huge[64 + 40..64 + 48].copy_from_slice(&(1u64 << 32).to_le_bytes()); // p_memsz
    for (kernel, parts) in [
        (&b""[..], &["loading the kernel: the file is empty"][..]),
        (b"x", &["neither an ELF file nor a bzImage"]),
        (b"\x7fEL", &["neither an ELF file nor a bzImage"]),
        (&noise, &["neither an ELF file nor a bzImage: give a vmlinux or bzImage file"]),
        (b"\x1f\x8b\x08\0", &["compressed", "unpack it first"]),
        (&GUEST[..40], &["truncated: the ELF header ends at byte 64 of 40"]),
        (&GUEST[..100], &["truncated: the program header table", "of 100"]),
        (&GUEST[..0x1000], &["truncated: a segment", "of 4096"]),
        (&GUEST[..0x8000], &["truncated: a segment", "of 32768"]),
        (&bits32, &["32-bit kernel", "x86_64"]),
        (b"\x7fELF\x01\x01\x01", &["32-bit kernel", "x86_64"]),
        (&other_machine, &["another processor (ELF machine 183)", "x86_64"]),
        (&noisy, &["loading the kernel"]),
        (&huge, &[&with_size((1 << 32) + (1 << 20)), "give more memory"]),
    ] {
        fs::write(place.path("odd"), kernel).unwrap();
        refused(&place.run(&["--kernel", "odd"]), 1, parts);
    }
}

/// The file of a kernel that distributions boot, cut off where a copy may have stopped.
#[test]
fn a_truncated_bzimage_is_refused() {
    let kernel = fs::read_dir("/boot").ok().and_then(|entries| {
        let mut found = entries.flatten().map(|entry| entry.path());
        found.find(|path| path.file_name().unwrap().as_encoded_bytes().starts_with(b"vmlinuz-"))
    });
    let Some(whole) = kernel.and_then(|path| fs::read(path).ok()) else {
        eprintln!("skipped, because there is no kernel in /boot that can be read");
        return;
    };
    let place = Place::new();
    for (len, part) in [
        (0x202, "neither an ELF file nor a bzImage"),
        (0x230, "truncated: the setup header"),
        (0x1000, "truncated: the kernel proper"),
        (whole.len() / 2, "truncated: the kernel proper"),
        (whole.len() - 64 * 1024, "truncated: the kernel proper"),
    ] {
        fs::write(place.path("odd"), &whole[..len]).unwrap();
        refused(&place.run(&["--kernel", "odd"]), 1, &["loading the kernel", part]);
    }
}

#[test]
fn what_comes_with_the_kernel_has_to_fit() {
    let place = Place::new();
    fs::write(place.path("guest"), GUEST).unwrap();
    File::create(place.path("empty")).unwrap();
    File::create(place.path("large")).unwrap().set_len(64 << 20).unwrap();
    let long = "x".repeat(4000);
    let too_many: Vec<String> = (0..18).map(|n| format!("d{n}")).collect();
    let mut disks = Vec::new();
    for name in &too_many {
        File::create(place.path(name)).unwrap().set_len(512).unwrap();
        disks.extend(["--disk", name]);
    }
    for (args, parts) in [
        (&["--initrd", "empty"][..], &["loading the initrd: the file is empty"][..]),
        (&["--initrd", "large", "-m", "64M"], &["67108864 bytes", "give more memory"]),
        (&["--cmdline", &long], &["it has 4000 bytes and this kernel takes 2047", "shorten"]),
        (&["--cmdline", "a\nb"], &["command line", "control character at byte 1"]),
        (&disks, &["18 disks", "17 a VM can have"]),
    ] {
        refused(&place.run(&[&["--kernel", "guest"], args].concat()), 1, parts);
    }
}

/// A mistake that is found late, when device processes are running already: they go, and
/// so do the sockets.
#[test]
fn nothing_is_left_behind_by_a_start_that_fails() {
    let place = Place::new();
    let before = named_cellblock();
    for kernel in ["kernel", "guest"] {
        fs::write(place.path("guest"), &GUEST[..5000]).unwrap();
        let mut args = vec!["--kernel", kernel, "--disk", "disk", "--control", "c"];
        args.extend(["--serial", "socket=s"]);
        let output = place.run(&args);
        let text = String::from_utf8(output.stderr).unwrap();
        let (note, line) = text.split_once('\n').unwrap();
        assert_eq!(note, "cellblock: serial console on socket s");
        refused(&Output { stderr: line.into(), ..output }, 1, &["loading the kernel"]);
        let names = fs::read_dir(place.dir.path()).unwrap().flatten().map(|e| e.file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["disk", "guest", "kernel"]);
    }
    // Other tests run at the same time, and the last of ours may be on its way out.
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let left: Vec<_> = named_cellblock().into_iter().filter(|p| !before.contains(p)).collect();
        let ours = |pid: &i32| {
            let cwd = fs::read_link(format!("/proc/{pid}/cwd"));
            cwd.is_ok_and(|cwd| cwd == place.dir.path())
        };
        let jailed = |pid: &i32| {
            let root = fs::read_dir(format!("/proc/{pid}/root"));
            root.is_ok_and(|mut entries| entries.next().is_none())
        };
        let left: Vec<_> = left.into_iter().filter(|pid| ours(pid) || jailed(pid)).collect();
        if left.is_empty() {
            break;
        }
        assert!(Instant::now() < end, "processes are left: {left:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// All processes of the program on this machine, zombies aside.
fn named_cellblock() -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline"));
        line.is_ok_and(|line| {
            let program = line.split(|b| *b == 0).next().unwrap_or(&[]);
            program.ends_with(b"cellblock")
        })
    })
    .collect()
}

#[test]
fn two_machines_do_not_share_a_disk_that_one_writes() {
    let place = Place::new();
    fs::write(place.path("guest"), GUEST).unwrap();
    let mut first = place.command();
    first.args(["run", "--die-with-parent", "--kernel", "guest", "--disk", "disk", "--control"]);
    first.args(["c", "--cmdline", "mode=echo"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut first = first.spawn().unwrap();
    let mut stdin = first.stdin.take().unwrap();
    let mut ready = [0; 28]; // "cellblock guest\necho: ready\n"
    first.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    let seen = String::from_utf8_lossy(&ready).into_owned();

    let guest = ["--kernel", "guest", "--disk"];
    let remedy = "stop the other one, or use the image read-only in both with ',ro'";
    refused(&place.run(&[&guest[..], &["disk"]].concat()), 1, &["disk disk is in use", remedy]);
    let line = ["disk disk is in use", "stop the one that writes it"];
    refused(&place.run(&[&guest[..], &["disk,ro"]].concat()), 1, &line);
    let taken = ["--control", "c"];
    refused(&place.run(&taken), 1, &["the socket path c is in use by a running program"]);

    // The first one has not noticed.
    stdin.write_all(b"quit").unwrap();
    let output = first.wait_with_output().unwrap();
    let rest = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && rest.contains("echo: ok"), "{seen}{rest}");
    assert!(!place.path("c").exists());
}

/// Runs the program with a /dev that holds nothing but `nodes`, as `user`. Only root can.
fn with_dev(place: &Place, nodes: &[&str], user: Option<u32>) -> Output {
    let program = place.path("cellblock");
    copy_program(&program);
    fs::write(place.path("guest"), GUEST).unwrap();
    let mut script = String::from("set -e; mkdir dev; mount -t tmpfs none dev; ");
    for node in nodes {
        script += &format!("touch dev/{node}; mount --bind /dev/{node} dev/{node}; ");
    }
    script += "mount --rbind dev /dev; ";
    if let Some(id) = user {
        script += &format!("exec setpriv --reuid {id} --regid {id} --clear-groups ");
    } else {
        script += "exec ";
    }
    script += "./cellblock run --kernel guest --serial null";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).current_dir(place.dir.path());
    command.env_remove("CELLBLOCK_LOG").output().unwrap()
}

#[test]
fn no_kvm() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped, because it needs root: a machine without /dev/kvm");
        return;
    }
    let parts = ["opening /dev/kvm: there is none", "load the module kvm_intel or kvm_amd"];
    refused(&with_dev(&Place::new(), &["null"], None), 1, &parts);
    // Not even /dev/null: another line, but one.
    refused(&with_dev(&Place::new(), &[], None), 1, &["/dev/null"]);
}

#[test]
fn kvm_that_this_user_may_not_open() {
    let mode = fs::metadata("/dev/kvm").unwrap().permissions().mode();
    if !nix::unistd::geteuid().is_root() || mode & 0o006 == 0o006 {
        eprintln!("skipped, because it needs root and a /dev/kvm that is not everybody's");
        return;
    }
    let parts = ["opening /dev/kvm: permission denied", "usermod -aG kvm USER"];
    refused(&with_dev(&Place::new(), &["null", "kvm"], Some(65534)), 1, &parts);
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
        ("kernel = 'k'\ncpus = -1\n", &["line 2"]),
        ("kernel = 'k'\ncpus = 'two'\n", &["line 2"]),
        ("kernel = 'k'\nmemory = 1\n", &["line 2", "at least 32M"]),
        ("kernel = 'k'\ndisk = ['d,cow']\n", &["line 2", "'cow' is not supported yet"]),
        ("kernel = 'k'\ndisk = ['a,id=x', 'b,id=x']\n", &["'x' is used by two devices"]),
        ("kernel = 'k'\n[disk]\npath = 'x'\n", &["line 2"]),
        ("kernel = 'k'\nkernel = 'l'\n", &["line 2", "duplicate key"]),
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
