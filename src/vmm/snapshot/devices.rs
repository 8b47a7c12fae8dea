//! Device processes brought to rest, all at once, and let go on.
//!
//! A disk's rings are stopped by its front end, and its process then says that they are; the
//! serial process carries out what is in its ring. Everyone answers with the epoch, in one
//! common time; who does not is named, and asked to go on all the same, so that one that was
//! only slow does.

use std::time::{Duration, Instant};

use cellblock_devices::protocol::state::CellState;
use cellblock_devices::protocol::{FromCell, ToCell};

use super::super::event_loop::Vm;
use super::plugins::plugin_name;
use crate::plugin::Holder;
use crate::snapshot::coordinator::{CutError, Input, Phase};
use crate::snapshot::state::PluginState;
use crate::transport::mmio::FreezeError;

/// What has to be let go on, and what was answered.
#[derive(Default)]
pub(in super::super) struct Frozen {
    /// Disks whose rings were asked to stop, by index, and whether they have.
    disks: Vec<(usize, bool)>,
    /// Processes that were told to come to rest.
    told: bool,
    /// What each process said, by its place.
    pub(super) states: Vec<Option<CellState>>,
    /// What back ends of other programs gave, by id.
    pub(super) strangers: Vec<(String, Vec<u8>)>,
    /// Plugins that have part of the machine; those that were told to come to rest; what they
    /// gave.
    pub(super) plugins: Vec<Holder>,
    pub(super) plugins_told: usize,
    pub(super) plugin_states: Vec<PluginState>,
    /// Programs that attached are kept from writing to guest memory.
    pub(super) writers: bool,
}

/// What becomes of disks that other programs serve.
#[derive(Clone, Copy)]
pub(super) enum Strangers {
    /// They give their state, where they can.
    Saved,
    /// There must be none, for this reason.
    Refused(&'static str),
}

impl Frozen {
    /// Nobody yet; these will be asked too.
    pub(super) fn of_plugins(plugins: Vec<Holder>) -> Frozen {
        Frozen { plugins, ..Frozen::default() }
    }

    /// Plugins that have part of the machine, and no state to go on from.
    pub(super) fn without_state(&self) -> Vec<String> {
        let without = self.plugin_states.iter().filter(|plugin| plugin.state.is_none());
        without.map(|plugin| plugin.name.clone()).collect()
    }
}

impl Vm {
    /// Every process that takes part, by name: in the order of the cells, then plugins.
    pub(super) fn participants(&self, frozen: &Frozen) -> Vec<String> {
        let cells = self.cells.iter().map(|cell| format!("{} {}", cell.role(), cell.id()));
        cells.chain(frozen.plugins.iter().map(|plugin| plugin_name(&plugin.name))).collect()
    }

    /// A disk of another program's may have state that we cannot have, and its writes to guest
    /// memory are in no log of ours.
    pub(super) fn refuse_strangers(&self, wanted: Strangers) -> Result<(), CutError> {
        let refused = |id: &str, why: &str| {
            let (who, why) = (format!("disk {id}"), why.to_string());
            Err(CutError { phase: Phase::Running, who, why })
        };
        for back_end in &self.back_ends {
            let id = back_end.id.as_str();
            let device = self.devices.iter().find(|(of, _)| of == id);
            match wanted {
                _ if back_end.gone => return refused(id, "its back end is gone"),
                Strangers::Refused(why) => return refused(id, why),
                Strangers::Saved if device.is_some_and(|(_, device)| device.info().has_state) => {}
                Strangers::Saved => {
                    return refused(
                        id,
                        "it is served by another program's vhost-user back end, which does not \
                         offer its state (VHOST_USER_PROTOCOL_F_DEVICE_STATE)",
                    );
                }
            }
        }
        Ok(())
    }

    /// Has the back ends of other programs, whose rings are stopped, give their state.
    fn save_strangers(&mut self, end: Instant, frozen: &mut Frozen) -> Result<(), CutError> {
        for n in 0..self.devices.len() {
            let (id, device) = &self.devices[n];
            if !self.back_ends.iter().any(|back_end| back_end.id == *id) {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            match device.save_back_end(left) {
                Ok(state) => frozen.strangers.push((id.clone(), state)),
                Err(error) => {
                    let (name, why) = (format!("blk {id}"), crate::remedy::chain(&error));
                    return self.give_up(&name, &why);
                }
            }
        }
        Ok(())
    }

    /// Brings every process to rest.
    pub(super) fn quiesce(&mut self, limit: Duration, frozen: &mut Frozen) -> Result<(), CutError> {
        let end = Instant::now() + limit;
        let epoch = self.snapshots.cut.epoch();
        frozen.states = vec![None; self.cells.len()];
        self.tell_plugins(epoch, frozen)?;
        // The console's process works while the disks' rings come to rest.
        self.tell(epoch, "serial", frozen)?;
        self.stop_rings(limit, frozen)?;
        self.save_strangers(end, frozen)?;
        self.tell(epoch, "blk", frozen)?;
        for n in 0..self.cells.len() {
            self.await_quiesced(n, epoch, end, frozen)?;
        }
        self.await_plugins(epoch, end, frozen)?;
        if self.ring.as_ref().is_some_and(|ring| !ring.is_idle()) {
            return self.give_up("serial com1", "it left accesses of the guest undone");
        }
        Ok(())
    }

    fn tell(&mut self, epoch: u64, role: &str, frozen: &mut Frozen) -> Result<(), CutError> {
        for n in 0..self.cells.len() {
            let cell = &self.cells[n];
            if cell.role() != role {
                continue;
            }
            let name = format!("{role} {}", cell.id());
            frozen.told = true;
            let told = cell.is_open()
                && matches!(cell.channel().try_send(&ToCell::Quiesce { epoch }, &[]), Ok(true));
            if !told {
                return self.give_up(&name, "its process is dead or does not take messages");
            }
        }
        Ok(())
    }

    fn stop_rings(&mut self, limit: Duration, frozen: &mut Frozen) -> Result<(), CutError> {
        let mut begun = Vec::new();
        for n in 0..self.devices.len() {
            match self.devices[n].1.begin_freeze() {
                Ok(answer) => {
                    frozen.disks.push((n, false));
                    begun.push(answer);
                }
                Err(error) => return self.disk_failed(n, &error),
            }
        }
        for (n, answer) in begun.into_iter().enumerate() {
            let result = self.devices[n].1.finish_freeze(&answer, limit);
            frozen.disks[n].1 = !matches!(result, Err(FreezeError::Late(_)));
            if let Err(error) = result {
                return self.disk_failed(n, &error);
            }
        }
        Ok(())
    }

    fn disk_failed(&mut self, n: usize, error: &FreezeError) -> Result<(), CutError> {
        let name = format!("blk {}", self.devices[n].0);
        self.give_up(&name, &crate::remedy::chain(error))
    }

    fn await_quiesced(
        &mut self,
        n: usize,
        epoch: u64,
        end: Instant,
        frozen: &mut Frozen,
    ) -> Result<(), CutError> {
        let name = format!("{} {}", self.cells[n].role(), self.cells[n].id());
        loop {
            match self.cells[n].wait_message(end) {
                Some(FromCell::Quiesced { epoch: of, state }) if of == epoch => {
                    if let Err(why) = check(self.cells[n].role(), &state) {
                        return self.give_up(&name, why);
                    }
                    frozen.states[n] = Some(*state);
                    return self.step(Input::Acked { who: n, epoch });
                }
                // Of a cut that was given up.
                Some(FromCell::Quiesced { .. }) => {}
                Some(other) => self.cell_message(n, other),
                None if self.cells[n].is_open() => {
                    return self.step(Input::Deadline);
                }
                None => return self.give_up(&name, "its process died"),
            }
        }
    }

    pub(super) fn give_up(&mut self, who: &str, why: &str) -> Result<(), CutError> {
        self.step(Input::Failed { who: who.into(), why: why.into() })
    }

    /// Lets everyone go on who was asked to come to rest. What cannot is reported by the
    /// device itself: its driver has to reset it, or its process is found dead.
    pub(super) fn release_devices(&mut self, frozen: Frozen) {
        let begun: Vec<_> = frozen
            .disks
            .iter()
            .map(|(n, stopped)| (*n, *stopped, self.devices[*n].1.begin_thaw()))
            .collect();
        if frozen.told {
            self.release_processes();
        }
        self.release_plugins(&frozen);
        for (n, stopped, answer) in begun {
            let (id, device) = &self.devices[n];
            if stopped && let Err(error) = device.finish_thaw(&answer) {
                tracing::error!(
                    device = id,
                    error = crate::remedy::chain(&error),
                    "going on after a snapshot"
                );
            }
        }
    }
}

impl Vm {
    /// Has the processes go on that were told to come to rest.
    pub(super) fn release_processes(&mut self) {
        let epoch = self.snapshots.cut.epoch();
        for cell in self.cells.iter().filter(|cell| cell.is_open()) {
            // It reads what is before this first, and then this.
            let told = cell.channel().try_send(&ToCell::Thaw { epoch }, &[]);
            // One with no room for it has read nothing for long, and would rest for ever: another
            // takes its place.
            if let (Ok(false), Some(pid)) = (told, cell.pid()) {
                let (role, id) = (cell.role(), cell.id());
                tracing::error!(role, device = id, pid, "it takes no messages, and is ended");
                if let Err(error) = self.spawner.kill(pid) {
                    tracing::error!(error = crate::remedy::chain(&error), "ending it");
                }
            }
        }
    }
}

/// A process's word for its own state, as far as it can be checked here.
fn check(role: &str, state: &CellState) -> Result<(), &'static str> {
    match (role, state) {
        ("blk", CellState::Blk { running: 0, .. }) => Ok(()),
        ("blk", CellState::Blk { .. }) => Err("its rings still run"),
        ("serial", CellState::Serial(state)) if state.is_possible() => Ok(()),
        _ => Err("it answered with a state that no such device has"),
    }
}
