//! Prints every access of a running guest to ports and MMIO ranges, without being in the way of the
//! devices behind them.
//!
//! ```text
//! trace SOCKET RANGE...       RANGE: port:START[+LENGTH] or mmio:START[+LENGTH]
//! trace /tmp/vm-plugin port:0x3f8+8 mmio:0xd0000000+0x1000
//!     0.000214 vcpu0 port 0x3fd read  1           rip 0x10243f rax 0x0 rdx 0x3fd
//!     0.000251 vcpu0 port 0x3f8 write 1 41        rip 0x102447 rax 0x41 rdx 0x3f8
//! ```
//! It attaches to a VM that was started with `--plugin-socket`; the right to observe is enough. An
//! access is printed before its device sees it: what a read gives is not known yet. It ends with the
//! VM, or when it is interrupted; the guest runs on.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Instant;

use cellblock_plugin_api::{Access, Error, Event, Space, Vcpu, Vm};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let ranges: Option<Vec<_>> = words.iter().skip(1).map(|word| range(word)).collect();
    match (words.first(), ranges) {
        (Some(socket), Some(ranges)) if !ranges.is_empty() => match trace(socket, &ranges) {
            Ok(()) | Err(Error::Closed) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("trace: {error}: {}", io::Error::from_raw_os_error(error.errno()));
                ExitCode::FAILURE
            }
        },
        _ => {
            eprintln!("usage: trace SOCKET port:START[+LENGTH]... mmio:START[+LENGTH]...");
            ExitCode::from(2)
        }
    }
}

fn trace(socket: &str, ranges: &[(Space, u64, u64)]) -> Result<(), Error> {
    let vm = Vm::attach(Path::new(socket))?;
    for (space, start, length) in ranges {
        vm.watch_range(*space, *start, *length)?;
    }
    let begin = Instant::now();
    // Bounded: a guest that is faster than the reader of our output waits for it.
    let (lines, printed) = sync_channel(1024);
    for id in 0..vm.vcpu_count() {
        let (vcpu, lines) = (vm.vcpu(id)?, lines.clone());
        thread::spawn(move || follow(&vcpu, begin, &lines));
    }
    drop(lines);
    let mut out = io::stdout().lock();
    for line in printed {
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            break; // nobody reads us any more
        }
    }
    Ok(())
}

/// Reports one vCPU's accesses until the VM lets go of it.
fn follow(vcpu: &Vcpu, begin: Instant, lines: &SyncSender<String>) -> Result<(), Error> {
    loop {
        let event = vcpu.wait()?;
        let line = match &event {
            Event::Watched(access) => Some(describe(vcpu, access, begin)?),
            _ => None,
        };
        vcpu.resume()?;
        if line.is_some_and(|line| lines.send(line).is_err()) {
            return Ok(());
        }
    }
}

fn describe(vcpu: &Vcpu, access: &Access, begin: Instant) -> Result<String, Error> {
    let regs = vcpu.regs()?;
    let space = if access.space == Space::Port { "port" } else { "mmio" };
    let data: String = match access.is_write {
        true => access.data.iter().map(|byte| format!("{byte:02x}")).collect(),
        false => String::new(),
    };
    Ok(format!(
        "{:12.6} vcpu{} {space} {:#x} {} {} {data:<16} rip {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x}",
        begin.elapsed().as_secs_f64(),
        vcpu.id(),
        access.address,
        if access.is_write { "write" } else { "read " },
        access.data.len(),
        regs.rip,
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
    ))
}

fn range(text: &str) -> Option<(Space, u64, u64)> {
    let (space, range) = text.split_once(':')?;
    let space = match space {
        "port" => Space::Port,
        "mmio" => Space::Mmio,
        _ => return None,
    };
    let (start, length) = range.split_once('+').unwrap_or((range, "1"));
    Some((space, number(start)?, number(length).filter(|length| *length > 0)?))
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
