//! The descriptor tables and page tables the processor walks, computed at build time.
//!
//! Code at privilege level 0 may be emulated one instruction at a time (a host without hardware
//! virtualisation), so the guest arrives with its tables ready made and spends a few dozen
//! instructions on loading them. Layouts: AMD64 Architecture Programmer's Manual, volume 2,
//! chapters 4, 5, 8 and 12.
#![allow(unsafe_code)] // link sections at fixed addresses, and statics the processor itself writes

use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::AtomicU64;

/// Most vCPUs the guest has descriptors for.
pub const MAX_CPUS: usize = 32;
/// Interrupt and exception vectors with a gate: 32 exceptions, then one per IOAPIC pin, then ours.
pub const VECTORS: usize = 64;
/// First vector given to an IOAPIC pin; pin n has `IRQ_BASE + n`.
pub const IRQ_BASE: u8 = 32;
/// Vector of the local APIC's timer.
pub const TIMER_VECTOR: u8 = 0x3e;
/// Vector of spurious local APIC interrupts.
pub const SPURIOUS_VECTOR: u8 = 0x3f;

/// Where the linker script puts [`Tables`].
pub const TABLES_AT: u64 = 0x10_0000;
/// Where the linker script puts [`Machine`].
pub const MACHINE_AT: u64 = 0x12_0000;
/// Where the linker script puts the gates' code, [`VECTOR_STRIDE`] bytes each.
pub const VECTORS_AT: u64 = 0x10_6000;
/// Bytes of code per gate.
pub const VECTOR_STRIDE: u64 = 32;

/// Selector of 64-bit code at level 0.
pub const KERNEL_CODE: u16 = 0x08;
/// Selector of data at level 3, with its requested privilege level.
pub const USER_DATA: u16 = 0x1b;
/// Selector of 64-bit code at level 3, with its requested privilege level.
pub const USER_CODE: u16 = 0x23;
/// Selector of vCPU 0's task state; vCPU n's is 16 n further.
pub const TSS_SELECTOR: u16 = 0x30;

/// A second view of the fourth gigabyte at the top of the address space, so that a gate can reach
/// the local APIC with a sign-extended 32-bit displacement and needs no register.
pub const HIGH_ALIAS: u64 = 0xffff_ffff_0000_0000;

const PRESENT_WRITE_USER: u64 = 0b111;
// Set beforehand, so that the page walker has nothing to write back.
const ACCESSED_DIRTY: u64 = 0b110_0000;
const LARGE: u64 = 1 << 7;
const GIB: u64 = 1 << 30;

/// Bytes of a task state segment proper.
const TSS_BYTES: usize = 0x68;
/// One bit per port, and the byte of ones the processor may read past the end.
const IO_BITMAP_BYTES: usize = 8192 + 1;
/// Stack of a vCPU's gates: enough for the frame of a trap and of an interrupt taken inside it.
pub const KERNEL_STACK_BYTES: usize = 512;

/// Tables with contents. Writable: the processor marks task states busy.
#[repr(C, align(4096))]
pub struct Tables {
    pml4: [u64; 512],
    pdpt: [u64; 512],
    directories: [[u64; 512]; 2],
    idt: [[u64; 2]; VECTORS],
    gdt: [u64; 6 + 2 * MAX_CPUS],
}

/// State the processor uses that starts as zeros, and so takes no room in the file.
///
/// All task states share one bitmap behind them: clear bits open every port to level 3. (The I/O
/// privilege level would be simpler, but an emulated `iretq` drops it.)
#[repr(C, align(16))]
pub struct Machine {
    kernel_stacks: [[u8; KERNEL_STACK_BYTES]; MAX_CPUS],
    task_states: [[u8; TSS_BYTES]; MAX_CPUS],
    io_bitmap: [u8; IO_BITMAP_BYTES],
}

/// A table at a fixed address that the processor reads and writes behind the compiler's back.
#[repr(transparent)]
pub struct Shared<T>(UnsafeCell<T>);

// SAFETY: the processor is the only user of the contents after start-up, and start-up writes each
// vCPU's part before that vCPU runs.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The contents' address.
    pub const fn get(&self) -> *mut T {
        self.0.get()
    }
}

#[unsafe(link_section = ".tables")]
#[used]
static TABLES: Shared<Tables> = Shared(UnsafeCell::new(Tables::build()));

// Used by the processor alone, through the descriptors.
#[unsafe(link_section = ".bss.machine")]
#[used]
static MACHINE: Shared<Machine> = Shared(UnsafeCell::new(Machine {
    kernel_stacks: [[0; KERNEL_STACK_BYTES]; MAX_CPUS],
    task_states: [[0; TSS_BYTES]; MAX_CPUS],
    io_bitmap: [0; IO_BITMAP_BYTES],
}));

/// How often each vector was taken. Written by the gates; vectors are routed to vCPU 0 only.
#[unsafe(no_mangle)]
pub static VECTOR_COUNTS: [AtomicU64; VECTORS] = [const { AtomicU64::new(0) }; VECTORS];

/// Address of the top page table.
pub const PML4_AT: u64 = TABLES_AT + offset_of!(Tables, pml4) as u64;
/// Address of the interrupt descriptor table.
pub const IDT_AT: u64 = TABLES_AT + offset_of!(Tables, idt) as u64;
/// Address of the global descriptor table.
pub const GDT_AT: u64 = TABLES_AT + offset_of!(Tables, gdt) as u64;
/// Limit of the interrupt descriptor table.
pub const IDT_LIMIT: u16 = (VECTORS * 16 - 1) as u16;
/// Limit of the global descriptor table.
pub const GDT_LIMIT: u16 = (size_of::<[u64; 6 + 2 * MAX_CPUS]>() - 1) as u16;

impl Tables {
    const fn build() -> Self {
        let pdpt_at = TABLES_AT + offset_of!(Tables, pdpt) as u64;
        let low_at = TABLES_AT + offset_of!(Tables, directories) as u64;
        let device_at = low_at + 4096;
        let table = PRESENT_WRITE_USER | ACCESSED_DIRTY;

        let mut tables = Self {
            pml4: [0; 512],
            pdpt: [0; 512],
            directories: [[0; 512]; 2],
            idt: [[0; 2]; VECTORS],
            gdt: [0; 6 + 2 * MAX_CPUS],
        };
        tables.pml4[0] = pdpt_at | table;
        tables.pml4[511] = pdpt_at | table;
        // The first gigabyte is memory, the fourth has the devices; others come on demand.
        tables.pdpt[0] = low_at | table;
        tables.pdpt[3] = device_at | table;
        tables.pdpt[511] = device_at | table;
        let mut i = 0;
        while i < 512 {
            tables.directories[0][i] = large_page((i as u64) << 21);
            tables.directories[1][i] = large_page(3 * GIB + ((i as u64) << 21));
            i += 1;
        }
        let mut vector = 0;
        while vector < VECTORS {
            tables.idt[vector] = gate(VECTORS_AT + vector as u64 * VECTOR_STRIDE);
            vector += 1;
        }
        tables.gdt[1] = 0x00af_9b00_0000_ffff; // 64-bit code, level 0
        tables.gdt[2] = 0x00cf_9300_0000_ffff; // data, level 0
        tables.gdt[3] = 0x00cf_f300_0000_ffff; // data, level 3
        tables.gdt[4] = 0x00af_fb00_0000_ffff; // 64-bit code, level 3
        let mut cpu = 0;
        while cpu < MAX_CPUS {
            let [low, high] = task_descriptor(cpu);
            tables.gdt[6 + 2 * cpu] = low;
            tables.gdt[7 + 2 * cpu] = high;
            cpu += 1;
        }
        tables
    }
}

const fn large_page(address: u64) -> u64 {
    address | PRESENT_WRITE_USER | ACCESSED_DIRTY | LARGE
}

/// An interrupt gate (interrupts off inside) to level 0.
const fn gate(handler: u64) -> [u64; 2] {
    let attributes = 0x8e00 << 32;
    let low = (handler & 0xffff) | (KERNEL_CODE as u64) << 16 | attributes;
    [low | (handler >> 16 & 0xffff) << 48, handler >> 32]
}

/// The descriptor of a vCPU's task state: its limit takes in the bitmap they all share.
const fn task_descriptor(cpu: usize) -> [u64; 2] {
    let base = task_state_at(cpu);
    let limit = (bitmap_offset(cpu) as usize + IO_BITMAP_BYTES - 1) as u64;
    let available_task = 0x89 << 40;
    let low = limit | (base & 0xff_ffff) << 16 | available_task | (base >> 24 & 0xff) << 56;
    [low, base >> 32]
}

/// Address of a vCPU's task state.
pub const fn task_state_at(cpu: usize) -> u64 {
    MACHINE_AT + (offset_of!(Machine, task_states) + cpu * TSS_BYTES) as u64
}

/// Where the port bitmap is, seen from a vCPU's task state.
pub const fn bitmap_offset(cpu: usize) -> u16 {
    ((MAX_CPUS - cpu) * TSS_BYTES) as u16
}

/// The top of the stack a vCPU's gates run on.
pub const fn kernel_stack_top(cpu: usize) -> u64 {
    MACHINE_AT + ((cpu + 1) * KERNEL_STACK_BYTES) as u64
}

/// Fills in the task state of a vCPU that has not started. (The boot vCPU's is written by the
/// entry code.)
pub fn prepare_task_state(cpu: usize) {
    let state = task_state_at(cpu) as *mut u8;
    // SAFETY: inside MACHINE for every vCPU below MAX_CPUS, and nobody uses it before the vCPU runs.
    unsafe {
        state.add(4).cast::<u64>().write_unaligned(kernel_stack_top(cpu));
        state.add(0x66).cast::<u16>().write_unaligned(bitmap_offset(cpu));
    }
}

/// Makes a further gigabyte of addresses usable, identity-mapped with large pages.
///
/// `directory` becomes a page table and must stay one; it is 4 KiB aligned. Level 3 may write the
/// tables because it sees all memory; a new entry needs no invalidation.
pub fn map_gigabyte(index: usize, directory: &'static mut [u64; 512]) {
    assert!(index < 511, "only the first half terabyte can be mapped");
    for (i, entry) in directory.iter_mut().enumerate() {
        *entry = large_page(index as u64 * GIB + ((i as u64) << 21));
    }
    let entry = directory.as_ptr() as u64 | PRESENT_WRITE_USER | ACCESSED_DIRTY;
    // SAFETY: the tables are ours; a page walk sees either the old or the new 64-bit entry.
    unsafe { (&raw mut (*TABLES.get()).pdpt[index]).write_volatile(entry) };
}

/// Whether the given gigabyte of addresses is mapped.
pub fn is_mapped(index: usize) -> bool {
    // SAFETY: as above; a plain read of our own table.
    unsafe { (&raw const (*TABLES.get()).pdpt[index]).read_volatile() != 0 }
}

/// Takes every gate away, so that the next exception is a triple fault, which resets the machine.
pub fn drop_gates() {
    // SAFETY: the table is ours. The caller wants the machine gone.
    unsafe { (&raw mut (*TABLES.get()).idt).write_bytes(0, 1) };
}

const _: () = {
    assert!(size_of::<Tables>() <= (VECTORS_AT - TABLES_AT) as usize, "tables overlap the gates");
    assert!(offset_of!(Machine, kernel_stacks) == 0, "stacks come first, so that they are aligned");
    assert!(
        offset_of!(Machine, io_bitmap)
            == offset_of!(Machine, task_states) + size_of::<[[u8; TSS_BYTES]; MAX_CPUS]>(),
        "the bitmap follows the task states"
    );
};
