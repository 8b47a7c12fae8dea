//! Plugins brought to rest for a cut, and let go on.
//!
//! One that takes part is asked, with the epoch, and answers with what it needs to go on from
//! there. Of one that does not, and has part of the machine, nothing can be kept: it is at rest
//! because no vCPU runs and it has answered every event, and the snapshot is for inspection.

use std::time::{Duration, Instant};

use super::super::event_loop::Vm;
use super::devices::Frozen;
use super::reset::{self, ResetError};
use cellblock_plugin_api::Space;

use crate::cell::com1;
use crate::cell::serial::PORTS;
use crate::plugin::{self, Holder, PartAnswer};
use crate::snapshot::coordinator::{CutError, Input};
use crate::snapshot::state::{MicrovmState, PluginState};
use crate::vcpu::{self, Outstanding, SettleError};
use crate::vm::layout;

/// What a write that has begun has at least to end.
const MOMENT: Duration = Duration::from_millis(100);

/// An access to the console's registers.
pub(super) fn is_console(access: &Outstanding) -> bool {
    let ports = u64::from(layout::SERIAL_PORT)..u64::from(layout::SERIAL_PORT) + PORTS;
    access.space == vcpu::Space::Port && ports.contains(&access.addr)
}

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
                Some(other) => {
                    return self.give_up(&plugin_name(&plugin.name), &why_not(&other));
                }
            };
            frozen.plugin_states.push(PluginState { name: plugin.name, state });
            self.step(Input::Acked { who: self.cells.len() + n, epoch })?;
        }
        self.hold_writers(end, frozen)
    }

    /// Has no program in the middle of a write to guest memory, and none begin one: of each the cut
    /// has all or nothing. Plugins that take part are at rest by now, and have written what they
    /// had to.
    fn hold_writers(&mut self, end: Instant, frozen: &mut Frozen) -> Result<(), CutError> {
        let Some((hub, _)) = &self.plugins else { return Ok(()) };
        frozen.writers = true;
        // A write that only has to end has a moment for it, however late it is.
        let end = end.max(Instant::now() + MOMENT);
        if self.snapshots.tracker.hold_writers(end) {
            return Ok(());
        }
        let who = hub.writer().map_or("a plugin".to_string(), |name| plugin_name(&name));
        self.give_up(&who, "it is in the middle of a write to guest memory")
    }

    /// Whose fault it is that vCPUs are not between two instructions.
    pub(super) fn who_holds(&self, error: &SettleError) -> String {
        let (SettleError::Waits { access, .. } | SettleError::Dead { access, .. }) = error else {
            return "the vCPUs".to_string();
        };
        let space = match access.space {
            vcpu::Space::Port => Space::Port,
            vcpu::Space::Mmio => Space::Mmio,
        };
        let plugin = self.plugins.as_ref().and_then(|(hub, _)| hub.holder_of(space, access.addr));
        match plugin {
            Some(name) => plugin_name(&name),
            None if is_console(access) => format!("serial {}", com1::ID),
            None => "the vCPUs".to_string(),
        }
    }

    /// Lets every plugin go on that was asked to come to rest.
    pub(super) fn release_plugins(&self, frozen: &Frozen) {
        let epoch = self.snapshots.cut.epoch();
        frozen.plugins.iter().take(frozen.plugins_told).for_each(|plugin| plugin.thaw(epoch));
        if frozen.writers {
            self.snapshots.tracker.let_writers_go();
        }
    }
}

// Of a reset.
impl Vm {
    /// Plugins that have to go back to what they gave to the snapshot; or the one that cannot.
    /// Programs that attached and take no part are left as they are, with what they have of the
    /// machine: it is they who have it reset.
    pub(super) fn returning(&self, state: &MicrovmState) -> Result<Vec<Holder>, String> {
        let mut plugins = self.plugin_holders();
        plugins.retain(|plugin| plugin.takes_part() || plugin.name == plugin::OWNER);
        match plugins.iter().find(|plugin| state_of(state, plugin).is_none()) {
            Some(plugin) => Err(plugin_name(&plugin.name)),
            None => Ok(plugins),
        }
    }

    /// Hands every plugin its state: they go back beside what follows.
    pub(super) fn tell_plugins_back(
        &self,
        state: &MicrovmState,
        frozen: &Frozen,
    ) -> Result<(), ResetError> {
        let epoch = self.snapshots.cut.epoch();
        for plugin in &frozen.plugins {
            if !state_of(state, plugin).is_some_and(|state| plugin.restore(epoch, state.clone())) {
                let why = "it is dead or does not take messages".to_string();
                return Err(ResetError::Plugin(plugin.name.clone(), why));
            }
        }
        Ok(())
    }

    /// Waits until all have gone back.
    pub(super) fn await_plugins_back(&self, frozen: &Frozen) -> Result<(), ResetError> {
        let (epoch, end) = (self.snapshots.cut.epoch(), Instant::now() + reset::LIMIT);
        for plugin in &frozen.plugins {
            match plugin.answer(epoch, end) {
                PartAnswer::Restored => {}
                other => return Err(ResetError::Plugin(plugin.name.clone(), why_not(&other))),
            }
        }
        Ok(())
    }
}

fn state_of<'s>(state: &'s MicrovmState, plugin: &Holder) -> Option<&'s Vec<u8>> {
    let saved = state.plugin_states.iter().find(|saved| saved.name == plugin.name);
    saved.and_then(|saved| saved.state.as_ref()).filter(|_| plugin.takes_part())
}

/// Why a plugin's answer is not what it was asked for.
pub(super) fn why_not(answer: &PartAnswer) -> String {
    match answer {
        PartAnswer::Failed(errno) => {
            format!("it cannot: {}", std::io::Error::from_raw_os_error(*errno))
        }
        PartAnswer::Late => "it did not answer in time".into(),
        PartAnswer::Gone => "its connection ended".into(),
        PartAnswer::State(_) | PartAnswer::Restored => "it answered another question".into(),
    }
}
