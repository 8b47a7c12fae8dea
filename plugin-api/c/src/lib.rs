//! `libcrosvm_plugin.so`: the C interface of `../include/crosvm.h` on the safe Rust client.
//!
//! Every function returns 0, a file descriptor or an error number, negated; no panic gets
//! out. Pointers are checked where that is possible: null is -EINVAL, and an object that is
//! not one of the connection's family is -ENOENT, without being looked at.
#![allow(unsafe_code, unsafe_op_in_unsafe_fn)] // the functions are what C calls, with C's pointers
#![allow(clippy::missing_safety_doc, missing_docs)] // the header documents them

mod guard;
mod handles;
mod layout;
mod object;
mod part;
mod state;
mod vcpu;
mod vm;
