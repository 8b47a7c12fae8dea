//! Everything at once, for monitors that stop and continue the machine meanwhile.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::arch::cpu::{self, cycles};
use crate::arch::tables::MAX_CPUS;
use crate::boot::Boot;
use crate::clock::Clock;
use crate::console;
use crate::heap::Heap;
use crate::pattern::SECTOR;
use crate::random::Random;
use crate::virtio::blk::{Disk, Kind, Options};
use crate::{exit, pattern};

use super::{heartbeat, start_others};

/// Each vCPU's counter, on a cache line of its own.
#[repr(align(64))]
struct Counter(AtomicU64);

static COUNTERS: [Counter; MAX_CPUS] = [const { Counter(AtomicU64::new(0)) }; MAX_CPUS];

/// The other vCPUs count for ever. The boot vCPU writes and reads back blocks (if there is a
/// disk), reads the console, and sees that neither a counter nor a clock ever steps back. It ends
/// after `count=` rounds, or when it reads `q`. Every `every=` rounds it prints a line, and writes a
/// heartbeat to the readiness port if `heartbeat` is there.
///
/// `port=` has it write to a port and read the same back, each round.
///
/// `touch=` has so many MiB of memory in use first.
pub fn run(boot: &Boot) {
    if boot.cmdline.number("touch", 0) > 0 {
        super::touch::pages(boot, boot.cmdline.number("touch", 0) << 20);
    }
    let mut heap = Heap::new(&boot.memory);
    let options = Options { depth: 1, ..Options::from_cmdline(boot) };
    let mut disk =
        Disk::find(boot).next().map(|transport| Disk::start(transport, &mut heap, options));
    let cpus = start_others(boot, &mut heap, count);
    let clock = Clock::new(&mut heap);
    let (limit, every) = (boot.cmdline.number("count", 0), boot.cmdline.number("every", 1000));
    let beats = boot.cmdline.flag("heartbeat");
    let port = boot.cmdline.number("port", 0) as u16;
    let has = |there| if there { "yes" } else { "no" };
    say!("pause: ready cpus={cpus} disk={} clock={}", has(disk.is_some()), has(clock.is_some()));

    let mut random = Random::new(boot.cmdline.number("seed", 1));
    let mut counted = [0; MAX_CPUS];
    let (mut tsc, mut nanoseconds) = (cycles(), 0);
    let mut rounds = 0;
    loop {
        rounds += 1;
        counted[0] = COUNTERS[0].0.fetch_add(1, Ordering::Relaxed) + 1;
        if counted[0] != rounds {
            exit::fail(format_args!("counter 0 is {} in round {rounds}", counted[0]));
        }
        if let Some(disk) = &mut disk {
            let sectors = (options.buffer / SECTOR) as u64;
            let sector = random.below(disk.capacity / sectors) * sectors;
            pattern::fill(disk.data(0), sector, rounds);
            disk.request(Kind::Write, sector, options.buffer);
            disk.data(0).fill(0);
            disk.request(Kind::Read, sector, options.buffer);
            pattern::check(disk.data(0), sector, rounds);
        }
        for (cpu, before) in counted.iter_mut().enumerate().take(cpus).skip(1) {
            *before = forward("counter", cpu, *before, COUNTERS[cpu].0.load(Ordering::Acquire));
        }
        tsc = forward("time stamp counter of vCPU", 0, tsc, cycles());
        if let Some(clock) = &clock {
            nanoseconds = forward("clock of vCPU", 0, nanoseconds, clock.nanoseconds());
        }
        if port != 0 {
            cpu::out8(port, rounds as u8);
            let back = cpu::in8(port);
            if back != rounds as u8 {
                exit::fail(format_args!("port {port:#x} gives {back} back in round {rounds}"));
            }
        }
        let quit = console::poll() == Some(b'q');
        if rounds.is_multiple_of(every) {
            if beats {
                heartbeat();
            }
            let others: u64 = counted[1..].iter().sum();
            say!("pause: n={rounds} others={others} tsc={tsc} ns={nanoseconds}");
        }
        if quit || rounds == limit {
            break;
        }
    }
    for (cpu, value) in counted.iter().enumerate().take(cpus) {
        if *value == 0 {
            exit::fail(format_args!("vCPU {cpu} never counted"));
        }
    }
    say!("pause: rounds={rounds}");
}

/// `now`, if it is not before `before`.
fn forward(what: &str, number: usize, before: u64, now: u64) -> u64 {
    if now < before {
        exit::fail(format_args!("{what} {number} went from {before} back to {now}"));
    }
    now
}

fn count(cpu: usize) -> ! {
    let counter = &COUNTERS[cpu].0;
    let (mut value, mut tsc) = (0, 0);
    loop {
        // Nobody else writes it: a step back would be memory that was restored, or lost.
        if counter.load(Ordering::Relaxed) != value {
            exit::fail(format_args!("counter {cpu} is not {value} any more"));
        }
        value += 1;
        counter.store(value, Ordering::Release);
        if value.is_multiple_of(1024) {
            tsc = forward("time stamp counter of vCPU", cpu, tsc, cycles());
        }
    }
}
