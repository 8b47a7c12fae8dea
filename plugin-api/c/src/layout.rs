//! The structures of the header, as Rust sees them.

use std::ffi::c_void;
use std::mem::offset_of;

use cellblock_plugin_api::Space;
use libc::{EINVAL, c_int};

use crate::guard::{Errno, Result};

#[repr(C)]
pub struct NetConfig {
    pub tap_fd: c_int,
    /// The bytes in network order.
    pub host_ip: [u8; 4],
    pub netmask: [u8; 4],
    pub host_mac_address: [u8; 6],
    pub _padding: [u8; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct IrqRoute {
    pub irq_id: u32,
    pub kind: u32,
    /// Of an irqchip route the controller and, in the upper half, the pin.
    pub address: u64,
    pub data: u32,
    pub _reserved: [u8; 4],
}

/// A `bool` of C is a byte that may hold anything: it is only compared with 0.
#[repr(C)]
pub struct HintDetail {
    pub match_: [u8; 4],
    pub _reserved: [u8; 4],
    pub registers: [u64; 4],
    pub send_sregs: u8,
    pub send_debugregs: u8,
    pub _reserved2: [u8; 6],
}

#[repr(C)]
pub struct Hint {
    pub hint_version: u32,
    pub _reserved: u32,
    pub address_space: u32,
    pub address_flags: u16,
    pub details_count: u16,
    pub address: u64,
    pub details: *const HintDetail,
}

#[repr(C)]
pub struct VcpuEvent {
    pub kind: u32,
    pub _padding: u32,
    pub payload: Payload,
}

#[repr(C)]
pub union Payload {
    pub io_access: IoAccess,
    pub user: *mut c_void,
    pub hyperv_call: HypervCall,
    pub hyperv_synic: HypervSynic,
    pub reserved: [u64; 8],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct IoAccess {
    pub address_space: u32,
    pub _padding: u32,
    pub address: u64,
    pub data: *mut u8,
    pub length: u32,
    pub is_write: u8,
    pub no_resume: u8,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct HypervCall {
    pub input: u64,
    pub result: *mut u64,
    pub params: [u64; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct HypervSynic {
    pub msr: u32,
    pub _reserved: u32,
    pub control: u64,
    pub evt_page: u64,
    pub msg_page: u64,
}

// The same that crosvm.h asserts.
const _: () = {
    assert!(size_of::<NetConfig>() == 20 && offset_of!(NetConfig, host_mac_address) == 12);
    assert!(size_of::<IrqRoute>() == 24 && offset_of!(IrqRoute, data) == 16);
    assert!(size_of::<HintDetail>() == 48 && offset_of!(HintDetail, send_debugregs) == 41);
    assert!(size_of::<Hint>() == 32 && offset_of!(Hint, details) == 24);
    assert!(size_of::<VcpuEvent>() == 72 && offset_of!(VcpuEvent, payload) == 8);
    assert!(offset_of!(IoAccess, data) == 16 && offset_of!(IoAccess, no_resume) == 29);
    assert!(offset_of!(HypervCall, params) == 16 && offset_of!(HypervSynic, msg_page) == 24);
};

pub(crate) fn space(number: u32) -> Result<Space> {
    match number {
        0 => Ok(Space::Port),
        1 => Ok(Space::Mmio),
        _ => Err(Errno(EINVAL)),
    }
}

pub(crate) fn space_number(space: Space) -> u32 {
    match space {
        Space::Port => 0,
        Space::Mmio => 1,
    }
}
