//! Plugins brought to rest for a cut, and let go on.
//!
//! One that takes part is asked, with the epoch, and answers with what it needs to go on from
//! there. Of one that does not, and has part of the machine, nothing can be kept: it is at rest
//! because no vCPU runs and it has answered every event, and the snapshot is for inspection.

use std::time::Instant;

use super::super::event_loop::Vm;
use super::devices::Frozen;
use crate::plugin::{Holder, PartAnswer};
use crate::snapshot::coordinator::{CutError, Input};
use crate::snapshot::state::PluginState;

/// A plugin as one who takes part.
pub(super) fn plugin_name(name: &str) -> String {
    format!("plugin {name}")
}

impl Vm {
    /// Plugins that have part of the machine.
    pub(super) fn plugin_holders(&self) -> Vec<Holder> {
        self.plugins.as_ref().map(|(hub, _)| hub.holders()).unwrap_or_default()
    }

    /// Asks every plugin that takes part to come to rest. No vCPU runs.
    pub(super) fn tell_plugins(&mut self, epoch: u64, frozen: &mut Frozen) -> Result<(), CutError> {
        if let Some(vcpu) = self.plugins.as_ref().and_then(|(hub, _)| hub.has_open_event()) {
            let why = format!("a plugin has not answered an event of vCPU {vcpu}");
            return self.give_up("the plugins", &why);
        }
        for n in 0..frozen.plugins.len() {
            frozen.plugins_told = n + 1;
            let plugin = &frozen.plugins[n];
            if plugin.takes_part() && !plugin.quiesce(epoch) {
                let name = plugin_name(&plugin.name);
                return self.give_up(&name, "it is dead or does not take messages");
            }
        }
        Ok(())
    }

    /// Waits until all of them are at rest.
    pub(super) fn await_plugins(
        &mut self,
        epoch: u64,
        end: Instant,
        frozen: &mut Frozen,
    ) -> Result<(), CutError> {
        for n in 0..frozen.plugins.len() {
            let plugin = frozen.plugins[n].clone();
            let state = match plugin.takes_part().then(|| plugin.answer(epoch, end)) {
                None => None,
                Some(PartAnswer::State(state)) => Some(state),
                Some(PartAnswer::Late) => return self.step(Input::Deadline),
                Some(PartAnswer::Failed(errno)) => {
                    let why = format!("it cannot: {}", std::io::Error::from_raw_os_error(errno));
                    return self.give_up(&plugin_name(&plugin.name), &why);
                }
                Some(PartAnswer::Gone) => {
                    let why = "its connection ended";
                    return self.give_up(&plugin_name(&plugin.name), why);
                }
            };
            frozen.plugin_states.push(PluginState { name: plugin.name, state });
            self.step(Input::Acked { who: self.cells.len() + n, epoch })?;
        }
        Ok(())
    }

    /// Lets every plugin go on that was asked to come to rest.
    pub(super) fn release_plugins(&self, frozen: &Frozen) {
        let epoch = self.snapshots.cut.epoch();
        frozen.plugins.iter().take(frozen.plugins_told).for_each(|plugin| plugin.thaw(epoch));
    }
}
