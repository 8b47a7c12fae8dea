//! The processes of a running VM, as the kernel shows them: their jails, their ends.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use cellblock::control::protocol::{
    DeviceState, EventKind, Process, Reply, Request, Shutdown, State,
};
use common::proc::{self, Identity};
use common::{LIMIT, NOBODY, Options, Vm, is_root, poll, send};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];
/// How long a process may outlive what it depends on.
const AFTERLIFE: Duration = Duration::from_secs(1);

/// A guest that uses two disks' processes and the console, on two vCPUs.
fn busy() -> Options {
    Vm::with("mode=pause cpus=2 every=100").cpus(2).disk(8).disk(8)
}

/// Device processes: role and id, by pid.
fn devices(processes: &[Process]) -> Vec<&Process> {
    processes.iter().filter(|p| p.role != "vmm" && p.role != "spawner").collect()
}

/// Runs the test as whoever we are, and as an ordinary user where we are root.
fn as_both(start: impl Fn() -> Options, test: impl Fn(Vm)) {
    test(start().start());
    if is_root("the same as an ordinary user") {
        test(start().ordinary_user().start());
    }
}

#[track_caller]
fn no_capabilities(status: &BTreeMap<String, String>, what: &str) {
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set} of {what}");
    }
}

#[test]
fn every_device_process_is_jailed() {
    as_both(busy, |mut vm| {
        vm.wait_for("pause: n=");
        let processes = vm.ps();
        let devices = devices(&processes);
        let roles: Vec<_> = devices.iter().map(|p| (p.role.as_str(), p.id.as_str())).collect();
        assert_eq!(roles, [("serial", "com1"), ("blk", "disk0"), ("blk", "disk1")]);

        for device in &devices {
            let (pid, what) = (device.pid, format!("{} {}", device.role, device.id));
            let threads = proc::threads(pid);
            assert!(threads.len() > 1, "{what} has {threads:?}");
            for tid in threads {
                let status = proc::status(pid, tid);
                let what = format!("{what}, thread {}", status["Name"]);
                assert_eq!(status["Seccomp"], "2", "{what}");
                assert_eq!(status["NoNewPrivs"], "1", "{what}");
                no_capabilities(&status, &what);
                assert_eq!(status["CapBnd"], "0000000000000000", "CapBnd of {what}");
                assert_eq!(status["Groups"], "", "groups of {what}");
            }
            // Nothing below the root, and nothing mounted but it, read-only.
            let root: Vec<_> = fs::read_dir(format!("/proc/{pid}/root")).unwrap().collect();
            assert!(root.is_empty(), "root of {what}: {root:?}");
            let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
            let mount: Vec<&str> = mounts.split_whitespace().collect();
            assert_eq!(mounts.lines().count(), 1, "mounts of {what}:\n{mounts}");
            assert!(
                mount[4] == "/" && mount[5].starts_with("ro,") && mounts.contains(" tmpfs "),
                "{mounts}"
            );
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
            assert!(environment.is_empty(), "environment of {what}");
            let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
            let core = limits.lines().find(|line| line.starts_with("Max core")).unwrap();
            assert!(core.split_whitespace().nth(4) == Some("0"), "{what}: {core}");
        }

        let ours = std::process::id() as i32;
        for kind in NAMESPACES {
            let mut seen = BTreeSet::from([proc::namespace(ours, kind)]);
            for device in &devices {
                let new = seen.insert(proc::namespace(device.pid, kind));
                assert!(new, "{} {} shares its {kind} namespace", device.role, device.id);
            }
            assert_eq!(proc::namespace(vm.pid(), kind), proc::namespace(ours, kind), "{kind}");
        }
        vm.say(b"q");
        vm.wait_for("pause: ok");
        vm.ends_well();
    });
}

#[test]
fn ps_says_what_the_kernel_says() {
    let mut vm = busy().start();
    vm.wait_for("pause: n=");
    let json = vm.cli("ps", &["--json"]);
    let Ok(Reply::Ps { processes }) = serde_json::from_str::<Reply>(&json) else {
        vm.fail(&format!("ps --json printed {json}"))
    };
    let family: BTreeSet<i32> = vm.processes().iter().map(|p| p.pid).collect();
    assert_eq!(processes.iter().map(|p| p.pid).collect::<BTreeSet<_>>(), family);
    assert_eq!((&*processes[0].role, processes[0].pid), ("vmm", vm.pid()));
    assert_eq!(processes[1].role, "spawner");

    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    for process in &processes {
        let what = format!("{} {}", process.role, process.id);
        let status = proc::status(process.pid, process.pid);
        assert_eq!(process.seccomp.to_string(), status["Seccomp"], "{what}");
        assert_eq!(u8::from(process.no_new_privs).to_string(), status["NoNewPrivs"], "{what}");
        assert_eq!(process.cap_eff.0, hex(&status["CapEff"]), "{what}");
        assert_eq!(process.cap_prm.0, hex(&status["CapPrm"]), "{what}");
        assert_eq!(process.cap_bnd.0, hex(&status["CapBnd"]), "{what}");
        assert_eq!(process.uid.to_string(), status["Uid"].split('\t').next().unwrap(), "{what}");
        assert!(process.rss_kib > 0 && process.pss_kib > 0, "{what}: {process:?}");
        let namespaces: BTreeMap<String, u64> = NAMESPACES
            .iter()
            .map(|kind| (kind.to_string(), proc::namespace(process.pid, kind)))
            .collect();
        assert_eq!(process.namespaces, namespaces, "{what}");
        let threads: BTreeSet<_> = process.threads.iter().map(|t| t.tid).collect();
        assert_eq!(threads, proc::threads(process.pid).into_iter().collect(), "{what}");
        for thread in &process.threads {
            let status = proc::status(process.pid, thread.tid);
            assert_eq!(thread.name, status["Name"], "{what}");
            assert_eq!(thread.seccomp.to_string(), status["Seccomp"], "{what} {}", thread.name);
        }
    }
    // The same for a human reader.
    let table = vm.cli("ps", &[]);
    for process in &processes {
        let row = table.lines().find(|line| line.contains(&format!(" {} ", process.pid)));
        assert!(row.is_some_and(|row| row.starts_with(&process.role)), "{process:?} in\n{table}");
    }
}

/// Open files without the numbers that differ from run to run.
fn kinds(pid: i32) -> Vec<String> {
    let files = proc::files(pid);
    let kind = |(fd, target): (&i32, &String)| match target.split_once(':') {
        _ if *fd <= 4 => format!("{fd} {}", target.split('[').next().unwrap_or_default()),
        Some(("socket" | "pipe", _)) => target.split(':').next().unwrap_or_default().into(),
        _ => target.clone(),
    };
    let mut kinds: Vec<String> = files.iter().map(kind).collect();
    kinds[3..].sort();
    kinds
}

#[test]
fn device_processes_have_no_file_open_but_those_they_need() {
    let mut vm = busy().start();
    vm.wait_for("pause: n=");
    let standard = ["0 /dev/null", "1 /dev/null", "2 /dev/null"];

    // 3 the cell channel. Events: the ring's doorbell, the guest's interrupt, and one
    // that wakes each of the two threads for input and output. Pipes: the console's two
    // ends, and two each of those that output leaves and input comes by. The ring's memory,
    // the journal and the violation page are mapped, their fds closed.
    let serial = vm.pid_of("serial", "com1");
    let event = "anon_inode:[eventfd]";
    let mut expected = standard.to_vec();
    expected.extend(["3 socket:", "4 anon_inode:", event, event, event]);
    expected.extend(["pipe"; 6]);
    assert_eq!(kinds(serial), expected);
    let pipes: BTreeSet<String> =
        proc::files(serial).into_values().filter(|file| file.starts_with("pipe:")).collect();
    let vmm = proc::files(vm.pid());
    assert!(pipes.contains(&vmm[&0]) && pipes.contains(&vmm[&1]), "{pipes:?}");
    assert_eq!(pipes.len(), 4);

    // 3 the cell channel, 4 the vhost-user socket, which has a second number. Of a disk
    // that the guest uses, three events of its queue (kick, interrupt, error), and guest
    // memory, which is mapped too, and cannot be resized; of one that it does not use,
    // neither.
    for (id, used) in [("disk0", true), ("disk1", false)] {
        let blk = vm.pid_of("blk", id);
        let files = proc::files(blk);
        let disk = vm.path(id).canonicalize().unwrap().display().to_string();
        let mut expected = standard.to_vec();
        expected.extend(["3 socket:", "4 socket:", disk.as_str()]);
        expected.push("socket");
        expected.push("/memfd:cellblock-inflight (deleted)"); // for a front end that asks
        // Each queue's thread, one a vCPU: what it waits on, what wakes it, its throttle.
        for _ in 0..2 {
            expected.extend(["anon_inode:[eventpoll]", event, "anon_inode:[timerfd]"]);
        }
        if used {
            expected.extend(["/memfd:guest-ram (deleted)", event, event, event]);
        }
        expected[3..].sort();
        assert_eq!(kinds(blk), expected, "{id}: {files:?}");
        let sockets: BTreeSet<_> =
            files.values().filter(|file| file.starts_with("socket:")).collect();
        assert_eq!(sockets.len(), 2, "{id}: {files:?}");
    }
    // Guest memory reaches those who need it, and nobody else.
    let maps = |pid| fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(maps(vm.pid_of("blk", "disk0")).contains("guest-ram"));
    assert!(!maps(vm.pid_of("blk", "disk1")).contains("guest-ram"), "before it is used");
    assert!(!maps(serial).contains("guest-ram"), "the serial process maps guest memory");
    let spawner = vm.pid_of("spawner", "");
    assert!(!maps(spawner).contains("guest-ram"), "the spawner maps guest memory");
    for (fd, file) in proc::files(spawner) {
        let foreign = ["kvm", "guest-ram", "/disk"].iter().any(|part| file.contains(part));
        assert!(!foreign, "the spawner has {fd} {file}");
    }
}

#[test]
fn the_vmm_is_confined() {
    as_both(busy, |mut vm| {
        vm.wait_for("pause: n=");
        let pid = vm.pid();
        let mut names = Vec::new();
        for tid in proc::threads(pid) {
            let status = proc::status(pid, tid);
            let name = status["Name"].clone();
            assert_eq!(status["Seccomp"], "2", "thread {name}");
            assert_eq!(status["NoNewPrivs"], "1", "thread {name}");
            no_capabilities(&status, &format!("the VMM's thread {name}"));
            // Dropping the bounding set takes a capability, which an ordinary user has not;
            // with no_new_privs and without capabilities it has no meaning.
            if status["Uid"].starts_with("0\t") {
                assert_eq!(status["CapBnd"], "0000000000000000", "thread {name}");
            }
            names.push(name);
        }
        names.sort();
        names.retain(|name| !name.starts_with("kvm-")); // the kernel's own
        assert_eq!(names, ["cellblock", "vcpu0", "vcpu1", "vu-disk0", "vu-disk1"]);

        let spawner = vm.pid_of("spawner", "");
        let status = proc::status(spawner, spawner);
        assert_eq!(status["NoNewPrivs"], "1");
        // CAP_SETUID and CAP_SETGID, for writing id maps, where there are any.
        let kept = u64::from_str_radix(&status["CapEff"], 16).unwrap();
        assert_eq!(kept & !0xc0, 0, "CapEff of the spawner: {kept:x}");
    });
}

/// Kills what `victim` finds; nothing may be left within a second.
fn leaves_nothing(mut vm: Vm, victim: &str, paused: bool, stopped: bool) {
    vm.wait_for("pause: n=");
    if paused {
        vm.pause();
    }
    let pid = if victim == "vmm" { vm.pid() } else { vm.pid_of(victim, "") };
    let family = vm.processes();
    assert_eq!(family.len(), 5, "{family:?}");
    if stopped {
        for process in family.iter().filter(|p| p.name == "blk" || p.name == "serial") {
            send(process.pid, Signal::SIGSTOP);
            let arrived = poll(LIMIT, || (process.state() == Some('T')).then_some(()));
            assert!(arrived.is_some(), "{process:?} does not stop");
        }
    }
    send(pid, Signal::SIGKILL);
    if let Err(left) = proc::wait_gone(&family, AFTERLIFE) {
        vm.fail(&format!("{victim} killed, and left after {AFTERLIFE:?}: {left:?}"));
    }
    let status = vm.wait_exit();
    if victim == "spawner" {
        assert_eq!(status.code(), Some(1), "{status}");
        let line = vm.wait_for_error("the spawner died");
        assert!(line.starts_with("cellblock: error: "), "{line}");
        assert!(!vm.path("control").exists(), "the control path is left");
    }
}

#[test]
fn killing_the_vmm_leaves_no_process() {
    as_both(busy, |vm| leaves_nothing(vm, "vmm", false, false));
}

#[test]
fn killing_the_paused_vmm_leaves_no_process() {
    leaves_nothing(busy().start(), "vmm", true, false);
}

#[test]
fn killing_the_vmm_leaves_no_stopped_process() {
    as_both(busy, |vm| leaves_nothing(vm, "vmm", false, true));
}

#[test]
fn killing_the_spawner_leaves_no_process() {
    as_both(busy, |vm| leaves_nothing(vm, "spawner", false, false));
}

#[test]
fn killing_the_spawner_leaves_no_stopped_process() {
    leaves_nothing(busy().start(), "spawner", false, true);
}

/// Kills a device process and waits until that was noticed and named.
fn kill_device(vm: &mut Vm, role: &str, id: &str) {
    let events = vm.events();
    let victim = Identity::of(vm.pid_of(role, id)).unwrap();
    send(victim.pid, Signal::SIGKILL);
    let event = vm.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceDied { .. }));
    let how = "signal 9 (SIGKILL)".to_string();
    let (role, id) = (role.to_string(), id.to_string());
    assert_eq!(
        event.kind,
        EventKind::DeviceDied { role: role.clone(), id: id.clone(), pid: victim.pid, how }
    );
    let line = vm.wait_for_error("device process died");
    for part in ["error", "SIGKILL", &role, &id, &victim.pid.to_string()] {
        assert!(line.contains(part), "no {part:?} in: {line}");
    }
    let gone = vec![victim];
    assert_eq!(proc::wait_gone(&gone, AFTERLIFE), Ok(()));
}

/// The VM answers everything, with a device process dead.
fn answers(vm: &mut Vm) {
    let (epoch, _) = vm.pause();
    assert_eq!(vm.stats().state, State::Paused);
    assert_eq!(vm.resume(), epoch);
    let stats = vm.stats();
    assert_eq!(stats.state, State::Running);
    assert!(stats.vcpus.iter().all(|vcpu| vcpu.state == State::Running), "{stats:?}");
}

#[test]
fn a_killed_block_process_is_named_and_replaced() {
    // The first disk is in use, the second has not been touched by the guest.
    for id in ["disk0", "disk1"] {
        let mut vm = busy().start();
        vm.wait_for("pause: n=");
        let (events, before) = (vm.events(), vm.ps());
        let files = kinds(vm.pid_of("blk", id));
        kill_device(&mut vm, "blk", id);
        let event =
            vm.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceReplaced { .. }));
        let EventKind::DeviceReplaced { role, id: named, pid, restarts, .. } = event.kind else {
            unreachable!()
        };
        assert_eq!((role.as_str(), named.as_str(), restarts), ("blk", id, 1));
        answers(&mut vm);
        for disk in &vm.stats().disks {
            let restarts = u64::from(disk.id == id);
            assert_eq!((disk.state, disk.restarts), (DeviceState::Running, restarts));
        }
        // In a jail of the same shape, and all its own.
        let of = |list: &[Process]| list.iter().find(|p| p.id == id).unwrap().clone();
        let (old, new) = (of(&before), of(&vm.ps()));
        assert_eq!(new.pid, pid);
        assert_eq!((new.seccomp, new.no_new_privs), (old.seccomp, old.no_new_privs));
        assert_eq!((new.cap_eff, new.cap_bnd), (old.cap_eff, old.cap_bnd));
        assert!(new.namespaces.keys().eq(old.namespaces.keys()), "{new:?}");
        assert_eq!(kinds(pid), files);
        vm.wait_for("pause: n=");
        vm.say(b"q");
        vm.wait_for("pause: ok");
        vm.ends_well();
    }
}

#[test]
fn a_killed_serial_process_is_named_and_replaced() {
    // The guest reads the UART in every round; its disk shows that rounds go on.
    let mut vm = busy().start();
    vm.wait_for("pause: n=");
    let events = vm.events();
    kill_device(&mut vm, "serial", "com1");
    vm.wait_for_event(&events, |kind| matches!(kind, EventKind::DeviceReplaced { .. }));
    answers(&mut vm);
    let serial = vm.stats().serials[0].clone();
    assert_eq!((serial.state, serial.restarts), (DeviceState::Running, 1));
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

#[test]
fn a_serial_process_killed_while_stopped_lets_the_guest_go() {
    // The guest waits in a read of the UART that nobody answers, until the end of the
    // process answers it.
    let mut vm = busy().start();
    vm.wait_for("pause: n=");
    let serial = vm.pid_of("serial", "com1");
    send(serial, Signal::SIGSTOP);
    let mut last = vm.stats().disks[0].writes;
    let stuck = poll(LIMIT, || {
        std::thread::sleep(Duration::from_millis(20));
        let writes = vm.stats().disks[0].writes;
        (std::mem::replace(&mut last, writes) == writes).then_some(())
    });
    assert!(stuck.is_some(), "the guest goes on without an answer");
    kill_device(&mut vm, "serial", "com1");
    // At once, and not when the VMM would have lost patience with a silent process.
    let soon = Duration::from_secs(2);
    if poll(soon, || (vm.stats().disks[0].writes > last).then_some(())).is_none() {
        vm.fail("the guest still waits");
    }
}

/// Makes a thread of `pid` call unshare, as an attacker would who got that far.
/// False where this kernel does not let us.
fn provoke(pid: i32, name: &str) -> bool {
    let tid = proc::threads(pid).into_iter().find(|tid| proc::status(pid, *tid)["Name"] == name);
    let tid = Pid::from_raw(tid.unwrap_or_else(|| panic!("no thread {name}")));
    match ptrace::attach(tid) {
        Err(Errno::EPERM) => {
            eprintln!("skipped: this user may not trace processes");
            return false;
        }
        attached => attached.unwrap(),
    }
    let stopped = waitpid(tid, Some(WaitPidFlag::__WALL)).unwrap();
    assert!(matches!(stopped, WaitStatus::Stopped(_, Signal::SIGSTOP)), "{stopped:?}");
    let mut registers = ptrace::getregs(tid).unwrap();
    // It sleeps in a system call: right before where it returns to is the instruction
    // that made it. It is made once more, with another number, and is not restarted.
    registers.rip -= 2;
    registers.rax = nix::libc::SYS_unshare as u64;
    registers.orig_rax = u64::MAX;
    ptrace::setregs(tid, registers).unwrap();
    ptrace::detach(tid, None).unwrap();
    true
}

#[test]
fn a_forbidden_system_call_is_reported() {
    for (role, id, thread) in [("blk", "disk0", "blk-q0"), ("serial", "com1", "serial-in")] {
        let mut vm = Vm::with("mode=halt").disk(8).start();
        vm.wait_for("halt: ready");
        let events = vm.events();
        let pid = vm.pid_of(role, id);
        if !provoke(pid, thread) {
            return;
        }
        let event = vm.wait_for_event(&events, |kind| matches!(kind, EventKind::Violation { .. }));
        let EventKind::Violation { process, syscall, thread: named } = &event.kind else {
            unreachable!()
        };
        assert_eq!(
            (process.as_str(), syscall.as_str()),
            (&*format!("{role} {id}"), "unshare (272)")
        );
        assert!(named.starts_with(thread), "{event:?}");
        let line = vm.wait_for_error("device process died");
        for part in [role, id, thread, "unshare (272)", &pid.to_string()] {
            assert!(line.contains(part), "no {part:?} in: {line}");
        }
        vm.wait_for_event(
            &events,
            |kind| matches!(kind, EventKind::DeviceDied { how, .. } if how.contains("unshare")),
        );
        answers(&mut vm);
        vm.ask(Request::Stop);
        vm.ends_well();
    }
}

#[test]
fn signals_stop_the_vm_in_good_order() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        for paused in [false, true] {
            let mut vm = busy().start();
            vm.wait_for("pause: n=");
            let events = vm.events();
            if paused {
                vm.pause();
            }
            vm.signal(signal);
            let event =
                vm.wait_for_event(&events, |kind| matches!(kind, EventKind::Shutdown { .. }));
            let stopped = EventKind::Shutdown { reason: Shutdown::Stopped, message: None };
            assert_eq!(event.kind, stopped, "{signal}");
            vm.ends_well();
        }
    }
}

#[test]
fn a_signal_of_the_keyboard_reaches_all_and_stops_the_vm_in_good_order() {
    // ctrl-c goes to the whole foreground group: the VMM acts on it, nobody else.
    let mut vm = busy().start();
    vm.wait_for("pause: n=");
    send(-vm.pid(), Signal::SIGINT);
    vm.wait_exit();
    assert_eq!(vm.stderr.finished(LIMIT), "", "a clean stop is silent");
    assert!(vm.console.is_finished(LIMIT), "somebody holds the console");
    vm.ends_well();
}

#[test]
fn stop_ends_the_vm_paused_or_not() {
    for paused in [false, true] {
        let mut vm = busy().start();
        vm.wait_for("pause: n=");
        if paused {
            vm.cli("pause", &[]);
            assert_eq!(vm.stats().state, State::Paused);
        }
        let family = vm.processes();
        vm.cli("stop", &[]);
        // The command returns when the VM has gone.
        assert!(!vm.path("control").exists(), "stop returned before the control path went");
        assert_eq!(proc::wait_gone(&family, AFTERLIFE), Ok(()));
        vm.ends_well();
    }
}

#[test]
fn stop_does_not_wait_for_a_stopped_device_process() {
    let mut vm = busy().start();
    vm.wait_for("pause: n=");
    let family = vm.processes();
    for process in family.iter().filter(|p| p.name == "blk" || p.name == "serial") {
        send(process.pid, Signal::SIGSTOP);
    }
    vm.ask(Request::Stop);
    vm.wait_for_error("console process did not finish in time");
    vm.ends_well();
}

/// A start that must fail: one line on standard error with all of `parts`, no process
/// left, and not a single instruction of the guest run.
#[track_caller]
fn refused(mut vm: Vm, parts: &[&str]) {
    let status = vm.wait_exit();
    let said = vm.stderr.finished(LIMIT);
    assert_eq!(status.code(), Some(1), "{said}");
    let line = said.lines().last().unwrap_or_default();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(line.starts_with("cellblock: error: "), "{said}");
    for part in parts {
        assert!(line.contains(part), "no {part:?} in: {line}");
    }
    assert_eq!(vm.console.finished(LIMIT), "", "the guest ran");
    assert!(!vm.path("control").exists());
}

#[test]
fn without_user_namespaces_nothing_starts() {
    if !is_root("forbidding user namespaces in one of our own") {
        return;
    }
    // The limit counts in the user namespace it is set in.
    let forbid = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
    let prefix = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh"];
    let vm = busy().prefix(&prefix).start();
    refused(vm, &["process", "create process and namespaces", "user.max_*_namespaces"]);
}

#[test]
fn a_program_that_the_jail_may_not_execute_does_not_start() {
    if !is_root("device processes are another user's only then") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program: PathBuf = dir.path().join("cellblock");
    let copied = std::process::Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_cellblock"))
        .arg(&program)
        .status();
    assert!(copied.unwrap().success());
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    let vm = busy().program(&program).start();
    refused(vm, &["execute cellblock", "Permission denied", "chmod o+rx"]);
}

#[test]
fn device_processes_are_nobody_on_the_host() {
    if !is_root("device processes are another user's only then") {
        return;
    }
    let mut vm = busy().start();
    vm.wait_for("pause: n=");
    for device in devices(&vm.ps()) {
        assert_ne!(device.uid, 0, "{device:?}");
    }
    drop(vm);
    // An ordinary user has no other id to give.
    let mut vm = busy().ordinary_user().start();
    vm.wait_for("pause: n=");
    for process in vm.ps() {
        assert_eq!(process.uid, NOBODY, "{process:?}");
    }
}
