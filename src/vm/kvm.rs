//! The VM as KVM knows it: memory slots, interrupt controllers, events.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::layout;
use super::memory::GuestRam;
use crate::transport::mmio;

/// KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// /dev/kvm.
    #[error("opening /dev/kvm")]
    Open(#[source] kvm_ioctls::Error),
    /// Any request.
    #[error("{what}")]
    Request {
        /// What was being done.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: kvm_ioctls::Error,
    },
}

fn during(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Request { what, source }
}

/// The VM.
#[derive(Debug)]
pub struct Machine {
    kvm: Kvm,
    vm: VmFd,
}

impl Machine {
    /// Makes a VM with `ram`, interrupt controllers and timer, without vCPUs.
    #[allow(unsafe_code)] // memory slots
    pub fn new(ram: &GuestRam) -> Result<Machine, KvmError> {
        let kvm = Kvm::new().map_err(KvmError::Open)?;
        let vm = kvm.create_vm().map_err(during("creating a VM"))?;
        // Slots first: after the interrupt controllers each costs milliseconds.
        for (slot, region) in ram.regions().iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.len,
                userspace_addr: region.hva,
            };
            // SAFETY: the range is mapped for as long as `ram`, which outlives the VM's vCPUs.
            unsafe { vm.set_user_memory_region(region) }.map_err(during("placing guest memory"))?;
        }
        vm.set_identity_map_address(layout::IDENTITY_MAP).map_err(during("placing the identity map"))?;
        vm.set_tss_address(layout::TSS).map_err(during("placing the TSS"))?;
        vm.create_irq_chip().map_err(during("creating the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(during("creating the timer"))?;
        Ok(Machine { kvm, vm })
    }

    /// The KVM handle.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM handle.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Makes a vCPU.
    pub fn create_vcpu(&self, id: u64) -> Result<VcpuFd, KvmError> {
        self.vm.create_vcpu(id).map_err(during("creating a vCPU"))
    }

    /// Makes `event` raise `gsi`.
    pub fn irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.vm.register_irqfd(event, gsi).map_err(during("connecting an interrupt line"))
    }

    /// Makes a notification of queue `queue` ring `event`.
    pub fn virtio_doorbell(&self, event: &EventFd, base: u64, queue: u32) -> Result<(), KvmError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(base + mmio::QUEUE_NOTIFY), queue)
            .map_err(during("connecting a doorbell"))
    }

    /// Makes an acknowledgement of used buffers ring `event`.
    pub fn virtio_ack(&self, event: &EventFd, base: u64) -> Result<(), KvmError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(base + mmio::INTERRUPT_ACK), 1u32)
            .map_err(during("connecting an acknowledgement"))
    }
}
