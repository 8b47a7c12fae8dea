//! Builds the bare-metal guest (`tests/guests/bare`) that `src/guest.rs` embeds.
//!
//! rustc is called directly, not through a nested cargo: the guest has no dependencies, and flags
//! meant for this build (`RUSTFLAGS`, profiles, wrappers) must not reach it.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const GUEST: &str = "tests/guests/bare";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={GUEST}");
    println!("cargo::rerun-if-changed=build.rs");
    if env::var("CARGO_CFG_TARGET_ARCH")? != "x86_64" {
        return Err("Cellblock and its guests are for x86_64 only".into());
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let elf = out.join("bare-guest");
    compile(&elf)?;
    let image = without_notes(fs::read(&elf)?).ok_or("the guest is not a 64-bit ELF file")?;
    fs::write(out.join("bare-guest-linux64"), image)?;
    Ok(())
}

fn compile(elf: &Path) -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let script = root.join(GUEST).join("guest.ld");
    let mut rustc = Command::new(env::var("RUSTC")?);
    // A relative source path keeps this machine's folders out of the image.
    rustc.current_dir(&root).arg(format!("{GUEST}/src/main.rs")).arg("-o").arg(elf);
    rustc.args(["--crate-name=bare_guest", "--crate-type=bin", "--edition=2024"]);
    rustc.arg(format!("--target={}", env::var("TARGET")?));
    for option in [
        "opt-level=s",
        "lto=fat",
        "codegen-units=1",
        "panic=abort",
        "strip=symbols",
        "relocation-model=static",
        "target-cpu=x86-64",
        "link-arg=-nostartfiles",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=-no-pie",
        "link-arg=-Wl,--build-id=none",
        "link-arg=-Wl,-z,max-page-size=4096",
    ] {
        rustc.args(["-C", option]);
    }
    rustc.arg("-C").arg(format!("link-arg=-Wl,-T,{}", script.display()));
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    let status = rustc.status()?;
    if !status.success() {
        return Err(format!("rustc could not build the guest in {GUEST}: {status}").into());
    }
    Ok(())
}

/// The same image with its notes struck out, so that a loader finds no PVH entry and takes the
/// 64-bit one.
fn without_notes(mut elf: Vec<u8>) -> Option<Vec<u8>> {
    const PT_NULL: u32 = 0;
    const PT_NOTE: u32 = 4;
    let half = |elf: &[u8], at: usize| Some(u16::from_le_bytes(*elf.get(at..)?.first_chunk()?));
    let start = usize::try_from(u64::from_le_bytes(*elf.get(0x20..)?.first_chunk()?)).ok()?;
    let size = usize::from(half(&elf, 0x36)?);
    let count = usize::from(half(&elf, 0x38)?);
    for header in (0..count).map(|i| start + i * size) {
        let kind = elf.get_mut(header..)?.first_chunk_mut()?;
        if *kind == PT_NOTE.to_le_bytes() {
            *kind = PT_NULL.to_le_bytes();
        }
    }
    Some(elf)
}
