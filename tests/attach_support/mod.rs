//! What tests of attached programs share: guests of a few bytes, and the way in.
#![allow(dead_code, clippy::unwrap_used)] // every test uses a part of it; a test fails by panicking

pub mod counting;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::{self, Vm};

/// Where the guest's code is.
pub const CODE: u64 = 0x10_0000;

/// A kernel of a few bytes: an ELF file with one segment.
pub fn kernel(dir: &Path, code: &[u8]) -> PathBuf {
    let mut elf = vec![0; 0x78];
    elf[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
    elf[20] = 1;
    elf[24..32].copy_from_slice(&CODE.to_le_bytes()); // entry
    elf[32] = 0x40; // program headers
    (elf[52], elf[54], elf[56]) = (0x40, 0x38, 1);
    let mut header = Vec::new();
    header.extend(1u32.to_le_bytes()); // PT_LOAD
    header.extend(7u32.to_le_bytes());
    for word in [0x1000u64, CODE, CODE, code.len() as u64, code.len() as u64, 0x1000] {
        header.extend(word.to_le_bytes());
    }
    elf[0x40..0x78].copy_from_slice(&header);
    elf.resize(0x1000, 0);
    elf.extend(code);
    let path = dir.join("tiny");
    fs::write(&path, elf).unwrap();
    path
}

/// Waits until the socket is there.
pub fn attach(vm: &Vm) -> cellblock_plugin_api::Vm {
    let path = vm.path("plugin");
    let until = Instant::now() + common::LIMIT;
    loop {
        match cellblock_plugin_api::Vm::attach(&path) {
            Ok(attached) => return attached,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An example of the plugin interface, built as a reader would.
pub fn example(name: &str) -> PathBuf {
    let built = Command::new(env!("CARGO"))
        .args([
            "build",
            "--release",
            "--locked",
            "-q",
            "-p",
            "cellblock-plugin-api",
            "--example",
            name,
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(built.success());
    // Beside the program, wherever that is.
    Path::new(env!("CARGO_BIN_EXE_cellblock")).with_file_name("examples").join(name)
}
