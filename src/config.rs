//! What a VM is made of.

use std::path::PathBuf;

use cellblock_devices::protocol::{LogLevel, SeccompMode};

use crate::spec::{DiskSpec, SerialSpec};

/// A validated configuration.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// vCPUs.
    pub cpus: u8,
    /// Bytes of memory.
    pub memory: u64,
    /// Disks.
    pub disks: Vec<DiskSpec>,
    /// Console.
    pub serial: SerialSpec,
    /// Control socket.
    pub control: Option<PathBuf>,
    /// Jails on.
    pub sandbox: bool,
    /// Violations.
    pub seccomp: SeccompMode,
    /// Log level.
    pub log: LogLevel,
}
