//! Processes of devices that are killed, and others that take over.

use cellblock::control::protocol::EventKind;
use nix::sys::signal::Signal;

use super::output::Events;
use super::{Vm, send};

/// Where kills fall is different every time, and printed.
pub struct Dice(u64);

impl Dice {
    /// Seeded by the time, or by `CELLBLOCK_SEED`.
    #[allow(clippy::new_without_default)] // no two are alike
    pub fn new() -> Dice {
        let seed = std::env::var("CELLBLOCK_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = seed.unwrap_or(now.as_nanos() as u64);
        println!("CELLBLOCK_SEED={seed}");
        Dice(seed | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Kills the process of a device and waits until another has taken over.
pub fn kill_and_wait(vm: &mut Vm, events: &Events, role: &str, id: &str) -> u64 {
    let before = restarts(vm, id);
    send(vm.pid_of(role, id), Signal::SIGKILL);
    replaced(vm, events, id, before + 1)
}

/// Processes of a device that took over.
pub fn restarts(vm: &mut Vm, device: &str) -> u64 {
    let stats = vm.stats();
    let disks = stats.disks.iter().map(|disk| (&disk.id, disk.restarts));
    let mut all = disks.chain(stats.serials.iter().map(|serial| (&serial.id, serial.restarts)));
    all.find(|(id, _)| *id == device).unwrap().1
}

/// Waits until so many processes were replaced; says how long the last took.
pub fn replaced(vm: &mut Vm, events: &Events, device: &str, times: u64) -> u64 {
    let event = vm.wait_for_event(events, |kind| {
        matches!(kind, EventKind::DeviceReplaced { id, restarts, .. }
            if id == device && *restarts == times)
    });
    let EventKind::DeviceReplaced { took_us, .. } = event.kind else { unreachable!() };
    took_us
}
