//! The socket by which outside programs attach to a VM, and who may.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use cellblock_plugin_api::{MemoryAccess, Rights};
use cellblock_wire::closer::{self, Outside};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{SockFlag, SockType, accept4, getsockopt, sockopt::PeerCredentials};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::geteuid;

use crate::control::socket::{ListeningSocket, Node, SocketError};
use crate::remedy::Remedy;
use crate::spec::PluginSocketSpec;
use crate::throttle::Throttle;
use crate::vm::memory::GuestRam;

/// The socket to attach by could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The socket itself.
    #[error("making the plugin socket")]
    Socket(#[from] SocketError),
    /// It cannot be used as wanted.
    #[error("setting the plugin socket up")]
    Setup(#[source] Errno),
    /// Guest memory cannot be opened for reading only.
    #[error("opening guest memory for plugins")]
    Memory(#[source] io::Error),
}

impl Remedy for AttachError {
    fn remedy(&self) -> Option<String> {
        match self {
            AttachError::Socket(error) => error.remedy(),
            _ => None,
        }
    }
}

/// A listening socket, and what those that connect to it get.
pub struct AttachSocket {
    /// Those that were not let in yet may have sent something.
    fd: Outside<OwnedFd>,
    node: Option<Node>,
    spec: PluginSocketSpec,
    uid: u32,
    /// Guest memory as it is handed out, and to be looked at only.
    ram: Option<OwnedFd>,
    read_only: Option<OwnedFd>,
    /// Whether all of it is there, where it comes on demand.
    arrived: Option<Arrived>,
    /// Those that were refused.
    refusals: Throttle,
}

/// Who is at the socket.
pub(super) enum Caller {
    /// Nobody.
    Nobody,
    /// Somebody who may, with what they may.
    Let(OwnedFd, Rights),
    /// Somebody who may not, and is closed.
    Refused,
    /// Somebody for whom there are no fds now.
    Waits(Errno),
}

/// Says whether all of guest memory is there.
pub type Arrived = Box<dyn Fn() -> bool + Send>;

impl AttachSocket {
    /// Makes the socket. Before privileges go: paths are opened.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn bind(spec: &PluginSocketSpec) -> Result<AttachSocket, AttachError> {
        // Others may connect where others are let in; who they are is asked for each of them.
        let private = spec.observe.is_empty() && spec.control.is_empty();
        let mode = Mode::from_bits_truncate(if private { 0o600 } else { 0o666 });
        let socket = ListeningSocket::bind_as(&spec.path, SockType::SeqPacket, mode)?;
        let (fd, node) = socket.into_parts();
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(AttachError::Setup)?;
        let uid = geteuid().as_raw();
        Ok(AttachSocket {
            fd: fd.into(),
            node: Some(node),
            spec: spec.clone(),
            uid,
            ram: None,
            read_only: None,
            arrived: None,
            refusals: Throttle::default(),
        })
    }

    /// Prepares guest memory to be handed out.
    ///
    /// A memfd can be opened anew through `/proc/self/fd` by whoever its mode lets, for writing as
    /// well: the mode says the VMM's user only. (It could not be sealed against writing, since a
    /// device process that is replaced maps it for writing later.)
    ///
    /// Memory that comes on demand comes to who has registered with the pager. Others would find
    /// zeros, and what they wrote would be taken for what has come: they get it once it is whole,
    /// which `arrived` tells.
    ///
    /// # Errors
    /// [`AttachError::Memory`].
    pub fn hand_out(
        &mut self,
        ram: &GuestRam,
        arrived: Option<Arrived>,
    ) -> Result<(), AttachError> {
        self.arrived = arrived;
        if self.spec.memory == MemoryAccess::None {
            return Ok(());
        }
        fchmod(ram.fd(), Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|errno| AttachError::Memory(errno.into()))?;
        let path = format!("/proc/self/fd/{}", ram.fd().as_raw_fd());
        self.read_only = Some(File::open(path).map_err(AttachError::Memory)?.into());
        self.ram = match self.spec.memory {
            MemoryAccess::ReadWrite => Some(ram.fd().try_clone_to_owned()),
            _ => self.read_only.as_ref().map(OwnedFd::try_clone),
        }
        .transpose()
        .map_err(AttachError::Memory)?;
        Ok(())
    }

    /// The path of the socket, to be removed with its owner: by the thread that may.
    pub(super) fn take_node(&mut self) -> Option<Node> {
        self.node.take()
    }

    pub(super) fn memory(&self) -> MemoryAccess {
        self.spec.memory
    }

    /// Whether memory can be handed out by now.
    pub(super) fn has_arrived(&self) -> bool {
        self.arrived.as_ref().is_none_or(|arrived| arrived())
    }

    pub(super) fn ram(&self) -> Option<BorrowedFd<'_>> {
        self.ram.as_ref().map(|fd| fd.as_fd())
    }

    /// Guest memory that cannot be written to.
    pub(super) fn read_only_ram(&self) -> Option<OwnedFd> {
        self.read_only.as_ref()?.try_clone().ok()
    }

    /// The next who has connected.
    #[allow(unsafe_code)] // nix gives the accepted descriptor as a number
    pub(super) fn accept(&mut self) -> Caller {
        let fd = match accept4(self.fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(fd) => fd,
            Err(errno @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS)) => {
                return Caller::Waits(errno);
            }
            Err(_) => return Caller::Nobody,
        };
        // SAFETY: the kernel gave it to us just now.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let uid = getsockopt(&socket, PeerCredentials).map(|peer| peer.uid());
        match uid.ok().and_then(|uid| self.rights(uid)) {
            Some(rights) => Caller::Let(socket, rights),
            None => {
                closer::close(socket);
                if let Some(unsaid) = self.refusals.take() {
                    let uid = uid.unwrap_or(u32::MAX);
                    tracing::warn!(uid, unsaid, "refused a program that tried to attach");
                }
                Caller::Refused
            }
        }
    }

    fn rights(&self, uid: u32) -> Option<Rights> {
        if uid == self.uid || uid == 0 || self.spec.control.contains(&uid) {
            Some(Rights::Control)
        } else if self.spec.observe.contains(&uid) {
            Some(Rights::Observe)
        } else {
            None
        }
    }
}

impl std::fmt::Debug for AttachSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AttachSocket").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl AsFd for AttachSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
