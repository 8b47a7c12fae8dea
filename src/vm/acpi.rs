//! ACPI tables, as far as an unmodified kernel needs them to find its CPUs, the
//! I/O APIC, COM1 and the virtio devices, and to switch itself off.
//!
//! The platform is hardware-reduced (ACPI 6.5 section 4.1): no PM timer, no PM1
//! registers; power-off goes through the sleep control register, reset through the
//! reset register, which is the keyboard controller's.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{self, VirtioSlot};
use super::memory::GuestRam;
use crate::transport::mmio::WINDOW;

/// SLP_EN of the sleep control register: carry the transition out.
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// SLP_TYP that means soft-off here (`\_S5`); bits 2 to 4 of the register.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// What resets the machine when written to the keyboard controller's command port.
pub const RESET_VALUE: u8 = 0xfe;

/// Where the tables are: an area that firmware uses, reserved in the memory map.
pub const START: u64 = 0xe_0000;
/// End of that area.
pub const END: u64 = 0x10_0000;

const OEM: [u8; 6] = *b"CELLBL";
const OEM_TABLE: [u8; 8] = *b"CELLBLCK";
const OEM_REVISION: u32 = 1;

/// Tables that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They do not fit into their area.
    #[error("the ACPI tables need {0} bytes where {max} are reserved", max = END - START)]
    TooLarge(u64),
    /// Guest memory.
    #[error("writing the ACPI tables")]
    Write(#[source] GuestMemoryError),
}

/// Writes the tables for `cpus` vCPUs and the devices at `virtio`; returns the
/// address of the root pointer (RSDP).
///
/// # Errors
/// Guest memory that ends before the tables' area.
pub fn write(ram: &GuestRam, cpus: u8, virtio: &[VirtioSlot]) -> Result<u64, AcpiError> {
    let mut area = Area { next: START + Rsdp::len().next_multiple_of(16) as u64, ram };
    let dsdt = area.put(&dsdt(cpus, virtio))?;
    let fadt = area.put(&bytes(&fadt(dsdt)))?;
    let madt = area.put(&bytes(&madt(cpus)))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.put(&bytes(&xsdt))?;
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    ram.memory().write_slice(&rsdp, GuestAddress(START)).map_err(AcpiError::Write)?;
    Ok(START)
}

struct Area<'a> {
    next: u64,
    ram: &'a GuestRam,
}

impl Area<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let at = self.next;
        self.next += table.len().next_multiple_of(16) as u64;
        if self.next > END {
            return Err(AcpiError::TooLarge(self.next - START));
        }
        self.ram.memory().write_slice(table, GuestAddress(at)).map_err(AcpiError::Write)?;
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    /// No VGA, no CMOS clock; and, by their absence, no legacy devices, no 8042 to probe.
    const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        // No button devices are described, so neither button is fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::I8042_PORT + 4);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_PORT + 1);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let lapic = LocalInterruptController::Address(layout::LAPIC as u32);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, lapic);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(cpus, layout::IOAPIC as u32, 0));
    madt
}

fn dsdt(cpus: u8, virtio: &[VirtioSlot]) -> Vec<u8> {
    let mut body = Vec::new();
    for cpu in 0..cpus {
        let hid = Name::new("_HID".into(), &"ACPI0007");
        let uid = Name::new("_UID".into(), &cpu);
        scope(&mut body, &Device::new(name('C', cpu).as_str().into(), vec![&hid, &uid]));
    }
    com1(&mut body);
    for (n, slot) in virtio.iter().enumerate() {
        virtio_device(&mut body, n as u8, slot);
    }
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_OFF])).to_aml_bytes(&mut body);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt.as_slice().to_vec()
}

/// Devices belong below `\_SB_`; a scope may be opened as often as one likes.
fn scope(body: &mut Vec<u8>, device: &dyn Aml) {
    Scope::new(Path::new("\\_SB_"), vec![device]).to_aml_bytes(body);
}

fn name(letter: char, n: u8) -> String {
    format!("{letter}{n:03X}")
}

/// The interrupt of an irqfd without resampling: a pulse.
fn edge(gsi: u32) -> Interrupt {
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge, active_low, shared, gsi)
}

fn com1(body: &mut Vec<u8>) {
    let base = layout::SERIAL_PORT as u16;
    let io = IO::new(base, base, 1, 8);
    let line = edge(layout::SERIAL_GSI);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &aml::ZERO);
    let resources = ResourceTemplate::new(vec![&io, &line]);
    let crs = Name::new("_CRS".into(), &resources);
    scope(body, &Device::new("COM1".into(), vec![&hid, &uid, &crs]));
}

fn virtio_device(body: &mut Vec<u8>, n: u8, slot: &VirtioSlot) {
    let window = Memory32Fixed::new(true, slot.base as u32, WINDOW as u32);
    let line = edge(slot.gsi);
    let hid = Name::new("_HID".into(), &"LNRO0005");
    let uid = Name::new("_UID".into(), &n);
    let resources = ResourceTemplate::new(vec![&window, &line]);
    let crs = Name::new("_CRS".into(), &resources);
    scope(body, &Device::new(name('V', n).as_str().into(), vec![&hid, &uid, &crs]));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(cpus: u8, devices: usize) -> (GuestRam, u64) {
        let ram = GuestRam::new(32 << 20).expect("ram");
        let slots: Vec<_> = (0..devices).map(layout::virtio_slot).collect();
        let rsdp = write(&ram, cpus, &slots).expect("tables");
        (ram, rsdp)
    }

    fn read(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.memory().read_slice(&mut bytes, GuestAddress(at)).expect("in memory");
        bytes
    }

    fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
        let len = u32::from_le_bytes(read(ram, at + 4, 4).try_into().expect("four"));
        let bytes = read(ram, at, len as usize);
        assert_eq!(bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum");
        bytes
    }

    fn address(bytes: &[u8]) -> u64 {
        u64::from_le_bytes(bytes[..8].try_into().expect("eight"))
    }

    #[test]
    fn a_kernel_finds_every_table_from_the_root() {
        let (ram, rsdp) = tables(4, 2);
        let root = read(&ram, rsdp, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!(root.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        let xsdt = table(&ram, address(&root[24..]));
        assert_eq!(&xsdt[..4], b"XSDT");
        let [fadt, madt] = [36, 44].map(|at| table(&ram, address(&xsdt[at..])));
        assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
        let dsdt = table(&ram, address(&fadt[140..]));
        assert_eq!(&dsdt[..4], b"DSDT");
        let has = |text: &[u8]| dsdt.windows(text.len()).any(|w| w == text);
        assert!(has(b"LNRO0005") && has(b"V001") && !has(b"V002") && has(b"COM1") && has(b"C003"));
    }

    #[test]
    fn every_cpu_and_the_io_apic_are_listed_once() {
        let (ram, rsdp) = tables(64, 0);
        let xsdt = table(&ram, address(&read(&ram, rsdp + 24, 8)));
        let madt = table(&ram, address(&xsdt[44..]));
        let mut at = 44;
        let (mut cpus, mut io_apics) = (Vec::new(), 0);
        while at < madt.len() {
            match madt[at] {
                0 => cpus.push(madt[at + 3]),
                1 => io_apics += 1,
                kind => panic!("unexpected entry {kind}"),
            }
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(cpus, (0..64).collect::<Vec<u8>>());
        assert_eq!(io_apics, 1);
    }

    #[test]
    fn the_most_there_can_be_fits() {
        tables(u8::MAX, layout::VIRTIO_SLOTS);
    }

    #[test]
    fn power_off_and_reset_registers_are_described() {
        let (ram, rsdp) = tables(1, 0);
        let xsdt = table(&ram, address(&read(&ram, rsdp + 24, 8)));
        let fadt = table(&ram, address(&xsdt[36..]));
        // ACPI 6.5 table 5.9: RESET_REG at 116, RESET_VALUE at 128, SLEEP_CONTROL_REG at 244.
        assert_eq!((fadt[116], address(&fadt[120..]), fadt[128]), (1, 0x64, 0xfe));
        assert_eq!((fadt[244], address(&fadt[248..])), (1, layout::SLEEP_PORT));
    }
}
