//! A plugin's part in snapshots: `../include/cellblock.h`.

use std::ffi::{CStr, c_char, c_void};

use cellblock_plugin_api::wire::part::MAX_STATE;
use cellblock_plugin_api::{Moment, Part};
use libc::{EINVAL, EIO, EOVERFLOW, c_int};

use crate::guard::{Errno, guard, input};
use crate::handles::Crosvm;

/// `struct cellblock_part`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Callbacks {
    save: Option<unsafe extern "C" fn(*mut c_void, *mut u8) -> i64>,
    thaw: Option<unsafe extern "C" fn(*mut c_void)>,
    restore: Option<unsafe extern "C" fn(*mut c_void, *const u8, usize) -> c_int>,
}

/// The callbacks of a plugin, and what they are called with.
struct Plugin {
    callbacks: Callbacks,
    user: *mut c_void,
}

// SAFETY: the header has the plugin expect its callbacks on another thread.
unsafe impl Send for Plugin {}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cellblock_take_part(
    c: *mut Crosvm,
    name: *const c_char,
    callbacks: *const Callbacks,
    user: *mut c_void,
) -> c_int {
    guard(|| {
        let (c, callbacks) = (input(c)?, *input(callbacks)?);
        let Callbacks { save: Some(_), restore: Some(_), .. } = callbacks else {
            return Err(Errno(EINVAL));
        };
        let name = if name.is_null() { c"" } else { CStr::from_ptr(name) };
        let mut part = c.vm.take_part(name.to_str().map_err(|_| Errno(EINVAL))?)?;
        let restored = part.take_restored();
        let plugin = Plugin { callbacks, user };
        if let Some(state) = &restored {
            match plugin.restore(state) {
                0 => {}
                errno => return Err(Errno(errno)),
            }
        }
        let thread = std::thread::Builder::new().name("snapshots".into());
        let spawned = thread.spawn(move || plugin.serve(&part));
        spawned.map_err(|error| Errno(error.raw_os_error().unwrap_or(EIO)))?;
        Ok(restored.is_some().into())
    })
}

impl Plugin {
    /// Until the VMM ends.
    fn serve(&self, part: &Part) {
        let mut buffer = vec![0; MAX_STATE];
        while let Ok(moment) = part.wait() {
            let answered = match moment {
                Moment::Quiesce(epoch) => match self.save(&mut buffer) {
                    Ok(length) => part.quiesced(epoch, buffer[..length].to_vec()),
                    Err(errno) => part.failed(epoch, errno),
                },
                Moment::Restore(epoch, state) => match self.restore(&state) {
                    0 => part.restored(epoch),
                    errno => part.failed(epoch, errno),
                },
                Moment::Thaw => {
                    if let Some(thaw) = self.callbacks.thaw {
                        // SAFETY: the plugin's own function, with its own pointer.
                        unsafe { thaw(self.user) };
                    }
                    Ok(())
                }
            };
            if answered.is_err() {
                return;
            }
        }
    }

    /// 0, or why the plugin cannot be what `state` says.
    fn restore(&self, state: &[u8]) -> c_int {
        let Some(restore) = self.callbacks.restore else { return EINVAL };
        // SAFETY: the plugin's own function, with its own pointer and bytes that outlive the call.
        match unsafe { restore(self.user, state.as_ptr(), state.len()) } {
            0.. => 0,
            errno => errno.checked_neg().unwrap_or(EIO),
        }
    }

    fn save(&self, buffer: &mut [u8]) -> Result<usize, c_int> {
        let save = self.callbacks.save.ok_or(EINVAL)?;
        // SAFETY: the plugin's own function, with its own pointer and a buffer as long as the
        // header says.
        let length = unsafe { save(self.user, buffer.as_mut_ptr()) };
        match usize::try_from(length) {
            Ok(length) if length <= buffer.len() => Ok(length),
            Ok(_) => Err(EOVERFLOW),
            Err(_) => {
                Err(length.checked_neg().and_then(|n| c_int::try_from(n).ok()).unwrap_or(EIO))
            }
        }
    }
}
