//! How many file descriptors plugins may take up: all of them together leave the VMM enough for
//! its control socket, for device processes that take the place of others, and for snapshots.

use std::io;

use cellblock_plugin_api::Rights;
use cellblock_wire::closer;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

use super::hub::Hub;

/// For the VMM itself, beside what each vCPU takes; but never more than three quarters of all.
const RESERVE: u64 = 512;
const OF_A_VCPU: u64 = 4;
/// fds that are not closed yet, from where on nobody new is let in and none are taken. With those of
/// one message more, at most 253, they find room in the reserve: for what finds none the kernel has
/// the thread that receives close it.
pub(super) const UNCLOSED: usize = 64;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fds {
    all: usize,
}

impl Fds {
    /// By the limit of this process.
    pub(super) fn of_process(vcpus: usize) -> io::Result<Fds> {
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        Ok(Fds::of(limit, vcpus))
    }

    fn of(limit: u64, vcpus: usize) -> Fds {
        let reserve = RESERVE.saturating_add(OF_A_VCPU.saturating_mul(vcpus as u64));
        let left = limit - reserve.min(limit / 4 * 3);
        Fds { all: usize::try_from(left).unwrap_or(usize::MAX) }
    }

    /// EMFILE where `more` are too many. Who only observes has half of them, shared with its like.
    pub(super) fn room(self, hub: &Hub, rights: Rights, more: usize) -> Result<(), Errno> {
        let (mut all, mut observers) = (closer::waiting(), 0);
        for session in hub.sessions().iter() {
            let fds = session.fds();
            all += fds;
            if session.rights() != Rights::Control {
                observers += fds;
            }
        }
        let observes = rights != Rights::Control;
        if all + more > self.all || observes && observers + more > self.all / 2 {
            return Err(Errno::EMFILE);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vmm_keeps_what_it_needs() {
        assert_eq!(Fds::of(1024, 1).all, 508);
        assert_eq!(Fds::of(1024, 254).all, 256);
        assert_eq!(Fds::of(256, 1).all, 64);
        assert_eq!(Fds::of(1 << 20, 4).all, (1 << 20) - 528);
    }
}
