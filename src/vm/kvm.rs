//! `/dev/kvm` and the virtual machine: memory slots, interrupt controllers,
//! vCPUs, and the eventfds that let devices bypass the VMM.
//!
//! **Memory slots come first.** Adding a slot waits for every reader of the
//! interrupt routing that creating the irqchip has just replaced: milliseconds
//! after it, microseconds before.
#![allow(unsafe_code)] // hands guest RAM to the kernel as memory slots

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY,
    kvm_clear_dirty_log, kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::layout;
use super::memory::GuestRam;

/// A virtual machine that could not be made, or refused a request.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` is not there.
    #[error(
        "opening /dev/kvm: there is none (load the module kvm_intel or kvm_amd; inside a \
         virtual machine, enable nested virtualization on its host)"
    )]
    Missing,
    /// `/dev/kvm` may not be opened by this user.
    #[error(
        "opening /dev/kvm: permission denied (join its group: usermod -aG kvm USER, then log in \
         again)"
    )]
    Permission,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("opening /dev/kvm")]
    Open(#[source] io::Error),
    /// The kernel speaks another KVM interface.
    #[error("KVM's interface has version {0}, not 12: use a current Linux kernel")]
    Version(i32),
    /// The kernel's KVM lacks something we need.
    #[error("KVM lacks {0}: use Linux 5.10 or newer, with its full KVM")]
    Capability(&'static str),
    /// More vCPUs than allowed, or none.
    #[error("{asked} vCPUs are not possible: give 1 to {most}")]
    Cpus {
        /// What was asked for.
        asked: u32,
        /// The most possible here.
        most: u32,
    },
    /// A request to KVM failed.
    #[error("{step}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bytes of guest memory that a word of a dirty log is for.
const DIRTY_WORD: u64 = 64 * PAGE;

nix::ioctl_readwrite!(
    /// KVM_CLEAR_DIRTY_LOG, which no crate wraps.
    clear_dirty, 0xae, 0xc0, kvm_clear_dirty_log);

/// Wraps a failed KVM request with what it was for.
pub(super) fn step(step: &'static str) -> impl FnOnce(errno::Error) -> KvmError {
    move |e| KvmError::Step { step, source: e.into() }
}

/// Opens `/dev/kvm` and checks that it has all we need.
///
/// Done before privileges are dropped; nothing later opens a path.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| classify(e.into()))?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::Version(version));
    }
    for (cap, name) in REQUIRED {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Capability(name));
        }
    }
    Ok(kvm)
}

const REQUIRED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "memory slots (KVM_CAP_USER_MEMORY)"),
    (Cap::Irqchip, "interrupt controllers in the kernel (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "a timer in the kernel (KVM_CAP_PIT2)"),
    (Cap::Irqfd, "interrupts by eventfd (KVM_CAP_IRQFD)"),
    (Cap::Ioeventfd, "notifications by eventfd (KVM_CAP_IOEVENTFD)"),
    (Cap::ExtCpuid, "CPUID tables (KVM_CAP_EXT_CPUID)"),
    (Cap::MpState, "processor states (KVM_CAP_MP_STATE)"),
    (Cap::VcpuEvents, "event state (KVM_CAP_VCPU_EVENTS)"),
    (Cap::ImmediateExit, "immediate exits (KVM_CAP_IMMEDIATE_EXIT)"),
];

fn classify(e: io::Error) -> KvmError {
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => KvmError::Missing,
        Some(libc::EACCES | libc::EPERM) => KvmError::Permission,
        _ => KvmError::Open(e),
    }
}

/// Checks a number of vCPUs against our limit and this KVM's.
pub fn check_cpus(kvm: &Kvm, cpus: u32) -> Result<u8, KvmError> {
    let most = u32::from(layout::MAX_CPUS).min(kvm.get_max_vcpus() as u32);
    match u8::try_from(cpus) {
        Ok(n) if n > 0 && cpus <= most => Ok(n),
        _ => Err(KvmError::Cpus { asked: cpus, most }),
    }
}

/// A virtual machine with its memory and interrupt controllers, without vCPUs.
///
/// On drop the memory slots are removed before the RAM is unmapped, so that a
/// vCPU that outlives its machine finds no memory rather than someone else's.
pub struct Machine {
    kvm: Kvm,
    vm: VmFd,
    ram: GuestRam,
}

impl Machine {
    /// Opens `/dev/kvm` and makes the machine.
    pub fn new(ram: &GuestRam) -> Result<Machine, KvmError> {
        Machine::with_kvm(open()?, ram)
    }

    /// Makes the machine with a `/dev/kvm` that [`open`] returned.
    pub fn with_kvm(kvm: Kvm, ram: &GuestRam) -> Result<Machine, KvmError> {
        let vm = create_vm(&kvm)?;
        let machine = Machine { kvm, vm, ram: ram.clone() };
        machine.prepare_dirty_log()?;
        machine.add_memory()?;
        machine.add_interrupt_controllers()?;
        Ok(machine)
    }

    /// How the dirty log will work, should it be wanted: cleared by hand, and all set at
    /// first. Said now, for it is a capability, which no filter could tell from others.
    fn prepare_dirty_log(&self) -> Result<(), KvmError> {
        let mut cap =
            kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        cap.args[0] = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        self.vm.enable_cap(&cap).map_err(step("choosing KVM's kind of dirty log"))
    }

    fn add_memory(&self) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(self.ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.len,
                userspace_addr: region.hva,
            };
            // SAFETY: the range is a mapping that `self.ram` keeps until Drop has
            // removed the slot; regions of one GuestRam do not overlap.
            unsafe { self.vm.set_user_memory_region(region) }
                .map_err(step("giving guest memory to KVM"))?;
        }
        let identity = layout::KVM_IDENTITY_MAP;
        self.vm.set_identity_map_address(identity).map_err(step("placing KVM's identity map"))?;
        self.vm
            .set_tss_address(layout::KVM_TSS as usize)
            .map_err(step("placing KVM's task state segment"))
    }

    fn add_interrupt_controllers(&self) -> Result<(), KvmError> {
        self.vm.create_irq_chip().map_err(step("creating the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.vm.create_pit2(pit).map_err(step("creating the interval timer"))
    }

    /// Has KVM note every page the guest writes from now on, or no more. What it has at first is
    /// all pages, none of them protected yet: that costs next to nothing, and the first
    /// [`Machine::take_dirty_pages`] pays.
    pub fn log_dirty_pages(&self, on: bool) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(self.ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.gpa,
                memory_size: region.len,
                userspace_addr: region.hva,
            };
            // SAFETY: the slot is there with the same range; only its flags change.
            unsafe { self.vm.set_user_memory_region(region) }
                .map_err(step("having KVM log what the guest writes"))?;
        }
        Ok(())
    }

    /// The pages the guest wrote since this was last called, a bit each, in the order of
    /// guest memory's file.
    pub fn take_dirty_pages(&self) -> Result<Vec<u64>, KvmError> {
        let mut all = Vec::new();
        for (slot, region) in (0..).zip(self.ram.regions()) {
            let mut pages = self.take_dirty_slot(slot, region.len)?;
            // A region is a whole number of MiB, and so of words.
            pages.truncate((region.len / DIRTY_WORD) as usize);
            all.extend(pages);
        }
        Ok(all)
    }

    /// The pages of one memory slot of `len` bytes that the guest wrote since this was last called;
    /// all of them the first time.
    pub fn take_dirty_slot(&self, slot: u32, len: u64) -> Result<Vec<u64>, KvmError> {
        let mut pages = self
            .vm
            .get_dirty_log(slot, len as usize)
            .map_err(step("reading what the guest wrote"))?;
        self.clear_dirty_log(slot, len, &mut pages)?;
        Ok(pages)
    }

    /// Has KVM note the pages that are set in `pages` again. Runs without any are left out:
    /// the kernel would look at each of them.
    fn clear_dirty_log(&self, slot: u32, len: u64, pages: &mut [u64]) -> Result<(), KvmError> {
        let words = (len.div_ceil(DIRTY_WORD) as usize).min(pages.len());
        let mut at = 0;
        while let Some(first) = pages[at..words].iter().position(|word| *word != 0) {
            let first = at + first;
            let run = pages[first..words].iter().position(|word| *word == 0);
            let end = run.map_or(words, |run| first + run);
            let mut args = kvm_clear_dirty_log {
                slot,
                // Whole words, but for the slot's end.
                num_pages: ((end - first) as u64 * 64).min(len / PAGE - first as u64 * 64) as u32,
                first_page: (first * 64) as u64,
                ..Default::default()
            };
            args.__bindgen_anon_1.dirty_bitmap = pages[first..end].as_mut_ptr().cast();
            // SAFETY: the kernel reads as many bits of the bitmap as `num_pages` says.
            let done = unsafe { clear_dirty(self.vm.as_raw_fd(), &mut args) };
            done.map_err(|e| KvmError::Step {
                step: "having KVM log pages again",
                source: e.into(),
            })?;
            at = end;
        }
        Ok(())
    }

    /// Creates the vCPU with this index, which is its APIC id as well.
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd, KvmError> {
        self.vm.create_vcpu(u64::from(id)).map_err(step("creating a vCPU"))
    }

    /// From now on a write to `fd` raises interrupt `gsi` once (edge).
    pub fn irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.vm.register_irqfd(fd, gsi).map_err(step("connecting an interrupt eventfd"))
    }

    /// Undoes [`Machine::irqfd`].
    pub fn remove_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.vm.unregister_irqfd(fd, gsi).map_err(step("disconnecting an interrupt eventfd"))
    }

    /// From now on a guest's 32-bit write of `value` to guest-physical `address`
    /// (of anything, if `None`) signals `fd` instead of leaving the guest.
    pub fn ioeventfd(
        &self,
        fd: &EventFd,
        address: u64,
        value: Option<u32>,
    ) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        match value {
            Some(value) => self.vm.register_ioevent(fd, &address, value),
            None => self.vm.register_ioevent(fd, &address, NoDatamatch),
        }
        .map_err(step("connecting a notification eventfd"))
    }

    /// Undoes [`Machine::ioeventfd`], called with the same arguments.
    pub fn remove_ioeventfd(
        &self,
        fd: &EventFd,
        address: u64,
        value: Option<u32>,
    ) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        match value {
            Some(value) => self.vm.unregister_ioevent(fd, &address, value),
            None => self.vm.unregister_ioevent(fd, &address, NoDatamatch),
        }
        .map_err(step("disconnecting a notification eventfd"))
    }

    /// `/dev/kvm`, for what belongs to the host: CPUID, MSR lists, limits.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM, for state of the whole machine: clock, controllers, dirty log.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// The machine's memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for slot in 0..self.ram.regions().len() as u32 {
            let none = kvm_userspace_memory_region { slot, ..Default::default() };
            // SAFETY: a slot of size zero names no memory: this removes the slot.
            // It fails only if the slot was never added.
            let _ = unsafe { self.vm.set_user_memory_region(none) };
        }
    }
}

/// KVM_CREATE_VM starts a kernel thread on some machines, which a signal can interrupt.
fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    for _ in 0..5 {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.map_err(step("creating the VM")),
        }
    }
    kvm.create_vm().map_err(step("creating the VM"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_forbidden_kvm_names_the_remedy() {
        let text = |code| classify(io::Error::from_raw_os_error(code)).to_string();
        assert!(text(libc::ENOENT).contains("kvm_intel or kvm_amd"));
        assert!(text(libc::EACCES).contains("usermod -aG kvm"));
        assert!(matches!(classify(io::Error::from_raw_os_error(libc::EMFILE)), KvmError::Open(_)));
    }
}
