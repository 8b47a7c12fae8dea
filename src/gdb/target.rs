//! The VM as gdbstub wants it.

use cellblock_plugin_api::Error;
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;

use super::machine::{Action, Machine, Stop};
use super::registers;

/// See the module.
pub(super) struct Debugged {
    machine: Machine,
    actions: Vec<Action>,
    locked: bool,
}

impl Debugged {
    pub(super) fn new(machine: Machine) -> Debugged {
        let actions = vec![Action::Stay; machine.count()];
        Debugged { machine, actions, locked: false }
    }

    /// What stopped the guest.
    pub(super) fn stopped(&mut self) -> Result<Option<MultiThreadStopReason<u64>>, Error> {
        Ok(self.machine.stopped()?.map(|stop| match stop {
            Stop::Stepped(id) => {
                MultiThreadStopReason::SignalWithThread { tid: tid(id), signal: Signal::SIGTRAP }
            }
            Stop::Breakpoint(id) => MultiThreadStopReason::HwBreak(tid(id)),
        }))
    }

    pub(super) fn stop_all(&mut self) -> Result<(), Error> {
        self.machine.stop_all()
    }

    fn set_action(&mut self, tid: Tid, action: Action) {
        if let Some(place) = self.actions.get_mut(index(tid)) {
            *place = action;
        }
    }
}

/// gdb counts threads from one.
fn tid(id: usize) -> Tid {
    Tid::MIN.saturating_add(id)
}

fn index(tid: Tid) -> usize {
    tid.get() - 1
}

/// Of one request of gdb's that cannot be: gdb is told, and the session goes on. Only the end of the
/// VM ends it.
fn refused(error: Error) -> TargetError<Error> {
    match error {
        Error::Closed => TargetError::Fatal(error),
        other => TargetError::Errno(other.errno() as u8),
    }
}

impl Target for Debugged {
    type Arch = X86_64_SSE;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64_SSE, Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debugged {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.machine.vcpu(index(tid)).ok_or(TargetError::NonFatal)?;
        let general = vcpu.regs().map_err(refused)?;
        let system = vcpu.sregs().map_err(refused)?;
        *regs = registers::to_gdb(&general, &system, &vcpu.fpu().map_err(refused)?);
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.machine.vcpu(index(tid)).ok_or(TargetError::NonFatal)?;
        let mut general = vcpu.regs().map_err(refused)?;
        let mut fpu = vcpu.fpu().map_err(refused)?;
        if !registers::same_segments(regs, &vcpu.sregs().map_err(refused)?) {
            return Err(TargetError::NonFatal);
        }
        registers::from_gdb(regs, &mut general, &mut fpu);
        vcpu.set_fpu(&fpu).map_err(refused)?;
        vcpu.set_regs(&general).map_err(refused)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        match self.machine.read(index(tid), start, data).map_err(refused)? {
            0 if !data.is_empty() => Err(TargetError::NonFatal),
            count => Ok(count),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        match self.machine.write(index(tid), start, data).map_err(refused)? {
            count if count == data.len() => Ok(()),
            _ => Err(TargetError::NonFatal),
        }
    }

    fn list_active_threads(&mut self, each: &mut dyn FnMut(Tid)) -> Result<(), Error> {
        (0..self.machine.count()).map(tid).for_each(each);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Debugged {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Error> {
        let name = format!("vCPU {}", index(tid));
        let len = name.len().min(buf.len());
        buf[..len].copy_from_slice(&name.as_bytes()[..len]);
        Ok(len)
    }
}

impl MultiThreadResume for Debugged {
    fn resume(&mut self) -> Result<(), Error> {
        // Those gdb says nothing of run too, unless it wants them held.
        let rest = if self.locked { Action::Stay } else { Action::Run };
        let actions: Vec<_> = self
            .actions
            .iter()
            .map(|action| if *action == Action::Stay { rest } else { *action })
            .collect();
        self.machine.resume(&actions)
    }

    fn clear_resume_actions(&mut self) -> Result<(), Error> {
        self.actions.fill(Action::Stay);
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.set_action(tid, Action::Run);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debugged {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.set_action(tid, Action::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Debugged {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Error> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Debugged {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

// The guest's code is not touched: what gdb would write an instruction for is a register as well.
impl SwBreakpoint for Debugged {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.machine.add_breakpoint(address))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.machine.remove_breakpoint(address))
    }
}

impl HwBreakpoint for Debugged {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.machine.add_breakpoint(address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.machine.remove_breakpoint(address))
    }
}
