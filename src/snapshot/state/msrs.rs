//! Model-specific registers: all that KVM lists, as far as this host has them.
//!
//! KVM handles a batch up to the first register it refuses and says how many that were.
//! Reading, a refused register is one this host does not have, and is left out. Setting, it
//! is one that cannot be written: fine where it has the wanted value anyway, a difference
//! between hosts where it has not.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use vmm_sys_util::errno;

use super::StateError;

/// Registers in one ioctl. KVM takes up to 256; the wrapper has room for as many.
const BATCH: usize = 256;

/// The TSC is set through its offset, which does not depend on when it is done.
pub const IA32_TSC: u32 = 0x10;

/// Every register of this host's KVM that holds state of a vCPU.
pub fn list(kvm: &Kvm) -> Result<Vec<u32>, StateError> {
    let list = kvm.get_msr_index_list().map_err(|e| StateError::Kvm {
        step: "listing model-specific registers",
        source: e.into(),
    })?;
    let mut list = list.as_slice().to_vec();
    list.sort_unstable();
    list.dedup();
    Ok(list)
}

/// The registers of `wanted` that this vCPU has, with their values, in that order.
pub fn save(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut found = Vec::with_capacity(wanted.len());
    in_batches(wanted, |batch| {
        let mut msrs = entries(batch.iter().map(|index| (*index, 0)));
        let count = vcpu.get_msrs(&mut msrs)?.min(batch.len());
        found.extend(msrs.as_slice()[..count].iter().map(|entry| (entry.index, entry.data)));
        Ok(count)
    })
    .map_err(|e| StateError::Kvm { step: "reading model-specific registers", source: e.into() })?;
    Ok(found)
}

/// Sets the registers; returns those that are refused and have another value.
pub fn load(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<Vec<u32>, StateError> {
    let mut refused = Vec::new();
    in_batches(msrs, |batch| {
        let count = vcpu.set_msrs(&entries(batch.iter().copied()))?.min(batch.len());
        refused.extend(batch.get(count));
        Ok(count)
    })
    .map_err(|e| StateError::Kvm { step: "setting model-specific registers", source: e.into() })?;
    let indices: Vec<u32> = refused.iter().map(|(index, _)| *index).collect();
    let have = save(vcpu, &indices)?;
    refused.retain(|wanted| !have.contains(wanted));
    Ok(refused.into_iter().map(|(index, _)| index).collect())
}

/// Hands `work` what is left, a batch at a time. It returns how many it took; the next one
/// was refused then, and is skipped.
fn in_batches<T>(
    all: &[T],
    mut work: impl FnMut(&[T]) -> Result<usize, errno::Error>,
) -> Result<(), errno::Error> {
    let mut rest = all;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let taken = work(batch)?;
        let refused = usize::from(taken < batch.len());
        rest = &rest[taken + refused..];
    }
    Ok(())
}

fn entries(of: impl Iterator<Item = (u32, u64)>) -> Msrs {
    let entries: Vec<_> =
        of.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).expect("a batch is no longer than the wrapper allows")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_goes_on_behind_what_was_refused() {
        let all: Vec<u32> = (0..600).collect();
        let mut taken = Vec::new();
        in_batches(&all, |batch| {
            let until = batch.iter().position(|n| n % 100 == 7).unwrap_or(batch.len());
            taken.extend_from_slice(&batch[..until]);
            Ok(until)
        })
        .unwrap();
        let want: Vec<u32> = all.into_iter().filter(|n| n % 100 != 7).collect();
        assert_eq!(taken, want);
    }

    #[test]
    fn an_error_ends_it() {
        let result = in_batches(&[1, 2], |_| Err(errno::Error::new(libc::EFAULT)));
        assert_eq!(result, Err(errno::Error::new(libc::EFAULT)));
    }
}
