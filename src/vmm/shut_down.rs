//! How a machine is taken down: vCPUs, what devices hold, their processes, and memory last.

use std::sync::Arc;
use std::time::Duration;

use cellblock_seccomp::spawner::Spawner;

use super::event_loop::Vm;
use super::{VmEnd, VmmError};
use crate::cell::Cell;
use crate::control::protocol::{EventKind, Shutdown};
use crate::remedy::chain;
use crate::snapshot::pager::Pager;
use crate::vcpu::Vcpus;
use crate::vm::kvm::Machine;

/// How long the vCPUs may take to stop at the end of the VM.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// The same of vCPUs that may wait for memory which never comes: until that is given up.
const STUCK_LIMIT: Duration = Duration::from_millis(300);
/// How long the spawner may take to end every device process.
const SPAWNER_LIMIT: Duration = Duration::from_secs(2);
/// How long control clients may take to read their last lines.
const CLIENTS_LIMIT: Duration = Duration::from_millis(500);

impl Vm {
    /// Takes the machine down, with nothing lost that was accepted from the guest.
    pub(super) fn shut_down(mut self, end: &Result<VmEnd, VmmError>) {
        let stopped = self.stop_vcpus();
        let _ = self.notices(); // markers of the guest's last moments
        self.plugins = None;
        self.end_supervision();
        // All at once, so that they share one deadline.
        let drains: Vec<_> = self.devices.iter().map(|(_, device)| device.begin_drain()).collect();
        for ((id, device), drain) in self.devices.iter().zip(drains) {
            if let Err(error) = device.finish_drain(&drain) {
                tracing::warn!(device = id, error = chain(&error), "finishing requests");
            }
        }
        self.deliver_consoles();
        let (reason, message) = match end {
            Ok(VmEnd::Shutdown | VmEnd::Plugin) => (Shutdown::PowerOff, None),
            Ok(VmEnd::Reset) => (Shutdown::Reset, None),
            Ok(VmEnd::Stopped | VmEnd::Signal) => (Shutdown::Stopped, None),
            Err(error) => (Shutdown::Error, Some(chain(error))),
        };
        self.event(EventKind::Shutdown { reason, message });
        self.give_triggers_up();
        let held: Vec<_> = self.cells.iter_mut().filter_map(Cell::take_held).collect();
        let ended = end_processes(self.cells, self.spawner);
        if let Some(pager) = self.pager {
            give_up(pager, ended, stopped, &mut self.vcpus, &self.machine);
        }
        for held in held {
            held.wait_released(SPAWNER_LIMIT);
        }
        if let Some(control) = self.control.take() {
            control.finish(CLIENTS_LIMIT).at_exit();
        }
    }

    /// Takes the machine down at once: nobody wants what the guest still had to say.
    pub(super) fn discard(mut self) {
        let stopped = self.stop_vcpus();
        self.plugins = None;
        let ended = end_processes(self.cells, self.spawner);
        if let Some(pager) = self.pager {
            give_up(pager, ended, stopped, &mut self.vcpus, &self.machine);
        }
    }

    /// Whether all have stopped.
    fn stop_vcpus(&mut self) -> bool {
        let stuck = self.pager.as_ref().is_some_and(Pager::has_failed);
        let stopped = self.vcpus.stop(if stuck { STUCK_LIMIT } else { STOP_LIMIT });
        if let (Err(error), false) = (&stopped, stuck) {
            tracing::warn!(error = chain(error), "stopping vCPUs");
        }
        stopped.is_ok()
    }
}

/// Whether no device process is left.
fn end_processes(cells: Vec<Cell>, spawner: Spawner) -> bool {
    drop(cells); // end of file on its channel ends a cell
    let ended = spawner.shutdown(SPAWNER_LIMIT);
    if !ended {
        tracing::warn!("the spawner is slow to end");
    }
    ended
}

/// Has nobody wait for what is missing of guest memory. `ended`: no device process is left;
/// `stopped`: nor does a vCPU's thread live.
fn give_up(pager: Pager, ended: bool, stopped: bool, vcpus: &mut Vcpus, machine: &Arc<Machine>) {
    if !ended {
        // Who still lives is not to take zeros for memory that did not come. The end of KVM's
        // machine would wait for that memory: it is left to the end of this process.
        std::mem::forget(machine.clone());
        return;
    }
    pager.let_go();
    if !stopped && let Err(error) = vcpus.stop(STOP_LIMIT) {
        tracing::warn!(error = chain(&error), "stopping vCPUs");
    }
}
