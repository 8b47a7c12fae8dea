//! Everything that knows the processor: start-up, tables, gates, interrupt controllers.

pub mod apic;
pub mod cpu;
pub mod entry;
pub mod gates;
pub mod smp;
pub mod tables;
