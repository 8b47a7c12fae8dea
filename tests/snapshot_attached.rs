//! Programs that attached, in snapshots, restores and resets: what they hold, what they have begun,
//! and what those give back that take part.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod attach_support;
mod common;

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use attach_support::{attach, kernel};
use cellblock::control::protocol::{Reply, Request};
use cellblock::snapshot::format::Chain;
use cellblock_plugin_api as api;
use cellblock_plugin_api::wire::{Request as ToVmm, VERSION};
use cellblock_plugin_api::{Event, Moment, Space};
use cellblock_wire::Channel;
use common::Vm;
use common::snapshot::{cellblock, refused_restore};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

const PORT: u64 = 0x510;
/// Asks the port for a number and gives it the next: `mov dx, 0x510`; 4: `in eax, dx`; `inc eax`;
/// `out dx, eax`; `jmp 4`.
const ECHO: &[u8] = &[0x66, 0xba, 0x10, 0x05, 0xed, 0xff, 0xc0, 0xef, 0xeb, 0xfa];
/// `xor rax, rax`; 7: `inc rax`; `jmp 7`.
const COUNT: &[u8] = &[0x48, 0xc7, 0xc0, 0, 0, 0, 0, 0x48, 0xff, 0xc0, 0xeb, 0xfb];
/// Memory that no guest here uses.
const BLOCK: u64 = 0x80_0000;
const BLOCK_LEN: usize = 1 << 20;

fn tiny(dir: &Path, code: &[u8], options: &str) -> Vm {
    let socket = format!("plugin{options}");
    Vm::with("").kernel(&kernel(dir, code)).arg("--plugin-socket").arg(socket).start()
}

fn restored(from: &Path, options: &str) -> Vm {
    Vm::restore(from).arg("--plugin-socket").arg(format!("plugin{options}")).start()
}

/// What a device that counts knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Known {
    number: u32,
    /// The guest has the number, and owes the next.
    given: bool,
    resets: u32,
    /// Where the last reset put it.
    back_at: u32,
}

#[derive(Default)]
struct Shared {
    known: Mutex<Known>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap()
    }

    fn wait(&self, done: impl Fn(&Known) -> bool) -> Known {
        let (known, late) = self
            .changed
            .wait_timeout_while(self.lock(), common::LIMIT, |known| !done(known))
            .unwrap();
        assert!(!late.timed_out(), "stands at {known:?}");
        *known
    }
}

/// A device at [`PORT`], which finds every access that is lost, repeated or of another time.
struct Device {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Device {
    /// `name`: it takes part in snapshots.
    fn attach(vm: &Vm, name: Option<&str>) -> Device {
        Device::over(attach(vm), name)
    }

    fn over(api: api::Vm, name: Option<&str>) -> Device {
        let shared = Arc::new(Shared::default());
        api.reserve_range(Space::Port, PORT, 4).unwrap();
        let mut threads = Vec::new();
        if let Some(name) = name {
            let mut part = api.take_part(name).unwrap();
            if let Some(state) = part.take_restored() {
                shared.lock().load(&state);
            }
            let own = shared.clone();
            threads.push(spawn(move || take_part(&part, &own)));
        }
        let own = shared.clone();
        threads.push(spawn(move || serve(&api, &own)));
        Device { shared, threads }
    }

    fn goes_on(&self) -> u32 {
        let now = self.shared.lock().number;
        self.shared.wait(|known| known.number.wrapping_sub(now) >= 20).number
    }

    /// Its VM has ended, and it has seen nothing wrong.
    fn ends(self) {
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

impl Known {
    fn save(&self) -> Vec<u8> {
        [&self.number.to_le_bytes()[..], &[self.given.into()]].concat()
    }

    fn load(&mut self, state: &[u8]) {
        let (number, given) = state.split_at(4);
        self.number = u32::from_le_bytes(number.try_into().unwrap());
        self.given = given == [1];
    }
}

fn serve(vm: &api::Vm, shared: &Shared) {
    let vcpu = vm.vcpu(0).unwrap();
    let mut first = *shared.lock() == Known::default();
    while let Ok(event) = vcpu.wait() {
        let Event::Access(access) = event else { panic!("{event:?}") };
        assert_eq!(access.address, PORT);
        let mut known = shared.lock();
        if !access.is_write {
            assert!(!known.given, "asked twice for {}", known.number);
            known.given = true;
            let number = known.number.to_le_bytes();
            drop(known);
            vcpu.answer(&number).unwrap();
        } else if !std::mem::take(&mut first) || known.given {
            let number = u32::from_le_bytes(access.data[..4].try_into().unwrap());
            assert_eq!((known.given, number), (true, known.number + 1));
            (known.number, known.given) = (number, false);
            shared.changed.notify_all();
        }
        if vcpu.resume().is_err() {
            return;
        }
    }
}

fn take_part(part: &api::Part, shared: &Shared) {
    while let Ok(moment) = part.wait() {
        match moment {
            Moment::Quiesce(epoch) => {
                let state = shared.lock().save();
                if std::env::var_os(COUNTER).is_some() {
                    // Most of the moments at which it is killed are in here.
                    std::thread::sleep(Duration::from_millis(20));
                }
                part.quiesced(epoch, state).unwrap();
            }
            Moment::Restore(epoch, state) => {
                let mut known = shared.lock();
                known.load(&state);
                (known.back_at, known.resets) = (known.number, known.resets + 1);
                shared.changed.notify_all();
                part.restored(epoch).unwrap();
            }
            Moment::Thaw => {}
        }
    }
}

fn stop(mut vm: Vm) {
    vm.ask(Request::Stop);
    vm.ends_well();
}

#[track_caller]
fn fails(vm: &Vm, to: &Path, options: &[&str]) -> String {
    let ended = vm.try_snapshot(to, options);
    let line = String::from_utf8(ended.stderr).unwrap();
    assert_eq!((ended.status.code(), line.lines().count()), (Some(1), 1), "{line}");
    assert!(!to.exists());
    line
}

#[test]
fn a_program_that_takes_part_goes_on_with_its_vm_and_back_with_a_reset() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut vm = tiny(dir.path(), ECHO, "");
    let device = Device::attach(&vm, Some("counter"));
    for n in 0..4 {
        device.goes_on();
        let options: &[&str] = if n % 2 == 0 { &[] } else { &["--live"] };
        let said = vm.snapshot(&at(&n.to_string()), options);
        assert!(!said.contains("inspection"), "{said}");
    }
    device.goes_on();
    vm.snapshot(&at("last"), &["--stop"]);
    vm.wait_exit();
    let known = *device.shared.lock();
    device.ends();
    let line = refused_restore(&at("last"), &[]);
    assert!(line.contains("'counter'") && line.contains("'--plugin-socket PATH'"), "{line}");

    let mut vm = restored(&at("last"), "");
    // Nothing of it runs, and nothing is done to it, until the program is there.
    let stranger = attach(&vm);
    fails(&vm, &at("none"), &["--timeout", "300ms"]);
    assert!(vm.try_ask(Request::Reset).is_err());
    let device = Device::attach(&vm, Some("counter"));
    drop(stranger);
    assert!(device.goes_on() >= known.number + 20);
    vm.snapshot(&at("next"), &[]);
    for round in 1..4 {
        device.shared.wait(|now| now.number > known.number + 1000 * round);
        let Reply::Reset { .. } = vm.ask(Request::Reset) else { panic!("no reset") };
        let now = device.shared.wait(|now| now.resets == round);
        assert_eq!(now.back_at, known.number);
        device.goes_on();
    }
    stop(vm);
    device.ends();

    let vm = restored(&at("next"), "");
    let device = Device::attach(&vm, Some("counter"));
    assert!(device.goes_on() > known.number + 20);
    stop(vm);
    device.ends();
}

#[test]
fn a_program_that_the_snapshot_does_not_know_keeps_a_vm_from_being_reset() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = tiny(dir.path(), COUNT, "");
    drop(attach(&vm)); // its sockets are there
    vm.snapshot(&at, &["--stop"]);
    vm.wait_exit();
    let mut vm = restored(&at, "");
    // One that has part of the machine and takes no part in snapshots stays as it is.
    let other = attach(&vm);
    other.reserve_range(Space::Port, PORT + 8, 4).unwrap();
    vm.ask(Request::Reset);
    let device = Device::attach(&vm, Some("new"));
    let error = vm.try_ask(Request::Reset).unwrap_err().to_string();
    assert!(error.contains("no state that plugin new could go back to"), "{error}");
    stop(vm);
    drop(other);
    device.ends();
}

#[test]
fn an_access_that_is_open_fails_the_snapshot_in_time_by_the_name_of_its_program() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut vm = tiny(dir.path(), ECHO, "");
    let program = attach(&vm);
    program.reserve_range(Space::Port, PORT, 4).unwrap();
    let vcpu = program.vcpu(0).unwrap();
    let event = vcpu.wait().unwrap();
    assert!(matches!(event, Event::Access(_)), "{event:?}");
    for options in [&["--timeout", "200ms"][..], &["--timeout", "200ms", "--live"]] {
        let line = fails(&vm, &at("none"), options);
        assert!(line.contains("plugin attached-1") && line.contains("port 0x510"), "{line}");
    }
    // It goes on where it was, until the program goes; which takes no part, so that the snapshot
    // with it is for inspection.
    drop((vcpu, program));
    let device = Device::attach(&vm, None);
    device.goes_on();
    let said = vm.snapshot(&at("inspection"), &[]);
    assert!(said.contains("for inspection only: no state of attached-2"), "{said}");
    device.goes_on();
    let path = at("inspection");
    assert!(cellblock(&["verify", path.to_str().unwrap()]).status.success());
    let line = refused_restore(&path, &["--plugin-socket", at("p").to_str().unwrap()]);
    assert!(line.contains("'attached-2'") && line.contains("for inspection"), "{line}");
    stop(vm);
    device.ends();
}

#[test]
fn vcpus_that_a_program_holds_stay_its_own_and_run_in_a_restored_vm() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut vm = tiny(dir.path(), COUNT, "");
    let program = attach(&vm);
    let part = program.take_part("debugger").unwrap();
    let vcpu = program.vcpu(0).unwrap();
    let hold = || {
        program.pause_vcpus(1, 1).unwrap();
        assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 1 });
        vcpu.regs().unwrap()
    };
    // It stands while it is held; let go, it counts on, however long that takes.
    let counts_on = |from: u64| {
        let counted = common::poll(common::LIMIT, || {
            let regs = hold();
            if regs.rax == from {
                vcpu.resume().unwrap();
            }
            (regs.rax != from).then_some(regs)
        });
        counted.unwrap()
    };
    let held = counts_on(0);
    let rests = spawn(move || {
        while let Ok(moment) = part.wait() {
            if let Moment::Quiesce(epoch) = moment {
                part.quiesced(epoch, b"holds vCPU 0".to_vec()).unwrap();
            }
        }
    });
    for (n, options) in [&[][..], &["--live"], &["--disks", "copy"]].into_iter().enumerate() {
        vm.snapshot(&at(&n.to_string()), options);
        assert_eq!(vcpu.regs().unwrap(), held, "{options:?}");
    }
    vm.pause();
    vm.snapshot(&at("paused"), &[]);
    vm.resume();
    assert_eq!(vcpu.regs().unwrap(), held);
    vcpu.resume().unwrap();
    counts_on(held.rax);
    drop((vcpu, program));
    stop(vm);
    rests.join().unwrap();

    for name in ["0", "1", "2", "paused"] {
        let vm = restored(&at(name), "");
        let program = attach(&vm);
        let vcpu = program.vcpu(0).unwrap();
        // Who held it and goes on holding it asks for that first, and has it at that instruction.
        program.pause_vcpus(1, 3).unwrap();
        let state = program.take_part("debugger").unwrap().take_restored().unwrap();
        assert_eq!(
            (&state[..], vcpu.wait().unwrap()),
            (&b"holds vCPU 0"[..], Event::Paused { user: 3 })
        );
        let now = vcpu.regs().unwrap();
        assert_eq!((now.rip, now.rax), (held.rip, held.rax), "{name}");
        vcpu.resume().unwrap();
        program.pause_vcpus(1, 4).unwrap();
        assert_eq!(vcpu.wait().unwrap(), Event::Paused { user: 4 });
        stop(vm);
    }
}

/// Says that it writes, and never that it has.
struct Stuck {
    _channel: Channel,
}

fn begins_to_write(vm: &Vm) -> Stuck {
    let socket: OwnedFd =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
    let address = UnixAddr::new(&vm.path("plugin")).unwrap();
    connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address).unwrap();
    let channel = Channel::from_fd(socket);
    let requests = [ToVmm::Hello { version: VERSION }, ToVmm::Writing { offset: 0, length: 1 }];
    for request in requests {
        channel.send(&request, &[]).unwrap();
        let (reply, _) = channel.recv::<api::wire::Reply>().unwrap();
        reply.unwrap();
    }
    Stuck { _channel: channel }
}

#[test]
fn of_a_programs_write_a_snapshot_has_all_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut vm = tiny(dir.path(), COUNT, ",memory=rw");
    let memory = attach(&vm).guest_memory().unwrap();
    let written = Arc::new(Shared::default());
    let own = written.clone();
    let writer = spawn(move || {
        for number in 1.. {
            if memory.write(BLOCK, &vec![number as u8; BLOCK_LEN]).is_err() {
                return;
            }
            own.lock().number = number;
            own.changed.notify_all();
        }
    });
    let more = || {
        let now = written.lock().number;
        written.wait(|known| known.number >= now + 3);
    };
    for n in 0..8 {
        more();
        let options: &[&str] = if n % 2 == 0 { &[] } else { &["--live"] };
        let path = at(&n.to_string());
        let said = vm.snapshot(&path, options);
        assert!(!said.contains("inspection"), "{said}");
        let block = block(&path);
        let torn = block.iter().position(|byte| *byte != block[0]);
        assert_eq!(torn, None, "snapshot {n}: of two writes");
        assert_ne!(block[0], 0);
    }
    // One that does not end its write is named, and keeps nobody else from writing afterwards.
    let stuck = begins_to_write(&vm);
    let line = fails(&vm, &at("none"), &["--timeout", "200ms"]);
    assert!(line.contains("plugin attached-2") && line.contains("in the middle"), "{line}");
    more();
    drop(stuck);
    // Its end is noticed by another thread than that which is asked for the snapshot.
    let other = at("other");
    common::poll(common::LIMIT, || vm.try_snapshot(&other, &[]).status.success().then_some(()))
        .unwrap();
    more();
    stop(vm);
    writer.join().unwrap();
}

/// What is written through a mapping of its own is in no log: no copy that takes one for granted.
#[test]
fn a_program_that_writes_untold_keeps_copies_from_being_made_in_rounds() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = tiny(dir.path(), COUNT, ",memory=rw");
    let program = attach(&vm);
    vm.snapshot(&dir.path().join("before"), &["--live"]);
    let (_memory, _, _) = program.memory().unwrap();
    let line = fails(&vm, &dir.path().join("none"), &["--live"]);
    assert!(line.contains("memory=rw") && line.contains("without --live"), "{line}");
    let parent = dir.path().join("before");
    let line = fails(&vm, &dir.path().join("none"), &["--diff", parent.to_str().unwrap()]);
    assert!(line.contains("untold"), "{line}");
    vm.snapshot(&dir.path().join("full"), &[]);
    vm.snapshot(&dir.path().join("copied"), &["--disks", "copy"]);
    stop(vm);
}

/// [`BLOCK`] as a snapshot has it.
fn block(snapshot: &Path) -> Vec<u8> {
    use cellblock::snapshot::format::CHUNK;
    let chain = Chain::open(snapshot).unwrap();
    let first = BLOCK as usize / CHUNK;
    let mut block = vec![0; BLOCK_LEN];
    for (n, chunk) in block.chunks_mut(CHUNK).enumerate() {
        if !chain.is_zero(first + n) {
            chain.read_chunk(first + n, chunk).unwrap();
        }
    }
    block
}

/// The socket that this test's own program is to attach to, when it is another process.
const COUNTER: &str = "CELLBLOCK_TEST_COUNTER";

/// A device in a process of its own, which says when it has counted for a while.
fn counter(vm: &Vm) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "as_a_counter", "--nocapture"])
        .env(COUNTER, vm.path("plugin"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("counts on")), "the counter has ended");
    child
}

#[test]
fn as_a_counter() {
    let Ok(path) = std::env::var(COUNTER) else { return };
    let device = Device::over(api::Vm::attach(Path::new(&path)).unwrap(), Some("counter"));
    device.goes_on();
    println!("counts on");
    device.ends();
}

/// A program that takes part dies: the snapshot is whole or not there, and the guest goes on, with
/// the next one of its name.
#[test]
fn a_program_killed_at_any_moment_of_a_snapshot_leaves_a_whole_one_or_none() {
    const MOMENTS: u32 = 16;
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let mut vm = tiny(dir.path(), ECHO, "");
    drop(attach(&vm)); // its sockets are there
    let mut program = counter(&vm);
    let begun = Instant::now();
    vm.snapshot(&dir.path().join("first"), &[]);
    let took = begun.elapsed();
    let mut whole = 0;
    for moment in 0..MOMENTS {
        let options: &[&str] = if moment % 2 == 0 { &[] } else { &["--live"] };
        let ended = std::thread::scope(|scope| {
            let snapshot = scope.spawn(|| vm.try_snapshot(&at, options));
            std::thread::sleep(took * moment / MOMENTS);
            program.kill().unwrap();
            program.wait().unwrap();
            snapshot.join().unwrap()
        });
        assert_eq!(at.exists(), ended.status.success(), "{ended:?}");
        if at.exists() {
            whole += 1;
            Chain::open(&at).unwrap().verify_all(|_, _| {}).unwrap();
            std::fs::remove_dir_all(&at).unwrap();
        }
        program = counter(&vm);
    }
    eprintln!("killed {MOMENTS} times: {whole} whole");
    assert!(whole < MOMENTS, "it was never killed in time");
    vm.snapshot(&at, &[]);
    let left = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with('.')).collect();
    assert!(left.is_empty(), "{left:?}");
    program.kill().unwrap();
    program.wait().unwrap();
    stop(vm);
}
