//! The cut: everything stands still for it, everything goes on after it, all or nothing.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cellblock::control::client::{Client, ClientError, Cut};
use cellblock::control::protocol::{EventKind, Request, State};
use cellblock::snapshot::state::MicrovmState;
use common::trace::Traced;
use common::{LIMIT, Vm};
use nix::libc;
use nix::sys::signal::Signal;

/// Cycles of the standing test; `CELLBLOCK_CYCLES` has it do more, as 5000.
const CYCLES: u64 = 150;
/// Requests of a client that get their answers while memory is copied.
const PAUSES: u64 = 30;

fn cycles() -> u64 {
    std::env::var("CELLBLOCK_CYCLES").map_or(CYCLES, |n| n.parse().unwrap())
}

fn cut_within(vm: &Vm, hold: bool, timeout: Duration) -> Result<(Client, Cut), ClientError> {
    let mut client = Client::connect(&vm.path("control"))?;
    let cut = client.snapshot(hold, false, timeout, "test", LIMIT)?;
    Ok((client, cut))
}

#[track_caller]
fn cut(vm: &mut Vm) -> Cut {
    match cut_within(vm, false, Duration::from_secs(5)) {
        Ok((_, cut)) => cut,
        Err(error) => vm.fail(&cellblock::remedy::chain(&error)),
    }
}

fn contents(fd: OwnedFd) -> Vec<u8> {
    let (mut file, mut bytes) = (File::from(fd), Vec::new());
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_cut_is_a_whole_state_and_the_memory_that_belongs_to_it() {
    let mut vm = Vm::with("mode=pause cpus=2 every=50").cpus(2).disk(4).start();
    vm.wait_for("pause: n=100 ");
    let cut = cut(&mut vm);
    let report = cut.report.clone();
    assert_eq!((report.memory, report.disks.len()), (64 << 20, 1));
    assert!(report.still_us >= report.pause_us + report.drain_us, "{report:?}");
    let bytes = contents(cut.state);
    assert_eq!(bytes.len() as u64, report.state);
    let state = MicrovmState::decode(&bytes).unwrap();
    assert_eq!(state.encode().unwrap(), bytes, "the same state has the same bytes");
    state.verify_compatible(&state.vm_info.host).unwrap();
    assert_eq!((state.vm_info.cpus, state.vcpu_states.len()), (2, 2));
    assert!(state.vcpu_states[0].msrs.iter().any(|(index, _)| *index == 0x10), "no TSC");
    let ids: Vec<_> = state.device_states.iter().map(|d| (d.slot, d.id.as_str())).collect();
    assert_eq!(ids, [(0, "com1"), (1, "disk0")]);
    let disk = state.device_states[1].as_disk().unwrap().unwrap();
    assert!(disk.transport.queues[0].base.is_some());
    assert!(disk.counters[0].writes_completed >= 100);
    let memory = contents(cut.memory);
    assert_eq!(memory.len() as u64, report.memory);
    let ring = disk.transport.queues[0].config.used as usize;
    let used = u16::from_le_bytes([memory[ring + 2], memory[ring + 3]]);
    assert_eq!(Some(used), disk.transport.queues[0].base, "memory is of the same moment");
    // Every truncation is refused, and no flip gets further than an error.
    for len in (0..bytes.len()).step_by(97) {
        assert!(MicrovmState::decode(&bytes[..len]).is_err());
    }
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// Whoever restores it is in another directory than the VM was.
#[test]
fn no_path_in_a_state_is_relative() {
    let mut vm = Vm::with("mode=pause every=20").disk_with(4 << 20, ",cow=.").start();
    vm.wait_for("pause: n=20 ");
    let state = MicrovmState::decode(&contents(cut(&mut vm).state)).unwrap();
    let record = state.device_states[1].as_disk().unwrap().unwrap().record;
    let at = vm.path("disk0");
    let directory = at.parent().unwrap().to_path_buf();
    assert_eq!((record.path, record.cow), (at, Some(Some(directory))));
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// The guest counts, writes and checks blocks, reads its console and watches its clocks.
#[test]
fn cut_after_cut_leaves_no_trace_in_the_guest() {
    let mut vm = Vm::with("mode=pause cpus=2 every=100").cpus(2).disk(4).start();
    vm.wait_for("pause: n=100 ");
    let mut still = Vec::new();
    for n in 0..cycles() {
        let report = cut(&mut vm).report;
        still.push(report.still_us);
        // The pauses fall into different moments of what the guest does.
        std::thread::sleep(Duration::from_micros(n * 37 % 1500));
    }
    still.sort_unstable();
    let at = |part: usize| still[(still.len() - 1) * part / 100];
    eprintln!("{} cuts: still {} us median, {} us 99th", still.len(), at(50), at(99));
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// A stopped process of a device is named in time, nobody is left behind, and once it goes on
/// the next cut works.
#[test]
fn a_process_that_does_not_answer_fails_the_cut_in_time() {
    let mut vm = Vm::with("mode=pause every=100").disk(4).start();
    vm.wait_for("pause: n=100 ");
    let events = vm.events();
    for (role, id) in [("blk", "disk0"), ("serial", "com1")] {
        let pid = vm.pid_of(role, id);
        common::send(pid, Signal::SIGSTOP);
        let begun = Instant::now();
        let result = cut_within(&vm, false, Duration::from_millis(300));
        let took = begun.elapsed();
        common::send(pid, Signal::SIGCONT);
        let Err(ClientError::Refused { message, .. }) = result else {
            vm.fail(&format!("a cut without {role}: {result:?}"))
        };
        assert!(message.contains(&format!("{role} {id}")), "{message}");
        assert!(took < Duration::from_secs(3), "{took:?}");
        assert_eq!(vm.stats().state, State::Running);
        vm.wait_for_event(&events, |event| matches!(event, EventKind::SnapshotFailed { .. }));
        vm.wait_for("pause: n=");
        cut(&mut vm);
        vm.wait_for("pause: n=");
    }
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// A process that could never be told to go on is not waited for: another takes its place.
#[test]
fn a_process_with_no_room_for_messages_is_replaced() {
    let mut vm = Vm::with("mode=pause every=20").disk(4).arg("--device-timeout").arg("0").start();
    vm.wait_for("pause: n=20 ");
    let events = vm.events();
    common::send(vm.pid_of("blk", "disk0"), Signal::SIGSTOP);
    let throttle = |iops| Request::Throttle {
        id: "disk0".into(),
        bw: None,
        bw_burst: None,
        iops: Some(iops),
        iops_burst: None,
    };
    let full = (1_000_000..1_100_000).any(|iops| vm.try_ask(throttle(iops)).is_err());
    assert!(full, "it takes any number of messages");
    let result = cut_within(&vm, false, Duration::from_millis(300));
    assert!(matches!(result, Err(ClientError::Refused { .. })), "{result:?}");
    vm.wait_for_event(&events, |event| matches!(event, EventKind::DeviceReplaced { .. }));
    vm.wait_for("pause: n=");
    cut(&mut vm);
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// A guest that its user has paused does not run because a snapshot failed.
#[test]
fn a_paused_vm_stays_paused_when_its_snapshot_fails() {
    let mut vm = Vm::with("mode=pause every=1").disk(4).start();
    vm.wait_for("pause: n=100 ");
    let serial = vm.pid_of("serial", "com1");
    common::send(serial, Signal::SIGSTOP);
    // Until its vCPU is in the middle of a write to the console.
    std::thread::sleep(Duration::from_millis(200));
    vm.pause();
    let begun = Instant::now();
    let result = cut_within(&vm, false, Duration::from_millis(300));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let Err(ClientError::Refused { message, .. }) = result else {
        vm.fail(&format!("a cut in the middle of an access: {result:?}"))
    };
    assert!(message.contains("waits for the device at port"), "{message}");
    assert_eq!(vm.stats().state, State::Paused);
    common::send(serial, Signal::SIGCONT);
    // What it had written is on its way still.
    std::thread::sleep(Duration::from_millis(100));
    let before = vm.console.text();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(vm.console.text(), before, "the guest runs");
    // Now that the device answers there is a snapshot, of a VM that stays paused.
    cut(&mut vm);
    assert_eq!(vm.stats().state, State::Paused);
    vm.resume();
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// Capturing has a deadline, as all phases: a vCPU's thread that does not get to it is named.
#[test]
fn a_capture_that_does_not_end_fails_and_is_named() {
    let mut vm = Vm::with("mode=pause every=20").disk(4).start();
    vm.wait_for("pause: n=20 ");
    vm.pause();
    let thread = Traced::hold(vm.pid(), "vcpu0");
    let begun = Instant::now();
    let result = cut_within(&vm, false, Duration::from_millis(300));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let Err(ClientError::Refused { message, .. }) = result else {
        vm.fail(&format!("a cut without a vCPU: {result:?}"))
    };
    assert!(message.contains("capturing") && message.contains("vcpu 0"), "{message}");
    drop(thread);
    assert_eq!(vm.stats().state, State::Paused);
    cut(&mut vm);
    vm.resume();
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

#[test]
fn a_held_vm_stands_still_until_its_client_says_or_goes() {
    let mut vm = Vm::with("mode=pause every=10").disk(4).start();
    vm.wait_for("pause: n=10 ");
    let (mut client, held) = cut_within(&vm, true, Duration::from_secs(5)).unwrap();
    let before = contents(held.memory.try_clone().unwrap());
    assert!(cut_within(&vm, false, Duration::from_secs(5)).is_err(), "one at a time");
    std::thread::sleep(Duration::from_millis(20));
    assert!(contents(held.memory) == before, "the guest ran");
    client.ask(Request::Resume).unwrap();
    vm.wait_for("pause: n=");
    let (client, _held) = cut_within(&vm, true, Duration::from_secs(5)).unwrap();
    drop(client);
    vm.wait_for("pause: n=");
    // A VM that was paused stays so.
    vm.pause();
    cut(&mut vm);
    assert_eq!(vm.stats().state, State::Paused);
    vm.resume();
    let (mut client, _held) = cut_within(&vm, true, Duration::from_secs(5)).unwrap();
    client.ask(Request::Stop).unwrap();
    vm.ends_well();
}

/// Whoever reads a VM that it holds reads one moment: nobody else has it go on, and a hold that
/// is over is known to be.
#[test]
fn a_hold_is_its_clients_alone() {
    let mut vm = Vm::with("mode=pause every=10").disk(4).start();
    vm.wait_for("pause: n=10 ");
    let (mut client, held) = cut_within(&vm, true, Duration::from_secs(5)).unwrap();
    let before = contents(held.memory.try_clone().unwrap());
    for request in [Request::Resume, Request::Held, Request::Reset] {
        match vm.try_ask(request.clone()) {
            Err(ClientError::Refused { message, .. }) if request == Request::Resume => {
                assert!(message.contains("held for a snapshot"), "{message}");
            }
            Err(ClientError::Refused { .. }) => {}
            other => vm.fail(&format!("{request:?}: {other:?}")),
        }
    }
    std::thread::sleep(Duration::from_millis(20));
    assert!(contents(held.memory) == before, "the guest ran");
    client.ask(Request::Held).unwrap();
    client.ask(Request::Resume).unwrap();
    assert!(client.ask(Request::Held).is_err(), "nothing is held any more");
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// Who holds a VM and is found dead when it is told something has it go on like any that is.
#[test]
fn a_hold_ends_with_its_client_however_that_is_found() {
    let mut vm = Vm::with("mode=pause every=10").disk(4).start();
    vm.wait_for("pause: n=10 ");
    let disk = vm.pid_of("blk", "disk0");
    let (mut client, _held) = cut_within(&vm, true, Duration::from_secs(5)).unwrap();
    client.ask(Request::Events).unwrap();
    // An event is there for the VMM before the end of who is to hear of it.
    vm.signal(Signal::SIGSTOP);
    common::send(disk, Signal::SIGKILL);
    let dead = || (!std::path::Path::new(&format!("/proc/{disk}")).exists()).then_some(());
    common::poll(LIMIT, dead).expect("it is reaped");
    std::thread::sleep(Duration::from_millis(50));
    drop(client);
    vm.signal(Signal::SIGCONT);
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

/// The VM ends while the command reads it: what it has then is not given out as a snapshot.
#[test]
fn a_hold_that_ended_before_all_was_read_makes_no_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::with("mode=pause every=10").disk(4).start();
    vm.wait_for("pause: n=10 ");
    vm.stats();
    vm.signal(Signal::SIGSTOP);
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    command.arg("snapshot").arg(vm.path("control")).arg(dir.path().join("s")).arg("--stop");
    let command = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let writer = Traced::hold(command.id() as i32, "cellblock");
    vm.signal(Signal::SIGCONT);
    writer.run_until(|call| call.entered && call.number == libc::SYS_fsync);
    assert!(vm.try_ask(Request::Resume).is_err());
    vm.ask(Request::Stop);
    vm.wait_exit();
    writer.release();
    let ended = command.wait_with_output().unwrap();
    let line = String::from_utf8(ended.stderr).unwrap();
    assert_eq!((ended.status.code(), line.lines().count()), (Some(1), 1), "{line}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something is left");
}

/// Memory is copied in turns: who else has a request is answered in between.
#[test]
fn a_live_copy_lets_others_have_their_answers_first() {
    let mut vm = Vm::with("mode=pause every=20 touch=100").memory("256M").start();
    vm.wait_for_line("pause: n=20 ");
    let events = vm.events();
    let connect = || {
        let mut stream = UnixStream::connect(vm.path("control")).unwrap();
        ask(&mut stream, &Request::Stats);
        line(&mut stream); // it is let in
        stream
    };
    let [mut copies, mut snapshots, mut pauses] = [connect(), connect(), connect()];
    let wanted = |live| Request::Snapshot { hold: false, live, timeout_us: None, trigger: None };
    // All requests are there when the VMM looks.
    vm.signal(Signal::SIGSTOP);
    ask(&mut copies, &wanted(true));
    ask(&mut snapshots, &wanted(false));
    // More than the VMM does in a few turns.
    for _ in 0..PAUSES {
        ask(&mut pauses, &Request::Pause);
        ask(&mut pauses, &Request::Resume);
    }
    vm.signal(Signal::SIGCONT);
    let refused = line(&mut snapshots);
    assert!(refused.contains("another snapshot of the VM is being taken"), "{refused}");
    let last = |kind: &EventKind| matches!(kind, EventKind::Pause { epoch: PAUSES, .. });
    let paused = vm.wait_for_event(&events, last);
    let cut = vm.wait_for_event(&events, |kind| matches!(kind, EventKind::Snapshot { .. }));
    assert!(paused.seq < cut.seq, "{paused:?} after {cut:?}");
    let report = line(&mut copies);
    assert!(report.contains(r#""reply":"snapshot""#), "{report}");
    vm.wait_for("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

fn ask(stream: &mut UnixStream, request: &Request) {
    let line = serde_json::to_string(request).unwrap() + "\n";
    stream.write_all(line.as_bytes()).unwrap();
}

fn line(stream: &mut UnixStream) -> String {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}
