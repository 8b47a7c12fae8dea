//! What a user can do when a VM does not come up.

use super::VmmError;
use crate::remedy::Remedy;
use crate::vm::kvm::KvmError;

impl Remedy for VmmError {
    fn remedy(&self) -> Option<String> {
        match self {
            VmmError::Input(error) => error.remedy(),
            VmmError::Kvm(KvmError::Open(error)) => match error.errno() {
                libc::EACCES | libc::EPERM => {
                    Some("join the group that owns /dev/kvm, or run as root".into())
                }
                _ => Some(
                    "load kvm_intel or kvm_amd, and enable virtualization in the firmware".into(),
                ),
            },
            VmmError::SpawnerDied => Some("see the kernel log for who killed it".into()),
            _ => None,
        }
    }
}
