//! A plugin's place in a vCPU's thread: events on the way in and out of the guest.

use std::sync::Arc;
use std::time::Duration;

use cellblock_plugin_api::slot::{AsyncWrite, MAX_DATA, at, flag, kind, registers};
use cellblock_plugin_api::{Hint, HintDetail, Plain, Rights, Space};
use kvm_bindings::{kvm_debugregs, kvm_guest_debug, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;

use super::hub::Hub;
use super::orders;
use super::seat::{Facts, Line, Move};
use super::session::Session;
use crate::bus::Outcome;
use crate::vcpu::{self, Attendant, GuestAccess, SpecialExit, set_hypercall_result};

/// So long a guest does not notice that it stood still: its watchdogs wait for many seconds.
const LONG: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Tap {
    hub: Arc<Hub>,
    id: usize,
    /// The event that a plugin has not answered.
    held: Option<Held>,
    /// The VM's owner was told that the vCPU is there, and has answered.
    greeted: bool,
    /// So have all others: the guest may run.
    through: bool,
    /// The number from which on watchers have not had the access at hand.
    watched: usize,
    /// Elements of it that were reported.
    reported: usize,
    /// Who set breakpoints or steps.
    debugger: Option<Arc<Session>>,
}

struct Held {
    session: Arc<Session>,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Init,
    Paused,
    Access,
    Watched,
    HypervCall,
    Told,
}

/// How the wait for an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Resumed,
    Kicked,
    Gone,
}

impl Tap {
    pub(super) fn new(hub: Arc<Hub>, id: usize) -> Tap {
        let owned = hub.owner().is_some();
        Tap {
            hub,
            id,
            held: None,
            greeted: !owned,
            through: !owned,
            watched: 0,
            reported: 0,
            debugger: None,
        }
    }

    fn post(&mut self, session: Arc<Session>, what: What, facts: &Facts) {
        let seat = session.seat(self.id);
        seat.post(&mut seat.line(), facts);
        self.held = Some(Held { session, what });
        // A vCPU that was stopped on request is between two instructions: nothing of it is open.
        self.hub.set_open(self.id, what != What::Paused);
    }

    /// Waits for the answer to the event that is held, and does what the plugin wants done.
    fn hold(&mut self, vcpu: &mut VcpuFd, session: &Arc<Session>) -> Answer {
        let seat = session.seat(self.id);
        let mut line = seat.line();
        // The owner's vCPUs wait until the VM ends, which is about to happen.
        let gone = || session.has_ended() && !session.is_owner();
        loop {
            match seat.wait(&mut line, &self.hub, self.id, &gone) {
                Move::Kicked => return Answer::Kicked,
                Move::Gone => {
                    let_go(vcpu, &mut line);
                    return Answer::Gone;
                }
                Move::Order => {
                    let (order, bytes) = seat.take_order(&mut line);
                    let result = orders::carry_out(
                        vcpu,
                        session,
                        &mut self.debugger,
                        self.id,
                        order,
                        &bytes,
                    );
                    seat.reply(&line, result.map_err(|errno| errno as i32));
                }
                Move::Resume => {
                    set_registers(vcpu, session, self.id, &mut line);
                    let_go(vcpu, &mut line);
                    return Answer::Resumed;
                }
            }
        }
    }

    /// Waits for the answer to the event at hand; `None` when the vCPU was kicked first.
    fn answer(&mut self, vcpu: &mut VcpuFd) -> Option<(Held, Answer)> {
        let held = self.held.take()?;
        match self.hold(vcpu, &held.session) {
            Answer::Kicked => {
                self.held = Some(held);
                None
            }
            answer => {
                self.hub.set_open(self.id, false);
                Some((held, answer))
            }
        }
    }

    /// Posts an access, with registers where a hint wants them.
    fn post_access(
        &mut self,
        vcpu: &mut VcpuFd,
        session: Arc<Session>,
        what: What,
        access: &GuestAccess,
    ) {
        let seat = session.seat(self.id);
        let mut data = [0; 8];
        let len = access.len.min(MAX_DATA);
        match data.get_mut(..len) {
            Some(data) => {
                if access.is_write {
                    access.load(vcpu, data);
                }
                seat.put_data(data);
            }
            None => {
                let mut data = vec![0; len];
                if access.is_write {
                    access.load(vcpu, &mut data);
                }
                seat.put_data(&data);
            }
        }
        let mut flags = if access.is_write { flag::WRITE } else { 0 };
        if access.space == vcpu::Space::Mmio {
            flags |= flag::MMIO;
        }
        let kind = if what == What::Watched { kind::WATCHED } else { kind::ACCESS };
        let hint = session.with_hint(|hint| {
            (matches(hint, access)).then(|| send_registers(vcpu, &session, self.id, &hint.details))
        });
        let facts = Facts {
            kind,
            flags,
            len: len as u32,
            cached: hint.flatten().unwrap_or(0),
            words: [access.addr, 0, 0, 0],
        };
        self.post(session, what, &facts);
    }

    /// Gives the answer to a read to the guest.
    fn take_answer(&self, vcpu: &mut VcpuFd, held: &Held, answer: Answer, access: &GuestAccess) {
        if access.is_write {
            return;
        }
        let len = access.len.min(MAX_DATA);
        let mut few = [0; 8];
        let mut many = Vec::new();
        let data = match few.get_mut(..len) {
            Some(few) => few,
            None => {
                many.resize(len, 0);
                &mut many[..]
            }
        };
        match answer {
            Answer::Resumed if allowed(&held.session) => held.session.seat(self.id).take_data(data),
            _ => data.fill(0xff),
        }
        access.store(vcpu, data);
    }

    /// Reports a write to an async range, element by element; `false` when kicked.
    fn report(&mut self, vcpu: &mut VcpuFd, session: &Arc<Session>, access: &GuestAccess) -> bool {
        let mut data = vec![0; access.len.min(MAX_DATA)];
        access.load(vcpu, &mut data);
        let seat = session.seat(self.id);
        let mut line = seat.line();
        let gone = || session.has_ended();
        for element in data.chunks(access.size.clamp(1, 8)).skip(self.reported) {
            let mut write = AsyncWrite {
                address: access.addr,
                data: [0; 8],
                len: element.len() as u32,
                mmio: access.space == vcpu::Space::Mmio,
            };
            write.data[..element.len()].copy_from_slice(element);
            if !seat.post_async(&mut line, &self.hub, self.id, &gone, &write) {
                return false;
            }
            self.reported += 1;
        }
        self.reported = 0;
        true
    }

    /// Ends the debugging of a plugin that is gone.
    fn check_debugger(&mut self, vcpu: &VcpuFd) {
        if self.debugger.as_ref().is_some_and(|session| session.has_ended()) {
            self.debugger = None;
            if let Err(error) = vcpu.set_guest_debug(&kvm_guest_debug::default()) {
                tracing::error!(vcpu = self.id, %error, "ending the debugging of a vCPU");
            }
        }
    }
}

impl Attendant for Tap {
    #[inline]
    fn wanted(&self) -> bool {
        !self.through || self.held.is_some() || self.hub.is_wanted(self.id)
    }

    fn attend(&mut self, vcpu: &mut VcpuFd) -> Outcome {
        loop {
            if self.held.is_some() {
                match self.answer(vcpu) {
                    None => return Outcome::Retry,
                    Some((Held { what: What::Init, .. }, _)) => {
                        self.greeted = true;
                        self.hub.arrived();
                    }
                    Some(_) => {}
                }
                continue;
            }
            self.check_debugger(vcpu);
            if !self.greeted
                && let Some(owner) = self.hub.owner().cloned()
            {
                self.post(owner, What::Init, &Facts { kind: kind::INIT, ..Facts::default() });
                continue;
            }
            if let Some((session, user)) = self.hub.take_request(self.id) {
                let words = [user, 0, 0, 0];
                let facts = Facts { kind: kind::PAUSED, words, ..Facts::default() };
                self.post(session, What::Paused, &facts);
                continue;
            }
            if self.hub.may_run() {
                self.through = true;
                // A request that came meanwhile is looked for again before the guest runs.
                return Outcome::Done;
            }
            if self.hub.kicked(self.id) {
                return Outcome::Retry;
            }
            let Some(owner) = self.hub.owner() else { return Outcome::Done };
            let (hub, id) = (&self.hub, self.id);
            let seat = owner.seat(id);
            seat.rest(&mut seat.line(), hub, id, || {
                (hub.may_run() || hub.is_wanted(id) || hub.kicked(id)).then_some(())
            });
        }
    }

    fn access(&mut self, vcpu: &mut VcpuFd, access: &GuestAccess) -> Option<Outcome> {
        loop {
            if self.held.is_some() {
                match self.answer(vcpu) {
                    None => return Some(Outcome::Retry),
                    Some((Held { what: What::Watched, session }, _)) => {
                        self.watched = session.id() + 1;
                        // Watchers that answer at once do not keep the vCPU from a pause.
                        if self.hub.kicked(self.id) {
                            return Some(Outcome::Retry);
                        }
                    }
                    Some((held, answer)) => {
                        self.watched = 0;
                        self.take_answer(vcpu, &held, answer, access);
                        return Some(Outcome::Done);
                    }
                }
            }
            let space = space(access);
            if let Some(session) = self.hub.watcher(space, access.addr, self.watched) {
                self.post_access(vcpu, session, What::Watched, access);
                continue;
            }
            let Some(claim) = self.hub.claim(space, access.addr) else {
                self.watched = 0;
                return None;
            };
            if !claim.is_async {
                self.post_access(vcpu, claim.session, What::Access, access);
            } else if !access.is_write {
                self.watched = 0;
                access.store(vcpu, &vec![0; access.len]);
                return Some(Outcome::Done);
            } else if self.report(vcpu, &claim.session, access) {
                self.watched = 0;
                return Some(Outcome::Done);
            } else {
                return Some(Outcome::Retry);
            }
        }
    }

    fn exit(&mut self, vcpu: &mut VcpuFd, exit: &SpecialExit) -> Option<Outcome> {
        if self.held.is_none() {
            self.check_debugger(vcpu);
            let (kind, words) = match *exit {
                SpecialExit::HypervCall { input, params } => {
                    (kind::HYPERV_CALL, [input, params[0], params[1], 0])
                }
                SpecialExit::HypervSynic { msr, control, evt_page, msg_page } => {
                    (kind::HYPERV_SYNIC, [msr.into(), control, evt_page, msg_page])
                }
                SpecialExit::Debug { pc, dr6, dr7 } => (kind::DEBUG, [pc, dr6, dr7, 0]),
            };
            let session = match exit {
                // One that was still on its way when its debugger left is forgotten.
                SpecialExit::Debug { .. } => match self.debugger.clone() {
                    Some(session) => session,
                    None => return Some(Outcome::Done),
                },
                _ => self.hub.owner()?.clone(),
            };
            let call = kind == kind::HYPERV_CALL;
            let what = if call { What::HypervCall } else { What::Told };
            self.post(session, what, &Facts { kind, words, ..Facts::default() });
        }
        let Some((held, answer)) = self.answer(vcpu) else { return Some(Outcome::Retry) };
        if (held.what, answer) == (What::HypervCall, Answer::Resumed) {
            let result = held.session.seat(self.id).slot().load64(at::RESULT);
            set_hypercall_result(vcpu, result);
        }
        Some(Outcome::Done)
    }
}

/// Tells a guest that stood still for long that the time ahead is not its own, so that its watchdogs
/// stay quiet. Refused where it does not use kvmclock.
fn let_go(vcpu: &VcpuFd, line: &mut Line) {
    if line.stood() > LONG {
        let _ = vcpu.kvmclock_ctrl();
    }
}

fn allowed(session: &Session) -> bool {
    session.rights() == Rights::Control
}

fn space(access: &GuestAccess) -> Space {
    match access.space {
        vcpu::Space::Port => Space::Port,
        vcpu::Space::Mmio => Space::Mmio,
    }
}

fn matches(hint: &Hint, access: &GuestAccess) -> bool {
    (hint.space, hint.address, hint.on_write) == (space(access), access.addr, access.is_write)
}

/// Puts registers into the slot as a hint wants it; which ones.
fn send_registers(vcpu: &VcpuFd, session: &Session, id: usize, details: &[HintDetail]) -> u32 {
    let slot = session.seat(id).slot();
    let Ok(regs) = vcpu.get_regs() else { return 0 };
    slot.write(at::REGS, regs.bytes());
    let mut sent = registers::REGS;
    let equal = |wanted: Option<u64>, is: u64| wanted.is_none_or(|wanted| wanted == is);
    let first = details.iter().find(|detail| {
        equal(detail.rax, regs.rax)
            && equal(detail.rbx, regs.rbx)
            && equal(detail.rcx, regs.rcx)
            && equal(detail.rdx, regs.rdx)
    });
    let Some(detail) = first else { return sent };
    if detail.send_sregs
        && let Ok(sregs) = vcpu.get_sregs()
    {
        slot.write(at::SREGS, sregs.bytes());
        sent |= registers::SREGS;
    }
    if detail.send_debugregs
        && let Ok(debugregs) = vcpu.get_debug_regs()
    {
        slot.write(at::DEBUGREGS, debugregs.bytes());
        sent |= registers::DEBUGREGS;
    }
    sent
}

/// Sets the registers that the plugin set before its resume, from one copy of each. The first that
/// KVM refuses is told of.
fn set_registers(vcpu: &VcpuFd, session: &Session, id: usize, line: &mut Line) {
    use std::sync::atomic::Ordering;
    let seat = session.seat(id);
    let slot = seat.slot();
    let sets = slot.word(at::SETS).load(Ordering::Relaxed);
    if sets == 0 {
        return;
    }
    if !allowed(session) {
        return seat.set_failed(line, Errno::EPERM as i32);
    }
    fn copy<T: Plain>(slot: &cellblock_plugin_api::slot::Slot, at: usize) -> T {
        let mut bytes = [0; size_of::<kvm_sregs>()];
        let bytes = &mut bytes[..size_of::<T>()];
        slot.read(at, bytes);
        T::from_bytes(bytes).unwrap_or_default()
    }
    let mut failed = None;
    let mut keep = |result: Result<(), kvm_ioctls::Error>| {
        failed = failed.or(result.err());
    };
    // System registers first: what general registers may hold depends on the mode.
    if sets & registers::SREGS != 0 {
        keep(vcpu.set_sregs(&copy::<kvm_sregs>(slot, at::SET_SREGS)));
    }
    if sets & registers::REGS != 0 {
        keep(vcpu.set_regs(&copy::<kvm_regs>(slot, at::SET_REGS)));
    }
    if sets & registers::DEBUGREGS != 0 {
        keep(vcpu.set_debug_regs(&copy::<kvm_debugregs>(slot, at::SET_DEBUGREGS)));
    }
    if let Some(error) = failed {
        seat.set_failed(line, error.errno());
    }
}
