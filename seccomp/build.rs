//! Compiles `policies/*.json` into BPF programs embedded in the crate.

#[path = "src/bpf.rs"]
mod bpf;
#[path = "build/policy.rs"]
mod policy;
#[path = "build/program.rs"]
mod program;
#[path = "src/syscalls.rs"]
mod syscalls;

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

/// Policies that become programs; the other files are included by these.
const PROGRAMS: [&str; 7] =
    ["blk", "serial", "vmm_main", "vmm_vcpu", "vmm_device", "vmm_plugin", "vmm_pager"];

fn main() {
    println!("cargo::rerun-if-changed=policies");
    println!("cargo::rerun-if-changed=build");
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    match generate(&Path::new(&root).join("policies")) {
        Ok(code) => fs::write(Path::new(&out).join("programs.rs"), code)
            .expect("the output folder is writable"),
        Err(message) => {
            println!("cargo::error={message}");
            std::process::exit(1);
        }
    }
}

fn generate(folder: &Path) -> Result<String, String> {
    let constants = policy::constants(folder)?;
    let mut code = String::new();
    for name in PROGRAMS {
        let policy = policy::resolve(folder, name, &constants)?;
        for (mode, action) in [("KILL", program::Otherwise::Trap), ("LOG", program::Otherwise::Log)]
        {
            let bpf = program::compile(&policy, action).map_err(|e| format!("{name}.json: {e}"))?;
            let upper = name.to_uppercase();
            let _ = writeln!(code, "static {upper}_{mode}: [sock_filter; {}] = [", bpf.len());
            for op in bpf {
                let _ = writeln!(
                    code,
                    "    sock_filter {{ code: {}, jt: {}, jf: {}, k: {} }},",
                    op.code, op.jt, op.jf, op.k
                );
            }
            let _ = writeln!(code, "];");
        }
    }
    Ok(code)
}
