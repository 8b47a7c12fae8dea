//! The smallest VM that has vCPUs: one piece of RAM, hand-assembled code, no firmware.
//!
//! Two kinds of guest: real mode (emulated instruction by instruction where the host has no
//! hardware virtualization) and 64-bit at CPL 3 (native everywhere), set up by registers alone.
#![allow(unsafe_code)] // memory slots are raw pointers
#![allow(dead_code)] // shared by several test programs
#![allow(clippy::unwrap_used)] // a failure here is a failed test

use cellblock::bus::{Bus, BusDevice, Outcome, VmExit};
use cellblock::vcpu::{Config, ExitListener, Kicks, Vcpus, exit_notice};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Guest-physical bytes of RAM. Nothing lies behind them.
pub const RAM: usize = 2 << 20;
/// Where the code of vCPU 0 is, and how far the next one's lies behind it.
pub const CODE: u64 = 0x1_0000;
const CODE_STEP: u64 = 0x1000;
/// Where vCPU 0 counts, and how far the next one's counter lies behind it.
pub const COUNTER: u64 = 0x8000;
const COUNTER_STEP: u64 = 64;
/// The linear address of a page with no RAM behind it, for CPL 3 guests.
pub const HOLE: u64 = RAM as u64;

/// A pause that takes longer than this has failed.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// One test at a time: they look at the threads of the process and at the time.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A VM before its vCPUs run.
pub struct Lab {
    pub vm: VmFd,
    pub fds: Vec<VcpuFd>,
    pub ram: GuestMemoryMmap<()>,
    pub kicks: Arc<Kicks>,
}

impl Lab {
    pub fn new(vcpus: usize, irqchip: bool) -> Self {
        let kvm = Kvm::new().expect("the tests need /dev/kvm");
        let vm = kvm.create_vm().unwrap();
        let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: ram.get_host_address(GuestAddress(0)).unwrap() as u64,
        };
        // SAFETY: the slot is the mapping of `ram`, which the lab keeps as long as the VM.
        unsafe { vm.set_user_memory_region(slot) }.unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        if irqchip {
            vm.create_irq_chip().unwrap();
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let fds = (0..vcpus)
            .map(|id| {
                let vcpu = vm.create_vcpu(id as u64).unwrap();
                vcpu.set_cpuid2(&cpuid).unwrap();
                if irqchip {
                    // Also makes KVM enter this vCPU's APIC in its map of interrupt targets.
                    vcpu.set_lapic(&vcpu.get_lapic().unwrap()).unwrap();
                }
                vcpu
            })
            .collect();
        // The page tables of the CPL 3 guests: 4 MiB identity mapped, user pages, half of it RAM.
        let table = [(0x1000u64, 0x2007u64), (0x2000, 0x3007), (0x3000, 0x87), (0x3008, 0x20_0087)];
        for (at, entry) in table {
            ram.write_obj(entry, GuestAddress(at)).unwrap();
        }
        Self { vm, fds, ram, kicks: Kicks::new(vcpus) }
    }

    /// Puts code where vCPU `id` would have its own, without setting one up to run it.
    pub fn place(&self, id: usize, code: &[u8]) -> u64 {
        let at = CODE_STEP * id as u64 + CODE;
        self.ram.write_slice(code, GuestAddress(at)).unwrap();
        at
    }

    /// Real mode code for vCPU `id`, all segments at its code: addresses in it are offsets.
    pub fn real_mode(&self, id: usize, code: &[u8]) {
        let base = self.place(id, code);
        let mut sregs = self.fds[id].get_sregs().unwrap();
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.selector) = (base, (base >> 4) as u16);
        }
        self.fds[id].set_sregs(&sregs).unwrap();
        let mut regs = self.fds[id].get_regs().unwrap();
        (regs.rip, regs.rflags) = (0, 2);
        self.fds[id].set_regs(&regs).unwrap();
    }

    /// 64-bit code at CPL 3 for vCPU `id`, with the address of its counter in rax and that of the
    /// hole in rbx.
    pub fn user_mode(&self, id: usize, code: &[u8]) {
        let rip = self.place(id, code);
        let mut sregs = self.fds[id].get_sregs().unwrap();
        let flat = |selector, type_, long| kvm_segment {
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
        sregs.cs = flat(0x33, 0xb, 1);
        let data = flat(0x2b, 3, 0);
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.cr0 = 0x8000_0031;
        sregs.cr3 = 0x1000;
        sregs.cr4 = 0x20;
        sregs.efer = 0x500;
        self.fds[id].set_sregs(&sregs).unwrap();
        let mut regs = self.fds[id].get_regs().unwrap();
        (regs.rip, regs.rflags) = (rip, 2);
        (regs.rax, regs.rbx) = (counter_at(id), HOLE);
        self.fds[id].set_regs(&regs).unwrap();
    }

    /// Starts the vCPUs' threads; a kick that is lost stays lost.
    pub fn start(self, pio: Bus, mmio: Bus) -> Running {
        self.start_with(pio, mmio, |config| config.rekick_after = Duration::MAX)
    }

    pub fn start_with(self, pio: Bus, mmio: Bus, adapt: impl FnOnce(&mut Config)) -> Running {
        let (notifier, exit) = exit_notice().unwrap();
        let mut config = Config::new(self.kicks, Arc::new(pio), Arc::new(mmio), notifier);
        adapt(&mut config);
        let vcpus = Vcpus::start(self.fds, config).unwrap();
        Running { vcpus, exit, ram: self.ram, vm: self.vm }
    }
}

/// A guest that writes to a port: `mov dx, 0x500`, then at 3 `in al, dx`, `inc dword [0x100]`,
/// `out dx, al`, and back to 3.
pub const ECHO: [u8; 12] = [0xba, 0x00, 0x05, 0xec, 0x66, 0xff, 0x06, 0x00, 0x01, 0xee, 0xeb, 0xf7];
/// The port of [`ECHO`].
pub const ECHO_PORT: u64 = 0x500;
/// A guest that writes al to port 0x7f, which ends the VM where [`PowerButton`] is.
pub const END: [u8; 2] = [0xe6, 0x7f];
/// The port of [`END`].
pub const END_PORT: u64 = 0x7f;

/// Ends the VM at any access.
pub struct PowerButton;

impl BusDevice for PowerButton {
    fn read(&self, _: usize, _: u64, _: &mut [u8]) -> Outcome {
        Outcome::Exit(VmExit::Shutdown)
    }
    fn write(&self, _: usize, _: u64, _: &[u8]) -> Outcome {
        Outcome::Exit(VmExit::Shutdown)
    }
}

fn counter_at(id: usize) -> u64 {
    COUNTER + COUNTER_STEP * id as u64
}

/// `inc qword [rax]` for ever.
pub const COUNT: [u8; 5] = [0x48, 0xff, 0x00, 0xeb, 0xfb];
/// The same in real mode; the count is a dword at offset 0x100.
pub const COUNT_REAL: [u8; 7] = [0x66, 0xff, 0x06, 0x00, 0x01, 0xeb, 0xf9];

/// A VM with its vCPU threads.
pub struct Running {
    pub vcpus: Vcpus,
    pub exit: ExitListener,
    pub ram: GuestMemoryMmap<()>,
    pub vm: VmFd,
}

impl Running {
    pub fn counter(&self, id: usize) -> u64 {
        self.ram.load(GuestAddress(counter_at(id)), std::sync::atomic::Ordering::Acquire).unwrap()
    }

    pub fn counter_real(&self, id: usize) -> u32 {
        let at = CODE + CODE_STEP * id as u64 + 0x100;
        self.ram.load(GuestAddress(at), std::sync::atomic::Ordering::Acquire).unwrap()
    }

    /// Waits until the guest has ended.
    pub fn end(&self) -> cellblock::vcpu::VmEnd {
        wait_for("the end of the vm", || self.exit.end().cloned())
    }
}

/// Polls until there is an answer.
pub fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = poll() {
            return answer;
        }
        assert!(Instant::now() < until, "waited too long for {what}");
        std::thread::yield_now();
    }
}

/// A bus with one device.
pub fn bus(base: u64, len: u64, device: Arc<dyn BusDevice>) -> Bus {
    Bus::builder().add(base, len, device).unwrap().build()
}

/// Waits until all vCPU threads of this process are gone: a thread that was joined can still be
/// seen for a moment.
pub fn no_vcpu_threads() {
    wait_for("the vcpu threads to be gone", || vcpu_threads().is_empty().then_some(()));
}

/// The names of this process's vCPU threads.
pub fn vcpu_threads() -> Vec<String> {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| name.starts_with("vcpu") && name[4..].parse::<u32>().is_ok())
        .collect()
}

/// Median and 99th percentile.
pub fn percentiles(times: &mut [Duration]) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}
