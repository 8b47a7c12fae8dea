//! Where everything is: guest-physical addresses, I/O ports, interrupt numbers.
//!
//! ```text
//! 0                low RAM: boot structures, kernel, initrd
//! 0x000a_0000      hole of the PC (no RAM in the e820 map up to 1 MiB)
//! 0x000e_0000        ACPI tables, VM generation id, reset vector
//! 0x0010_0000      low RAM goes on, to 3 GiB at most
//! 0xc000_0000      MMIO hole: virtio-mmio, IOAPIC, local APIC, KVM's own pages
//! 0x1_0000_0000    high RAM
//! ```

/// End of low RAM and start of the MMIO hole, 3 GiB.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of high RAM and end of the MMIO hole, 4 GiB.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// First address a kernel file may ask to be loaded at, 1 MiB: below are boot structures.
pub const KERNEL_MIN: u64 = 0x10_0000;

/// Most vCPUs a VM may have.
pub const MAX_CPUS: u8 = 64;

/// Global descriptor table of the boot vCPU.
pub const GDT: u64 = 0x500;
/// `hvm_start_info`, with its module list and memory map behind it (PVH).
pub const PVH_START_INFO: u64 = 0x6000;
/// The zero page, `struct boot_params` (64-bit protocol).
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer; the stack grows down towards the zero page's end.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the boot vCPU: one PML4, one PDPT, four directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Bytes the boot page tables map, one to one: everything below 4 GiB.
pub const PAGE_TABLES_MAP: u64 = HIGH_RAM_START;
/// The kernel command line, nul-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line with its nul, in bytes.
pub const CMDLINE_ROOM: u64 = 0x1_0000;
/// End of the RAM below 640 KiB that the guest may use; the last KiB is the EBDA's place.
pub const LOW_RAM_640K: u64 = 0x9_fc00;

/// ACPI tables, the RSDP first: firmware's place, where a guest also scans for it.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the ACPI tables' area.
pub const ACPI_END: u64 = 0xf_0000;
/// The VM generation id, 16 bytes, in a page that nothing else is in.
pub const VMGENID: u64 = 0xf_0000;
/// Where a PC's firmware starts: kernels that know no better way to restart jump here
/// in real mode. The code there resets the machine.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// End of the reserved range that begins at [`ACPI_START`], 1 MiB.
pub const FIRMWARE_END: u64 = 0x10_0000;

/// First virtio-mmio register window.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Size of a virtio-mmio register window in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt of each virtio-mmio slot: the IOAPIC pins that nothing else uses.
pub const VIRTIO_GSI: [u32; 17] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// The IOAPIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs' registers.
pub const LAPIC: u64 = 0xfee0_0000;
/// One page KVM uses for an identity map (Intel without unrestricted guests).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages KVM uses for a real-mode task state segment (Intel, as above).
pub const KVM_TSS: u64 = 0xfffb_d000;

/// First I/O port of COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// COM1's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt that says that the VM generation id has changed: that of the CMOS clock, which
/// this machine does not have.
pub const VMGENID_GSI: u32 = 8;
/// Port a guest writes a readiness marker to.
pub const MARKER_PORT: u16 = 0xcb0;
/// Keyboard controller, data port.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Keyboard controller, command port; also the ACPI reset register.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// Byte that, written to [`I8042_COMMAND_PORT`], resets the machine.
pub const RESET_VALUE: u8 = 0xfe;

/// ACPI sleep control register (one byte, hardware-reduced ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register (one byte): reads as zero, writes are ignored.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// The sleep type that the DSDT's `_S5_` object names for power-off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// SLP_EN, the bit of the sleep control register that starts the sleep.
pub const SLEEP_ENABLE: u8 = 1 << 5;

/// One virtio-mmio device as tables and the command line describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// Guest-physical address of its register window of [`VIRTIO_MMIO_SIZE`] bytes.
    pub base: u64,
    /// Its interrupt: edge-triggered, active high, not shared.
    pub gsi: u32,
}

/// The virtio-mmio slot number `n`; `None` beyond the last.
pub fn virtio_slot(n: usize) -> Option<VirtioSlot> {
    let gsi = *VIRTIO_GSI.get(n)?;
    Some(VirtioSlot { base: VIRTIO_MMIO_BASE + n as u64 * VIRTIO_MMIO_SIZE, gsi })
}

/// True if `value`, written to [`SLEEP_CONTROL_PORT`], powers the machine off.
pub fn is_power_off(value: u8) -> bool {
    value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == SLEEP_TYPE_S5
}

/// `virtio_mmio.device=` words, for kernels that do not read ACPI: the command
/// line's way to say what [`super::acpi`] says in the DSDT.
pub fn cmdline_words(slots: &[VirtioSlot]) -> String {
    let words: Vec<_> = slots
        .iter()
        .map(|slot| {
            let kib = VIRTIO_MMIO_SIZE / 1024;
            format!("virtio_mmio.device={kib}K@{:#x}:{}", slot.base, slot.gsi)
        })
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_structures_do_not_overlap() {
        let places = [
            (GDT, 5 * 8),
            (PVH_START_INFO, 0x1000),
            (ZERO_PAGE, 0x1000),
            (ZERO_PAGE + 0x1000, BOOT_STACK - ZERO_PAGE - 0x1000),
            (PAGE_TABLES, 6 * 0x1000),
            (CMDLINE, CMDLINE_ROOM),
            (LOW_RAM_640K, 0xa_0000 - LOW_RAM_640K),
            (ACPI_START, ACPI_END - ACPI_START),
            (VMGENID, 0x1000),
            (RESET_VECTOR, FIRMWARE_END - RESET_VECTOR),
            (KERNEL_MIN, LOW_RAM_END - KERNEL_MIN),
            (VIRTIO_MMIO_BASE, VIRTIO_GSI.len() as u64 * VIRTIO_MMIO_SIZE),
            (IOAPIC, 0x1000),
            (LAPIC, 0x1000),
            (KVM_IDENTITY_MAP, 0x1000),
            (KVM_TSS, 0x3000),
            (HIGH_RAM_START, 1),
        ];
        for pair in places.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{:#x} and {:#x}", pair[0].0, pair[1].0);
        }
        assert!(VMGENID.is_multiple_of(8) && VMGENID >= ACPI_START && VMGENID < FIRMWARE_END);
    }

    #[test]
    fn slots_have_distinct_interrupts_that_no_legacy_device_has() {
        for (n, gsi) in VIRTIO_GSI.iter().enumerate() {
            assert!(!VIRTIO_GSI[..n].contains(gsi));
            assert!(*gsi < 24 && ![0, 1, 2, SERIAL_GSI, VMGENID_GSI, 13].contains(gsi));
        }
        assert_eq!(virtio_slot(3), Some(VirtioSlot { base: 0xd000_3000, gsi: 9 }));
        assert_eq!(virtio_slot(VIRTIO_GSI.len()), None);
    }

    #[test]
    fn command_line_words() {
        let slots: Vec<_> = (0..2).filter_map(virtio_slot).collect();
        assert_eq!(
            cmdline_words(&slots),
            "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"
        );
        assert_eq!(cmdline_words(&[]), "");
    }

    #[test]
    fn only_s5_with_the_enable_bit_powers_off() {
        assert!(is_power_off(0x34));
        assert!(!is_power_off(0x14)); // type without enable
        assert!(!is_power_off(0x24)); // another sleep type
        assert!(!is_power_off(0x00));
    }
}
