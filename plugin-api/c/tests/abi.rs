//! The C interface as C sees it: symbols, layouts, and what needs no VMM.
#![allow(clippy::expect_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every function of the interface, without its prefix.
const FUNCTIONS: &str = "
    connect new_connection destroy_connection get_shutdown_eventfd check_extension
    enable_capability get_supported_cpuid get_emulated_cpuid get_msr_index_list net_get_config
    reserve_range reserve_async_write_range set_irq set_irq_routing set_hypercall_hint
    get_pic_state set_pic_state get_ioapic_state set_ioapic_state get_pit_state set_pit_state
    get_clock set_clock set_identity_map_addr pause_vcpus start create_io_event
    destroy_io_event io_event_fd create_memory destroy_memory memory_get_dirty_log
    create_irq_event destroy_irq_event irq_event_get_fd irq_event_get_resample_fd get_vcpu
    get_hyperv_cpuid vcpu_wait vcpu_resume vcpu_get_regs vcpu_set_regs vcpu_get_sregs
    vcpu_set_sregs vcpu_get_fpu vcpu_set_fpu vcpu_get_debugregs vcpu_set_debugregs
    vcpu_get_xcrs vcpu_set_xcrs vcpu_get_lapic_state vcpu_set_lapic_state vcpu_get_mp_state
    vcpu_set_mp_state vcpu_get_vcpu_events vcpu_set_vcpu_events vcpu_get_msrs vcpu_set_msrs
    vcpu_set_cpuid vcpu_enable_capability";

/// The library that cargo built for this test.
fn library() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    test.with_file_name("libcrosvm_plugin.so")
}

fn output(command: &mut Command) -> String {
    let output = command.output().expect("runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn compile(compiler: &str, flags: &[&str], source: &str, to: &Path) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = library();
    let folder = library.parent().expect("a folder");
    output(
        Command::new(compiler)
            .args(["-Wall", "-Wextra", "-Werror"])
            .args(flags)
            .arg("-I")
            .arg(here.join("../include"))
            .arg(here.join("tests").join(source))
            .arg("-o")
            .arg(to)
            .arg("-L")
            .arg(folder)
            .args(["-lcrosvm_plugin", "-Wl,-rpath"])
            .arg(folder),
    );
}

#[test]
fn the_symbols_are_those_of_the_interface() {
    let wanted: BTreeSet<String> =
        FUNCTIONS.split_whitespace().map(|name| format!("crosvm_{name}")).collect();
    assert_eq!(wanted.len(), 60);
    let text = output(Command::new("nm").args(["-D", "--defined-only"]).arg(library()));
    let mut found: BTreeSet<String> =
        text.lines().filter_map(|line| Some(line.split(" T ").nth(1)?.to_string())).collect();
    // For some months there was one more.
    assert!(found.remove("crosvm_get_render_server_fd"), "{text}");
    // Our own, which `cellblock.h` has.
    assert!(found.remove("cellblock_take_part"), "{text}");
    assert_eq!(found, wanted);
    let name = output(Command::new("objdump").arg("-p").arg(library()));
    let name = name.lines().find(|line| line.contains("SONAME")).expect("a name");
    assert!(name.ends_with(" libcrosvm_plugin.so"), "{name}");
}

#[test]
fn layouts_in_every_language_of_the_header() {
    let dir = tempfile::tempdir().expect("a folder");
    let to = dir.path().join("layout");
    compile("cc", &["-std=c11"], "layout.c", &to);
    compile("cc", &["-std=gnu99"], "layout.c", &to);
    // C++ has another word for the assertion; those of the header are checked.
    let header = concat!(env!("CARGO_MANIFEST_DIR"), "/../include/crosvm.h");
    output(Command::new("c++").args(["-std=c++17", "-fsyntax-only", "-x", "c++", header]));
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../include");
    let header = concat!(env!("CARGO_MANIFEST_DIR"), "/../include/cellblock.h");
    let own = ["-std=c++17", "-fsyntax-only", "-I", folder, "-x", "c++", header];
    output(Command::new("c++").args(own));
}

#[test]
fn without_a_vmm() {
    let dir = tempfile::tempdir().expect("a folder");
    let to = dir.path().join("alone");
    compile("cc", &["-std=gnu11"], "alone.c", &to);
    output(&mut Command::new(to));
}
