//! A bare-metal guest that tests a virtual machine monitor from the inside.
//!
//! It boots by the 64-bit Linux protocol or by PVH, leaves privilege level 0 at once (see
//! [`arch::entry`]), says `cellblock guest` on COM1, and then does what its command line asks for:
//!
//! | `mode=` | does | options (default) |
//! |---|---|---|
//! | `hello` | nothing more | |
//! | `echo` | gives console input back, until `quit` | `irq` `open` (a disk: `disk=` `qd=` `queues=`) |
//! | `print` | prints numbered lines, or always the same, as fast as it can, and ends | `lines=` (1000) `line=TEXT` |
//! | `uart` | the other vCPUs each print their letter `n=` times (`b` for vCPU 1), the first meanwhile checks that registers keep what it writes | `cpus=` `n=` (1000) |
//! | `smp` | starts the other vCPUs and counts them | `cpus=` (1) |
//! | `blk` | writes, reads back and checks a disk | `disk=` (0) `qd=` (1) `mib=` (4) `sectors=` (8) `segments=` (1) `irq` `indirect` `event-idx` `queues=` (1) `keep` `seed=` (1) `rounds=` (1) |
//! | `blk-errors` | requests a disk must refuse, one by one | `disk=` `irq` |
//! | `blk-features` | discards and zeroes ranges of a disk of at least 4 MiB, turns its cache off and on | `disk=` `irq` `indirect` |
//! | `bench-blk` | measures random requests | `disk=` `op=read\|write` (read) `qd=` (1) `n=` (10000) `sectors=` (8) `mib=` (all) `indirect` `event-idx` `queues=` (1) |
//! | `bench-plan` | measures a list of requests, each for a time | `plan=OP:SECTORS:DEPTH,...` (`read:8:1`) `cycles=` (200000000) `disk=` `irq` `indirect` `event-idx` `queues=`, and the largest `qd=` and `sectors=` of the list |
//! | `storm` | random requests whose blocks say what they are, then reads all back | `disk=` `n=` (10000) `qd=` (1) `mib=` (16) `sectors=` (8) `reads=` (0, percent) `flush=` (0: none) `clear=` (0: none) `cache=off` `errors` `resets=` (0) `idle` `quit` `irq` `indirect` `event-idx` `queues=` (1) `seed=` (1) |
//! | `pause` | block and console I/O while all vCPUs count; nothing may step back | `cpus=` `count=` (0: until `q`) `every=` (1000) `irq` `heartbeat` `port=` |
//! | `spin` | every vCPU spins until `q` | `cpus=` |
//! | `halt` | every vCPU halts until `q` | `cpus=` |
//! | `touch` | writes and checks memory | `mib=` (16) `high` |
//! | `clone` | stops for a snapshot; whoever goes on from it says who it is and writes that everywhere, then commands: `c` `s` `m` `q` | `mib=` (1) `blocks=` (64) |
//! | `snap` | prints dots and does as it is told, to be measured: `t` touches 64 MiB, `w` writes 1 MiB, `q` | `touch=` (16, MiB) |
//! | `vector` | keeps values in all registers of AVX, SSE and x87, for a while each round | `every=` (20) `spins=` (1000000) |
//! | `demo` | a short tour, then commands: `t` `w` `q` | `mib=` (8) |
//!
//! Words for every mode: `marks=1,3` writes these bytes to the readiness port before the mode
//! begins; `last=TEXT` is printed, and `last-mark=5` written to that port, as the very last thing of
//! a mode that succeeds; `exit=reset|acpi|triple|none` chooses how the guest ends (reset). Disks
//! are found by `virtio_mmio.device=SIZE@ADDRESS:LINE` words. The last line of a successful run is
//! else `MODE: ok`; anything that goes wrong prints `FAIL: ` and the reason, and ends the guest the
//! same way.
#![no_std]
#![no_main]

mod arch;
mod boot;
mod clock;
mod cmdline;
#[macro_use]
mod console;
mod exit;
mod heap;
mod mem;
mod modes;
mod pattern;
mod random;
mod virtio;

/// Rust's beginning: level 3, vCPU 0, interrupts on with nothing routed.
#[allow(unsafe_code)] // called by name from assembly
#[unsafe(no_mangle)]
extern "C" fn boot_main(info: u64, protocol: u32) -> ! {
    // First of all, because the time to this line is what start-up benchmarks measure.
    console::write(b"cellblock guest\n");
    let boot = boot::read(info, protocol);
    modes::run(&boot);
    exit::end(boot.cmdline.get("exit"))
}
