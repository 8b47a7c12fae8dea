//! The main thread while the guest runs: it waits, and answers what comes.
//!
//! Nothing on a guest's data path comes by here. What does: the end of a vCPU,
//! control requests, messages and deaths of device processes, signals.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use cellblock_devices::protocol::ring::{Fault, Producer};
use cellblock_devices::protocol::{EngineKind, FromCell, ThrottleLimits};
use cellblock_seccomp::spawner::{Event as SpawnerEvent, ExitStatus, Spawner};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vmm_sys_util::eventfd::EventFd;

use super::notice::{Notice, Notifier};
use super::phases::Phases;
use super::shell::Shell;
use super::signals::Signals;
use super::snapshot::{Origin, Snapshots};
use super::supervise::Supervisor;
use super::triggers::Triggers;
use super::watchdog::Watchdog;
use super::{VmEnd, VmmError, requests};
use crate::bus::VmExit;
use crate::cell::overlay::{Overlay, Place};
use crate::cell::{Cell, ROUND};
use crate::console::Keep;
use crate::control::protocol::EventKind;
use crate::control::protocol::{Reply, Request};
use crate::control::server::{ControlServer, Handler, Response, Token};
use crate::plugin::{Hub, Plugins};
use crate::plugin_process::PluginProcess;
use crate::snapshot::pager::Pager;
use crate::snapshot::state::MicrovmState;
use crate::terminal::RawTerminal;
use crate::transport::mmio::VirtioMmio;
use crate::vcpu::{ExitListener, Vcpus};
use crate::vm::kvm::Machine;
use crate::vm::memory::GuestRam;
use crate::vm::vmgenid::VmGenId;

/// A machine that is ready to run, or runs.
pub(super) struct Vm {
    pub(super) phases: Phases,
    // Kept for as long as vCPUs run: their slots and lines hang off it.
    pub(super) machine: Arc<Machine>,
    /// None in a machine that is a plugin's.
    pub(super) vmgenid: Option<VmGenId>,
    pub(super) ram: GuestRam,
    pub(super) vcpus: Vcpus,
    pub(super) ended: ExitListener,
    /// COM1's.
    pub(super) ring: Option<Arc<Producer>>,
    /// COM1's interrupt.
    pub(super) com1_irq: Option<EventFd>,
    pub(super) cells: Vec<Cell>,
    pub(super) devices: Vec<(String, Arc<VirtioMmio>)>,
    pub(super) disks: Vec<DiskFacts>,
    pub(super) back_ends: Vec<BackEnd>,
    pub(super) spawner: Spawner,
    pub(super) plugin: Option<PluginProcess>,
    pub(super) plugins: Option<(Arc<Hub>, Plugins)>,
    /// Where programs attach.
    pub(super) plugin_socket: Option<PathBuf>,
    /// Whether a plugin decides when there are vCPUs.
    pub(super) starts_later: bool,
    pub(super) supervisor: Supervisor,
    pub(super) watchdog: Watchdog,
    pub(super) control: Option<ControlServer>,
    pub(super) notifier: Arc<Notifier>,
    pub(super) signals: Signals,
    // Given back when the machine is dropped. With it comes the escape sequence.
    pub(super) terminal: Option<RawTerminal>,
    pub(super) _console: Keep,
    /// Events of the request that is being carried out, and whether one is.
    pub(super) events: Vec<EventKind>,
    pub(super) defers_events: bool,
    pub(super) asked_to_stop: bool,
    pub(super) asked_for_processes: Vec<Token>,
    pub(super) snapshots: Snapshots,
    pub(super) triggers: Option<Triggers>,
    /// Of a machine whose memory still comes, or came while it ran.
    pub(super) pager: Option<Pager>,
    /// Of a restored machine: what it can be put back to.
    pub(super) origin: Option<Origin>,
    /// Of a restored machine that waits for its plugins: its state.
    pub(super) to_load: Option<Arc<MicrovmState>>,
    /// Of a pool's machine: what it waits for, and for whom.
    pub(super) shell: Option<Box<Shell>>,
}

/// A back end that is another program.
pub(super) struct BackEnd {
    /// Id of its disk.
    pub(super) id: String,
    /// Where it listens, absolute.
    pub(super) path: PathBuf,
    /// The connection, to see its end.
    pub(super) socket: UnixStream,
    pub(super) gone: bool,
}

/// What does not change about a disk.
pub(super) struct DiskFacts {
    pub(super) id: String,
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) throttle: ThrottleLimits,
    /// Where it is an image of ours.
    pub(super) image: Option<ImageFacts>,
}

/// What a snapshot says of an image.
pub(super) struct ImageFacts {
    /// A duplicate of what its process has.
    pub(super) fd: OwnedFd,
    /// Absolute.
    pub(super) path: PathBuf,
    pub(super) serial: String,
    pub(super) poll_us: u32,
    pub(super) queues: u16,
    pub(super) direct: bool,
    pub(super) engine: Option<EngineKind>,
    /// Of a `cow` disk: what the guest has written, and where the user wanted it kept.
    pub(super) overlay: Option<(Overlay, Place)>,
}

/// What an epoll event is about. Cells and devices carry their index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Signals,
    Spawner,
    Control,
    Vcpus,
    Notices,
    Ring,
    Plugin,
    PluginFilter,
    Links,
    Triggers,
    Pager,
    Shell,
    Cell(usize),
    Device(usize),
    BackEnd(usize),
}

impl Source {
    fn token(self) -> u64 {
        match self {
            Source::Signals => 0,
            Source::Spawner => 1,
            Source::Control => 2,
            Source::Vcpus => 3,
            Source::Notices => 4,
            Source::Ring => 5,
            Source::Links => 6,
            Source::Triggers => 7,
            Source::Pager => 8,
            Source::Plugin => 9,
            Source::PluginFilter => 10,
            Source::Shell => 11,
            Source::Cell(n) => 1 << 32 | n as u64,
            Source::Device(n) => 2 << 32 | n as u64,
            Source::BackEnd(n) => 3 << 32 | n as u64,
        }
    }

    fn of(token: u64) -> Option<Source> {
        let n = token as u32 as usize;
        match (token >> 32, n) {
            (0, 0) => Some(Source::Signals),
            (0, 1) => Some(Source::Spawner),
            (0, 2) => Some(Source::Control),
            (0, 3) => Some(Source::Vcpus),
            (0, 4) => Some(Source::Notices),
            (0, 5) => Some(Source::Ring),
            (0, 6) => Some(Source::Links),
            (0, 7) => Some(Source::Triggers),
            (0, 8) => Some(Source::Pager),
            (0, 9) => Some(Source::Plugin),
            (0, 10) => Some(Source::PluginFilter),
            (0, 11) => Some(Source::Shell),
            (1, n) => Some(Source::Cell(n)),
            (2, n) => Some(Source::Device(n)),
            (3, n) => Some(Source::BackEnd(n)),
            _ => None,
        }
    }
}

/// More messages than one socket holds.
const LAST_WORDS: usize = 4096;

/// Whether the machine goes on.
pub(super) type Flow = std::ops::ControlFlow<Result<VmEnd, VmmError>>;
pub(super) const ON: Flow = Flow::Continue(());

impl Vm {
    /// Runs until something ends the machine. [`Vm::shut_down`] must follow.
    pub(super) fn run(&mut self) -> Result<VmEnd, VmmError> {
        let system = |what| move |e: Errno| VmmError::System { what, source: e.into() };
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(system("creating epoll"))?;
        self.watch(&epoll).map_err(system("watching the machine's events"))?;
        if !self.starts_later {
            self.run_vcpus()?;
        }

        let mut events = [EpollEvent::empty(); 16];
        loop {
            // A live snapshot goes on between events.
            let wait = if self.copies() { EpollTimeout::ZERO } else { self.supervision_due() };
            let count = match epoll.wait(&mut events, wait) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(system("waiting for events")(e)),
            };
            for event in &events[..count] {
                let Some(source) = Source::of(event.data()) else { continue };
                if let Flow::Break(end) = self.handle(&epoll, source) {
                    return self.finish_plugin(end);
                }
            }
            self.supervise(&epoll);
            self.copy_on();
            self.clients_lost();
        }
    }

    pub(super) fn run_vcpus(&mut self) -> Result<(), VmmError> {
        self.vcpus.run()?;
        self.phases.end("run");
        if let Some(pager) = &self.pager {
            pager.guest_runs();
        }
        self.event(EventKind::Start);
        if let Some(triggers) = &mut self.triggers {
            triggers.begin();
        }
        tracing::info!(after = ?self.phases.elapsed(), "guest is running");
        Ok(())
    }

    fn watch(&self, epoll: &Epoll) -> nix::Result<()> {
        let add = |fd: BorrowedFd<'_>, source: Source| {
            epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, source.token()))
        };
        add(self.signals.as_fd(), Source::Signals)?;
        add(self.spawner.as_fd(), Source::Spawner)?;
        add(self.ended.as_fd(), Source::Vcpus)?;
        add(self.notifier.as_fd(), Source::Notices)?;
        if let Some(ring) = &self.ring {
            add(ring.fault_event(), Source::Ring)?;
        }
        add(self.supervisor.links.as_fd(), Source::Links)?;
        if let Some(triggers) = &self.triggers {
            add(triggers.as_fd(), Source::Triggers)?;
        }
        self.watch_pager(epoll)?;
        if let Some(control) = &self.control {
            add(control.as_fd(), Source::Control)?;
        }
        if let Some(shell) = &self.shell {
            add(shell.as_fd(), Source::Shell)?;
        }
        if let Some(plugin) = &self.plugin {
            add(plugin.as_fd(), Source::Plugin)?;
            if let Some(listener) = plugin.listener() {
                add(listener, Source::PluginFilter)?;
            }
        }
        for (n, cell) in self.cells.iter().enumerate() {
            add(cell.channel().as_fd(), Source::Cell(n))?;
        }
        for n in 0..self.back_ends.len() {
            self.watch_back_end(epoll, n);
        }
        for (n, (_, device)) in self.devices.iter().enumerate() {
            // Edge-triggered, because it must not be read: see there.
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            epoll.add(device.err_event(), EpollEvent::new(flags, Source::Device(n).token()))?;
        }
        Ok(())
    }

    fn handle(&mut self, epoll: &Epoll, source: Source) -> Flow {
        match source {
            Source::Signals if self.signals.take() => {
                tracing::info!("stopping on a signal");
                return Flow::Break(Ok(VmEnd::Signal));
            }
            Source::Signals => {}
            Source::Vcpus => {
                if let Some(end) = self.ended.end() {
                    return Flow::Break(outcome(end.vcpu, &end.exit));
                }
            }
            Source::Spawner => return self.spawner_events(epoll),
            Source::Control => {
                self.control_requests();
                if self.asked_to_stop {
                    return Flow::Break(Ok(VmEnd::Stopped));
                }
            }
            Source::Notices => {
                if let Err(error) = self.notices() {
                    return Flow::Break(Err(error));
                }
            }
            Source::PluginFilter => self.plugin_violations(),
            Source::Plugin => {
                if let Some(plugin) = &mut self.plugin {
                    plugin.log();
                    if !plugin.is_open() {
                        let _ = epoll.delete(&*plugin);
                    }
                }
            }
            Source::Ring => self.ring_fault(),
            Source::Links => self.link_news(),
            Source::Triggers => self.trigger_timer(),
            Source::Pager => {
                if let Some(error) = self.pager.as_ref().and_then(Pager::take_failure) {
                    return Flow::Break(Err(VmmError::Pager(error)));
                }
            }
            Source::Shell => return self.pool_request(epoll),
            Source::Cell(n) => return self.cell_messages(epoll, n),
            Source::BackEnd(n) => self.back_end_gone(n),
            Source::Device(n) => {
                let (id, device) = &self.devices[n];
                if device.gave_up() {
                    let id = id.clone();
                    self.event(EventKind::NeedsReset { id });
                }
            }
        }
        ON
    }

    fn cell_messages(&mut self, epoll: &Epoll, n: usize) -> Flow {
        // If there is more, the channel is still readable in the next round.
        for _ in 0..ROUND {
            let Some(message) = self.cells[n].next_message() else { break };
            self.cell_message(n, message);
        }
        if self.asked_to_stop {
            return Flow::Break(Ok(VmEnd::Stopped));
        }
        if !self.cells[n].is_open() {
            let _ = epoll.delete(self.cells[n].channel());
            // As a rule it is dead, which the spawner reports. One that is not, and
            // broke the protocol, is ended.
            if let Some(pid) = self.cells[n].pid()
                && let Err(error) = self.spawner.kill(pid)
            {
                tracing::error!(error = crate::remedy::chain(&error), "ending a device process");
            }
        }
        ON
    }

    /// COM1's process does not answer, or lies. A liar is ended at once.
    fn ring_fault(&mut self) {
        let Some(fault) = self.ring.as_ref().and_then(|ring| ring.take_fault()) else { return };
        let Some(cell) = self.cells.iter_mut().find(|cell| cell.role() == "serial") else { return };
        let (id, pid) = (cell.id().to_string(), cell.pid());
        tracing::error!(role = "serial", device = id, pid, "{fault}");
        match (fault, pid) {
            (Fault::Stalled, _) => {}
            // It is killed when its pid is known.
            (Fault::Index { .. }, None) => cell.close(),
            (Fault::Index { .. }, Some(pid)) => {
                if let Err(error) = self.spawner.kill(pid) {
                    tracing::error!(error = crate::remedy::chain(&error), "ending it");
                }
            }
        }
        self.event(EventKind::DeviceStalled { role: "serial".to_string(), id });
    }

    pub(super) fn cell_message(&mut self, n: usize, message: FromCell) {
        // Each process speaks for its own device only.
        let is_serial = self.cells[n].role() == "serial";
        match message {
            FromCell::Quit if is_serial && self.terminal.is_some() => {
                tracing::info!("stopping on the console's escape sequence");
                self.asked_to_stop = true;
            }
            FromCell::Marker { marker, .. } if is_serial => {
                self.event(requests::marker_event(marker, "console"));
                self.seen(marker);
            }
            FromCell::Stats(stats) => self.cells[n].keep_stats(stats),
            FromCell::Ready => self.process_ready(n),
            FromCell::Failed { step, message } => self.cells[n].refused(&step, &message),
            // The rest is said only when asked for, and then waited for.
            _ => {}
        }
    }

    pub(super) fn notices(&mut self) -> Result<(), VmmError> {
        for notice in self.notifier.take() {
            match notice {
                Notice::Marker(marker) => {
                    self.event(requests::marker_event(marker, "port"));
                    self.seen(marker);
                }
                Notice::Made => {
                    if let Some(state) = self.to_load.take() {
                        self.go_on_from(&state, true)?;
                    }
                    self.run_vcpus()?;
                }
            }
        }
        Ok(())
    }

    fn control_requests(&mut self) {
        // Taken out, so that carrying a request out may use all of the machine.
        let Some(mut control) = self.control.take() else { return };
        self.defers_events = true;
        control.poll(&mut Requests(self));
        self.defers_events = false;
        for kind in std::mem::take(&mut self.events) {
            control.broadcast(kind);
        }
        self.control = Some(control);
    }

    fn answer_processes(&mut self, reply: &Reply) {
        for token in std::mem::take(&mut self.asked_for_processes) {
            if let Some(control) = &mut self.control {
                control.complete(token, reply);
            }
        }
    }

    pub(super) fn spawner_events(&mut self, epoll: &Epoll) -> Flow {
        loop {
            match self.spawner.try_event() {
                Ok(Some(SpawnerEvent::Exited { pid, status })) => {
                    if let Some(end) = self.plugin_ended(pid, status) {
                        return Flow::Break(end);
                    }
                    self.process_ended(epoll, pid, status);
                    if self.asked_to_stop {
                        return Flow::Break(Ok(VmEnd::Stopped));
                    }
                }
                Ok(Some(SpawnerEvent::Started { ticket, pid, pidfd })) => {
                    self.process_started(ticket, pid, pidfd);
                }
                Ok(Some(SpawnerEvent::Failed { ticket, step, message })) => {
                    self.process_failed(epoll, ticket, &step, &message);
                }
                Ok(Some(SpawnerEvent::Processes(processes))) => {
                    self.answer_processes(&requests::processes(&processes));
                }
                Ok(Some(SpawnerEvent::Connected { place, socket })) => {
                    self.back_end_there(epoll, place, socket);
                }
                Ok(Some(SpawnerEvent::NotConnected { place, why })) => {
                    self.back_end_absent(place, &why);
                }
                Ok(None) => return ON,
                Err(error) => {
                    tracing::error!(error = crate::remedy::chain(&error), "spawner");
                    return Flow::Break(Err(VmmError::SpawnerDied));
                }
            }
        }
    }

    /// What a process that is gone said last still counts: all that its socket could hold.
    pub(super) fn last_words(&mut self, n: usize) {
        for _ in 0..LAST_WORDS {
            match self.cells[n].next_message() {
                Some(message) => self.cell_message(n, message),
                None if self.cells[n].is_open() => {} // so many log lines were taken
                None => return,
            }
        }
    }

    /// A device process is gone: it is named, and another takes its place.
    fn process_ended(&mut self, epoll: &Epoll, pid: i32, status: ExitStatus) {
        let Some(n) = self.cells.iter().position(|cell| cell.pid() == Some(pid)) else { return };
        let (role, id) = (self.cells[n].role(), self.cells[n].id().to_string());
        self.last_words(n);
        if self.supervisor.exchanges(&id) {
            return self.process_over(epoll, n);
        }
        let how = self.cells[n].obituary(status);
        tracing::error!(role, device = id, pid, "device process died: {how}");
        if let Some(violation) = self.cells[n].violation() {
            self.event(EventKind::Violation {
                process: format!("{role} {id}"),
                syscall: violation.call(),
                thread: format!("{} ({})", violation.thread, violation.tid),
            });
        }
        self.event(EventKind::DeviceDied { role: role.to_string(), id, pid, how });
        self.process_over(epoll, n);
    }

    /// Hears when guest memory does not come any more.
    pub(super) fn watch_pager(&self, epoll: &Epoll) -> nix::Result<()> {
        let Some(pager) = &self.pager else { return Ok(()) };
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
        epoll.add(pager.notice(), EpollEvent::new(flags, Source::Pager.token()))
    }

    /// Hears when a back end goes.
    pub(super) fn watch_back_end(&self, epoll: &Epoll, n: usize) {
        // Not what it says, which is for the front end's thread, but that it is gone.
        let flags = EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLONESHOT;
        let event = EpollEvent::new(flags, Source::BackEnd(n).token());
        if let Err(errno) = epoll.add(&self.back_ends[n].socket, event) {
            tracing::error!(device = self.back_ends[n].id, %errno, "watching a back end");
        }
    }

    /// Takes messages of the process of a device, which is a new one.
    pub(super) fn watch_cell(&self, epoll: &Epoll, id: &str) {
        let Some(n) = self.cells.iter().position(|cell| cell.id() == id) else { return };
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Cell(n).token());
        if let Err(errno) = epoll.add(self.cells[n].channel(), event) {
            // It is too slow, then, and ended.
            tracing::error!(device = id, %errno, "watching its process");
        }
    }

    /// Tells whoever listens on the control socket.
    pub(super) fn event(&mut self, kind: EventKind) {
        match &mut self.control {
            Some(control) => {
                control.broadcast(kind);
            }
            // Sent when the request that is being carried out is done.
            None if self.defers_events => self.events.push(kind),
            None => {}
        }
    }
}

/// Carries control requests out on the machine.
struct Requests<'a>(&'a mut Vm);

impl Handler for Requests<'_> {
    fn handle(&mut self, request: Request, token: Token) -> Response {
        if let Some(refused) = self.0.refuse_unclaimed(&request) {
            return Response::Now(refused);
        }
        if let Some(reply) = self.0.about_hold(&request, token.client()) {
            return Response::Now(reply);
        }
        if let Request::Snapshot { hold, live, timeout_us, trigger } = request {
            return self.0.snapshot(hold, live, timeout_us, trigger, token);
        }
        if let Request::Kept { id } = &request {
            return Response::Now(self.0.kept(id, token.client()));
        }
        if request == Request::AwaitTrigger {
            return self.0.await_trigger(token).map_or(Response::Later, Response::Now);
        }
        match self.0.answer(request) {
            Some(reply) => Response::Now(reply),
            None => {
                self.0.asked_for_processes.push(token);
                Response::Later
            }
        }
    }

    fn gone(&mut self, client: u64) {
        self.0.client_gone(client);
    }
}

fn outcome(vcpu: usize, exit: &VmExit) -> Result<VmEnd, VmmError> {
    match exit {
        VmExit::Shutdown => Ok(VmEnd::Shutdown),
        VmExit::Reset => Ok(VmEnd::Reset),
        VmExit::Error(reason) => Err(VmmError::Guest(format!("vCPU {vcpu}: {reason}"))),
    }
}
