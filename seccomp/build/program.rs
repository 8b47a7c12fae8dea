//! From a policy to a BPF program.
//!
//! seccompiler compiles the allow list. It knows one action for matches, so the
//! calls that are answered with an errno are a short prologue in front of its
//! program: one filter is installed, and none of its parts can go missing.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use crate::policy::{Condition, Policy, Test};

/// What happens to a call that is not in the policy.
#[derive(Clone, Copy)]
pub enum Otherwise {
    /// SIGSYS, whose handler reports the call and ends the process.
    Trap,
    /// The kernel logs it and lets it through.
    Log,
}

// include/uapi/linux/bpf_common.h, filter.h, seccomp.h, audit.h
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_SET: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const NUMBER_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const ARGS_OFFSET: u32 = 16;
/// BPF_MAXINSNS.
const MAX_LEN: usize = 4096;

/// Compiles `policy` for x86_64.
pub fn compile(policy: &Policy, otherwise: Otherwise) -> Result<BpfProgram, String> {
    let mut program = prologue(policy)?;
    program.extend(allow_list(policy, otherwise)?);
    if program.len() > MAX_LEN {
        return Err(format!("{} instructions are more than the kernel takes", program.len()));
    }
    Ok(program)
}

fn prologue(policy: &Policy) -> Result<BpfProgram, String> {
    let mut program = vec![
        // A 32-bit call (int 0x80) is named like any other violation, in both
        // modes: its numbers mean other calls.
        op(LOAD, 0, 0, ARCH_OFFSET),
        op(JUMP_EQUAL, 1, 0, AUDIT_ARCH_X86_64),
        op(RETURN, 0, 0, RET_TRAP),
        op(LOAD, 0, 0, NUMBER_OFFSET),
    ];
    for refusal in &policy.refuse {
        let answer = op(RETURN, 0, 0, RET_ERRNO | refusal.errno);
        let Some(unless) = &refusal.unless else {
            program.push(op(JUMP_EQUAL, 0, 1, refusal.number));
            program.push(answer);
            continue;
        };
        // Number matches: test the argument; if the exception holds, jump behind
        // the answer to where the number is loaded again.
        let tests: Vec<(u16, u32)> = match &unless.test {
            Test::OneOf(values) => values
                .iter()
                .map(|v| u32::try_from(*v).map(|v| (JUMP_EQUAL, v)))
                .collect::<Result<_, _>>()
                .map_err(|e| e.to_string())?,
            // JSET tests for any bit, which for a single bit is all of them.
            Test::Set(bits) if bits.is_power_of_two() => {
                vec![(JUMP_SET, u32::try_from(*bits).map_err(|e| e.to_string())?)]
            }
            _ => return Err("`unless` takes `one_of`, or `set` with one bit".into()),
        };
        let count = u8::try_from(tests.len()).map_err(|e| e.to_string())?;
        let skip = count.checked_add(3).ok_or("too many values in `unless`")?;
        program.push(op(JUMP_EQUAL, 0, skip, refusal.number));
        program.push(op(LOAD, 0, 0, ARGS_OFFSET + 8 * u32::from(unless.arg)));
        for (i, (code, value)) in (0u8..).zip(tests) {
            program.push(op(code, count - i, 0, value));
        }
        program.push(answer);
        program.push(op(LOAD, 0, 0, NUMBER_OFFSET));
    }
    Ok(program)
}

fn op(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn allow_list(policy: &Policy, otherwise: Otherwise) -> Result<BpfProgram, String> {
    let mut rules = BTreeMap::new();
    for (number, alternatives) in &policy.allow {
        let mut chain = Vec::new();
        for conditions in alternatives {
            for product in products(conditions)? {
                chain.push(SeccompRule::new(product).map_err(|e| e.to_string())?);
            }
        }
        rules.insert(*number, chain);
    }
    let otherwise = match otherwise {
        Otherwise::Trap => SeccompAction::Trap,
        Otherwise::Log => SeccompAction::Log,
    };
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(|e| e.to_string())
}

/// seccompiler knows "and" within a rule and "or" between rules: `one_of` becomes
/// one rule per value.
fn products(conditions: &[Condition]) -> Result<Vec<Vec<SeccompCondition>>, String> {
    let mut rules: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
    for condition in conditions {
        // A mask test looks at all 64 bits: the bits above the mask do not matter
        // to it, so it is right for both widths.
        let length = if condition.wide || matches!(condition.test, Test::Set(_) | Test::Clear(_)) {
            SeccompCmpArgLen::Qword
        } else {
            SeccompCmpArgLen::Dword
        };
        let tests = match &condition.test {
            Test::Set(bits) => vec![(SeccompCmpOp::MaskedEq(*bits), *bits)],
            Test::Clear(bits) => vec![(SeccompCmpOp::MaskedEq(*bits), 0)],
            Test::OneOf(values) => values.iter().map(|v| (SeccompCmpOp::Eq, *v)).collect(),
            Test::AtLeast(value) => vec![(SeccompCmpOp::Ge, *value)],
        };
        let mut next = Vec::new();
        for rule in &rules {
            for (op, value) in &tests {
                let mut rule = rule.clone();
                rule.push(
                    SeccompCondition::new(condition.arg, length.clone(), op.clone(), *value)
                        .map_err(|e| e.to_string())?,
                );
                next.push(rule);
            }
        }
        rules = next;
    }
    Ok(rules)
}
