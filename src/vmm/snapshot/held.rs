//! A cut that a client holds: the VM stands still until that client says, or goes.
//!
//! Guest memory and disks are read meanwhile as they are, so nobody else may have the VM go on.

use super::super::event_loop::Vm;
use crate::control::protocol::{Reply, Request};
use crate::control::server::ControlServer;
use crate::snapshot::coordinator::Input;

impl Vm {
    /// Answers what depends on whose the hold is; `None` of everything else.
    pub(in super::super) fn about_hold(&self, request: &Request, client: u64) -> Option<Reply> {
        let holder = self.snapshots.held.as_ref().map(|(holder, _)| *holder);
        match (request, holder) {
            (Request::Held, Some(holder)) if holder == client => Some(Reply::Held),
            (Request::Held, _) => Some(Reply::error(
                "the VM is not held for this connection: it has gone on, or another holds it",
                Some("take the snapshot again"),
            )),
            (Request::Resume, Some(holder)) if holder != client => Some(Reply::error(
                "the VM is held for a snapshot, and goes on when that has what it needs",
                Some("wait for it, or end the 'cellblock snapshot' that takes it"),
            )),
            _ => None,
        }
    }

    /// Lets everyone go on after a cut that was held. False where there is none.
    pub(in super::super) fn end_hold(&mut self) -> bool {
        let Some((_, frozen)) = self.snapshots.held.take() else { return false };
        self.thaw(frozen, Input::Thaw);
        true
    }

    /// A client is gone: what it held goes on.
    pub(in super::super) fn client_gone(&mut self, client: u64) {
        self.release_guest(client);
        if self.snapshots.live.as_ref().is_some_and(|live| live.token.client() == client) {
            tracing::warn!("who asked for a live snapshot is gone; it is given up");
            self.snapshots.live = None;
        }
        if self.snapshots.coming.as_ref().is_some_and(|coming| coming.token.client() == client) {
            self.snapshots.coming = None;
        }
        if self.snapshots.held.as_ref().is_some_and(|(holder, _)| *holder == client)
            && !self.asked_to_stop
        {
            tracing::warn!("who took the snapshot is gone; the VM goes on");
            self.end_hold();
        }
    }

    /// What clients had of the VM that went while they were sent something is given up too.
    pub(in super::super) fn clients_lost(&mut self) {
        while let Some(lost) = self.control.as_mut().map(ControlServer::take_lost)
            && !lost.is_empty()
        {
            lost.into_iter().for_each(|client| self.client_gone(client));
        }
    }

    /// Whether a cut holds the VM still.
    pub(in super::super) fn is_held(&self) -> bool {
        self.snapshots.held.is_some()
    }
}
