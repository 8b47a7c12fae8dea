//! From rules to a BPF program. seccompiler cannot say `in` and `&`, so this is ours:
//! a binary search over the call's number ([`crate::bpf`]), then the tests.

use seccompiler::sock_filter;

use super::{Action, Op, Policy, Rule, Test, Violation};
use crate::bpf::{
    AUDIT_ARCH_X86_64, Range, argument, jump_any_bit, jump_at_least, jump_equal, jump_greater,
    load, op_return, push, search,
};

/// A program, as plain data: code, jump if true, jump if false, operand.
pub type Code = Vec<(u16, u8, u8, u32)>;

// include/uapi/linux/seccomp.h
const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;
const USER_NOTIF: u32 = 0x7fc0_0000;
/// BPF_MAXINSNS, less what the start of a process adds.
const MAX_LEN: usize = 4096 - 64;

pub(super) fn compile(policy: &Policy, violation: Violation) -> Result<Code, String> {
    let violated = match violation {
        Violation::Kill => KILL_PROCESS,
        Violation::Log => LOG,
        Violation::Notify => USER_NOTIF,
    };
    let default = match policy.default {
        Action::Default => violated,
        action => answer(action, violated),
    };
    let mut calls: Vec<(u32, Vec<sock_filter>)> = Vec::new();
    for (call, rule) in &policy.rules {
        let call = u32::try_from(*call).map_err(|e| e.to_string())?;
        calls.push((call, code(rule, violated, default)?));
    }
    calls.sort_by_key(|(call, _)| *call);
    let mut ranges: Vec<Range> = vec![(0, vec![op_return(default)])];
    for (call, code) in calls {
        push(&mut ranges, call, code);
        push(&mut ranges, call + 1, vec![op_return(default)]);
    }
    let mut program = vec![
        load(crate::bpf::ARCH_OFFSET),
        jump_equal(AUDIT_ARCH_X86_64, 1, 0),
        op_return(KILL_PROCESS), // a 32-bit call: its numbers mean other calls
        load(crate::bpf::NUMBER_OFFSET),
    ];
    // x32 calls have bit 30 set, and so numbers beyond all of these.
    program.extend(search(&ranges)?);
    if program.len() > MAX_LEN {
        return Err(format!("{} instructions are more than the kernel takes", program.len()));
    }
    Ok(program.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect())
}

/// `default` is what violations get.
fn answer(action: Action, default: u32) -> u32 {
    match action {
        Action::Allow => ALLOW,
        Action::Errno(number) => ERRNO | u32::from(number),
        Action::Default => default,
        // These are violations, in modes that do not kill.
        Action::KillProcess | Action::KillThread | Action::Trap if default != KILL_PROCESS => {
            default
        }
        Action::KillProcess => KILL_PROCESS,
        Action::KillThread => KILL_THREAD,
        Action::Trap => TRAP,
        Action::Log => LOG,
    }
}

fn code(rule: &Rule, violated: u32, default: u32) -> Result<Vec<sock_filter>, String> {
    let mut code = Vec::new();
    for all in &rule.any {
        code.extend(alternative(all)?);
        if all.is_empty() {
            return Ok(code); // holds always
        }
    }
    let otherwise = match rule.otherwise {
        Action::Default => default,
        action => answer(action, violated),
    };
    code.push(op_return(otherwise));
    Ok(code)
}

/// Where a jump goes, before distances are known.
#[derive(Clone, Copy)]
enum To {
    Next,
    /// Past this test.
    Held,
    /// Past the alternative.
    Failed,
}

/// Returns ALLOW if all tests hold, else falls through.
fn alternative(all: &[Test]) -> Result<Vec<sock_filter>, String> {
    let tests: Vec<_> = all.iter().map(steps).collect();
    let total: usize = tests.iter().map(Vec::len).sum();
    let mut code = Vec::new();
    for steps in &tests {
        let held = code.len() + steps.len();
        for (instruction, yes, no) in steps {
            let mut instruction = instruction.clone();
            let from = code.len() + 1;
            let distance = |to| {
                let target = match to {
                    To::Next => from,
                    To::Held => held,
                    To::Failed => total + 1, // past the return as well
                };
                u8::try_from(target - from).map_err(|_| "too many tests in one alternative")
            };
            (instruction.jt, instruction.jf) = (distance(*yes)?, distance(*no)?);
            code.push(instruction);
        }
    }
    code.push(op_return(ALLOW));
    Ok(code)
}

type Step = (sock_filter, To, To);

fn steps(test: &Test) -> Vec<Step> {
    use To::{Failed, Held, Next};
    let (low_at, high_at) = argument(test.arg);
    let (low, high) = (test.value as u32, (test.value >> 32) as u32);
    let ld = |at| (load(at), Next, Next);
    let eq = |k| jump_equal(k, 0, 0);
    let gt = |k| jump_greater(k, 0, 0);
    let ge = |k| jump_at_least(k, 0, 0);
    let any = |k| jump_any_bit(k, 0, 0);
    // The high words decide unless they are equal.
    let ordered = |jump: sock_filter, yes, no| {
        vec![ld(high_at), (gt(high), yes, Next), (eq(high), Next, no), ld(low_at), (jump, yes, no)]
    };
    match test.op {
        Op::Eq => vec![ld(high_at), (eq(high), Next, Failed), ld(low_at), (eq(low), Held, Failed)],
        Op::Ne => vec![ld(high_at), (eq(high), Next, Held), ld(low_at), (eq(low), Failed, Held)],
        Op::Gt => ordered(gt(low), Held, Failed),
        Op::Ge => ordered(ge(low), Held, Failed),
        Op::Le => ordered(gt(low), Failed, Held),
        Op::Lt => ordered(ge(low), Failed, Held),
        Op::Any => vec![ld(high_at), (any(high), Held, Next), ld(low_at), (any(low), Held, Failed)],
        Op::In => {
            vec![ld(high_at), (any(!high), Failed, Next), ld(low_at), (any(!low), Failed, Held)]
        }
    }
}
