//! What a plugin's answer costs, against what it cannot be cheaper than.
//!
//! The plugin is a process of its own, started by the caller with [`CHILD`] in its environment: it
//! then calls [`child`].

use std::env;
use std::fs::File;
use std::io::{Read, Write, pipe};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use cellblock_plugin_api::{Event, Hint, HintDetail, SOCKET_VARIABLE, Space, Vm};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::{CODE, Memory, Vmm, enter, real_mode, wait_for};

/// Names what the child is to do.
pub const CHILD: &str = "CELLBLOCK_COST_CHILD";
const MEMORY: &str = "CELLBLOCK_COST_MEMORY";
/// Where the guest counts.
const COUNTER: u64 = 0x3000;

/// `inc dword [0x3000]; in al, 0x50; jmp`.
const READS: &[u8] = &[0x66, 0xff, 0x06, 0x00, 0x30, 0xe4, 0x50, 0xeb, 0xf7];
/// `inc dword [0x3000]; out 0x50, al; jmp`.
const WRITES: &[u8] = &[0x66, 0xff, 0x06, 0x00, 0x30, 0xe6, 0x50, 0xeb, 0xf7];

/// What is measured. All but the last are microseconds for each round of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// An exit to the VMM and back, nobody asked.
    Floor,
    /// A read answered by a plugin that looks for it all the time.
    Spinning,
    /// A read answered by a plugin that sleeps.
    Sleeping,
    /// There and back over two pipes between two processes, without a VM.
    Pipes,
    /// A read whose answer needs registers, asked for each time.
    Registers,
    /// The same with a hint.
    Hinted,
    /// A write that the vCPU waits for.
    Write,
    /// A write that it does not wait for.
    Posted,
    /// From request to PAUSED, of a busy guest: each one by itself.
    Pause,
}

/// In the order in which they are measured and printed.
pub const LINES: [Line; 9] = [
    Line::Floor,
    Line::Spinning,
    Line::Sleeping,
    Line::Pipes,
    Line::Registers,
    Line::Hinted,
    Line::Write,
    Line::Posted,
    Line::Pause,
];

impl Line {
    /// What the child is told to be.
    pub fn name(self) -> &'static str {
        match self {
            Line::Floor => "floor",
            Line::Spinning => "spinning",
            Line::Sleeping => "sleeping",
            Line::Pipes => "pipes",
            Line::Registers => "registers",
            Line::Hinted => "hinted",
            Line::Write => "write",
            Line::Posted => "posted",
            Line::Pause => "pause",
        }
    }

    /// Measures it for `window`; `command` makes the child.
    pub fn measure(self, command: Command, window: Duration) -> Vec<f64> {
        match self {
            Line::Pipes => vec![pipes(command, window)],
            Line::Pause => pauses(window),
            _ => {
                let mut plugin = Plugin::start(command, self.name());
                plugin.warm_up();
                vec![plugin.cost(window)]
            }
        }
    }
}

struct Plugin {
    _vmm: Vmm,
    memory: Memory,
    child: Child,
}

impl Plugin {
    fn start(mut command: Command, mode: &str) -> Plugin {
        let mut vmm = Vmm::new(1);
        let memory = Memory::new(0x10000);
        let socket = inherit(vmm.socket());
        let copy = inherit(memory.0.try_clone().unwrap().into());
        command.env(CHILD, mode).env(SOCKET_VARIABLE, socket.as_raw_fd().to_string());
        command.env(MEMORY, copy.as_raw_fd().to_string());
        let child = command.spawn().unwrap();
        Plugin { _vmm: vmm, memory, child }
    }

    fn count(&self) -> u32 {
        u32::from_le_bytes(self.memory.get(COUNTER))
    }

    fn warm_up(&mut self) {
        wait_for("the guest to run", || (self.count() > 200).then_some(()));
    }

    /// Microseconds a round of the guest.
    fn cost(&self, window: Duration) -> f64 {
        let (begin, before) = (Instant::now(), self.count());
        sleep(window);
        let rounds = self.count().wrapping_sub(before);
        begin.elapsed().as_secs_f64() * 1e6 / f64::from(rounds.max(1))
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn inherit(fd: OwnedFd) -> OwnedFd {
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    fd
}

/// The child's whole life.
pub fn child(mode: &str) {
    if mode == "pipes" {
        return echo();
    }
    let fd: i32 = env::var(MEMORY).unwrap().parse().unwrap();
    let memory =
        Memory(File::options().read(true).write(true).open(format!("/proc/self/fd/{fd}")).unwrap());
    let vm = Vm::connect().unwrap();
    vm.create_memory(&memory, 0, 0x10000, 0, false, false).unwrap();
    let writes = matches!(mode, "write" | "posted");
    memory.put(CODE, if writes { WRITES } else { READS });
    match mode {
        "floor" => {}
        "posted" => vm.reserve_async_write_range(Space::Port, 0x50, 1).unwrap(),
        _ => vm.reserve_range(Space::Port, 0x50, 1).unwrap(),
    }
    if mode == "hinted" {
        let details = vec![HintDetail::default()];
        let hint = Hint { space: Space::Port, address: 0x50, on_write: false, details };
        vm.set_hypercall_hint(Some(&hint)).unwrap();
    }
    let vcpu = vm.vcpu(0).unwrap();
    let long = Duration::from_secs(1);
    vcpu.set_spin(if mode == "sleeping" { Duration::ZERO } else { long });
    vm.start().unwrap();
    enter(&vcpu);
    let registers = matches!(mode, "registers" | "hinted");
    // Until the VMM is gone.
    while let Ok(event) = vcpu.wait() {
        let Event::Access(access) = event else { break };
        if access.no_resume {
            continue;
        }
        let rax = if registers { vcpu.regs().map_or(0, |regs| regs.rax) } else { 1 };
        if vcpu.answer(&[rax as u8]).and_then(|()| vcpu.resume()).is_err() {
            break;
        }
    }
}

fn echo() {
    let mut byte = [0];
    while std::io::stdin().read_exact(&mut byte).is_ok() {
        let mut out = std::io::stdout().lock();
        if out.write_all(&byte).and_then(|()| out.flush()).is_err() {
            break;
        }
    }
}

/// A byte there and back.
fn pipes(mut command: Command, window: Duration) -> f64 {
    let ((to_read, mut to), (mut from, from_write)) = (pipe().unwrap(), pipe().unwrap());
    command.env(CHILD, "pipes").stdin(to_read).stdout(from_write);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut byte = [0];
    let mut turn = || {
        to.write_all(b"x").unwrap();
        // What the child prints before it is there is not the answer.
        while byte != *b"x" {
            from.read_exact(&mut byte).unwrap();
        }
        byte = [0];
    };
    (0..20).for_each(|_| turn());
    let (begin, mut turns) = (Instant::now(), 0);
    while begin.elapsed() < window {
        turn();
        turns += 1;
    }
    let cost = begin.elapsed().as_secs_f64() * 1e6 / f64::from(turns);
    let _ = child.kill();
    let _ = child.wait();
    cost
}

fn pauses(window: Duration) -> Vec<f64> {
    let mut vmm = Vmm::new(1);
    let vm = vmm.connect();
    // inc dword [0x3000]; jmp
    let memory = Memory::new(0x10000);
    memory.put(CODE, &[0x66, 0xff, 0x06, 0x00, 0x30, 0xeb, 0xf9]);
    vm.create_memory(&memory, 0, 0x10000, 0, false, false).unwrap();
    let vcpu = vm.vcpu(0).unwrap();
    vm.start().unwrap();
    assert_eq!(vcpu.wait().unwrap(), Event::Init);
    real_mode(&vcpu);
    vcpu.resume().unwrap();
    let mut took = Vec::new();
    let begin = Instant::now();
    while begin.elapsed() < window {
        let asked = Instant::now();
        vm.pause_vcpus(1, 1).unwrap();
        assert!(matches!(vcpu.wait().unwrap(), Event::Paused { .. }));
        took.push(asked.elapsed().as_secs_f64() * 1e6);
        vcpu.resume().unwrap();
        sleep(Duration::from_micros(100));
    }
    took
}
