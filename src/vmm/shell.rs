//! A machine that waits in a pool for its claim.
//!
//! It is a VMM like any other, with its spawner, its jails and its filters, and comes as far as
//! it can before anybody wants it. A **primed** one has a snapshot loaded, with the memory that
//! it needs first: a claim sets the clock, tells the guest who it is, and lets it run. One of a
//! **shape** has processes, memory and vCPUs, and gets the state at the claim (`empty`).
//!
//! While it waits its main loop runs, as for a VM whose vCPUs are still to be started: a device
//! process that dies is replaced, and the end of the pool is the end of the shell.

mod disks;
mod empty;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use cellblock_devices::protocol::{FromCell, ToCell};
use cellblock_wire::{Channel, ChannelError};
use nix::sys::epoll::Epoll;

use super::event_loop::{Flow, ON, Vm};
use super::parts::Switches;
use super::restore::{self, MemoryMode, Progress, RestoreConfig, RestoreError};
use super::supervise::Kind;
use super::{VmEnd, VmmError};
use crate::control::protocol::{Reply, Request};
use crate::pool::protocol::{Claim, FromShell, Preparation, Stage, ToShell};
use crate::pool::shell::serial_of;
use crate::pool::times::monotonic_ns;
use crate::remedy::{Remedy, chain};
use crate::slice;
use crate::snapshot::format::{PAGE, SnapshotId};
use crate::spec::SerialSpec;
use crate::vm::layout;
pub use disks::DisksError;
use empty::Empty;
pub use empty::EmptyError;

/// How long the pool may take to say what is wanted.
const WORD_LIMIT: Duration = Duration::from_secs(10);
/// How long the memory that an earlier VM needed first may take to come.
const RECORD_LIMIT: Duration = Duration::from_secs(10);
/// How long the vCPUs may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// How long consoles may take to forget.
const PART_LIMIT: Duration = Duration::from_secs(5);

/// A shell that does not become a VM.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum ShellError {
    #[error("hearing from the pool")]
    Channel(#[from] ChannelError),
    #[error("the pool asks for something else than to prepare a shell")]
    Order,
    #[error("the snapshot is {found} by now, and the pool was made for {wanted}")]
    OtherSnapshot { found: SnapshotId, wanted: SnapshotId },
    #[error("the memory that the guest needs first did not come within {} s", RECORD_LIMIT.as_secs())]
    Memory,
    #[error("a claim came twice")]
    Twice,
    #[error("the claim says from which snapshot, and the shell is primed with one")]
    Primed,
    #[error("the claim does not say from which snapshot")]
    NoOrigin,
    #[error(transparent)]
    Disks(#[from] DisksError),
    #[error(transparent)]
    Empty(#[from] EmptyError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    Vmm(#[from] VmmError),
    #[error("{0}")]
    Reset(String),
}

impl Remedy for ShellError {
    fn remedy(&self) -> Option<String> {
        match self {
            ShellError::OtherSnapshot { .. } => Some("start the pool again".into()),
            ShellError::Empty(error) => error.remedy(),
            ShellError::Restore(error) => error.remedy(),
            ShellError::Vmm(error) => error.remedy(),
            _ => None,
        }
    }
}

/// A machine's place in a pool.
pub(super) struct Shell {
    channel: Channel,
    id: [u8; 16],
    stage: Waiting,
    /// Nobody wants to see how it ends.
    discarded: bool,
}

/// What a claim finds.
enum Waiting {
    /// Everything.
    Primed,
    /// A machine without state.
    Empty(Box<Empty>),
    /// Somebody's VM.
    Claimed,
}

impl AsFd for Shell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// Nobody looks.
struct Quiet;

impl Progress for Quiet {
    fn begin(&self, _: usize) {}
    fn advance(&self, _: usize) {}
    fn end(&self) {}
}

/// Becomes what the pool at the other end of `channel` says, waits to be claimed, and runs to its
/// end. The caller must still be single-threaded.
pub fn run(channel: Channel) -> Result<(), ShellError> {
    // Whoever claims it waits for each of its threads in turn. vCPUs do without.
    slice::shorten_own();
    let (order, _) = channel.recv_timeout::<ToShell>(WORD_LIMIT)?;
    let ToShell::Prepare(preparation) = order else { return Err(ShellError::Order) };
    let mut vm = match prepare(*preparation) {
        Ok((vm, id, stage)) => {
            let mut vm = vm;
            channel.send(&vm.ready(), &[])?;
            vm.shell = Some(Box::new(Shell { channel, id, stage, discarded: false }));
            vm
        }
        Err(error) => {
            channel.send(&failed(&error), &[])?;
            return Err(error);
        }
    };
    let end = vm.run();
    if vm.shell.as_ref().is_some_and(|shell| shell.discarded) {
        vm.discard();
        return Ok(());
    }
    vm.shut_down(&end);
    end.map(|_| ()).map_err(ShellError::from)
}

fn failed(error: &ShellError) -> FromShell {
    FromShell::Failed { message: chain(error), remedy: error.remedy() }
}

fn prepare(order: Preparation) -> Result<(Vm, [u8; 16], Waiting), ShellError> {
    let id = order.id;
    let serial = serial_of(SnapshotId(id));
    let (mut vm, stage) = match order.stage {
        Stage::Shape(shape) => {
            let places = (order.control, order.console);
            let Preparation { sandbox, seccomp, log, .. } = order;
            let switches = Switches { sandbox, seccomp, log };
            let (vm, empty) = empty::assemble(shape, places, switches, &serial)?;
            (vm, Waiting::Empty(Box::new(empty)))
        }
        Stage::Primed { snapshot, id: wanted, disks, track } => {
            let config = RestoreConfig {
                snapshot,
                disks,
                serial: SerialSpec::Socket(order.console),
                control: Some(order.control),
                memory: MemoryMode::Auto,
                track,
                shell: Some(serial),
                plugin_socket: None,
                plugin: None,
                max_deaths: crate::config::DEFAULT_MAX_DEATHS,
                device_timeout: crate::config::DEFAULT_DEVICE_TIMEOUT,
                sandbox: order.sandbox,
                seccomp: order.seccomp,
                log: order.log,
            };
            let vm = restore::assemble(config, &Quiet)?;
            let found = vm.origin.as_ref().map(|origin| origin.chain.manifest().id);
            let (found, wanted) = (found.unwrap_or(SnapshotId([0; 16])), SnapshotId(wanted));
            if found != wanted {
                vm.discard();
                return Err(ShellError::OtherSnapshot { found, wanted });
            }
            await_record(&vm)?;
            // What was on its way in the snapshot is done before anybody waits for it.
            vm.nudge();
            vm.begin_to_enter()?;
            (vm, Waiting::Primed)
        }
    };
    vm.starts_later = true;
    Ok((vm, id, stage))
}

/// Waits until the memory is there that an earlier VM needed first.
fn await_record(vm: &Vm) -> Result<(), ShellError> {
    let Some(pager) = &vm.pager else { return Ok(()) };
    let end = Instant::now() + RECORD_LIMIT;
    while !pager.has_recorded() {
        if Instant::now() > end {
            return Err(ShellError::Memory);
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

impl Vm {
    /// Has KVM do all that comes before a machine's first instruction, of which making a thread
    /// is the longest.
    fn begin_to_enter(&self) -> Result<(), ShellError> {
        let done = self.vcpus.with_each(|_, vcpu| {
            vcpu.set_kvm_immediate_exit(1);
            // Interrupted before it has begun.
            let _ = vcpu.run();
            vcpu.set_kvm_immediate_exit(0);
        });
        done.map(drop).map_err(|error| ShellError::Empty(error.into()))
    }

    /// Does what the pool asks for. Its end is ours.
    pub(super) fn pool_request(&mut self, epoll: &Epoll) -> Flow {
        let Some(shell) = &mut self.shell else { return ON };
        let mut runs = false;
        if shell.discarded {
            return Flow::Break(Ok(VmEnd::Stopped));
        }
        let done = match shell.channel.try_recv::<ToShell>() {
            Ok(None) => return ON,
            Ok(Some((ToShell::Claim(claim), fds))) => {
                let heard_ns = monotonic_ns();
                let claimed = self.claim(*claim, fds, epoll);
                runs = claimed.is_ok();
                claimed.map(|()| FromShell::Claimed { heard_ns, runs_ns: monotonic_ns() })
            }
            Ok(Some((ToShell::Reset { id }, _))) => self.unclaim(id).map(|()| self.ready()),
            Ok(Some((ToShell::Prepare(_), _))) => Err(ShellError::Order),
            Ok(Some((ToShell::End, _))) | Err(_) => {
                shell.discarded = true;
                return Flow::Break(Ok(VmEnd::Stopped));
            }
        };
        let answer = match &done {
            Ok(answer) => answer.clone(),
            Err(error) => failed(error),
        };
        let Some(shell) = &mut self.shell else { return ON };
        // A pool that does not listen is one that has ended, which comes next.
        let _ = shell.channel.try_send(&answer, &[]);
        if done.is_err() {
            shell.discarded = true;
            return Flow::Break(Ok(VmEnd::Stopped));
        }
        // Said before it is done: a vCPU that is woken may well take this processor, and whoever
        // claimed it has something to do meanwhile. One that cannot run has ended.
        if runs && let Err(error) = self.go() {
            tracing::error!(error = chain(&error), "running a VM that was claimed");
            return Flow::Break(Ok(VmEnd::Stopped));
        }
        ON
    }

    fn go(&mut self) -> Result<(), ShellError> {
        match self.is_paused() {
            true => self.vcpus.resume().map_err(|error| ShellError::Reset(chain(&error))),
            false => Ok(self.run_vcpus()?),
        }
    }

    fn ready(&self) -> FromShell {
        let pids = self.cells.iter().filter_map(|cell| u32::try_from(cell.pid()?).ok());
        FromShell::Ready { cells: pids.collect() }
    }

    /// A machine that nobody has claimed yet, and that lacks a device, is given to nobody.
    pub(super) fn discard_unclaimed(&mut self) {
        if let Some(shell) = &mut self.shell
            && !matches!(shell.stage, Waiting::Claimed)
        {
            shell.discarded = true;
            self.asked_to_stop = true;
        }
    }

    /// A machine that is nobody's yet can be looked at, and ended, and that is all.
    pub(super) fn refuse_unclaimed(&self, request: &Request) -> Option<Reply> {
        let shell = self.shell.as_ref()?;
        let looks = matches!(request, Request::Stats | Request::Ps | Request::Stop);
        let refused = !looks && !matches!(shell.stage, Waiting::Claimed);
        refused.then(|| {
            Reply::error("the VM waits in a pool and is nobody's yet", Some("claim one first"))
        })
    }

    /// Becomes somebody's VM, up to the first instruction.
    fn claim(&mut self, claim: Claim, fds: Vec<OwnedFd>, epoll: &Epoll) -> Result<(), ShellError> {
        // Whoever came while it was nobody's has no business here any more.
        if let Some(control) = &mut self.control {
            control.part();
        }
        let Some(shell) = &mut self.shell else { return Err(ShellError::Order) };
        let id = shell.id;
        let primed = matches!(shell.stage, Waiting::Primed);
        match (std::mem::replace(&mut shell.stage, Waiting::Claimed), claim.from) {
            (Waiting::Claimed, _) => return Err(ShellError::Twice),
            (Waiting::Primed, Some(_)) => return Err(ShellError::Primed),
            (Waiting::Primed, None) => {
                self.exchange_disks(claim.disks, fds, epoll)?;
                if let Some(origin) = &self.origin {
                    origin
                        .state
                        .irqchip_state
                        .load_clock(self.machine.vm())
                        .map_err(VmmError::from)?;
                }
            }
            (Waiting::Empty(_), None) => return Err(ShellError::NoOrigin),
            (Waiting::Empty(empty), Some(from)) => {
                self.fill(*empty, from, fds)?;
                self.watch_pager(epoll).map_err(|errno| {
                    let source = errno.into();
                    VmmError::System { what: "watching guest memory", source }
                })?;
            }
        }
        if let Some(vmgenid) = &self.vmgenid {
            vmgenid.new_life(&self.ram, Some(id), claim.data).map_err(VmmError::from)?;
        }
        self.snapshots.tracker.wrote(&self.ram, layout::VMGENID, PAGE as u64);
        // A primed one was told to look when it was made.
        if !primed {
            self.nudge();
        }
        Ok(())
    }

    /// Goes back to where the claim found it, to be another VM the next time.
    fn unclaim(&mut self, id: [u8; 16]) -> Result<(), ShellError> {
        let fail = |why: String| Err(ShellError::Reset(why));
        if !self.is_paused()
            && let Err(error) = self.vcpus.pause(STOP_LIMIT)
        {
            return fail(chain(&error));
        }
        if let Err(why) = self.part_consoles() {
            return fail(why);
        }
        // Before the reset, which every process answers: they have heard of this by then.
        if let Err(why) = self.rename_disks(&serial_of(SnapshotId(id))) {
            return fail(why);
        }
        if let Reply::Error { message, .. } = self.reset() {
            return fail(message);
        }
        if let Err(why) = self.forget_limits() {
            return fail(why);
        }
        if let Err(id) = self.supervisor.begin_anew() {
            return fail(format!("device '{id}' has failed, or is being replaced"));
        }
        // What it was asked for by somebody else is nobody's any more.
        if let Some(control) = &mut self.control {
            control.part();
        }
        if let Some(shell) = &mut self.shell {
            shell.stage = Waiting::Primed;
            shell.id = id;
        }
        Ok(())
    }

    /// Gives `cow` disks another serial number: what is written to them is another VM's.
    fn rename_disks(&mut self, serial: &str) -> Result<(), String> {
        for disk in &mut self.disks {
            let Some(image) = disk.image.as_mut().filter(|image| image.overlay.is_some()) else {
                continue;
            };
            image.serial = serial.into();
            // One that takes its place is told at its start.
            let watched = self.supervisor.watched.iter_mut();
            for watched in watched.filter(|watched| watched.id() == disk.id) {
                if let Kind::Blk { recipe, .. } = &mut watched.kind {
                    recipe.set_serial(serial);
                }
            }
            let cell = self.cells.iter().find(|cell| cell.id() == disk.id);
            let say = ToCell::Serial(serial.into());
            if !cell.is_some_and(|cell| matches!(cell.channel().try_send(&say, &[]), Ok(true))) {
                return Err(format!("the process of {} does not listen", disk.id));
            }
        }
        Ok(())
    }

    /// Has consoles keep nothing of what was said to one user for the next, nor the user.
    fn part_consoles(&mut self) -> Result<(), String> {
        let end = Instant::now() + PART_LIMIT;
        for n in 0..self.cells.len() {
            if self.cells[n].role() != "serial" {
                continue;
            }
            let silent = |vm: &Vm| format!("the process of {} does not answer", vm.cells[n].id());
            if !matches!(self.cells[n].channel().try_send(&ToCell::Part, &[]), Ok(true)) {
                return Err(silent(self));
            }
            loop {
                match self.cells[n].wait_message(end) {
                    Some(FromCell::Parted) => break,
                    Some(other) => self.cell_message(n, other),
                    None => return Err(silent(self)),
                }
            }
        }
        Ok(())
    }

    /// Gives disks back the limits that they had in the snapshot.
    fn forget_limits(&mut self) -> Result<(), String> {
        let Some(origin) = &self.origin else { return Ok(()) };
        for device in &origin.state.device_states {
            let Some(saved) = device.as_disk().map_err(|error| chain(&error))? else { continue };
            let limits = saved.record.throttle;
            let disk = self.disks.iter_mut().find(|disk| disk.id == device.id);
            let Some(disk) = disk.filter(|disk| disk.throttle != limits) else { continue };
            // One that takes its place is told at its start.
            disk.throttle = limits;
            let cell = self.cells.iter().find(|cell| cell.id() == device.id);
            let told = cell.map(|cell| cell.channel().try_send(&ToCell::Throttle(limits), &[]));
            if let Some(Ok(false)) = told {
                return Err(format!("the process of {} does not listen", device.id));
            }
        }
        Ok(())
    }
}
