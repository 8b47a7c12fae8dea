//! COM1: the VMM's end of a serial cell.
//!
//! A guest's access to the UART goes into the register ring; a write is posted,
//! a read waits for the process's answer. Both end early when the vCPU is
//! kicked, and go on where they were when the access is made again.

use std::sync::{Arc, Mutex, PoisonError};

use cellblock_devices::protocol::ring::{Producer, ReadTicket};

use crate::bus::{BusDevice, Outcome};
use crate::vcpu::Kicks;

/// Ports of a 16550.
pub const PORTS: u64 = 8;

/// The bus device in front of a register ring.
pub struct SerialPort {
    ring: Arc<Producer>,
    kicks: Arc<Kicks>,
    /// What each vCPU had begun when it was kicked.
    begun: Vec<Mutex<Begun>>,
}

/// An access wider than a byte is one access a byte; this is how far it got.
#[derive(Default)]
struct Begun {
    done: usize,
    bytes: [u8; 8],
    ticket: Option<ReadTicket>,
}

impl SerialPort {
    /// A port for the vCPUs of `kicks`.
    pub fn new(ring: Arc<Producer>, kicks: Arc<Kicks>) -> SerialPort {
        let begun = (0..kicks.len()).map(|_| Mutex::default()).collect();
        SerialPort { ring, kicks, begun }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, vcpu: usize, offset: u64, data: &mut [u8]) -> Outcome {
        // Each vCPU takes its own lock only; it is never contended.
        let mut begun = self.begun[vcpu].lock().unwrap_or_else(PoisonError::into_inner);
        let len = data.len().min(8);
        let kicked = || self.kicks.kicked(vcpu);
        while begun.done < len {
            let register = ((offset + begun.done as u64) % PORTS) as u8;
            let ticket = match begun.ticket.take() {
                Some(ticket) => ticket,
                None => match self.ring.begin_read(vcpu, register, &kicked) {
                    Ok(ticket) => ticket,
                    Err(_) => return Outcome::Retry,
                },
            };
            match self.ring.wait_read(vcpu, ticket, &kicked) {
                Ok(value) => {
                    let done = begun.done;
                    begun.bytes[done] = value;
                    begun.done += 1;
                }
                Err(_) => {
                    begun.ticket = Some(ticket);
                    return Outcome::Retry;
                }
            }
        }
        data[..len].copy_from_slice(&begun.bytes[..len]);
        begun.done = 0;
        Outcome::Done
    }

    fn write(&self, vcpu: usize, offset: u64, data: &[u8]) -> Outcome {
        let mut begun = self.begun[vcpu].lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(&value) = data.get(begun.done) {
            let register = ((offset + begun.done as u64) % PORTS) as u8;
            if self.ring.post_write(vcpu, register, value, &|| self.kicks.kicked(vcpu)).is_err() {
                return Outcome::Retry;
            }
            begun.done += 1;
        }
        begun.done = 0;
        Outcome::Done
    }
}
