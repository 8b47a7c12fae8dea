//! What can go wrong, with the errno the C interface has for it.

use cellblock_wire::{ChannelError, ShmError};
use nix::errno::Errno;

/// Why a call of a plugin failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This process was not started as a plugin.
    #[error("connecting to the VMM: {} is not set", crate::SOCKET_VARIABLE)]
    NotAPlugin,
    /// The environment does not name a socket.
    #[error("connecting to the VMM: {} is not the number of a socket", crate::SOCKET_VARIABLE)]
    BadSocket,
    /// The socket of a VM to attach to.
    #[error("attaching to the VM")]
    Attach(#[source] Errno),
    /// The VMM refused the request, or the kernel did.
    #[error("{what}")]
    Refused {
        /// What was being done.
        what: &'static str,
        /// Why not.
        #[source]
        errno: Errno,
    },
    /// The VMM is gone.
    #[error("the VMM closed the connection")]
    Closed,
    /// The call does not fit the vCPU's state: a resume without an event, state without one.
    #[error("{0}")]
    Protocol(&'static str),
    /// The VMM did not answer as it should.
    #[error("talking to the VMM")]
    Channel(#[source] ChannelError),
    /// Memory shared with the VMM.
    #[error("sharing memory with the VMM")]
    Memory(#[source] ShmError),
}

impl Error {
    /// The error number: what the C interface returns, negated.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Error::NotAPlugin => Errno::ENOTCONN,
            Error::BadSocket => Errno::EINVAL,
            Error::Attach(errno) | Error::Refused { errno, .. } => *errno,
            Error::Closed => Errno::EPIPE,
            Error::Protocol(_) => Errno::EPROTO,
            // A descriptor that is none, for one.
            Error::Channel(ChannelError::Send(errno) | ChannelError::Receive(errno)) => *errno,
            Error::Channel(_) => Errno::EPROTO,
            Error::Memory(_) => Errno::ENOMEM,
        };
        errno as i32
    }
}

impl From<ChannelError> for Error {
    fn from(error: ChannelError) -> Error {
        match error {
            ChannelError::Closed => Error::Closed,
            other => Error::Channel(other),
        }
    }
}

/// Makes an error of the kernel's or the VMM's one of ours.
pub(crate) fn refused(what: &'static str) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::Refused { what, errno }
}
