//! A VM that is a plugin's, in this process: the real server and vCPU threads, and the real client
//! on the other end of a socket. No jail, no seccomp: tests of the program have those.
#![allow(dead_code)] // shared by several test programs
#![allow(clippy::unwrap_used)] // a failure here is a failed test

pub mod cost;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cellblock::bus::{Bus, VmExit};
use cellblock::plugin::{Hub, Machinery, Network, Plugins};
use cellblock::snapshot::write_logs::WriteLogs;
use cellblock::vcpu::{Config, ExitListener, Kicks, PauseReport, Vcpus, exit_notice};
use cellblock::vm::kvm::Machine;
use cellblock::vm::memory::GuestRam;
use cellblock_plugin_api::{Event, Vcpu, Vm};
use cellblock_wire::{Channel, sealed_memfd};

/// Longer than anything takes.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The VMM's side of a VM that is a plugin's.
pub struct Vmm {
    orders: Sender<Order>,
    thread: Option<JoinHandle<()>>,
    pub hub: Arc<Hub>,
    socket: Option<OwnedFd>,
}

enum Order {
    Started,
    Pause(Sender<Result<PauseReport, String>>),
    Resume(Sender<Result<(), String>>),
    End(Sender<Option<VmExit>>),
    Stop,
}

impl Vmm {
    pub fn new(vcpus: usize) -> Vmm {
        Vmm::with(vcpus, None)
    }

    pub fn with(vcpus: usize, network: Option<Network>) -> Vmm {
        let kicks = Kicks::new(vcpus);
        let pio = Arc::new(Bus::builder().nobody(0).build());
        let mmio = Arc::new(Bus::builder().nobody(0).build());
        let hub = Hub::new(kicks.clone(), pio.clone(), mmio.clone(), true).unwrap();
        let machine = Arc::new(Machine::new(&GuestRam::none().unwrap()).unwrap());
        let (notifier, exit) = exit_notice().unwrap();
        let config = Config::new(kicks, pio, mmio, notifier).with_plugins(&hub);
        let (vcpus, supply) = Vcpus::start_later(config).unwrap();
        let (ours, theirs) = Channel::pair().unwrap();
        let (orders, inbox) = channel();
        let started = orders.clone();
        let machinery = Machinery {
            machine: machine.clone(),
            supply: Some(supply),
            vcpus: Vec::new(),
            on_start: Box::new(move || started.send(Order::Started).unwrap()),
            logs: Box::leak(Box::new(WriteLogs::new(0))),
            memory_is_mapped: false,
            network,
        };
        let plugins =
            Plugins::start(hub.clone(), machinery, Some(ours.into_fd()), None, || Ok(())).unwrap();
        let thread = std::thread::spawn(move || main_loop(vcpus, exit, &inbox, plugins, machine));
        Vmm { orders, thread: Some(thread), hub, socket: Some(theirs.into_fd()) }
    }

    /// The plugin's end, once.
    pub fn connect(&mut self) -> Vm {
        Vm::from_fd(self.socket.take().unwrap()).unwrap()
    }

    /// The socket, for a process of its own.
    pub fn socket(&mut self) -> OwnedFd {
        self.socket.take().unwrap()
    }

    pub fn pause(&self) -> Result<PauseReport, String> {
        let (sender, receiver) = channel();
        self.orders.send(Order::Pause(sender)).unwrap();
        receiver.recv_timeout(PATIENCE).unwrap()
    }

    pub fn resume(&self) -> Result<(), String> {
        let (sender, receiver) = channel();
        self.orders.send(Order::Resume(sender)).unwrap();
        receiver.recv_timeout(PATIENCE).unwrap()
    }

    /// How the guest has ended, if it has.
    pub fn end(&self) -> Option<VmExit> {
        let (sender, receiver) = channel();
        self.orders.send(Order::End(sender)).unwrap();
        receiver.recv_timeout(PATIENCE).unwrap()
    }

    /// Stops the VM; how long that took.
    pub fn stop(&mut self) -> Duration {
        let begin = Instant::now();
        if let Some(thread) = self.thread.take() {
            let _ = self.orders.send(Order::Stop);
            thread.join().unwrap();
        }
        begin.elapsed()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.stop();
    }
}

fn main_loop(
    mut vcpus: Vcpus,
    exit: ExitListener,
    inbox: &Receiver<Order>,
    plugins: Plugins,
    machine: Arc<Machine>,
) {
    while let Ok(order) = inbox.recv() {
        match order {
            Order::Started => vcpus.run().unwrap(),
            Order::Pause(to) => {
                to.send(vcpus.pause(PATIENCE).map_err(|e| e.to_string())).unwrap();
            }
            Order::Resume(to) => to.send(vcpus.resume().map_err(|e| e.to_string())).unwrap(),
            Order::End(to) => to.send(exit.end().map(|end| end.exit.clone())).unwrap(),
            Order::Stop => break,
        }
    }
    vcpus.stop(PATIENCE).unwrap();
    drop((plugins, machine));
}

/// Guest memory, seen from the plugin.
pub struct Memory(pub File);

impl Memory {
    pub fn new(bytes: u64) -> Memory {
        Memory(File::from(sealed_memfd("guest", bytes).unwrap()))
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).unwrap();
    }

    pub fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where the code of vCPU 0 is; that of the next is this far behind it.
pub const CODE: u64 = 0x1000;

/// Makes 64 KiB of memory with `code` for every vCPU.
pub fn guest(vm: &Vm, code: &[&[u8]]) -> Memory {
    let memory = Memory::new(0x10_0000);
    for (n, code) in code.iter().enumerate() {
        memory.put(CODE + CODE * n as u64, code);
    }
    vm.create_memory(&memory, 0, 0x10_0000, 0, false, false).unwrap();
    memory
}

/// Takes a vCPU through its first event into real mode, at its code with all registers zero. Only
/// its code segment is not at zero.
pub fn enter(vcpu: &Vcpu) {
    assert_eq!(vcpu.wait().unwrap(), Event::Init);
    real_mode(vcpu);
    vcpu.resume().unwrap();
}

/// Sets a vCPU up to run its code in real mode.
pub fn real_mode(vcpu: &Vcpu) {
    let base = CODE + CODE * u64::from(vcpu.id());
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (base, (base >> 4) as u16);
    (sregs.ds.base, sregs.ds.selector) = (0, 0);
    (sregs.es.base, sregs.es.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.regs().unwrap();
    (regs.rip, regs.rflags, regs.rsp) = (0, 2, 0x8000);
    (regs.rax, regs.rbx, regs.rcx, regs.rdx) = (0, 0, 0, 0);
    vcpu.set_regs(&regs).unwrap();
    let running = kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE };
    vcpu.set_mp_state(&running).unwrap();
}

/// Sets a vCPU up to run 64-bit code at `rip` as a user, without any interrupt table.
pub fn user_mode(vcpu: &Vcpu, memory: &Memory, rip: u64) {
    for (at, entry) in [(0x8_0000u64, 0x8_1007u64), (0x8_1000, 0x8_2007), (0x8_2000, 0x87)] {
        memory.put(at, &entry.to_le_bytes());
    }
    let flat = |selector, type_, long| kvm_bindings::kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.sregs().unwrap();
    sregs.cs = flat(0x33, 0xb, 1);
    let data = flat(0x2b, 3, 0);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0031, 0x8_0000, 0x20, 0x500);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.regs().unwrap();
    (regs.rip, regs.rflags) = (rip, 2);
    vcpu.set_regs(&regs).unwrap();
}

/// Does something for a while, and says what when it does not come.
pub fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = poll() {
            return answer;
        }
        assert!(Instant::now() < until, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
