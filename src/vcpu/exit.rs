//! One KVM_RUN, and its exit as a plain value that borrows nothing.
//!
//! A vCPU may park in the middle of an access, and its thread then needs the whole `VcpuFd`: so an
//! exit's facts are copied out, and the data of an access is moved one element at a time.
#![allow(unsafe_code)] // reads the union in kvm_run that the exit reason names

use super::attendant::SpecialExit;
use crate::bus::VmExit;
use kvm_bindings::{
    KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNIC, KVM_EXIT_IO_OUT, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::ptr;

/// The largest single access: 8 bytes over MMIO, 4 on a port.
pub(super) const MAX_ACCESS: usize = 8;

/// An access to a port (`count` elements by a string instruction, else one) or to memory that is
/// not RAM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub(super) addr: u64,
    pub(super) is_write: bool,
    /// Bytes an element.
    pub(super) size: usize,
    pub(super) count: usize,
    /// Where the elements lie in the run area.
    data: usize,
}

/// Why KVM_RUN returned.
pub(super) enum Exit {
    /// Nothing to handle.
    Interrupted,
    Port(Access),
    Mmio(Access),
    Special(SpecialExit),
    Ended(VmExit),
}

enum Reason {
    Port,
    Mmio,
    Hyperv,
    Special(SpecialExit),
    Internal,
    Ended(VmExit),
    Stuck(String),
}

/// Enters the guest.
pub(super) fn run(vcpu: &mut VcpuFd) -> Exit {
    let reason = match vcpu.run() {
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Reason::Port,
        Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => Reason::Mmio,
        Ok(VcpuExit::Hyperv) => Reason::Hyperv,
        Ok(VcpuExit::Debug(debug)) => {
            Reason::Special(SpecialExit::Debug { pc: debug.pc, dr6: debug.dr6, dr7: debug.dr7 })
        }
        // A vCPU that left wait-for-SIPI gives EAGAIN once.
        Ok(VcpuExit::Intr) => return Exit::Interrupted,
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Exit::Interrupted,
        Ok(VcpuExit::Shutdown) => Reason::Ended(VmExit::Reset),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Reason::Ended(VmExit::Shutdown),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Reason::Ended(VmExit::Reset),
        Ok(VcpuExit::SystemEvent(kind, data)) => {
            Reason::Stuck(format!("system event {kind}, data {data:x?}"))
        }
        Ok(VcpuExit::InternalError) => Reason::Internal,
        Ok(VcpuExit::FailEntry(why, cpu)) => {
            Reason::Stuck(format!("the processor refused the guest's state ({why:#x}, cpu {cpu})"))
        }
        Ok(VcpuExit::Hlt) => Reason::Stuck(
            "halted, with no interrupt controller in the kernel that could wake it".to_owned(),
        ),
        Ok(VcpuExit::MemoryFault { gpa, .. }) => {
            Reason::Stuck(format!("the memory at {gpa:#x} cannot be accessed"))
        }
        Ok(other) => Reason::Stuck(format!("an exit nobody handles: {other:?}")),
        Err(e) => Reason::Stuck(format!("KVM_RUN: {e}")),
    };
    let run = vcpu.get_kvm_run();
    match reason {
        Reason::Port => Exit::Port(port(run)),
        Reason::Mmio => Exit::Mmio(mmio(run)),
        Reason::Hyperv => match hyperv(run) {
            Ok(exit) => Exit::Special(exit),
            Err(facts) => Exit::Ended(stuck(vcpu, &facts)),
        },
        Reason::Special(exit) => Exit::Special(exit),
        Reason::Ended(end) => Exit::Ended(end),
        Reason::Internal => {
            let facts = internal(run);
            Exit::Ended(stuck(vcpu, &facts))
        }
        Reason::Stuck(facts) => Exit::Ended(stuck(vcpu, &facts)),
    }
}

fn port(run: &kvm_run) -> Access {
    // SAFETY: KVM_EXIT_IO fills this member.
    let io = unsafe { run.__bindgen_anon_1.io };
    Access {
        addr: io.port.into(),
        is_write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
        size: usize::from(io.size),
        count: io.count as usize,
        data: io.data_offset as usize,
    }
}

fn mmio(run: &kvm_run) -> Access {
    // SAFETY: KVM_EXIT_MMIO fills this member.
    let mmio = unsafe { &run.__bindgen_anon_1.mmio };
    Access {
        addr: mmio.phys_addr,
        is_write: mmio.is_write != 0,
        size: mmio.len as usize,
        count: 1,
        data: ptr::from_ref(&mmio.data).addr() - ptr::from_ref(run).addr(),
    }
}

fn hyperv(run: &kvm_run) -> Result<SpecialExit, String> {
    // SAFETY: KVM_EXIT_HYPERV fills this member.
    let exit = unsafe { run.__bindgen_anon_1.hyperv };
    match exit.type_ {
        KVM_EXIT_HYPERV_SYNIC => {
            // SAFETY: the type names this member.
            let synic = unsafe { exit.u.synic };
            Ok(SpecialExit::HypervSynic {
                msr: synic.msr,
                control: synic.control,
                evt_page: synic.evt_page,
                msg_page: synic.msg_page,
            })
        }
        KVM_EXIT_HYPERV_HCALL => {
            // SAFETY: the type names this member.
            let call = unsafe { exit.u.hcall };
            Ok(SpecialExit::HypervCall { input: call.input, params: call.params })
        }
        other => Err(format!("a hyper-v exit of type {other} that nobody handles")),
    }
}

fn internal(run: &kvm_run) -> String {
    // SAFETY: KVM_EXIT_INTERNAL_ERROR fills this member.
    let error = unsafe { run.__bindgen_anon_1.internal };
    if error.suberror != KVM_INTERNAL_ERROR_EMULATION {
        let data = &error.data[..error.data.len().min(error.ndata as usize)];
        return format!("internal error of kvm, suberror {}, data {data:x?}", error.suberror);
    }
    // SAFETY: the suberror says that this member is filled.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    let bytes = KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES;
    let known = failure.ndata >= 3 && failure.flags & u64::from(bytes) != 0;
    // SAFETY: `flags` says that the instruction's bytes are there.
    let insn = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let len = if known { usize::from(insn.insn_size).min(insn.insn_bytes.len()) } else { 0 };
    format!(
        "kvm cannot emulate the instruction (suberror 1), bytes {:02x?}",
        &insn.insn_bytes[..len]
    )
}

fn stuck(vcpu: &VcpuFd, facts: &str) -> VmExit {
    VmExit::Error(match vcpu.get_regs() {
        Ok(regs) => format!("{facts}, rip {:#x}", regs.rip),
        Err(error) => format!("{facts}, rip unknown ({error})"),
    })
}

/// The bytes of element `index` of an access.
fn element(vcpu: &mut VcpuFd, access: &Access, index: usize) -> *mut u8 {
    debug_assert!(index < access.count && access.size <= MAX_ACCESS);
    let run = ptr::from_mut(vcpu.get_kvm_run()).cast::<u8>();
    // SAFETY: KVM gave offset, size and count of this exit's data inside the run area, which
    // `vcpu` keeps mapped whole.
    unsafe { run.add(access.data + index * access.size) }
}

/// What the guest writes with element `index`.
pub(super) fn load(vcpu: &mut VcpuFd, access: &Access, index: usize) -> [u8; MAX_ACCESS] {
    let mut data = [0; MAX_ACCESS];
    let size = access.size.min(MAX_ACCESS);
    // SAFETY: `element` gives `size` bytes of the run area, which is not our stack.
    unsafe { ptr::copy_nonoverlapping(element(vcpu, access, index), data.as_mut_ptr(), size) };
    data
}

/// Answers element `index` of the guest's read.
pub(super) fn store(vcpu: &mut VcpuFd, access: &Access, index: usize, data: &[u8; MAX_ACCESS]) {
    let size = access.size.min(MAX_ACCESS);
    // SAFETY: as in `load`, the other way.
    unsafe { ptr::copy_nonoverlapping(data.as_ptr(), element(vcpu, access, index), size) };
}

/// What the guest writes with all elements, as far as `data` has room.
pub(super) fn load_all(vcpu: &mut VcpuFd, access: &Access, data: &mut [u8]) {
    let len = data.len().min(access.size * access.count);
    // SAFETY: KVM gave offset, size and count of this exit's data inside the run area, which
    // `vcpu` keeps mapped whole, and which is not `data`.
    unsafe { ptr::copy_nonoverlapping(element(vcpu, access, 0), data.as_mut_ptr(), len) };
}

/// Answers all elements of the guest's read, as far as `data` goes.
pub(super) fn store_all(vcpu: &mut VcpuFd, access: &Access, data: &[u8]) {
    let len = data.len().min(access.size * access.count);
    // SAFETY: as in `load_all`, the other way.
    unsafe { ptr::copy_nonoverlapping(data.as_ptr(), element(vcpu, access, 0), len) };
}
