//! The machine a guest sees: memory, interrupt controllers, processors, tables.
//!
//! # Order
//! [`memory::GuestRam`] first, then [`boot::load`] and [`acpi::write`] fill it,
//! [`kvm::Machine`] puts it under a virtual machine, and [`cpu::CpuModel`] sets
//! each vCPU's registers for the [`boot::Entry`] the loader found. Nothing here
//! runs a vCPU: that is `crate::vcpu`.
//!
//! | module | holds |
//! |---|---|
//! | [`layout`] | every address, port and interrupt number, in one place |
//! | [`memory`] | guest RAM: one sealed memfd, mapped with a hole below 4 GiB |
//! | [`kvm`] | `/dev/kvm`, the VM, memory slots, interrupt controllers, eventfds |
//! | [`cpu`] | CPUID, registers, MSRs and local APIC of each vCPU |
//! | [`boot`] | kernel files: ELF, PVH and bzImage, initrd, command line, e820 |
//! | [`vmgenid`] | the id that tells a guest that it is a copy |
//! | [`metadata`] | what a VM is told about itself |
//! | [`acpi`] | the tables by which an unmodified kernel finds CPUs and devices |
//!
//! # Trust
//! A kernel or initrd file is untrusted input: it is checked before a byte of it
//! is placed, and each refusal is one line that names the fault and the remedy.
//! Guest RAM may be written by the guest and by device processes at any time, so
//! it is only touched through `vm-memory`'s volatile accesses.

pub mod acpi;
pub mod boot;
pub mod cpu;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod metadata;
pub mod vmgenid;
