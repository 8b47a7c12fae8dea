//! Disks with limits, as the host's clock has them: by the requests and bytes that are counted
//! over seconds, in a real VM.
//!
//! That no disk does more than it may must hold on any machine. That it does nearly as much can
//! be seen only where its process and its guest get the processor when they want it.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::time::{Duration, Instant};

use cellblock::control::protocol::Request;
use common::{LIMIT, Vm, poll};

/// How long a rate is looked at.
const TIME: Duration = Duration::from_secs(5);
/// Somebody was kept from the processor for longer: how much a disk does then says nothing.
const STARVED: Duration = Duration::from_millis(60);

/// What disk0 has done in this unit, and when that was asked at the earliest, and at the latest.
fn done(vm: &mut Vm, bytes: bool) -> (f64, Instant, Instant) {
    let before = Instant::now();
    let disk = vm.stats().disks.remove(0);
    let done = if bytes { disk.counters.bytes_read } else { disk.counters.reads_completed };
    (done as f64, before, Instant::now())
}

/// Within 2% of `rate` over five seconds, behind the burst of one second's worth.
fn is_held(limit: &str, plan: &str, rate: f64, bytes: bool) {
    let mut vm =
        Vm::with(&format!("mode=bench-plan irq qd=32 sectors=256 cycles=999999999999 plan={plan}"))
            .disk_with(8 << 20, limit)
            .start();
    vm.wait_for("plan: begin");
    // Long enough for a bucket that is full, and not more than full.
    vm.pause();
    std::thread::sleep(Duration::from_millis(1200));
    let (first, begun, _) = done(&mut vm, bytes);
    vm.resume();
    // What the burst allows at once is over when a request waits.
    let stalled = vm.stats().disks[0].counters.throttled_count;
    let mut moved = Instant::now();
    let saturated = poll(LIMIT / 3, || {
        moved = Instant::now();
        (vm.stats().disks[0].counters.throttled_count > stalled).then_some(())
    });
    let (mut last, mut gap) = (done(&mut vm, bytes), Duration::ZERO);
    let end = Instant::now() + TIME;
    let from = last;
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
        last = done(&mut vm, bytes);
        gap = gap.max(last.2 - moved);
        moved = last.1;
    }
    // One burst at the most, and no more than the rate ever since.
    let most = rate + rate * (last.2 - begun).as_secs_f64();
    let all = last.0 - first;
    println!("{limit}: {all} of at most {most}: {:+.3}%", 100.0 * (all / most - 1.0));
    assert!(all <= most, "{limit}: {all} of at most {most}");
    let ideal = rate * (last.1 - from.2).as_secs_f64();
    let error = (last.0 - from.0) / ideal - 1.0;
    println!("{limit}: {:+.3}% over {TIME:?}, longest gap {gap:?}", 100.0 * error);
    if saturated.is_some() && gap < STARVED {
        assert!(error.abs() < 0.02, "{limit}: {:+.3}%, {gap:?}", 100.0 * error);
    }
    vm.ask(Request::Stop);
    vm.ends_well();
}

#[test]
fn five_thousand_requests_a_second_are_within_two_percent() {
    is_held(",iops=5000", "read:8:32", 5000.0, false);
}

#[test]
fn a_hundred_megabytes_a_second_are_within_two_percent() {
    is_held(",bw=100M", "read:256:8", 104_857_600.0, true);
}
