//! The machine underneath the devices: memory, KVM, CPUs, boot protocols, ACPI.

pub mod acpi;
pub mod boot;
pub mod cpu;
pub mod kvm;
pub mod layout;
pub mod memory;
