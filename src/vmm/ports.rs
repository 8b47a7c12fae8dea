//! The few ports that need no process of their own, because nothing behind them
//! holds state a guest could abuse: power, reset, readiness markers.

use std::sync::Arc;

use cellblock_devices::protocol::Marker;

use super::hold::Hold;
use super::notice::{Notice, Notifier};
use crate::bus::{BusDevice, Outcome, VmExit};
use crate::vcpu::Kicks;
use crate::vm::layout;

/// The keyboard controller at 0x60 to 0x64, as far as resetting the machine goes.
///
/// Reads say "no data, ready for a command", so that a kernel that waits for it
/// before it pulses the reset line does not wait.
#[derive(Debug)]
pub struct KeyboardController;

const COMMAND: u64 = 4;
const PULSE_RESET: u8 = layout::RESET_VALUE;

impl BusDevice for KeyboardController {
    fn read(&self, _vcpu: usize, _offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0);
        Outcome::Done
    }

    fn write(&self, _vcpu: usize, offset: u64, data: &[u8]) -> Outcome {
        match (offset, data) {
            (COMMAND, [PULSE_RESET]) => Outcome::Exit(VmExit::Reset),
            _ => Outcome::Done,
        }
    }
}

/// The ACPI sleep control and status registers (ACPI 6.5 section 4.8.3.7).
#[derive(Debug)]
pub struct SleepControl;

impl BusDevice for SleepControl {
    fn read(&self, _vcpu: usize, _offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0);
        Outcome::Done
    }

    fn write(&self, _vcpu: usize, offset: u64, data: &[u8]) -> Outcome {
        match (offset, data) {
            (0, &[value]) if layout::is_power_off(value) => Outcome::Exit(VmExit::Shutdown),
            _ => Outcome::Done,
        }
    }
}

/// Port 0xCB0: a byte tells how far the guest is.
#[derive(Debug)]
pub struct MarkerPort {
    notifier: Arc<Notifier>,
    hold: Arc<Hold>,
    kicks: Arc<Kicks>,
}

impl MarkerPort {
    /// Tells `notifier`; a vCPU that is about to run the workload waits in `hold`.
    pub fn new(notifier: Arc<Notifier>, hold: Arc<Hold>, kicks: Arc<Kicks>) -> MarkerPort {
        MarkerPort { notifier, hold, kicks }
    }
}

impl BusDevice for MarkerPort {
    fn read(&self, _vcpu: usize, _offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0);
        Outcome::Done
    }

    fn write(&self, vcpu: usize, _offset: u64, data: &[u8]) -> Outcome {
        let marker = match data {
            [1] => Marker::Heartbeat,
            [2] => Marker::PreExec,
            [3] => Marker::Listener,
            [4] => Marker::ListenerGone,
            [5] => Marker::Parked,
            _ => return Outcome::Done,
        };
        self.notifier.send(Notice::Marker(marker));
        if marker == Marker::PreExec {
            self.hold.wait(|| self.kicks.kicked(vcpu));
        }
        Outcome::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(outcome: Outcome) -> Option<VmExit> {
        match outcome {
            Outcome::Exit(exit) => Some(exit),
            _ => None,
        }
    }

    #[test]
    fn only_the_reset_pulse_resets() {
        let port = KeyboardController;
        assert!(exit(port.write(0, 4, &[0xd1])).is_none());
        assert!(exit(port.write(0, 0, &[0xfe])).is_none());
        assert!(matches!(exit(port.write(0, 4, &[0xfe])), Some(VmExit::Reset)));
        let mut status = [0xff];
        let _ = port.read(0, 4, &mut status);
        assert_eq!(status, [0]);
    }

    #[test]
    fn only_soft_off_with_enable_powers_off() {
        let port = SleepControl;
        let off = layout::SLEEP_ENABLE | layout::SLEEP_TYPE_S5 << 2;
        assert!(exit(port.write(0, 0, &[layout::SLEEP_TYPE_S5 << 2])).is_none());
        assert!(exit(port.write(0, 0, &[layout::SLEEP_ENABLE])).is_none());
        assert!(matches!(exit(port.write(0, 0, &[off])), Some(VmExit::Shutdown)));
    }

    #[test]
    fn markers_arrive_and_a_flood_is_bounded() {
        let notifier = Notifier::new().expect("notifier");
        let hold = Arc::new(Hold::new(false));
        let port = MarkerPort::new(notifier.clone(), hold, Kicks::new(1));
        let _ = port.write(0, 0, &[3]);
        let _ = port.write(0, 0, &[9]);
        assert_eq!(notifier.take(), vec![Notice::Marker(Marker::Listener)]);
        for _ in 0..100_000 {
            let _ = port.write(0, 0, &[1]);
        }
        assert!(notifier.take().len() <= 1024);
    }
}
