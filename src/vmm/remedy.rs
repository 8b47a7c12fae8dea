//! What a user can do when a VM does not come up.

use super::VmmError;
use crate::remedy::Remedy;

impl Remedy for VmmError {
    fn remedy(&self) -> Option<String> {
        match self {
            VmmError::Input(error) => error.remedy(),
            VmmError::Restore(error) => error.remedy(),
            VmmError::Attach(error) => error.remedy(),
            VmmError::Plugin(error) => error.remedy(),
            VmmError::SpawnerDied => Some("see the kernel log for who killed it".into()),
            _ => None,
        }
    }
}
