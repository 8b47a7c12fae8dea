//! Connections, and what concerns the VM as a whole.

use std::ffi::c_void;
use std::os::fd::IntoRawFd;

use cellblock_plugin_api::{Hint, HintDetail, IrqRoute, Route, Vm};
use kvm_bindings::kvm_cpuid_entry2;
use libc::{EINVAL, c_int};

use crate::guard::{Errno, fill, guard, input, inputs, output};
use crate::handles::{Crosvm, CrosvmVcpu};
use crate::layout::{self, NetConfig, space};

const MAX_HINT_DETAIL_COUNT: u16 = 32;
const HINT_ON_WRITE: u16 = 1;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_connect(out: *mut *mut Crosvm) -> c_int {
    guard(|| {
        let out = output(out)?;
        *out = Box::into_raw(Box::new(Crosvm::new(Vm::connect()?)?));
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_new_connection(c: *mut Crosvm, out: *mut *mut Crosvm) -> c_int {
    guard(|| {
        let (c, out) = (input(c)?, output(out)?);
        let vm = c.vm.new_connection()?;
        *out = Box::into_raw(Box::new(Crosvm { vm, family: c.family.clone() }));
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_destroy_connection(c: *mut *mut Crosvm) -> c_int {
    guard(|| {
        let place = output(c)?;
        if place.is_null() {
            return Err(Errno(EINVAL));
        }
        drop(Box::from_raw(std::mem::replace(place, std::ptr::null_mut())));
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_get_shutdown_eventfd(c: *mut Crosvm) -> c_int {
    guard(|| Ok(input(c)?.vm.shutdown_event()?.into_raw_fd()))
}

#[unsafe(no_mangle)]
pub extern "C" fn crosvm_get_render_server_fd() -> c_int {
    -EINVAL
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_check_extension(
    c: *mut Crosvm,
    extension: u32,
    has: *mut u8,
) -> c_int {
    guard(|| {
        let (c, has) = (input(c)?, output(has)?);
        *has = c.vm.check_extension(extension)?.into();
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_enable_capability(
    c: *mut Crosvm,
    capability: u32,
    flags: u32,
    args: *const [u64; 4],
) -> c_int {
    guard(|| {
        let args = args.as_ref().copied().unwrap_or_default();
        input(c)?.vm.enable_capability(capability, flags, args)?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_get_supported_cpuid(
    c: *mut Crosvm,
    count: u32,
    entries: *mut kvm_cpuid_entry2,
    out_count: *mut u32,
) -> c_int {
    guard(|| fill(&input(c)?.vm.supported_cpuid()?, count, entries, out_count))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_get_emulated_cpuid(
    c: *mut Crosvm,
    count: u32,
    entries: *mut kvm_cpuid_entry2,
    out_count: *mut u32,
) -> c_int {
    guard(|| fill(&input(c)?.vm.emulated_cpuid()?, count, entries, out_count))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_get_msr_index_list(
    c: *mut Crosvm,
    count: u32,
    indices: *mut u32,
    out_count: *mut u32,
) -> c_int {
    guard(|| fill(&input(c)?.vm.msr_index_list()?, count, indices, out_count))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_net_get_config(c: *mut Crosvm, config: *mut NetConfig) -> c_int {
    guard(|| {
        let (c, config) = (input(c)?, output(config)?);
        let net = c.vm.net_config()?;
        *config = NetConfig {
            tap_fd: net.tap.into_raw_fd(),
            host_ip: net.host_ip.octets(),
            netmask: net.netmask.octets(),
            host_mac_address: net.mac,
            _padding: [0; 2],
        };
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_reserve_range(
    c: *mut Crosvm,
    of: u32,
    start: u64,
    length: u64,
) -> c_int {
    guard(|| {
        input(c)?.vm.reserve_range(space(of)?, start, length)?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_reserve_async_write_range(
    c: *mut Crosvm,
    of: u32,
    start: u64,
    length: u64,
) -> c_int {
    guard(|| {
        input(c)?.vm.reserve_async_write_range(space(of)?, start, length)?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_set_irq(c: *mut Crosvm, irq: u32, active: u8) -> c_int {
    guard(|| {
        input(c)?.vm.set_irq(irq, active != 0)?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_set_irq_routing(
    c: *mut Crosvm,
    count: u32,
    routes: *const layout::IrqRoute,
) -> c_int {
    guard(|| {
        let c = input(c)?;
        let route = |r: &layout::IrqRoute| {
            let route = match r.kind {
                0 => Route::Irqchip { irqchip: r.address as u32, pin: (r.address >> 32) as u32 },
                1 => Route::Msi { address: r.address, data: r.data },
                _ => return Err(Errno(EINVAL)),
            };
            Ok(IrqRoute { irq: r.irq_id, route })
        };
        let routes = inputs(routes, count)?.iter().map(route).collect::<Result<Vec<_>, _>>()?;
        c.vm.set_irq_routing(&routes)?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_set_hypercall_hint(
    c: *mut Crosvm,
    count: u32,
    hints: *const layout::Hint,
) -> c_int {
    guard(|| {
        let c = input(c)?;
        let hint = match count {
            0 => None,
            1 => Some(hint(input(hints)?)?),
            _ => return Err(Errno(EINVAL)),
        };
        c.vm.set_hypercall_hint(hint.as_ref())?;
        Ok(0)
    })
}

unsafe fn hint(hint: &layout::Hint) -> Result<Hint, Errno> {
    if hint.hint_version != 0
        || hint._reserved != 0
        || hint.address == 0
        || hint.address_flags & !HINT_ON_WRITE != 0
        || hint.details_count > MAX_HINT_DETAIL_COUNT
    {
        return Err(Errno(EINVAL));
    }
    let detail = |d: &layout::HintDetail| {
        let value = |n: usize| (d.match_[n] != 0).then_some(d.registers[n]);
        HintDetail {
            rax: value(0),
            rbx: value(1),
            rcx: value(2),
            rdx: value(3),
            send_sregs: d.send_sregs != 0,
            send_debugregs: d.send_debugregs != 0,
        }
    };
    Ok(Hint {
        space: space(hint.address_space)?,
        address: hint.address,
        on_write: hint.address_flags & HINT_ON_WRITE != 0,
        details: inputs(hint.details, hint.details_count.into())?.iter().map(detail).collect(),
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_set_identity_map_addr(c: *mut Crosvm, address: u32) -> c_int {
    guard(|| {
        input(c)?.vm.set_identity_map_addr(address)?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_pause_vcpus(c: *mut Crosvm, mask: u64, user: *mut c_void) -> c_int {
    guard(|| {
        input(c)?.vm.pause_vcpus(mask, user as u64)?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_start(c: *mut Crosvm) -> c_int {
    guard(|| {
        input(c)?.vm.start()?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn crosvm_get_vcpu(
    c: *mut Crosvm,
    id: u32,
    out: *mut *mut CrosvmVcpu,
) -> c_int {
    guard(|| {
        let (c, out) = (input(c)?, output(out)?);
        *out = c.family.vcpu(id)?;
        Ok(0)
    })
}
