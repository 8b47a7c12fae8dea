//! `cargo bench`: what Cellblock costs, beside QEMU's `microvm` machine on the same
//! bare-metal guest and the same disk image, in the same run.
//!
//! Prints medians with the 10th and 90th percentile. Figures of one run may be
//! compared with one another, figures of different runs or machines may not:
//! read the ratios.

mod family;
mod machines;
mod memory;
mod stats;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use machines::{Bench, Machine};
use stats::Sample;

const STARTS: usize = 30;
const ROUNDS: usize = 5;
const DISK_BYTES: u64 = 256 << 20;
const RAM_MIB: u64 = 128;

fn main() {
    // `cargo bench` passes --bench; a word picks the rows to run.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wants = |row: &str| wanted.is_empty() || wanted.iter().any(|w| row.contains(w.as_str()));
    let bench = Bench::prepare(DISK_BYTES, RAM_MIB);
    let qemu = machines::qemu_available();
    if !qemu {
        println!("qemu-system-x86_64 is missing: install qemu-system-x86 to see the peer\n");
    }
    let machines: Vec<Machine> = [Machine::Cellblock, Machine::WithoutJails, Machine::Qemu]
        .into_iter()
        .filter(|m| *m != Machine::Qemu || qemu)
        .collect();

    if wants("start") {
        println!("start to first guest output, {STARTS} starts each, ms");
        for (machine, sample) in interleaved(&machines, STARTS, |m| first_output(&bench, m)) {
            println!("  {:<22} {sample}", machine.name());
        }
    }
    if wants("memory") {
        println!(
            "memory of all processes beyond guest RAM (proportional set size), {ROUNDS} runs, MiB"
        );
        for (machine, sample) in interleaved(&machines, ROUNDS, |m| beyond_ram(&bench, m)) {
            println!("  {:<22} {sample}", machine.name());
        }
    }
    if wants("block") {
        for (op, qd, n) in [
            ("read", 1, 20_000),
            ("read", 32, 200_000),
            ("write", 1, 20_000),
            ("write", 32, 200_000),
        ] {
            println!(
                "random {op} of 4 KiB, queue depth {qd}, polling guest, {ROUNDS} runs of {n}, cycles a request"
            );
            for (machine, sample) in interleaved(&machines, ROUNDS, |m| block(&bench, m, op, qd, n))
            {
                println!("  {:<22} {sample}", machine.name());
            }
        }
    }
    if wants("pause") {
        for cpus in [1, 2, 4] {
            println!(
                "pause of {cpus} vCPUs doing block and console I/O, from request to all parked, us"
            );
            println!("  {:<22} {}", Machine::Cellblock.name(), pauses(&bench, cpus));
        }
    }
}

/// Runs the machines in turn, so that what else the host does hits all alike.
fn interleaved(
    machines: &[Machine],
    rounds: usize,
    mut measure: impl FnMut(Machine) -> f64,
) -> Vec<(Machine, Sample)> {
    let mut values = vec![Vec::new(); machines.len()];
    for _ in 0..rounds {
        for (n, machine) in machines.iter().enumerate() {
            values[n].push(measure(*machine));
        }
    }
    machines.iter().copied().zip(values.into_iter().map(Sample::new)).collect()
}

fn first_output(bench: &Bench, machine: Machine) -> f64 {
    let mut command = bench.command(machine, 1, "mode=hello");
    let start = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the machine starts");
    let mut out = child.stdout.take().expect("piped");
    let mut byte = [0];
    out.read_exact(&mut byte).expect("the guest prints");
    let took = start.elapsed();
    out.read_to_end(&mut Vec::new()).expect("the rest");
    assert!(child.wait().expect("ends").success(), "{} failed", machine.name());
    took.as_secs_f64() * 1e3
}

fn beyond_ram(bench: &Bench, machine: Machine) -> f64 {
    let mut guest = bench.start(machine, 1, "mode=echo");
    guest.wait_for("echo: ready");
    let bytes = memory::beyond_guest_ram(guest.child.id(), RAM_MIB << 20);
    guest.say("quit\n");
    guest.end();
    bytes as f64 / f64::from(1 << 20)
}

fn block(bench: &Bench, machine: Machine, op: &str, qd: u32, n: u32) -> f64 {
    let mut guest = bench.start(machine, 1, &format!("mode=bench-blk op={op} qd={qd} n={n}"));
    let line = guest.wait_for("bench:");
    guest.end();
    field(&line, "cyc_mean").unwrap_or_else(|| panic!("no cyc_mean in {line:?}"))
}

fn field(line: &str, name: &str) -> Option<f64> {
    line.split_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

fn pauses(bench: &Bench, cpus: u32) -> Sample {
    const CYCLES: usize = 2_000;
    let control = bench.dir.path().join("control");
    let mut guest = bench.start_with(
        Machine::Cellblock,
        cpus,
        &format!("mode=pause cpus={cpus}"),
        &["--control", control.to_str().expect("utf-8")],
    );
    guest.wait_for("pause: n=");
    // The guest goes on printing; someone has to read it.
    let drain = guest.drain();
    let mut socket = control_connection(&control);
    let mut times = Vec::with_capacity(CYCLES);
    for _ in 0..CYCLES {
        times.push(socket.ask("pause")["took_us"].as_f64().expect("took_us"));
        socket.ask("resume");
    }
    socket.ask("stop");
    guest.end();
    drain.join().expect("reader");
    Sample::new(times)
}

struct Connection {
    write: std::os::unix::net::UnixStream,
    read: BufReader<std::os::unix::net::UnixStream>,
}

fn control_connection(path: &Path) -> Connection {
    let write = std::os::unix::net::UnixStream::connect(path).expect("control socket");
    let read = BufReader::new(write.try_clone().expect("clone"));
    Connection { write, read }
}

impl Connection {
    fn ask(&mut self, request: &str) -> serde_json::Value {
        use std::io::Write;
        writeln!(self.write, "{{\"request\":\"{request}\"}}").expect("ask");
        let mut line = String::new();
        self.read.read_line(&mut line).expect("answer");
        serde_json::from_str(&line).expect("JSON")
    }
}
