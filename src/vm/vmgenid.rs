//! The VM generation id: how a guest learns that it is a copy of itself.
//!
//! 128 bits in guest memory that are different in each life of a VM: a new one at every
//! start and at every restore of a snapshot. A guest with the driver (ACPI id
//! `VM_Gen_Counter`) is told of a change by an interrupt and reseeds its random numbers;
//! one without can read the bits, at [`VMGENID`].

use std::fs::File;
use std::io::{self, Read};
use std::time::{SystemTime, UNIX_EPOCH};

use vmm_sys_util::eventfd::EventFd;

use super::kvm::{KvmError, Machine};
use super::layout::{VMGENID, VMGENID_GSI};
use super::memory::{GuestRam, MemoryError};
use super::metadata::Metadata;
use crate::event::event;

/// A generation id.
pub type Id = [u8; 16];

/// A generation id that could not be given.
#[derive(Debug, thiserror::Error)]
pub enum VmGenIdError {
    /// There was nothing random to make one of.
    #[error("making a VM generation id")]
    Random(#[source] io::Error),
    /// It could not be written to guest memory.
    #[error("writing the VM generation id")]
    Memory(#[source] MemoryError),
    /// Its interrupt could not be made.
    #[error("creating the interrupt of the VM generation id")]
    Event(#[source] io::Error),
    /// Its interrupt could not be connected.
    #[error("connecting the interrupt of the VM generation id")]
    Kvm(#[source] KvmError),
    /// The guest could not be told.
    #[error("raising the interrupt of the VM generation id")]
    Raise(#[source] io::Error),
}

/// The generation id of a machine.
#[derive(Debug)]
pub struct VmGenId {
    irq: EventFd,
    random: File,
}

impl VmGenId {
    /// Connects the interrupt. Everything that a later change needs is open then.
    pub fn new(machine: &Machine) -> Result<VmGenId, VmGenIdError> {
        let random = File::open("/dev/urandom").map_err(VmGenIdError::Random)?;
        let irq = event().map_err(VmGenIdError::Event)?;
        machine.irqfd(&irq, VMGENID_GSI).map_err(VmGenIdError::Kvm)?;
        Ok(VmGenId { irq, random })
    }

    /// An id that no other VM has or had.
    pub fn fresh(&self) -> Result<Id, VmGenIdError> {
        let mut id = Id::default();
        (&self.random).read_exact(&mut id).map_err(VmGenIdError::Random)?;
        Ok(id)
    }

    /// Makes `id` the machine's, before it runs or while it stands still.
    pub fn set(&self, ram: &GuestRam, id: Id) -> Result<(), VmGenIdError> {
        ram.write(VMGENID, &id).map_err(VmGenIdError::Memory)
    }

    /// Gives the machine a new id, and new [`Metadata`]: of the VM `id`, or of one without a
    /// name, with `data`.
    pub fn new_life(
        &self,
        ram: &GuestRam,
        id: Option<Id>,
        data: Vec<u8>,
    ) -> Result<(), VmGenIdError> {
        self.set(ram, self.fresh()?)?;
        let mut random = [[0; 32]; 2];
        for half in &mut random {
            (&self.random).read_exact(half).map_err(VmGenIdError::Random)?;
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let real_ns = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        let id = id.map_or_else(|| self.fresh(), Ok)?;
        Metadata { id, random, real_ns, data }.write(ram).map_err(VmGenIdError::Memory)
    }

    /// Tells a guest that was running before that the id has changed.
    pub fn raise(&self) -> Result<(), VmGenIdError> {
        self.irq.write(1).map_err(VmGenIdError::Raise)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn the_guest_finds_what_was_set_and_no_id_comes_twice() {
        let ram = GuestRam::new(32 << 20).unwrap();
        let machine = Machine::new(&ram).unwrap();
        let vmgenid = VmGenId::new(&machine).unwrap();
        let (one, two) = (vmgenid.fresh().unwrap(), vmgenid.fresh().unwrap());
        assert_ne!(one, two);
        for id in [one, two] {
            vmgenid.set(&ram, id).unwrap();
            let found: Id = ram.memory().read_obj(GuestAddress(VMGENID)).unwrap();
            assert_eq!(found, id);
            vmgenid.raise().unwrap();
        }
    }
}
