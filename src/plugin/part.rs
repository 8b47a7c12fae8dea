//! Plugins in snapshots: who takes part, who would have to, and what they give to be kept.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_plugin_api::Space;
use cellblock_plugin_api::wire::Payload;
use cellblock_plugin_api::wire::part::{FromPart, MAX_STATE, ToPart};
use cellblock_wire::{Channel, ChannelError, closer};
use nix::errno::Errno;

use super::fds::UNCLOSED;
use super::hub::Hub;
use super::session::{Part, Session};

/// Name of the plugin that the VMM starts.
pub const OWNER: &str = "plugin0";
/// How the names begin of those that attached and do not take part.
const ATTACHED: &str = "attached-";
/// What a plugin may leave unread, in bytes as [`Channel::unread`] counts them, and still be asked
/// to come to rest: a third of the channel, so that there is room to tell it to go on.
const UNREAD: usize = 64 << 10;
/// Longest name of one that attached.
const NAME: usize = 64;

/// A plugin that has something of the machine, at a snapshot.
#[derive(Clone)]
pub struct Holder {
    /// For the snapshot.
    pub name: String,
    part: Option<Part>,
}

/// What a plugin answered.
pub enum Answer {
    /// Its state.
    State(Vec<u8>),
    /// It has gone back to its state.
    Restored,
    /// It cannot.
    Failed(i32),
    /// It did not answer in time.
    Late,
    /// It is gone, or said what it cannot have meant.
    Gone,
}

impl Holder {
    /// Whether it can give a state at all.
    pub fn takes_part(&self) -> bool {
        self.part.is_some()
    }

    /// Asks it to come to rest; false if it cannot be asked.
    pub fn quiesce(&self, epoch: u64) -> bool {
        self.has_room() && self.tell(&ToPart::Quiesce { epoch }, None)
    }

    /// Asks it to go back to `state`; false if it cannot be asked.
    pub fn restore(&self, epoch: u64, state: Vec<u8>) -> bool {
        let Ok((state, fd)) = Payload::new(state) else { return false };
        self.has_room() && self.tell(&ToPart::Restore { epoch, state }, fd.as_ref())
    }

    /// Lets it go on.
    pub fn thaw(&self, epoch: u64) {
        self.tell(&ToPart::Thaw { epoch }, None);
    }

    fn has_room(&self) -> bool {
        self.part.as_ref().is_some_and(|part| part.unread() < UNREAD)
    }

    fn tell(&self, message: &ToPart, fd: Option<&OwnedFd>) -> bool {
        let fds: Vec<_> = fd.into_iter().map(|fd| fd.as_fd()).collect();
        // One that reads nothing is not waited for.
        self.part.as_ref().is_some_and(|part| matches!(part.try_send(message, &fds), Ok(true)))
    }

    /// Waits for its answer of this epoch.
    pub fn answer(&self, epoch: u64, until: Instant) -> Answer {
        let Some(part) = &self.part else { return Answer::Gone };
        loop {
            // What it has said already counts, however late it is.
            let left = until.saturating_duration_since(Instant::now());
            let left = left.max(Duration::from_millis(1));
            if closer::waiting() >= UNCLOSED && part.brings_fds(left) {
                return Answer::Gone;
            }
            let (message, fds) = match part.recv_timeout::<FromPart>(left) {
                Ok((_, fds)) if fds.len() > 1 => {
                    closer::close_all(fds);
                    return Answer::Gone;
                }
                Ok(message) => message,
                Err(ChannelError::TimedOut(_)) => return Answer::Late,
                Err(_) => return Answer::Gone,
            };
            let answer = match message {
                FromPart::Quiesced { epoch: of, state } if of == epoch => Some(kept(state, &fds)),
                FromPart::Restored { epoch: of } if of == epoch => Some(Answer::Restored),
                FromPart::Failed { epoch: of, errno } if of == epoch => Some(Answer::Failed(errno)),
                // Of a snapshot that was given up.
                _ if Instant::now() < until => None,
                _ => Some(Answer::Late),
            };
            closer::close_all(fds);
            if let Some(answer) = answer {
                return answer;
            }
        }
    }
}

/// The state that a plugin gives, of which it says first how much it is.
fn kept(state: Payload, fds: &[OwnedFd]) -> Answer {
    if state.bytes() > MAX_STATE as u64 {
        return Answer::Failed(Errno::EFBIG as i32);
    }
    match state.take(fds.last().map(|fd| fd.as_fd())) {
        Ok(state) => Answer::State(state),
        Err(_) => Answer::Failed(Errno::EFBIG as i32),
    }
}

/// What a plugin is called.
fn name(session: &Arc<Session>) -> String {
    match (session.part(), session.is_owner()) {
        (_, true) => OWNER.to_string(),
        (Some((name, _)), false) => name,
        (None, false) => format!("{ATTACHED}{}", session.id()),
    }
}

impl Hub {
    /// What plugins are to go on from, by name: before any takes part.
    pub fn restore(&self, states: Vec<(String, Vec<u8>)>) {
        self.restored().extend(states);
    }

    /// Everybody who has something of the machine, or takes part all the same.
    pub fn holders(&self) -> Vec<Holder> {
        let of = |session: &Arc<Session>| {
            let part = session.part();
            let made = session.made().parts() > 0;
            let holds = session.is_owner() || self.holds_range(session) || made;
            let part = part.map(|(_, part)| part);
            (part.is_some() || holds).then(|| Holder { name: name(session), part })
        };
        let mut holders: Vec<Holder> = self.sessions().iter().filter_map(of).collect();
        holders.sort_by(|a, b| a.name.cmp(&b.name));
        holders
    }

    /// Who is to answer an access at `address`.
    pub fn holder_of(&self, space: Space, address: u64) -> Option<String> {
        let watcher = self.watcher(space, address, 0);
        let claim = || self.claim(space, address).map(|claim| claim.session);
        Some(name(&watcher.or_else(claim)?))
    }

    /// Who has begun to write to the VM's memory and has not ended.
    pub fn writer(&self) -> Option<String> {
        self.sessions().iter().find(|session| !session.made().writing.is_empty()).map(name)
    }

    /// Lets `session` take part under `name`; its end of the channel, and what it goes on from.
    pub(super) fn take_part(
        &self,
        session: &Session,
        name: &str,
    ) -> Result<(OwnedFd, Option<Payload>, Option<OwnedFd>), Errno> {
        let name = if session.is_owner() { OWNER } else { name };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > NAME || !name.chars().all(plain) {
            return Err(Errno::EINVAL);
        }
        let taken = |other: &Arc<Session>| other.part().is_some_and(|(known, _)| known == name);
        if session.part().is_some() {
            return Err(Errno::EALREADY);
        }
        // Those are ours to give.
        let reserved = !session.is_owner() && (name == OWNER || name.starts_with(ATTACHED));
        if reserved || self.sessions().iter().any(taken) {
            return Err(Errno::EEXIST);
        }
        let (ours, theirs) = Channel::pair().map_err(|_| Errno::EMFILE)?;
        let restored = self.restored().remove(name);
        let (payload, fd) = match restored.map(Payload::new).transpose() {
            Ok(made) => made.unzip(),
            Err(_) => return Err(Errno::ENOMEM),
        };
        session.set_part(name, ours);
        Ok((theirs.into_fd(), payload, fd.flatten()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However often it is asked while it reads nothing: whoever is to rest is told to go on.
    #[test]
    fn what_reads_nothing_for_long_misses_no_thaw() {
        for before in 0..2 {
            let (ours, theirs) = Channel::pair().unwrap();
            let holder = Holder { name: "p".into(), part: Some(Arc::new(ours.into())) };
            (0..before).for_each(|epoch| holder.thaw(epoch));
            let asked = (before..10_000).take_while(|epoch| {
                let asked = holder.quiesce(*epoch);
                holder.thaw(*epoch);
                asked
            });
            let asked = asked.count() as u64;
            assert!((10..9_000).contains(&asked), "{asked}");
            let mut rests = 0;
            while let Ok(Some((message, _))) = theirs.try_recv() {
                match message {
                    ToPart::Quiesce { epoch } => rests = epoch,
                    ToPart::Thaw { epoch } if epoch >= rests => rests = 0,
                    _ => {}
                }
            }
            assert_eq!(rests, 0, "it was never told to go on");
            // And now it can be asked again.
            assert!(holder.quiesce(10_000));
        }
    }
}
