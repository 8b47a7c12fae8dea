//! A guest that does nothing but count, at CPL 0.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::kernel;
use crate::common::{LIMIT, Vm};

/// Where it counts.
pub const COUNTER: u64 = 0x20_0000;
/// `xor rax, rax` (7 bytes); 7: `inc rax`; `mov [0x200000], rax`; `nop`; `jmp 7`.
pub const COUNT: &[u8] = &[
    0x48, 0xc7, 0xc0, 0, 0, 0, 0, 0x48, 0xff, 0xc0, 0x48, 0x89, 0x04, 0x25, 0, 0, 0x20, 0, 0x90,
    0xeb, 0xf2,
];

/// A guest whose vCPU counts, and that programs can attach to.
pub fn counting(options: &str, cpus: usize) -> (Vm, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::with("")
        .kernel(&kernel(dir.path(), COUNT))
        .cpus(cpus)
        .arg("--plugin-socket")
        .arg(format!("plugin{options}"))
        .start();
    (vm, dir)
}

/// How far it is.
pub fn counter(memory: &File) -> u64 {
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, COUNTER).unwrap();
    u64::from_le_bytes(bytes)
}

/// It counts.
#[track_caller]
pub fn goes_on(memory: &File) {
    let before = counter(memory);
    let until = Instant::now() + LIMIT;
    while counter(memory) == before {
        assert!(Instant::now() < until, "the guest stands at {before}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
