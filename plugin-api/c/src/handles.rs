//! What a C pointer points to.

use std::cell::UnsafeCell;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cellblock_plugin_api::{IoEvent, IrqEvent, Memory, Vcpu, Vm};
use libc::{EINVAL, ENOENT};

use crate::guard::{Errno, Result, output};

/// `struct crosvm`: a connection.
pub struct Crosvm {
    pub(crate) vm: Vm,
    pub(crate) family: Arc<Family>,
}

/// What the connections of a plugin have in common.
pub(crate) struct Family {
    /// Never grows or shrinks: C has their addresses.
    vcpus: Box<[CrosvmVcpu]>,
    /// Addresses of the objects that exist. A pointer that is not among them is not followed.
    objects: Mutex<HashSet<usize>>,
}

/// `struct crosvm_vcpu`.
pub struct CrosvmVcpu {
    pub(crate) vcpu: Arc<Vcpu>,
    /// The result of a hypercall that the plugin writes to.
    pub(crate) result: UnsafeCell<u64>,
    /// The data of a write that nobody waits for.
    pub(crate) data: UnsafeCell<Vec<u8>>,
    /// Whether the event is a hypercall.
    pub(crate) in_call: UnsafeCell<bool>,
}

// SAFETY: the header has a vCPU driven by one thread at a time, so that its cells are
// touched by one.
unsafe impl Sync for CrosvmVcpu {}

/// `struct crosvm_io`.
pub struct CrosvmIo(pub(crate) IoEvent);

/// `struct crosvm_memory`.
pub struct CrosvmMemory(pub(crate) Memory);

/// `struct crosvm_irq`.
pub struct CrosvmIrq(pub(crate) IrqEvent);

impl Crosvm {
    pub(crate) fn new(vm: Vm) -> Result<Crosvm> {
        let vcpus = (0..vm.vcpu_count()).map(|id| Ok(CrosvmVcpu::new(vm.vcpu(id)?)));
        let vcpus = vcpus.collect::<Result<_>>()?;
        let family = Arc::new(Family { vcpus, objects: Mutex::default() });
        Ok(Crosvm { vm, family })
    }
}

impl CrosvmVcpu {
    fn new(vcpu: Arc<Vcpu>) -> CrosvmVcpu {
        CrosvmVcpu {
            vcpu,
            result: UnsafeCell::new(0),
            data: UnsafeCell::default(),
            in_call: UnsafeCell::new(false),
        }
    }
}

impl Family {
    /// The same address for the same number.
    pub(crate) fn vcpu(&self, id: u32) -> Result<*mut CrosvmVcpu> {
        let vcpu = self.vcpus.get(id as usize).ok_or(Errno(ENOENT))?;
        Ok(std::ptr::from_ref::<CrosvmVcpu>(vcpu).cast_mut())
    }

    /// Gives an object to C.
    pub(crate) fn hand_out<T>(&self, object: T) -> *mut T {
        let pointer = Box::into_raw(Box::new(object));
        self.objects().insert(pointer as usize);
        pointer
    }

    /// An object that C has.
    ///
    /// # Safety
    /// If it is one, it is a `T`.
    pub(crate) unsafe fn known<'a, T>(&self, pointer: *const T) -> Result<&'a T> {
        if pointer.is_null() {
            return Err(Errno(EINVAL));
        }
        match self.objects().contains(&(pointer as usize)) {
            // SAFETY: it is an object, and by the caller's word a `T` then.
            true => Ok(unsafe { &*pointer }),
            false => Err(Errno(ENOENT)),
        }
    }

    /// Takes an object back once `destroy` has succeeded, and clears C's pointer.
    ///
    /// # Safety
    /// `place` is null or valid; what it points to, if it is an object, is a `T`.
    pub(crate) unsafe fn take_back<T>(
        &self,
        place: *mut *mut T,
        destroy: impl FnOnce(&T) -> std::result::Result<(), cellblock_plugin_api::Error>,
    ) -> Result {
        // SAFETY: by the caller's word it is null or valid.
        let place = unsafe { output(place) }?;
        if place.is_null() {
            return Err(Errno(ENOENT));
        }
        // SAFETY: by the caller's word an object there is a `T`.
        destroy(unsafe { self.known(*place) }?)?;
        // Two threads that destroy the same object: one of them.
        if !self.objects().remove(&(*place as usize)) {
            return Err(Errno(ENOENT));
        }
        // SAFETY: it was one of ours until now, made by `Box::into_raw`, and nobody else takes it.
        drop(unsafe { Box::from_raw(std::mem::replace(place, std::ptr::null_mut())) });
        Ok(0)
    }

    fn objects(&self) -> MutexGuard<'_, HashSet<usize>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
