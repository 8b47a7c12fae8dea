//! Where things are in the guest's physical address space and among its ports.

/// Start of the hole below 4 GiB; RAM below ends here at the latest.
pub const HOLE_START: u64 = 3 << 30;
/// End of the hole; RAM that did not fit below goes on here.
pub const HOLE_END: u64 = 4 << 30;
/// First register window of a virtio device.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Distance of register windows.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Interrupt lines of virtio devices. Those below 16 reach kernels that only know the PIC.
pub const VIRTIO_GSI: [u32; 17] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
/// Virtio devices a VM can have.
pub const VIRTIO_SLOTS: usize = VIRTIO_GSI.len();
/// I/O APIC registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LAPIC: u64 = 0xfee0_0000;
/// Page that KVM needs on Intel hosts for real mode.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel hosts.
pub const TSS: usize = 0xfffb_d000;
/// COM1.
pub const SERIAL_PORT: u64 = 0x3f8;
/// COM1's interrupt line.
pub const SERIAL_GSI: u32 = 4;
/// Keyboard controller.
pub const I8042_PORT: u64 = 0x60;
/// Readiness markers.
pub const MARKER_PORT: u64 = 0xcb0;
/// ACPI sleep control; the status register follows.
pub const SLEEP_PORT: u64 = 0x600;

/// Place of a virtio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// Guest-physical address of its register window.
    pub base: u64,
    /// Interrupt line.
    pub gsi: u32,
}

/// The `n`th virtio device's place.
///
/// # Panics
/// If `n` is [`VIRTIO_SLOTS`] or more.
pub fn virtio_slot(n: usize) -> VirtioSlot {
    VirtioSlot { base: VIRTIO_BASE + n as u64 * VIRTIO_STRIDE, gsi: VIRTIO_GSI[n] }
}
