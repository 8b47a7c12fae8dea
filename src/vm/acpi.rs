//! ACPI tables: how an unmodified kernel finds processors, the console, virtio
//! devices, and the way to power off.
//!
//! The platform is hardware-reduced (ACPI 6.5, 4.1): no fixed power-management
//! hardware to emulate. Power-off is a write to the sleep control register, reset
//! one to the reset register; `layout` has the ports and values. There is no
//! keyboard, VGA or CMOS clock to probe for, and the tables say so.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::layout::{
    ACPI_START, I8042_COMMAND_PORT, IOAPIC, LAPIC, RESET_VALUE, SERIAL_GSI, SERIAL_PORT,
    SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_S5, VIRTIO_GSI, VIRTIO_MMIO_SIZE, VMGENID,
    VMGENID_GSI, VirtioSlot,
};
use super::memory::{GuestRam, MemoryError};

const OEM: [u8; 6] = *b"CELBLK";
const OEM_TABLE: [u8; 8] = *b"CELLBLOK";
const OEM_REVISION: u32 = 1;

/// Tables that could not be placed.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More virtio devices than there are slots.
    #[error("{0} virtio devices are too many: give {most} at most", most = VIRTIO_GSI.len())]
    TooManyDevices(usize),
    /// Writing them failed.
    #[error("writing ACPI tables")]
    Write(#[source] MemoryError),
}

/// Writes the tables for a machine with these vCPUs and virtio-mmio devices, and
/// returns the address of the RSDP.
pub fn write(ram: &GuestRam, cpus: u8, virtio: &[VirtioSlot]) -> Result<u64, AcpiError> {
    if virtio.len() > VIRTIO_GSI.len() {
        return Err(AcpiError::TooManyDevices(virtio.len()));
    }
    ram.write(ACPI_START, &tables(ACPI_START, cpus, virtio)).map_err(AcpiError::Write)?;
    Ok(ACPI_START)
}

/// All tables as one block for address `base`, the RSDP first.
fn tables(base: u64, cpus: u8, virtio: &[VirtioSlot]) -> Vec<u8> {
    const ALIGN: usize = 16;
    let mut block = vec![0; Rsdp::len().next_multiple_of(ALIGN)];
    let mut add = |table: &dyn Aml| {
        let address = base + block.len() as u64;
        table.to_aml_bytes(&mut block);
        block.resize(block.len().next_multiple_of(ALIGN), 0);
        address
    };
    let dsdt = add(&dsdt(cpus, virtio));
    let fadt = add(&fadt(dsdt));
    let madt = add(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    block[..rsdp.len()].copy_from_slice(&rsdp);
    block
}

fn fadt(dsdt: u64) -> impl Aml {
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;
    let register =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton) // a control method button, of which there is none
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = register(I8042_COMMAND_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = register(SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let lapic = LocalInterruptController::Address(LAPIC as u32);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, lapic);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // KVM's IOAPIC has id 0 and pins 0 to 23 as GSIs 0 to 23, without overrides.
    madt.add_structure(IoApic::new(0, IOAPIC as u32, 0));
    madt
}

fn dsdt(cpus: u8, virtio: &[VirtioSlot]) -> Sdt {
    let mut body = Vec::new();
    let sleep = Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8]);
    Name::new(Path::new("_S5_"), &sleep).to_aml_bytes(&mut body);
    let mut devices = Devices(Vec::new());
    for id in 0..cpus {
        devices.processor(id);
    }
    devices.serial();
    devices.generation_id();
    devices.events();
    for (n, slot) in virtio.iter().enumerate() {
        devices.virtio(n, slot);
    }
    let scope = Scope::raw(Path::new("_SB_"), devices.0);
    body.extend_from_slice(&scope);

    const HEADER: u32 = 36;
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// The contents of `\_SB_`.
struct Devices(Vec<u8>);

impl AmlSink for Devices {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

impl Devices {
    fn processor(&mut self, id: u8) {
        let hid = Name::new(Path::new("_HID"), &"ACPI0007");
        let uid = Name::new(Path::new("_UID"), &id);
        Device::new(Path::new(&format!("C{id:03}")), vec![&hid, &uid]).to_aml_bytes(self);
    }

    fn serial(&mut self) {
        let hid = Name::new(Path::new("_HID"), &EISAName::new("PNP0501"));
        let uid = Name::new(Path::new("_UID"), &0u8);
        let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8);
        let interrupt = edge(SERIAL_GSI);
        let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
        let crs = Name::new(Path::new("_CRS"), &resources);
        Device::new(Path::new("COM1"), vec![&hid, &uid, &crs]).to_aml_bytes(self);
    }

    /// The VM generation id: where it is, for the driver that every system has for it.
    fn generation_id(&mut self) {
        let hid = Name::new(Path::new("_HID"), &"CLBK0001");
        let cid = Name::new(Path::new("_CID"), &"VM_Gen_Counter");
        let ddn = Name::new(Path::new("_DDN"), &"VM_Gen_Counter");
        let (low, high) = (VMGENID as u32, (VMGENID >> 32) as u32);
        let address = Package::new(vec![&low, &high]);
        let address = Name::new(Path::new("ADDR"), &address);
        Device::new(Path::new("VGEN"), vec![&hid, &cid, &ddn, &address]).to_aml_bytes(self);
    }

    /// The generic event device: without general-purpose events, which a hardware-reduced
    /// machine has none of, it is what turns an interrupt into a notification.
    fn events(&mut self) {
        let hid = Name::new(Path::new("_HID"), &"ACPI0013");
        let uid = Name::new(Path::new("_UID"), &0u8);
        let interrupt = edge(VMGENID_GSI);
        let resources = ResourceTemplate::new(vec![&interrupt]);
        let crs = Name::new(Path::new("_CRS"), &resources);
        let changed = Path::new("\\_SB_.VGEN");
        let notify = Notify::new(&changed, &0x80u8);
        let is_ours = Equal::new(&Arg(0), &VMGENID_GSI);
        let when = If::new(&is_ours, vec![&notify]);
        let event = Method::new(Path::new("_EVT"), 1, true, vec![&when]);
        Device::new(Path::new("GED0"), vec![&hid, &uid, &crs, &event]).to_aml_bytes(self);
    }

    fn virtio(&mut self, n: usize, slot: &VirtioSlot) {
        let hid = Name::new(Path::new("_HID"), &"LNRO0005");
        let uid = Name::new(Path::new("_UID"), &n);
        let registers = Memory32Fixed::new(true, slot.base as u32, VIRTIO_MMIO_SIZE as u32);
        let interrupt = edge(slot.gsi);
        let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
        let crs = Name::new(Path::new("_CRS"), &resources);
        Device::new(Path::new(&format!("V{n:03}")), vec![&hid, &uid, &crs]).to_aml_bytes(self);
    }
}

/// A consumed, edge-triggered, active-high, exclusive interrupt: what an irqfd is.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::layout::{ACPI_END, virtio_slot};

    struct Block {
        base: u64,
        bytes: Vec<u8>,
    }

    impl Block {
        fn new(cpus: u8, virtio: usize) -> Block {
            let slots: Vec<_> = (0..virtio).filter_map(virtio_slot).collect();
            Block { base: ACPI_START, bytes: tables(ACPI_START, cpus, &slots) }
        }

        fn u64(&self, address: u64) -> u64 {
            u64::from_le_bytes(self.at(address, 8).try_into().unwrap())
        }

        fn at(&self, address: u64, len: usize) -> &[u8] {
            &self.bytes[(address - self.base) as usize..][..len]
        }

        fn table(&self, address: u64, signature: &[u8; 4]) -> &[u8] {
            let len = u32::from_le_bytes(self.at(address + 4, 4).try_into().unwrap()) as usize;
            let table = self.at(address, len);
            assert_eq!(&table[..4], signature);
            assert_eq!(sum(table), 0, "checksum of {}", signature.escape_ascii());
            table
        }

        fn xsdt_entry(&self, n: u64) -> u64 {
            self.u64(self.u64(self.base + 24) + 36 + 8 * n)
        }

        fn dsdt(&self) -> &[u8] {
            let dsdt = self.u64(self.xsdt_entry(0) + 140);
            self.table(dsdt, b"DSDT")
        }
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn count(haystack: &[u8], needle: &[u8]) -> usize {
        haystack.windows(needle.len()).filter(|w| *w == needle).count()
    }

    #[test]
    fn tables_are_linked_and_sum_to_zero() {
        let block = Block::new(4, 2);
        assert_eq!(block.at(ACPI_START, 8), b"RSD PTR ");
        assert_eq!(sum(block.at(ACPI_START, 20)), 0);
        assert_eq!(sum(block.at(ACPI_START, 36)), 0);
        let xsdt = block.table(block.u64(ACPI_START + 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        block.table(block.xsdt_entry(0), b"FACP");
        block.table(block.xsdt_entry(1), b"APIC");
        block.dsdt();
    }

    #[test]
    fn fadt_names_the_power_registers() {
        let block = Block::new(1, 0);
        let fadt = block.table(block.xsdt_entry(0), b"FACP");
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        // Offsets from ACPI 6.5, table 5.9; a GAS is space, width, offset, access, address.
        let gas = |offset: usize, port: u16| {
            assert_eq!(fadt[offset..offset + 4], [1, 8, 0, 1]);
            assert_eq!(fadt[offset + 4..offset + 12], u64::from(port).to_le_bytes());
        };
        gas(116, I8042_COMMAND_PORT);
        assert_eq!(fadt[128], RESET_VALUE);
        gas(244, SLEEP_CONTROL_PORT);
        gas(256, SLEEP_STATUS_PORT);
    }

    #[test]
    fn madt_lists_every_cpu_and_the_ioapic() {
        let block = Block::new(32, 0);
        let madt = block.table(block.xsdt_entry(1), b"APIC");
        assert_eq!(madt[36..40], (LAPIC as u32).to_le_bytes());
        for id in 0..32u8 {
            let entry = &madt[44 + usize::from(id) * 8..][..8];
            assert_eq!(entry, [0, 8, id, id, 1, 0, 0, 0]);
        }
        assert_eq!(madt[44 + 32 * 8..], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    }

    #[test]
    fn dsdt_describes_every_device() {
        let block = Block::new(3, 17);
        let dsdt = block.dsdt();
        assert_eq!(count(dsdt, b"ACPI0007\0"), 3);
        assert_eq!(count(dsdt, b"LNRO0005\0"), 17);
        assert_eq!(count(dsdt, b"COM1"), 1);
        // _S5_ = Package (4) { 5, 0, 0, 0 }
        assert_eq!(count(dsdt, b"\x08_S5_\x12\x07\x04\x0a\x05\x00\x00\x00"), 1);
        for n in 0..17 {
            let slot = virtio_slot(n).unwrap();
            // Memory32Fixed (ReadWrite), then Interrupt (Consumer, Edge, ActiveHigh, Exclusive)
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend_from_slice(&(slot.base as u32).to_le_bytes());
            resources.extend_from_slice(&(VIRTIO_MMIO_SIZE as u32).to_le_bytes());
            resources.extend_from_slice(&[0x89, 6, 0, 3, 1]);
            resources.extend_from_slice(&slot.gsi.to_le_bytes());
            assert_eq!(count(dsdt, &resources), 1, "slot {n}");
        }
    }

    #[test]
    fn the_generation_id_has_a_place_and_an_event() {
        let block = Block::new(1, 1);
        let dsdt = block.dsdt();
        assert_eq!(count(dsdt, b"\x08_CID\x0dVM_Gen_Counter\0"), 1);
        // ADDR = Package (2) { 0x000f0000, 0 }
        assert_eq!(count(dsdt, b"\x08ADDR\x12\x08\x02\x0c\x00\x00\x0f\x00\x00"), 1);
        // The event device's interrupt: Consumer, Edge, ActiveHigh, Exclusive.
        let mut interrupt = vec![0x89, 6, 0, 3, 1];
        interrupt.extend_from_slice(&VMGENID_GSI.to_le_bytes());
        assert_eq!(count(dsdt, &interrupt), 1);
        assert_eq!(count(dsdt, b"\x08_HID\x0dACPI0013\0"), 1);
        // _EVT (1, Serialized) { If (Arg0 == 8) { Notify (\_SB_.VGEN, 0x80) } }
        let event = b"_EVT\x09\xa0\x12\x93\x68\x0a\x08\x86\\\x2e_SB_VGEN\x0a\x80";
        assert_eq!(count(dsdt, event), 1, "{}", dsdt.escape_ascii());
    }

    #[test]
    fn the_largest_machine_fits_and_a_larger_is_refused() {
        let mut slots: Vec<_> = (0..17).filter_map(virtio_slot).collect();
        let len = tables(ACPI_START, u8::MAX, &slots).len() as u64;
        assert!(len < ACPI_END - ACPI_START, "{len} bytes");
        slots.push(slots[0]);
        let ram = GuestRam::new(32 << 20).unwrap();
        assert_eq!(write(&ram, 1, &slots[..17]).unwrap(), ACPI_START);
        let refused = write(&ram, 1, &slots).unwrap_err().to_string();
        assert_eq!(refused, "18 virtio devices are too many: give 17 at most");
    }
}
