//! The 16550 itself: vm-superio's, between the register ring, the interrupt and
//! the two byte streams.

use std::convert::Infallible;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState as Registers};

use super::marker::Lines;
use crate::protocol::Marker;
use crate::protocol::ring::{Access, Reply};
use crate::protocol::state::FIFO;

/// IER and IIR bits of "received data available" (16550 data sheet).
const IER_RDA: u8 = 1;
const IIR_RDA: u8 = 4;

/// Raises the guest's interrupt line through its irqfd.
#[derive(Clone)]
struct Interrupt(Arc<OwnedFd>);

impl Trigger for Interrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        // An eventfd that is full is one that KVM has yet to see: nothing is lost.
        let _ = nix::unistd::write(&*self.0, &1u64.to_ne_bytes());
        Ok(())
    }
}

/// What the guest transmitted and nobody has taken yet.
#[derive(Default)]
struct Transmitted {
    bytes: Vec<u8>,
    lines: Lines,
    markers: Vec<Marker>,
}

impl Write for Transmitted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.markers.extend(self.lines.push(byte));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Device = Serial<Interrupt, NoEvents, Transmitted>;

pub(super) struct Uart {
    device: Device,
    interrupt: Interrupt,
}

impl Uart {
    pub(super) fn new(interrupt: OwnedFd) -> Uart {
        let interrupt = Interrupt(Arc::new(interrupt));
        let device = Serial::new(interrupt.clone(), Transmitted::default());
        Uart { device, interrupt }
    }

    /// Carries out one access; what a read gives, and whom.
    pub(super) fn access(&mut self, access: Access) -> Option<(Reply, u8)> {
        match access {
            Access::Write { offset, value } => {
                // Neither the interrupt nor `Transmitted` can fail.
                let _ = self.device.write(offset, value);
                None
            }
            Access::Read { offset, reply } => Some((reply, self.device.read(offset))),
        }
    }

    /// Offers input to the guest; returns how much of it the FIFO took. The FIFO is
    /// filled up when it is half empty, so that not every byte is an interrupt.
    pub(super) fn receive(&mut self, input: &[u8]) -> usize {
        if input.is_empty() || self.device.fifo_capacity() < FIFO / 2 {
            return 0;
        }
        self.device.enqueue_raw_bytes(input).unwrap_or(0)
    }

    /// Whether there is input that the guest wants to hear of, and could have
    /// forgotten: vm-superio takes the interrupt back with the first byte that is
    /// read, where a 16550 holds it until the FIFO is empty.
    pub(super) fn needs_reminder(&mut self) -> bool {
        let device = &self.device;
        if device.fifo_capacity() == FIFO {
            return false;
        }
        let state = device.state();
        state.interrupt_enable & IER_RDA != 0 && state.interrupt_identification & IIR_RDA == 0
    }

    /// Raises the interrupt for input that is still there.
    pub(super) fn remind(&mut self) {
        let mut state = self.device.state();
        state.interrupt_identification = state.interrupt_identification & !1 | IIR_RDA;
        let fresh = Serial::new(self.interrupt.clone(), Transmitted::default());
        let transmitted = std::mem::replace(&mut self.device, fresh).into_writer();
        // Raises what is pending and enabled. It fails only for a FIFO that holds too
        // much, and this one came from a FIFO.
        if let Ok(device) =
            Serial::from_state(&state, self.interrupt.clone(), NoEvents, transmitted)
        {
            self.device = device;
        }
    }

    /// Where the device stands: its registers in the order of
    /// [`crate::protocol::state::SerialState`], its FIFO, and the line begun.
    pub(super) fn state(&self) -> ([u8; 9], Vec<u8>, &Lines) {
        let state = self.device.state();
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        (registers, state.in_buffer, &self.device.writer().lines)
    }

    /// Goes on from what [`Uart::state`] gave, and raises the interrupt for what is pending.
    /// False where no device stands like that.
    pub(super) fn load(&mut self, registers: [u8; 9], fifo: Vec<u8>, lines: Lines) -> bool {
        let [dll, dlm, ier, iir, lcr, lsr, mcr, msr, scr] = registers;
        let registers = Registers {
            baud_divisor_low: dll,
            baud_divisor_high: dlm,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch: scr,
            in_buffer: fifo,
        };
        let transmitted = Transmitted { lines, ..Transmitted::default() };
        match Serial::from_state(&registers, self.interrupt.clone(), NoEvents, transmitted) {
            Ok(device) => {
                self.device = device;
                true
            }
            Err(_) => false,
        }
    }

    /// What the last access transmitted, to be taken out.
    pub(super) fn transmitted(&mut self) -> &mut Vec<u8> {
        &mut self.device.writer_mut().bytes
    }

    /// Marker lines since the last call.
    pub(super) fn markers(&mut self) -> std::vec::Drain<'_, Marker> {
        self.device.writer_mut().markers.drain(..)
    }
}
