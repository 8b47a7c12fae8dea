//! The ends of the guest.

use core::fmt::Arguments;
use core::panic::PanicInfo;

use crate::arch::{cpu, tables};

/// Ends the guest: `reset` (or nothing) by the keyboard controller, `acpi` by the power-off of the
/// hardware-reduced sleep register, `triple` by a triple fault, `none` not at all.
pub fn end(how: Option<&str>) -> ! {
    match how.unwrap_or("reset") {
        "acpi" => {
            const SLEEP_CONTROL: u16 = 0x600;
            const SLEEP_TYPE_5_ENABLE: u8 = 5 << 2 | 1 << 5;
            cpu::out8(SLEEP_CONTROL, SLEEP_TYPE_5_ENABLE);
        }
        "triple" => {}
        "none" => loop {
            cpu::wait_for_interrupt();
        },
        _ => cpu::out8(0x64, 0xfe),
    }
    // Not every machine has the asked-for way out; a triple fault ends them all. The wait is for
    // monitors that act on the first request while the vCPU runs on.
    let begin = cpu::cycles();
    while how != Some("triple") && cpu::cycles().wrapping_sub(begin) < 500_000_000 {}
    tables::drop_gates();
    cpu::undefined_instruction()
}

/// Reports a failure and ends the guest.
pub fn fail(reason: Arguments<'_>) -> ! {
    say!("\nFAIL: {reason}");
    end(None)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    match info.location() {
        Some(place) => fail(format_args!("{} ({}:{})", info.message(), place.file(), place.line())),
        None => fail(format_args!("{}", info.message())),
    }
}
