//! The thread that serves plugins' connections.
//!
//! One thread for all of them. A message is answered or its sender's connections end, in turns, and
//! nobody is waited for: answers that find no room end the connection, and fds that come in, or lie
//! in a connection that ends, are closed elsewhere ([`closer`]).

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::Builder;
use std::time::Duration;

use cellblock_plugin_api::Rights;
use cellblock_plugin_api::wire::{Reply, Request};
use cellblock_wire::closer::{self, Outside};
use cellblock_wire::{Channel, ChannelError};
use crossbeam_channel::{Receiver, Sender};
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{Shutdown, shutdown};
use vmm_sys_util::eventfd::EventFd;

use super::fds::{Fds, UNCLOSED};
use super::hub::Hub;
use super::listen::{AttachSocket, Caller};
use super::memory::SlotNumbers;
use super::session::Session;
use crate::control::socket::Node;
use crate::event;
use crate::snapshot::write_logs::WriteLogs;
use crate::throttle::Throttle;
use crate::vcpu::Supply;
use crate::vm::kvm::Machine;

/// The most connections of one plugin.
const CONNECTIONS: usize = 128;
/// The most programs that are attached at a time, and how many of them may only observe.
const ATTACHED: usize = 16;
const OBSERVERS: usize = 12;
/// fds that one more costs: its own, and those of its first answers.
const NEW_FDS: usize = 8;
/// How long those wait that cannot be let in for want of fds, before it is tried again.
const BREATH: Duration = Duration::from_millis(100);
/// How long the thread may take to end.
const END_LIMIT: Duration = Duration::from_secs(2);
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
    /// Ends with the thread.
    ended: Receiver<()>,
    _node: Option<Node>,
}

impl Plugins {
    /// Starts the server, with the socket of the VM's owner and the one to attach by. `confine` is
    /// called first on each of its threads.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(
        hub: Arc<Hub>,
        machinery: Machinery,
        owner: Option<OwnedFd>,
        mut attach: Option<AttachSocket>,
        confine: impl Fn() -> Result<(), String> + Clone + Send + 'static,
    ) -> Result<Plugins, StartError> {
        let system = |errno: Errno| StartError::System(errno.into());
        closer::start(confine.clone()).map_err(StartError::Thread)?;
        let fds = Fds::of_process(hub.vcpus()).map_err(StartError::System)?;
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
            fds,
            shut: false,
            refusals: Throttle::default(),
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
        let (alive, ended): (Sender<()>, _) = crossbeam_channel::bounded(0);
        Builder::new()
            .name("plugins".into())
            .spawn(move || {
                let _alive = alive;
                let result = confine();
                let go_on = result.is_ok();
                let _ = ready.send(result);
                if go_on {
                    server.run();
                }
            })
            .map_err(StartError::Thread)?;
        match confined.recv() {
            Ok(Ok(())) => Ok(Plugins { stop, ended, _node: node }),
            Ok(Err(why)) => Err(StartError::Confine(why)),
            Err(_) => Err(StartError::Confine("it ended".into())),
        }
    }
}

impl Drop for Plugins {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        // Nothing it does waits for a plugin; but the VM's end depends on no plugin's thread at all.
        if let Err(crossbeam_channel::RecvTimeoutError::Timeout) =
            self.ended.recv_timeout(END_LIMIT)
        {
            tracing::error!("the thread that serves plugins does not end; it is left to itself");
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
    pub(super) fds: Fds,
    /// Nobody is let in for a moment.
    shut: bool,
    /// Plugins that were let go for what they sent.
    refusals: Throttle,
    pub(super) slots: SlotNumbers,
    connections: BTreeMap<u64, Connection>,
    next: u64,
}

struct Connection {
    channel: Outside<Channel>,
    session: Arc<Session>,
}

impl Server {
    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 16];
        loop {
            let limit = if self.shut { BREATH.try_into() } else { Ok(EpollTimeout::NONE) };
            let count = match self.epoll.wait(&mut events, limit.unwrap_or(EpollTimeout::ZERO)) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    tracing::error!(%errno, "waiting for plugins");
                    break;
                }
            };
            if self.shut && self.may_open() {
                self.set_shut(false);
            }
            for event in &events[..count] {
                match event.data() {
                    STOP => return self.close_all(),
                    ATTACH => self.accept(),
                    id => self.serve(id),
                }
            }
        }
    }

    /// The VM ends, and with it all that plugins made: nothing is undone, one by one.
    fn close_all(self) {
        for Connection { session, channel } in self.connections.values() {
            self.hub.leave(session);
            let _ = shutdown(channel.as_raw_fd(), Shutdown::Both);
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
        self.connections.insert(id, Connection { channel: channel.into(), session });
        Ok(())
    }

    /// A further connection of a plugin; its end.
    pub(super) fn connect(&mut self, session: &Arc<Session>) -> Result<OwnedFd, Errno> {
        if session.connections.load(Ordering::Relaxed) >= CONNECTIONS {
            return Err(Errno::EMFILE);
        }
        self.fds.room(&self.hub, session.rights(), 1)?;
        let (ours, theirs) = Channel::pair().map_err(|_| Errno::EMFILE)?;
        self.add(ours, session.clone())?;
        Ok(theirs.into_fd())
    }

    fn accept(&mut self) {
        if !self.may_open() {
            if let Some(unsaid) = self.refusals.take() {
                tracing::warn!(
                    unsaid,
                    "programs wait to attach until more of what others sent is closed"
                );
            }
            return self.set_shut(true);
        }
        let Some(attach) = &mut self.attach else { return };
        let (socket, rights) = match attach.accept() {
            Caller::Let(socket, rights) => (socket, rights),
            Caller::Nobody | Caller::Refused => return,
            Caller::Waits(errno) => {
                if let Some(unsaid) = self.refusals.take() {
                    tracing::warn!(%errno, unsaid, "a program cannot attach now; it waits");
                }
                return self.set_shut(true);
            }
        };
        let memory = attach.memory();
        if let Err(error) = self.admit(rights) {
            closer::close(socket);
            if let Some(unsaid) = self.refusals.take() {
                tracing::warn!(unsaid, "refused a program that tried to attach: {error}");
            }
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

    /// Whether there is room for one more.
    fn admit(&self, rights: Rights) -> Result<(), String> {
        let (mut all, mut observers) = (0, 0);
        for session in self.hub.sessions().iter().filter(|session| !session.is_owner()) {
            all += 1;
            observers += usize::from(session.rights() != Rights::Control);
        }
        if all >= ATTACHED {
            return Err(format!("{ATTACHED} programs are attached"));
        }
        if rights != Rights::Control && observers >= OBSERVERS {
            return Err(format!("{OBSERVERS} programs that observe are attached"));
        }
        self.fds.room(&self.hub, rights, NEW_FDS).map_err(|_| {
            "those that are attached have all fds that are for them; raise the limit of open \
             files (ulimit -n) of the VM"
                .to_string()
        })
    }

    /// Whether a connection can be taken on, if only to be refused.
    fn may_open(&self) -> bool {
        closer::waiting() < UNCLOSED
    }

    /// Leaves those that connect where they are; they are let in later.
    fn set_shut(&mut self, shut: bool) {
        let Some(attach) = &self.attach else { return };
        let flags = if shut { EpollFlags::empty() } else { EpollFlags::EPOLLIN };
        match self.epoll.modify(attach, &mut EpollEvent::new(flags, ATTACH)) {
            Ok(()) => self.shut = shut,
            Err(errno) => tracing::error!(%errno, "watching the plugin socket"),
        }
    }

    fn serve(&mut self, id: u64) {
        for _ in 0..ROUND {
            let Some(connection) = self.connections.get(&id) else { return };
            let session = connection.session.clone();
            if closer::waiting() >= UNCLOSED && connection.channel.brings_fds(Duration::ZERO) {
                return self.let_go(&session, "fds, while many others are yet to be closed");
            }
            let (request, fds) = match connection.channel.try_recv::<Request>() {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(ChannelError::Closed) => return self.close(id),
                Err(error) => return self.let_go(&session, &crate::remedy::chain(&error)),
            };
            if fds.len() > takes(&request) {
                closer::close_all(fds);
                return self.let_go(&session, "more fds than are taken");
            }
            let result = self.carry_out(&session, request, &fds);
            closer::close_all(fds);
            let (reply, fds): (Reply, _) = match result {
                Ok(out) => (Ok(out.answer), out.fds),
                Err(errno) => (Err(errno as i32), Vec::new()),
            };
            let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            let Some(connection) = self.connections.get(&id) else { return };
            // fds that nobody has taken count for us, who sent them: beyond the limit of open files
            // none could be sent to anybody.
            if !fds.is_empty() && connection.channel.has_unread() {
                return self.let_go(&session, "requests for fds, with answers that were not read");
            }
            // A plugin has one request under way: one that leaves so many answers unread that the
            // socket is full is no longer served.
            if !matches!(connection.channel.try_send(&reply, &fds), Ok(true)) {
                return self.close(id);
            }
        }
    }

    /// Ends all connections of a plugin that sent what it may not.
    fn let_go(&mut self, session: &Session, why: &str) {
        if let Some(unsaid) = self.refusals.take() {
            tracing::warn!(why, unsaid, "a plugin sent what it may not; its connections end");
        }
        let its = |(id, of): (&u64, &Connection)| (of.session.id() == session.id()).then_some(*id);
        let ids: Vec<u64> = self.connections.iter().filter_map(its).collect();
        ids.into_iter().for_each(|id| self.close(id));
    }

    fn close(&mut self, id: u64) {
        let Some(Connection { channel, session }) = self.connections.remove(&id) else { return };
        let _ = self.epoll.delete(&*channel);
        // Whoever is at the other end sees it at once, whenever it is closed.
        let _ = shutdown(channel.as_raw_fd(), Shutdown::Both);
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

/// How many fds may come with a request.
fn takes(request: &Request) -> usize {
    match request {
        Request::CreateMemory { .. } => 1,
        // Where the table is too large for the message.
        Request::SetIrqRouting(_) => 1,
        _ => 0,
    }
}
