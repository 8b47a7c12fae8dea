//! What the guest does, one module per mode. The table is in the crate's documentation.

mod bench;
mod bench_plan;
mod blk;
mod blk_errors;
mod blk_features;
mod clone;
mod demo;
mod echo;
mod idle;
mod pause;
mod print;
mod snap;
mod storm;
mod touch;
mod uart;
mod vector;

use crate::arch::{cpu, smp};
use crate::boot::Boot;
use crate::heap::Heap;

const READINESS_PORT: u16 = 0xcb0;
/// The byte that says: still well.
const HEARTBEAT: u8 = 1;

/// Runs the mode the command line asks for, and prints its last line.
pub fn run(boot: &Boot) {
    let mode = boot.cmdline.get("mode").unwrap_or("hello");
    for text in boot.cmdline.get("marks").unwrap_or("").split(',').filter(|text| !text.is_empty()) {
        match text.parse() {
            Ok(mark) => cpu::out8(READINESS_PORT, mark),
            Err(_) => crate::exit::fail(format_args!("marks: {text} is not a byte")),
        }
    }
    match mode {
        "hello" => hello(boot),
        "echo" => echo::run(boot),
        "print" => print::run(boot),
        "uart" => uart::run(boot),
        "smp" => count_cpus(boot),
        "blk" => blk::run(boot),
        "blk-errors" => blk_errors::run(boot),
        "blk-features" => blk_features::run(boot),
        "bench-blk" => bench::run(boot),
        "bench-plan" => bench_plan::run(boot),
        "storm" => storm::run(boot),
        "pause" => pause::run(boot),
        "spin" => idle::spin(boot),
        "halt" => idle::halt(boot),
        "touch" => touch::run(boot),
        "clone" => clone::run(boot),
        "snap" => snap::run(boot),
        "vector" => vector::run(boot),
        "demo" => demo::run(boot),
        _ => crate::exit::fail(format_args!("there is no mode {mode}")),
    }
    say!("{mode}: ok");
    if let Some(text) = boot.cmdline.get("last") {
        say!("{text}");
    }
    if boot.cmdline.get("last-mark").is_some() {
        cpu::out8(READINESS_PORT, boot.cmdline.number("last-mark", 0) as u8);
    }
}

/// Tells the monitor that the guest is alive.
fn heartbeat() {
    cpu::out8(READINESS_PORT, HEARTBEAT);
}

fn hello(boot: &Boot) {
    say!("hello: protocol={} memory={}", boot.protocol, boot.memory.total());
}

/// Starts the other vCPUs that `cpus=` asks for; fails the guest if one does not come.
fn start_others(boot: &Boot, heap: &mut Heap, body: smp::Body) -> usize {
    let cpus = boot.cmdline.number("cpus", 1) as usize;
    if let Err(cpu) = smp::start(cpus, heap, body) {
        crate::exit::fail(format_args!("vCPU {cpu} does not start"));
    }
    cpus
}

fn count_cpus(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let cpus = start_others(boot, &mut heap, |_| {
        loop {
            cpu::wait_for_interrupt();
        }
    });
    say!("smp: cpus={cpus}");
}
