//! The plugin of a machine, from the main thread: its output, its end, and its grace.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use cellblock_seccomp::spawner::{Event, ExitStatus};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::event_loop::Vm;
use super::{VmEnd, VmmError};
use crate::control::protocol::EventKind;
use crate::plugin_process::PluginError;

/// How long a plugin that was killed may take to be gone.
const REAP_LIMIT: Duration = Duration::from_secs(2);

impl Vm {
    /// What the end of process `pid` means if it was the plugin.
    pub(super) fn plugin_ended(
        &mut self,
        pid: i32,
        status: ExitStatus,
    ) -> Option<Result<VmEnd, VmmError>> {
        let mut plugin = self.plugin.take_if(|plugin| plugin.pid() == pid)?;
        Some(plugin.ended(status).map(|()| VmEnd::Plugin).map_err(VmmError::from))
    }

    /// The plugin has made calls that its policy does not have.
    pub(super) fn plugin_violations(&mut self) {
        let Some(plugin) = &mut self.plugin else { return };
        let (found, pid) = (plugin.take_violations(), plugin.pid());
        if plugin.must_end()
            && let Err(error) = self.spawner.kill(pid)
        {
            tracing::error!(error = crate::remedy::chain(&error), "ending the plugin");
        }
        for violation in found {
            self.event(EventKind::Violation {
                process: "plugin plugin0".to_string(),
                syscall: violation.call(),
                thread: violation.tid.to_string(),
            });
        }
    }

    /// The machine has come to its `end`: the plugin is told and has its grace. How it exits
    /// is how the VM ended, unless somebody had the VM stopped.
    pub(super) fn finish_plugin(
        &mut self,
        end: Result<VmEnd, VmmError>,
    ) -> Result<VmEnd, VmmError> {
        if let Some((hub, _)) = &self.plugins {
            hub.ending();
        }
        let Some(plugin) = &mut self.plugin else { return end };
        plugin.begin_grace();
        let asked = matches!(end, Ok(VmEnd::Stopped | VmEnd::Signal));
        let exit = match self.await_plugin() {
            Some(exit) => exit,
            None => {
                self.kill_plugin();
                Err(PluginError::Hung.into())
            }
        };
        match (end, exit) {
            (end, Err(error)) if asked => {
                tracing::warn!("{}", crate::remedy::one_line(&error));
                end
            }
            (Err(error), Ok(_)) => {
                tracing::error!("{}", crate::remedy::one_line(&error));
                Ok(VmEnd::Plugin)
            }
            (end, Ok(_)) => end,
            (_, Err(error)) => Err(error),
        }
    }

    /// The plugin's end, if that comes within its grace.
    fn await_plugin(&mut self) -> Option<Result<VmEnd, VmmError>> {
        loop {
            let left = self.plugin.as_ref()?.grace_left()?;
            match self.plugin_event(left) {
                Some(end) => return Some(end),
                None if left.is_zero() => return None,
                None => {}
            }
        }
    }

    /// Waits for one thing that the plugin or the spawner has to say; the plugin's end, if
    /// it is that.
    fn plugin_event(&mut self, limit: Duration) -> Option<Result<VmEnd, VmmError>> {
        let plugin = self.plugin.as_mut()?;
        let timeout =
            PollTimeout::try_from(limit.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
        let output = plugin.is_open().then(|| PollFd::new(plugin.as_fd(), PollFlags::POLLIN));
        let mut fds = vec![PollFd::new(self.spawner.as_fd(), PollFlags::POLLIN)];
        fds.extend(output);
        fds.extend(plugin.listener().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let _ = poll(&mut fds, timeout); // interrupted is nothing yet
        plugin.log();
        self.plugin_violations();
        match self.spawner.try_event() {
            Ok(Some(Event::Exited { pid, status })) => self.plugin_ended(pid, status),
            Ok(_) => None,
            // With the spawner its children end.
            Err(_) => Some(Err(VmmError::SpawnerDied)),
        }
    }

    fn kill_plugin(&mut self) {
        let Some(plugin) = &self.plugin else { return };
        let pid = plugin.pid();
        if let Err(error) = self.spawner.kill(pid) {
            tracing::error!(error = crate::remedy::chain(&error), "ending the plugin");
        }
        let end = Instant::now() + REAP_LIMIT;
        while self.plugin.is_some() {
            let left = end.saturating_duration_since(Instant::now());
            if self.plugin_event(left).is_some() || left.is_zero() {
                return;
            }
        }
    }
}
