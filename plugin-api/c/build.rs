//! Gives the library its name, so that programs linked with it by path find it by name.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcrosvm_plugin.so");
}
