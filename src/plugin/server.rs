//! The thread that serves plugins' connections.
//!
//! One thread for all of them, so that nothing one plugin does costs more than its turn: a message
//! is answered or its connection ends, and nobody is waited for.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{Builder, JoinHandle};

use cellblock_plugin_api::wire::{Reply, Request};
use cellblock_wire::{Channel, ChannelError};
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vmm_sys_util::eventfd::EventFd;

use super::hub::Hub;
use super::listen::AttachSocket;
use super::memory::SlotNumbers;
use super::session::Session;
use crate::control::socket::Node;
use crate::event;
use crate::snapshot::write_logs::WriteLogs;
use crate::vcpu::Supply;
use crate::vm::kvm::Machine;

/// The most connections of one plugin.
const CONNECTIONS: usize = 128;
/// The most programs that are attached at a time.
const ATTACHED: usize = 16;
/// Messages of one connection in a row.
const ROUND: usize = 16;

/// The VM as the server uses it.
pub struct Machinery {
    /// The virtual machine.
    pub machine: Arc<Machine>,
    /// Where vCPUs go that a plugin starts: in a VM that is a plugin's.
    pub supply: Option<Supply>,
    /// vCPUs that are ready for it; where there are none, they are made when it starts them.
    pub vcpus: Vec<VcpuFd>,
    /// Called once the vCPUs are there.
    pub on_start: Box<dyn Fn() + Send>,
    /// What is written to the VM's own memory.
    pub logs: &'static WriteLogs,
    /// Device processes map guest memory: what a plugin adds they would not have.
    pub memory_is_mapped: bool,
    /// The network interface for plugins.
    pub network: Option<Network>,
}

/// A TAP device and the host's end of it.
#[derive(Debug)]
pub struct Network {
    /// The device.
    pub tap: OwnedFd,
    /// The host's address.
    pub host_ip: Ipv4Addr,
    /// The network's mask.
    pub netmask: Ipv4Addr,
    /// The host's hardware address.
    pub mac: [u8; 6],
}

/// The server could not be started.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum StartError {
    #[error("preparing to serve plugins")]
    System(#[source] io::Error),
    #[error("starting the thread that serves plugins")]
    Thread(#[source] io::Error),
    #[error("confining the thread that serves plugins: {0}")]
    Confine(String),
}

/// The running server. Dropping it ends it, and with it every connection.
#[derive(Debug)]
pub struct Plugins {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    _node: Option<Node>,
}

impl Plugins {
    /// Starts the server, with the socket of the VM's owner and the one to attach by. `confine` is
    /// called first on its thread.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(
        hub: Arc<Hub>,
        machinery: Machinery,
        owner: Option<OwnedFd>,
        mut attach: Option<AttachSocket>,
        confine: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<Plugins, StartError> {
        let system = |errno: Errno| StartError::System(errno.into());
        let stop = Arc::new(event::event().map_err(StartError::System)?);
        let node = attach.as_mut().and_then(AttachSocket::take_node);
        let Machinery { machine, supply, vcpus, on_start, logs, memory_is_mapped, network } =
            machinery;
        let mut server = Server {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(system)?,
            hub,
            machine,
            supply,
            vcpus,
            on_start,
            logs,
            memory_is_mapped,
            network,
            attach,
            slots: SlotNumbers::default(),
            connections: BTreeMap::new(),
            next: FIRST,
        };
        server.watch(event::fd(&stop), STOP).map_err(system)?;
        if let Some(attach) = &server.attach {
            server.watch(attach.as_fd(), ATTACH).map_err(system)?;
        }
        if let (Some(socket), Some(session)) = (owner, server.hub.owner().cloned()) {
            server.add(Channel::from_fd(socket), session).map_err(system)?;
        }
        let (ready, confined) = crossbeam_channel::bounded(1);
        let thread = Builder::new()
            .name("plugins".into())
            .spawn(move || {
                let result = confine();
                let go_on = result.is_ok();
                let _ = ready.send(result);
                if go_on {
                    server.run();
                }
            })
            .map_err(StartError::Thread)?;
        match confined.recv() {
            Ok(Ok(())) => Ok(Plugins { stop, thread: Some(thread), _node: node }),
            Ok(Err(why)) => Err(StartError::Confine(why)),
            Err(_) => Err(StartError::Confine("it ended".into())),
        }
    }
}

impl Drop for Plugins {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const STOP: u64 = 0;
const ATTACH: u64 = 1;
const FIRST: u64 = 2;

/// What the thread has.
pub(super) struct Server {
    epoll: Epoll,
    pub(super) hub: Arc<Hub>,
    pub(super) machine: Arc<Machine>,
    supply: Option<Supply>,
    vcpus: Vec<VcpuFd>,
    pub(super) on_start: Box<dyn Fn() + Send>,
    pub(super) logs: &'static WriteLogs,
    pub(super) memory_is_mapped: bool,
    pub(super) network: Option<Network>,
    pub(super) attach: Option<AttachSocket>,
    pub(super) slots: SlotNumbers,
    connections: BTreeMap<u64, Connection>,
    next: u64,
}

struct Connection {
    channel: Channel,
    session: Arc<Session>,
}

impl Server {
    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 16];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    tracing::error!(%errno, "waiting for plugins");
                    break;
                }
            };
            for event in &events[..count] {
                match event.data() {
                    STOP => return self.close_all(),
                    ATTACH => self.accept(),
                    id => self.serve(id),
                }
            }
        }
    }

    fn close_all(mut self) {
        while let Some(id) = self.connections.keys().next().copied() {
            self.close(id);
        }
    }

    fn watch(&self, fd: std::os::fd::BorrowedFd<'_>, token: u64) -> nix::Result<()> {
        self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))
    }

    fn add(&mut self, channel: Channel, session: Arc<Session>) -> nix::Result<()> {
        let id = self.next;
        self.next += 1;
        self.watch(channel.as_fd(), id)?;
        session.connections.fetch_add(1, Ordering::Relaxed);
        self.connections.insert(id, Connection { channel, session });
        Ok(())
    }

    /// A further connection of a plugin; its end.
    pub(super) fn connect(&mut self, session: &Arc<Session>) -> Result<OwnedFd, Errno> {
        if session.connections.load(Ordering::Relaxed) >= CONNECTIONS {
            return Err(Errno::EMFILE);
        }
        let (ours, theirs) = Channel::pair().map_err(|_| Errno::EMFILE)?;
        self.add(ours, session.clone())?;
        Ok(theirs.into_fd())
    }

    fn accept(&mut self) {
        let Some(attach) = &self.attach else { return };
        let Some((socket, rights)) = attach.accept() else { return };
        let memory = attach.memory();
        let mut attached: Vec<usize> = self.connections.values().map(|c| c.session.id()).collect();
        attached.dedup();
        attached.sort_unstable();
        attached.dedup();
        if attached.len() >= ATTACHED {
            tracing::warn!("{ATTACHED} programs are attached; refused another");
            return;
        }
        let joined = self.hub.join(rights, memory);
        let added = match joined {
            Ok(session) => self.add(Channel::from_fd(socket), session).map_err(|e| e.to_string()),
            Err(error) => Err(crate::remedy::chain(&error)),
        };
        if let Err(error) = added {
            tracing::error!(error, "letting a program attach");
        }
    }

    fn serve(&mut self, id: u64) {
        for _ in 0..ROUND {
            let Some(connection) = self.connections.get(&id) else { return };
            let session = connection.session.clone();
            let (request, fds) = match connection.channel.try_recv::<Request>() {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(error) => {
                    if !matches!(error, ChannelError::Closed) {
                        tracing::warn!(error = crate::remedy::chain(&error), "a plugin's message");
                    }
                    return self.close(id);
                }
            };
            let (reply, fds): (Reply, _) = match self.carry_out(&session, request, &fds) {
                Ok(out) => (Ok(out.answer), out.fds),
                Err(errno) => (Err(errno as i32), Vec::new()),
            };
            let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            let Some(connection) = self.connections.get(&id) else { return };
            // A plugin has one request under way: one that leaves so many answers unread that the
            // socket is full is no longer served.
            if !matches!(connection.channel.try_send(&reply, &fds), Ok(true)) {
                return self.close(id);
            }
        }
    }

    fn close(&mut self, id: u64) {
        let Some(Connection { channel, session }) = self.connections.remove(&id) else { return };
        let _ = self.epoll.delete(&channel);
        if session.connections.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.hub.leave(&session);
            if !session.is_owner() {
                self.undo(&session);
            }
        }
    }

    /// Makes the vCPUs and gives them to their threads.
    pub(super) fn start_vcpus(&mut self) -> Result<(), Errno> {
        let supply = self.supply.take().ok_or(Errno::EINVAL)?;
        let mut fds = std::mem::take(&mut self.vcpus);
        if fds.is_empty() {
            fds = (0..self.hub.vcpus())
                .map(|id| self.machine.vm().create_vcpu(id as u64))
                .collect::<Result<_, _>>()
                .map_err(super::orders::errno)?;
        }
        supply.give(fds).map_err(|error| {
            tracing::error!(error = crate::remedy::chain(&error), "starting the vCPUs");
            Errno::ENOMEM
        })?;
        (self.on_start)();
        Ok(())
    }
}
